//! Start, exit, kill and delete of processes.

use std::{sync::Arc, time::Duration};

use containerd_shim_protos::{
    api::ExecProcessRequest,
    events::task::{TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskStart},
    protobuf::well_known_types::any::Any,
};
use nix::sys::signal::Signal;
use tokio::time::{sleep, timeout};
use ttrpc::Code;

use super::{
    Container, Events, Exit, Life, Process, Service, TaskError,
    stdio::{self, Local, Paths},
};
use crate::{
    agent::AgentError,
    sandbox::{Sandbox, settled},
    sys,
};

const SIGKILL: u32 = 9;
/// Exit status of what never ran, and of what was killed.
const NOT_STARTED: u32 = 127;
const KILLED: u32 = 128 + SIGKILL;
/// How long after a broken channel the machine's end may take to show.
const GRACE: Duration = Duration::from_secs(2);
/// Between two events of that kind.
const OOM_PAUSE: Duration = Duration::from_secs(1);
/// How long the end of a container waits for those of its execs, which the guest's kernel kills with it.
const EXECS: Duration = Duration::from_secs(5);

fn what(process: &Process) -> (&'static str, String) {
    if process.exec.is_empty() { ("container", process.container.clone()) } else { ("exec", process.exec.clone()) }
}

impl Service {
    pub(super) async fn start_process(&self, process: &Arc<Process>) -> Result<u32, TaskError> {
        let _turn = process.turn.lock().await;
        let (what, id) = what(process);
        let not_created = |state| TaskError::State { what, id: id.clone(), state };
        match process.life() {
            Life::Created => {}
            Life::Running => return Err(not_created("is running already")),
            Life::Stopped(_) => return Err(not_created("has ended already")),
        }
        if process.pauses() {
            return Ok(self.start_pause(process).await);
        }
        let sandbox = self.machine().await?;
        let local = process.take_local().await.ok_or_else(|| not_created("is being started already"))?;
        // Before the start, so that not even a process that ends at once has its output without a reader.
        if let Err(e) = process.relays.start(sandbox.agent(), local, &process.streams).await {
            process.stopped(Exit::now(NOT_STARTED));
            process.relays.finish(Duration::ZERO).await;
            return Err(e.into());
        }
        let pid = match sandbox.agent().start(&process.container, &process.exec).await {
            Ok(pid) => pid,
            Err(e) => {
                process.stopped(Exit::now(NOT_STARTED));
                process.relays.finish(Duration::ZERO).await;
                return Err(explain(&sandbox, e).await);
            }
        };
        if !process.running(pid) {
            process.relays.finish(Duration::ZERO).await;
            return Err(TaskError::Gone("it ended during the start".into()));
        }
        self.tell_started(process).await;
        let container = if process.exec.is_empty() { self.container(&process.container).await.ok() } else { None };
        if container.is_some() {
            sys::trim_heap();
            sys::unmap_code();
            self.watchers.add(watch_oom(Arc::clone(&self.events), Arc::clone(process), Arc::clone(&sandbox)));
        }
        self.watchers.add(watch(Arc::clone(&self.events), Arc::clone(process), container, sandbox));
        Ok(process.pid())
    }

    /// From its creation on, a process has somebody who notices its end.
    pub(super) fn watch_created(&self, process: &Arc<Process>, sandbox: &Arc<Sandbox>) {
        self.watchers.add(watch_created(Arc::clone(&self.events), Arc::clone(process), Arc::clone(sandbox)));
    }

    async fn tell_started(&self, process: &Process) {
        if process.exec.is_empty() {
            let mut event = TaskStart::new();
            event.container_id = process.container.clone();
            event.pid = process.pid();
            self.events.publish(event).await;
        } else {
            let mut event = TaskExecStarted::new();
            event.container_id = process.container.clone();
            event.exec_id = process.exec.clone();
            event.pid = process.pid();
            self.events.publish(event).await;
        }
    }

