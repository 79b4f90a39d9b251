//! A VMM's process: started with nothing inherited by accident, watched until it is reaped, killed when dropped.
//!
//! Exactly one task waits for the process. A program that also calls `waitpid(-1)` would steal the exit status:
//! the shim runs with containerd-shim's own reaper off (`no_reaper`).

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::unistd::Uid;
use seccompiler::BpfProgram;
use tokio::{io::AsyncRead, process::Child, sync::watch, time::timeout};

use super::{BootError, ControlError, SnapshotError, VmExit};
use crate::{
    child,
    ring::Ring,
    sys::{self, Network},
};

/// Kept of the guest's console: more than a kernel's last words, less than anybody minds per pod.
const CONSOLE_BYTES: usize = 32 << 10;
/// Kept of the VMM's stderr.
const STDERR_BYTES: usize = 8 << 10;
/// How long the pipes of a dead VMM may stay open, should something else hold their other end.
const DRAIN: Duration = Duration::from_secs(1);
/// Between a VMM closing its control socket and its end.
const DYING: Duration = Duration::from_secs(5);
/// Variables that the VMM may need to be found and loaded. Others are nobody's business in there.
const ENVIRONMENT: [&str; 2] = ["PATH", "LD_LIBRARY_PATH"];

/// A process to start.
#[derive(Debug)]
pub struct Launch<'a> {
    /// What to run.
    pub program: &'a Path,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Descriptors it inherits, under the numbers they have here.
    pub fds: Vec<OwnedFd>,
    /// cgroup directories it joins before exec.
    pub cgroups: &'a [PathBuf],
    /// The network namespace it is in; without one, an empty one of its own.
    pub network: Option<&'a Path>,
    /// Judges its system calls.
    pub filter: Option<BpfProgram>,
}

/// What holds a process. Whoever has a clone can have it killed.
#[derive(Debug, Clone)]
pub struct Leash(watch::Sender<()>);

impl Leash {
    /// Holds nothing yet.
    pub fn new() -> Self {
        Self(watch::Sender::new(()))
    }

    /// Has the process killed.
    pub fn pull(&self) {
        self.0.send_replace(());
    }

    /// Changes when it is pulled.
    pub fn watch(&self) -> watch::Receiver<()> {
        self.0.subscribe()
    }
}

/// A process that is watched. Dropping it kills.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    console: Ring,
    exited: watch::Receiver<Option<VmExit>>,
    leash: Leash,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.leash.pull();
    }
}

impl Process {
    /// Starts it. stdout is taken as the guest's console. `by_guest` is asked once the process is gone, and says
    /// whether the guest wanted that: it is told whether the process ended by itself and successfully, and gets a
    /// moment to read the last of what the VMM had to say.
    pub fn start<F>(
        launch: Launch<'_>,
        leash: Leash,
        by_guest: impl FnOnce(bool) -> F + Send + 'static,
    ) -> Result<Self, BootError>
    where
        F: Future<Output = bool> + Send,
    {
        let mut released = leash.watch();
        let mut child = spawn(launch)?;
        let pid = child.id().unwrap_or_default();
        let (console, stderr) = (Ring::new(CONSOLE_BYTES), Ring::new(STDERR_BYTES));
        let (sender, exited) = watch::channel(None);
        let mut readers = {
            let (console, stdout_pipe) = (console.clone(), child.stdout.take());
            let (stderr, stderr_pipe) = (stderr.clone(), child.stderr.take());
            tokio::spawn(async move { tokio::join!(fill(&console, stdout_pipe), fill(&stderr, stderr_pipe)) })
        };
        let last_words = console.clone();
        tokio::spawn(async move {
            let (status, ended_well) = reap(&mut child, &mut released).await;
            if timeout(DRAIN, &mut readers).await.is_err() {
                readers.abort();
            }
            let by_guest = timeout(DRAIN, by_guest(ended_well)).await.unwrap_or(false);
            let exit = VmExit { status, by_guest, stderr: stderr.text(), console: last_words.text() };
            sender.send_replace(Some(exit));
        });
        Ok(Self { pid, console, exited, leash })
    }

