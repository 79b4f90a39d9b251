//! What containerd is told, in its own shim's order.

use std::{
    io::{BufRead, BufReader, Read},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use chsnap_tests::{Env, Started, patience};
use containerd_shim_protos::{
    api::{DeleteRequest, ExecProcessRequest, KillRequest},
    protobuf::well_known_types::any::Any,
    ttrpc::{self, context::with_duration},
};
use serde_json::Value;

crate::cases! {
    Everywhere: in_order, killed;
    Likewise: execs_end_first, execs_that_never_ran;
    Vms: out_of_memory, child_out_of_memory;
}

/// A task event.
#[derive(Debug)]
pub struct Event {
    pub topic: String,
    pub content: Value,
}

/// Follows `ctr events` until `last` of them of this container have come, and a little longer.
pub fn follow<'a>(env: &'a Env, id: &str) -> Result<impl FnMut(&str) -> Result<Vec<Event>> + 'a> {
    let mut running = env.ctr().run(["events"]).limit(Duration::from_secs(120)).start()?;
    let stdout = running.child.stdout.take().context("no stdout")?;
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if tell.send(line).is_err() {
                return;
            }
        }
    });
    // The subscription takes a moment, and nothing says when it is there.
    thread::sleep(Duration::from_millis(500));
    let id = id.to_owned();
    Ok(move |last: &str| {
        let _keep = &running;
        let mut seen = Vec::new();
        let mut until = Instant::now() + Duration::from_secs(60) * patience();
        let mut done = false;
        while let Ok(line) = told.recv_timeout(until.saturating_duration_since(Instant::now())) {
            let Some((head, json)) = line.split_once('{') else { continue };
            let Some(topic) = head.split(' ').find(|w| w.starts_with("/tasks/")) else { continue };
            let content: Value = serde_json::from_str(&format!("{{{json}")).with_context(|| line.clone())?;
            if content["container_id"] != id.as_str() {
                continue;
            }
            done |= topic == last;
            seen.push(Event { topic: topic.into(), content });
            if done {
                // One that comes twice comes soon.
                until = Instant::now() + Duration::from_millis(700);
            }
        }
        if !done {
            bail!("{last} did not come, but: {seen:?}");
        }
        Ok(seen)
    })
}

fn topics(events: &[Event]) -> Vec<&str> {
    events.iter().map(|e| e.topic.as_str()).collect()
}

fn in_order(env: &Env) -> Result<()> {
    let container = env.container().sh("read line < /tmp/go; exit 5");
    let id = container.id.clone();
    let mut events = follow(env, &id)?;
    let container = container.sh("mkfifo /tmp/go; echo up; read line < /tmp/go; exit 5").start()?;
    container.wait_log("up")?;
    container.exec_with(&["--exec-id", "look"], ["sh", "-c", "exit 3"]).output()?.code(3)?;
    // It may be caught up in the end that it brings about.
    let trigger = container.exec(["sh", "-c", "echo > /tmp/go"]).output()?;
    ensure!([0, 137].contains(&trigger.code), "{}", trigger.whole());
    env.ctr().wait_status(&id, "STOPPED")?;
    container.remove()?;
    let events = events("/tasks/delete")?;
    let expected = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/exec-added",
        "/tasks/exec-started",
    ];
    let seen = topics(&events);
    ensure!(seen[..expected.len().min(seen.len())] == expected, "{seen:?}");
    ensure!(seen.len() == 10 && seen[7..] == ["/tasks/exit", "/tasks/exit", "/tasks/delete"], "{seen:?}");
    let (create, start, exec, delete) =
        (&events[0].content, &events[1].content, &events[4].content, &events[9].content);
    ensure!(create["pid"].as_u64().is_some_and(|p| p > 0) && create["pid"] == start["pid"], "{events:?}");
    ensure!(create["bundle"].as_str().is_some_and(|b| b.ends_with(&id)), "{create}");
    ensure!(exec["id"] == "look" && exec["exit_status"] == 3, "{exec}");
    let main: Vec<_> = events.iter().filter(|e| e.topic == "/tasks/exit" && e.content["id"] == id.as_str()).collect();
    ensure!(main.len() == 1 && main[0].content["exit_status"] == 5, "{main:?}");
    ensure!(main[0].content["pid"] == create["pid"], "{main:?}");
    ensure!(!env.is_vm() || events[8].content["id"] == id.as_str(), "the exec's end came last: {events:?}");
    ensure!(delete["exit_status"] == 5 && delete["pid"] == create["pid"], "{delete}");
    Ok(())
}