    pub(super) async fn add_exec(&self, request: ExecProcessRequest) -> Result<(), TaskError> {
        let container = self.container(&request.id).await?;
        if container.init.life() != Life::Running {
            let state = "is not running: nothing can be executed in it";
            return Err(TaskError::State { what: "container", id: request.id, state });
        }
        if container.init.pauses() {
            let state = "is the pod's sandbox, in which there is nothing to execute";
            return Err(TaskError::State { what: "container", id: request.id, state });
        }
        let mut execs = container.execs.lock().await;
        if execs.contains_key(&request.exec_id) {
            return Err(TaskError::Exists { what: "exec", id: request.exec_id });
        }
        let json = process_json(request.spec.as_ref(), request.terminal)?;
        let paths =
            Paths { stdin: request.stdin, stdout: request.stdout, stderr: request.stderr, terminal: request.terminal };
        let local = Local::open(&paths).await?;
        let sandbox = self.machine().await?;
        let created = sandbox.agent().create_exec(&request.id, &request.exec_id, json, paths.wanted()).await;
        let streams = match created {
            Ok(streams) => streams,
            Err(e) => {
                if sandbox.may_yet_do(&e) {
                    forget(&sandbox, &request.id, &request.exec_id).await;
                }
                return Err(explain(&sandbox, e).await);
            }
        };
        let process = Arc::new(Process::new(&request.id, &request.exec_id, paths, streams, local, 0));
        self.watch_created(&process, &sandbox);
        execs.insert(request.exec_id.clone(), process);
        let mut event = TaskExecAdded::new();
        event.container_id = request.id;
        event.exec_id = request.exec_id;
        self.events.publish(event).await;
        Ok(())
    }

    pub(super) async fn kill_process(&self, process: &Arc<Process>, signal: u32, all: bool) -> Result<(), TaskError> {
        let turn = process.turn.lock().await;
        match process.life() {
            Life::Stopped(_) => return Err(TaskError::Finished),
            Life::Created if !process.exec.is_empty() => {
                // As in containerd's runc shim: only what has been started can be signalled, and has an end to tell.
                let (what, id) = what(process);
                return Err(TaskError::State { what, id, state: "has not been started" });
            }
            Life::Created => {
                // Nothing runs yet that could handle the signal, so it does what it does by default.
                let exit = Exit::now(128 + signal);
                if ends_by_default(signal) && process.stopped(exit.clone()) {
                    process.close().await;
                    tell_exit(&self.events, process, &exit).await;
                }
                return Ok(());
            }
            Life::Running => drop(turn),
        }
        if process.pauses() {
            self.kill_pause(process, signal).await;
            return Ok(());
        }
        let sandbox = self.machine().await?;
        match sandbox.agent().signal(&process.container, &process.exec, signal, all).await {
            Ok(()) => Ok(()),
            Err(e) if e.is_not_found() => Err(TaskError::Finished),
            Err(AgentError::Lost { .. }) if signal == SIGKILL => {
                // A guest that no longer answers still has to die when told to.
                log::warn!("the agent does not answer: killing the VM");
                sandbox.kill().await;
                Ok(())
            }
            Err(e) => Err(explain(&sandbox, e).await),
        }
    }

    /// Forgets an exec.
    pub(super) async fn delete_exec(&self, container: &Container, exec: &str) -> Result<Arc<Process>, TaskError> {
        let process = self.process(&container.id, exec).await?;
        let turn = process.turn.lock().await;
        if process.life() == Life::Running {
            return Err(TaskError::State { what: "exec", id: exec.into(), state: "is still running" });
        }
        let execs = container.execs.lock().await;
        if !execs.get(exec).is_some_and(|present| Arc::ptr_eq(present, &process)) {
            return Err(TaskError::NotFound { what: "exec", id: exec.into() });
        }
        drop(execs);
        // A created one never began, so its end is no event.
        process.stopped(Exit::now(0));
        process.close().await;
        if let Ok(sandbox) = self.machine().await
            && sandbox.gone().borrow().is_none()
        {
            forget(&sandbox, &container.id, exec).await;
        }
        container.execs.lock().await.remove(exec);
        drop(turn);
        Ok(process)
    }