    /// Its process id, its own until it is reaped.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What the guest wrote last.
    pub fn console(&self) -> String {
        self.console.text()
    }

    /// Becomes `Some` once the process is reaped and its output read.
    pub fn exited(&self) -> watch::Receiver<Option<VmExit>> {
        self.exited.clone()
    }

    /// Waits for the end.
    pub async fn ended(&self) -> Option<VmExit> {
        self.exited.clone().wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone())
    }

    /// Kills, and waits for the end.
    pub async fn kill(&self) {
        self.leash.pull();
        // One that the kernel does not let go of is no reason to keep everything else.
        if timeout(child::KILLED, self.ended()).await.is_err() {
            log::error!("the VMM (process {}) does not end although it was killed", self.pid());
        }
    }

    /// Why a VMM that was told to start a guest did not. Nothing of it is left after. What it said itself before it
    /// ended is worth more than that its socket closed; `advice` knows what to do about some of that.
    pub async fn gave_up(self, program: &Path, error: ControlError, advice: fn(&str) -> &'static str) -> BootError {
        let program = program.to_owned();
        let died = match error {
            ControlError::Closed { .. } => timeout(DYING, self.ended()).await.ok().flatten(),
            _ => None,
        };
        let Some(exit) = died else {
            self.kill().await;
            return BootError::Control { program, source: error };
        };
        let said = exit.stderr.lines().collect::<Vec<_>>().join("; ");
        BootError::Died { program, status: exit.status, advice: advice(&said), said }
    }
}

impl Process {
    /// Why a machine was not saved. The VMM may still run.
    pub async fn not_saved(&self, error: ControlError) -> SnapshotError {
        let died = match error {
            ControlError::Closed { .. } => timeout(DYING, self.ended()).await.ok().flatten(),
            _ => None,
        };
        match died {
            Some(exit) => {
                SnapshotError::Died { status: exit.status, said: exit.stderr.lines().collect::<Vec<_>>().join("; ") }
            }
            None => SnapshotError::Control(error),
        }
    }
}

fn spawn(launch: Launch<'_>) -> Result<Child, BootError> {
    let Launch { program, args, fds, cgroups, network, filter } = launch;
    let network = match network {
        // Who may not have one has no pods: a test's machine.
        None if !Uid::effective().is_root() => Network::Same,
        None => Network::Own,
        Some(path) => {
            let opened = network_namespace(path);
            Network::Of(opened.map_err(|source| BootError::Network { path: path.into(), source })?)
        }
    };
    let mut command = child::confined(program, cgroups, fds, network, filter).map_err(BootError::Cgroup)?;
    command.args(args).current_dir("/").env_clear();
    for name in ENVIRONMENT {
        command.envs(std::env::var_os(name).map(|value| (name, value)));
    }
    // Dropping the command closes this side's copies of the descriptors that the VMM inherited.
    command.spawn().map_err(|source| BootError::Spawn { program: program.to_owned(), source })
}

/// One that is none would be refused in the child, as if the program were at fault.
fn network_namespace(path: &Path) -> io::Result<OwnedFd> {
    let namespace = OwnedFd::from(File::open(path)?);
    match sys::is_network_namespace(&namespace) {
        true => Ok(namespace),
        false => Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no network namespace")),
    }
}

/// Waits for the child, and kills it first if its leash is pulled. Tells its status, and whether it ended by itself
/// and successfully.
async fn reap(child: &mut Child, released: &mut watch::Receiver<()>) -> (String, bool) {
    let (status, killed) = tokio::select! {
        status = child.wait() => (status, false),
        _ = released.changed() => {
            // An error means that it is dead already.
            let _ = child.start_kill();
            (child.wait().await, true)
        }
    };
    match status {
        Ok(status) => (status.to_string(), status.success() && !killed),
        Err(error) => (format!("unknown: {error}"), false),
    }
}