fn killed(env: &Env) -> Result<()> {
    let container = env.container().sh("sleep 1000");
    let id = container.id.clone();
    let mut events = follow(env, &id)?;
    let started: Started = container.start()?;
    started.kill("SIGKILL")?.success()?;
    env.ctr().wait_status(&id, "STOPPED")?;
    started.remove()?;
    let events = events("/tasks/delete")?;
    ensure!(topics(&events) == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"], "{events:?}");
    ensure!(events[2].content["exit_status"] == 137 && events[3].content["exit_status"] == 137, "{events:?}");
    Ok(())
}

/// The guest's own OOM killer is told like the host's.
fn out_of_memory(env: &Env) -> Result<()> {
    let limit = (48 << 20).to_string();
    let container = env.container().flags(["--memory-limit", &limit]);
    let id = container.id.clone();
    let mut events = follow(env, &id)?;
    // Looks for the last lines of an endless one. Little else is in memory that could be given up first.
    let container = container.sh("echo up; exec tail /dev/zero").start()?;
    env.ctr().wait_status(&id, "STOPPED")?;
    ensure!(container.log() == "up\n", "{}", container.log());
    container.remove()?;
    let events = events("/tasks/delete")?;
    let expected = ["/tasks/create", "/tasks/start", "/tasks/oom", "/tasks/exit", "/tasks/delete"];
    ensure!(topics(&events) == expected, "{events:?}");
    ensure!(events[3].content["exit_status"] == 137, "{events:?}");
    Ok(())
}

/// The end of another than the container's own is told when it comes.
fn child_out_of_memory(env: &Env) -> Result<()> {
    let limit = (48 << 20).to_string();
    let container = env.container().flags(["--memory-limit", &limit]);
    let id = container.id.clone();
    let mut events = follow(env, &id)?;
    let container = container.sh("tail /dev/zero; echo status $?; sleep 1000").start()?;
    container.wait_log("status 137")?;
    let before = events("/tasks/oom")?;
    ensure!(topics(&before) == ["/tasks/create", "/tasks/start", "/tasks/oom"], "{before:?}");
    let metrics = env.ctr().metrics(&id)?;
    for event in ["max", "oom", "oom_kill"] {
        ensure!(metrics["memory_events"][event].as_u64() > Some(0), "{event}: {metrics}");
    }
    container.kill("SIGKILL")?.success()?;
    env.ctr().wait_status(&id, "STOPPED")?;
    container.remove()?;
    let after = events("/tasks/delete")?;
    ensure!(topics(&after) == ["/tasks/exit", "/tasks/delete"], "told twice: {after:?}");
    Ok(())
}

/// The end of a container's own process ends its execs, and is told last.
fn execs_end_first(env: &Env) -> Result<()> {
    let container = env.container().sh("sleep 1000");
    let id = container.id.clone();
    let mut events = follow(env, &id)?;
    let started = container.start()?;
    let names = ["one", "two", "three", "four"];
    let mut execs = Vec::new();
    for name in names {
        let mut exec = started.exec_with(&["--exec-id", name], ["sh", "-c", "echo up; exec sleep 1000"]).start()?;
        exec.child.stdout.take().context("no stdout")?.read_exact(&mut [0; 3])?;
        execs.push(exec);
    }
    started.kill("SIGKILL")?.success()?;
    for exec in execs {
        exec.output()?.code(137)?;
    }
    env.ctr().wait_status(&id, "STOPPED")?;
    started.remove()?;
    // By now all have come.
    let events = events("/tasks/exit")?;
    let exits: Vec<&Value> = events.iter().filter(|e| e.topic == "/tasks/exit").map(|e| &e.content).collect();
    ensure!(exits.len() == 5 && exits.iter().all(|e| e["exit_status"] == 137), "{exits:?}");
    ensure!(exits[4]["id"] == id.as_str(), "the container's end was not told last: {exits:?}");
    ensure!(names.iter().all(|name| exits.iter().any(|e| e["id"] == *name)), "{exits:?}");
    Ok(())
}

/// An exec that was only created has no end that could be told, whether it is deleted or goes with its container.
fn execs_that_never_ran(env: &Env) -> Result<()> {
    let container = env.container().sh("echo up; sleep 1000");
    let mut events = follow(env, &container.id)?;
    let started = container.start()?;
    started.wait_log("up")?;
    let shim = started.shim()?;
    let soon = || with_duration(Duration::from_secs(20) * patience());
    for exec in ["deleted", "left"] {
        let mut spec = Any::new();
        spec.value = br#"{"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}}"#.to_vec();
        let (id, exec_id) = (started.id.clone(), exec.into());
        shim.exec(soon(), &ExecProcessRequest { id, exec_id, spec: Some(spec).into(), ..Default::default() })?;
    }
    let (id, exec_id) = (started.id.clone(), "left".to_owned());
    let refused = shim.kill(soon(), &KillRequest { id, exec_id, signal: 9, ..Default::default() });
    let Err(ttrpc::Error::RpcStatus(status)) = refused else { bail!("{refused:?}") };
    ensure!(status.code() == ttrpc::Code::FAILED_PRECONDITION, "{status:?}");
    let (id, exec_id) = (started.id.clone(), "deleted".to_owned());
    let deleted = shim.delete(soon(), &DeleteRequest { id, exec_id, ..Default::default() })?;
    ensure!((deleted.exit_status, deleted.pid) == (0, 0), "{deleted:?}");
    started.remove()?;
    let events = events("/tasks/delete")?;
    let of_execs: Vec<&Event> =
        events.iter().filter(|e| ["deleted", "left"].iter().any(|exec| e.content["id"] == *exec)).collect();
    ensure!(of_execs.is_empty(), "{of_execs:?}");
    ensure!(topics(&events).iter().filter(|t| **t == "/tasks/exit").count() == 1, "{events:?}");
    Ok(())
}