    /// Forgets a container; the machine ends with the last one that runs something.
    pub(super) async fn delete_container(&self, container: &Container) -> Result<(), TaskError> {
        let _turn = container.init.turn.lock().await;
        if container.init.life() == Life::Running {
            return Err(TaskError::State { what: "container", id: container.id.clone(), state: "is still running" });
        }
        let present = self.containers.lock().await.get(&container.id).cloned();
        if !present.is_some_and(|present| std::ptr::eq(&raw const *present, container)) {
            // Another call was quicker; what goes by the name now is another container.
            return Err(TaskError::NotFound { what: "container", id: container.id.clone() });
        }
        let exit = Exit::now(KILLED);
        if container.init.stopped(exit.clone()) {
            // Created and never started: what waits in the guest ends with the container.
            tell_exit(&self.events, &container.init, &exit).await;
        }
        container.init.close().await;
        for exec in container.execs.lock().await.values() {
            exec.close().await;
        }
        let mut slot = self.sandbox.lock().await;
        let mut containers = self.containers.lock().await;
        containers.remove(&container.id);
        // A sandbox that waits for a container's successor needs no machine for that.
        let last = containers.values().all(|other| other.init.pauses());
        if containers.is_empty() {
            *self.pod.lock().await = None;
        }
        // What asks for containers is not to wait for the agent.
        drop(containers);
        if last {
            if let Some(sandbox) = slot.take() {
                sandbox.stop().await;
            }
        } else if let Some(sandbox) = slot.as_ref().filter(|_| !container.init.pauses()) {
            sandbox.remove(&container.id).await;
        }
        Ok(())
    }
}

/// Has the agent forget an exec, also one that runs although its start seemed to fail: the answer came too late.
async fn forget(sandbox: &Sandbox, container: &str, exec: &str) {
    let agent = sandbox.agent();
    for pause in [10, 100, 1000] {
        match agent.delete_process(container, exec).await {
            Err(AgentError::Refused { code: Code::FAILED_PRECONDITION, .. }) => {
                log::warn!("exec {exec:?} runs though it did not start in time: killing it");
                let _ = agent.signal(container, exec, SIGKILL, false).await;
                sleep(Duration::from_millis(pause)).await;
            }
            Err(e) if !e.is_not_found() => return log::warn!("exec {exec:?}: {e}"),
            _ => return,
        }
    }
}

/// Whether a signal ends a process that does nothing about it, signal(7).
pub(super) fn ends_by_default(signal: u32) -> bool {
    use Signal::{SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH};
    const OTHERS: [Signal; 8] = [SIGCHLD, SIGCONT, SIGSTOP, SIGTSTP, SIGTTIN, SIGTTOU, SIGURG, SIGWINCH];
    signal != 0 && OTHERS.iter().all(|other| *other as u32 != signal)
}

/// Ends a process whose machine goes before it was started.
async fn watch_created(events: Arc<Events>, process: Arc<Process>, sandbox: Arc<Sandbox>) {
    let mut gone = sandbox.gone();
    tokio::select! {
        () = process.left_created() => {}
        why = settled(&mut gone) => {
            let exit = Exit::now(KILLED);
            // An exec that was not started never began, so its end is no event.
            if process.stopped(exit.clone()) && process.exec.is_empty() {
                let why = why.unwrap_or_default();
                log::error!("container {}: the pod's VM is gone before the start: {why}", process.container);
                tell_exit(&events, &process, &exit).await;
            }
        }
    }
}