async fn fill(ring: &Ring, pipe: Option<impl AsyncRead + Unpin>) {
    if let Some(pipe) = pipe {
        ring.fill_from(pipe).await;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read};

    use super::*;
    use crate::vmm::testing::is_gone;

    /// bash, since a plain sh knows descriptors of one digit only.
    fn shell<'a>(script: &str, fds: Vec<OwnedFd>, cgroups: &'a [PathBuf]) -> Launch<'a> {
        let args = vec!["-c".into(), script.into()];
        Launch { program: Path::new("/bin/bash"), args, fds, cgroups, network: None, filter: None }
    }

    #[tokio::test]
    async fn output_and_status_of_a_process_that_ends() {
        let process =
            Process::start(shell("echo out; echo err >&2; exit 3", vec![], &[]), Leash::new(), |_| async { true })
                .unwrap();
        let exit = process.ended().await.unwrap();
        assert_eq!((exit.console.as_str(), exit.stderr.as_str()), ("out", "err"));
        assert_eq!((exit.status.as_str(), exit.by_guest), ("exit status: 3", true));
    }

    #[tokio::test]
    async fn whether_it_ended_well_by_itself_is_told() {
        let ended = |script| async move {
            let process = Process::start(shell(script, vec![], &[]), Leash::new(), |well| async move { well }).unwrap();
            process.ended().await.unwrap().by_guest
        };
        assert_eq!((ended("exit 0").await, ended("exit 1").await), (true, false));
        let leash = Leash::new();
        let process =
            Process::start(shell("exec sleep 1000", vec![], &[]), leash.clone(), |well| async move { well }).unwrap();
        leash.pull();
        assert!(!process.ended().await.unwrap().by_guest);
    }

    #[tokio::test]
    async fn dropping_kills_and_reaps() {
        let process = Process::start(shell("exec sleep 1000", vec![], &[]), Leash::new(), |_| async { false }).unwrap();
        let (pid, mut exited) = (process.pid(), process.exited());
        drop(process);
        let exit = exited.wait_for(Option::is_some).await.unwrap().clone().unwrap();
        assert_eq!(exit.status, "signal: 9 (SIGKILL)");
        assert!(is_gone(pid));
    }

    #[tokio::test]
    async fn a_grandchild_that_holds_the_pipes_does_not_delay_the_end_for_long() {
        let process =
            Process::start(shell("sleep 5 & exit 0", vec![], &[]), Leash::new(), |_| async { false }).unwrap();
        timeout(Duration::from_secs(4), process.ended()).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_descriptor_and_only_harmless_variables_are_handed_over() {
        let (mut reader, writer) = io::pipe().unwrap();
        let writer = OwnedFd::from(writer);
        let script = format!("env | cut -d= -f1 >&{}", child::fd_number(&writer));
        let process = Process::start(shell(&script, vec![writer], &[]), Leash::new(), |_| async { false }).unwrap();
        process.ended().await.unwrap();
        let mut told = String::new();
        reader.read_to_string(&mut told).unwrap();
        let by_bash = ["PWD", "OLDPWD", "SHLVL", "_"];
        assert!(told.contains("PATH"), "{told}");
        assert!(told.lines().all(|name| ENVIRONMENT.contains(&name) || by_bash.contains(&name)), "{told}");
    }

    #[tokio::test]
    async fn a_missing_program_and_a_missing_cgroup_are_told_apart() {
        let program = Path::new("/nonexistent/vmm");
        let launch = Launch { program, args: vec![], fds: vec![], cgroups: &[], network: None, filter: None };
        let error = Process::start(launch, Leash::new(), |_| async { false }).unwrap_err();
        assert!(matches!(error, BootError::Spawn { .. }), "{error}");
        let cgroups = [PathBuf::from("/nonexistent/cgroup")];
        let error = Process::start(shell("true", vec![], &cgroups), Leash::new(), |_| async { false }).unwrap_err();
        assert!(matches!(error, BootError::Cgroup(_)), "{error}");
    }
}