/// Tells of processes of the container that the guest's OOM killer ends, for as long as its own lives.
async fn watch_oom(events: Arc<Events>, process: Arc<Process>, sandbox: Arc<Sandbox>) {
    let mut gone = sandbox.gone();
    loop {
        let kills = tokio::select! {
            kills = sandbox.agent().wait_oom(&process.container, process.oom_told()) => kills,
            _ = settled(&mut gone) => return,
        };
        if !kills.is_ok_and(|kills| process.owes_oom(kills)) {
            return;
        }
        tell_oom(&events, &process).await;
        // However many there are, and whatever the guest says.
        sleep(OOM_PAUSE).await;
    }
}

async fn tell_oom(events: &Events, process: &Process) {
    let mut event = TaskOOM::new();
    event.container_id = process.container.clone();
    events.publish(event).await;
}

/// Waits for a process's end and tells it, once, whatever ends first: the process or its machine. That of a container's
/// own is told after those of its execs, as containerd's runc shim does: what hears of it forgets the container.
async fn watch(events: Arc<Events>, process: Arc<Process>, container: Option<Arc<Container>>, sandbox: Arc<Sandbox>) {
    let mut gone = sandbox.gone();
    let exit = tokio::select! {
        answer = sandbox.agent().wait(&process.container, &process.exec) => match answer {
            Ok(end) => {
                if process.exec.is_empty() && process.owes_oom(end.oom_kills) {
                    tell_oom(&events, &process).await;
                }
                Some(Exit::at_ns(end.exit_status, end.exited_at_ns))
            }
            Err(e) => {
                log::warn!("{} {:?}: {e}", process.container, process.exec);
                None
            }
        },
        _ = settled(&mut gone) => None,
    };
    let exit = match exit {
        Some(exit) => exit,
        None => {
            let why = match timeout(GRACE, settled(&mut gone)).await {
                Ok(why) => why,
                Err(_) => {
                    // An agent without a session is of no use to anybody.
                    sandbox.kill().await;
                    None
                }
            };
            let why = why.unwrap_or_else(|| "the agent was lost".into());
            log::error!("container {}: the pod's VM is gone: {why}", process.container);
            stdio::report(&process.paths, &format!("the pod's VM is gone: {why}")).await;
            Exit::now(KILLED)
        }
    };
    // Here at the latest, since a client that waits for the end of the output waits with its deletion, too.
    process.relays.let_go();
    if let Some(container) = container
        && timeout(EXECS, container.execs_settled()).await.is_err()
    {
        log::warn!("container {}: ends before its execs", container.id);
    }
    if process.stopped(exit.clone()) {
        tell_exit(&events, &process, &exit).await;
    }
    process.told();
    process.relays.close_stdin();
}

pub(super) async fn tell_exit(events: &Events, process: &Process, exit: &Exit) {
    let mut event = TaskExit::new();
    event.container_id = process.container.clone();
    event.id = if process.exec.is_empty() { process.container.clone() } else { process.exec.clone() };
    event.pid = process.pid();
    event.exit_status = exit.status;
    event.exited_at = Some(exit.at.clone()).into();
    events.publish(event).await;
}

/// A machine that is gone explains an agent that was lost.
async fn explain(sandbox: &Sandbox, error: AgentError) -> TaskError {
    match sandbox.why_lost(&error).await {
        Some(why) => TaskError::Gone(why),
        None if error.is_unknown() => TaskError::NoAnswer(error),
        None => TaskError::Agent(error),
    }
}

/// The OCI process of an exec; the request's terminal flag is the one that counts.
fn process_json(spec: Option<&Any>, terminal: bool) -> Result<Vec<u8>, TaskError> {
    let bytes = spec.map_or(&[][..], |s| &s.value);
    let mut process: oci_spec::runtime::Process = serde_json::from_slice(bytes).map_err(TaskError::Process)?;
    process.set_terminal(Some(terminal));
    serde_json::to_vec(&process).map_err(TaskError::Process)
}
