//! Containers and processes from their creation to their end, on the real agent.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Agent, Spec, refusal};
use tokio::time::{sleep, timeout};
use ttrpc::Code;

#[tokio::test]
async fn a_program_runs_and_its_output_arrives() {
    need_root!();
    let agent = Agent::start().await;
    let spec = Spec::new(&agent.root(), &["echo", "hello", "guest"]);
    assert_eq!(agent.output("c", &spec).await, (0, "hello guest\n".into(), String::new()));
}

#[tokio::test]
async fn exit_codes_and_signals_are_reported() {
    need_root!();
    let agent = Agent::start().await;
    for (script, status) in [("exit 0", 0), ("exit 7", 7), ("exit 255", 255)] {
        assert_eq!(agent.output("c", &agent.shell(script)).await.0, status);
    }
    let streams = agent.run("c", &agent.shell("echo up; sleep 100")).await;
    agent.read_until(streams.stdout_stream, "up").await;
    agent.signal("c", "", 9, false).await.unwrap();
    assert_eq!(agent.wait("c", "").await, 137);
    // Again, and by several at once.
    let (a, b) = tokio::join!(agent.wait("c", ""), agent.wait("c", ""));
    assert_eq!((a, b), (137, 137));
    assert_eq!(refusal(agent.signal("c", "", 9, false).await).0, Code::NOT_FOUND);
    agent.delete("c").await.unwrap();
    assert_eq!(refusal(agent.delete("c").await).0, Code::NOT_FOUND);
    // Not the container's own process, which is its pid 1 and hears of no signal that it does not handle.
    agent.run("c", &agent.shell("sleep 100")).await;
    for (signal, status) in [(11, 139), (35, 163), (64, 192)] {
        let exec = signal.to_string();
        agent.exec("c", &exec, &agent.shell(&format!("kill -{signal} $$"))).await.unwrap();
        agent.start_process("c", &exec).await.unwrap();
        assert_eq!(agent.wait("c", &exec).await, status);
    }
    agent.delete("c").await.unwrap();
}

#[tokio::test]
async fn a_program_that_cannot_run_says_why() {
    need_root!();
    let agent = Agent::start().await;
    for (name, code, text) in [
        ("/bin/nope", Code::NOT_FOUND, "exec \"/bin/nope\": No such file or directory (os error 2)"),
        ("nope", Code::NOT_FOUND, "exec \"nope\": No such file or directory (os error 2)"),
        ("/bin/plain", Code::PERMISSION_DENIED, "exec \"/bin/plain\": Permission denied (os error 13)"),
        ("/etc", Code::PERMISSION_DENIED, "exec \"/etc\": Permission denied (os error 13)"),
    ] {
        // Before anybody waits for it; and nothing of it is there.
        assert_eq!(refusal(agent.create("c", &Spec::new(&agent.root(), &[name])).await), (code, text.into()));
        assert_eq!(refusal(agent.delete("c").await).0, Code::NOT_FOUND);
    }
}

#[tokio::test]
async fn info_tells_what_runs() {
    need_root!();
    let agent = Agent::start().await;
    let info = agent.info().await;
    assert_eq!(info.agent_version, env!("CARGO_PKG_VERSION"));
    assert!(!info.kernel_release.is_empty());
    assert!(info.agent_ready_ns > 0 && info.wall_clock_ns > 0);
    let request = chsnap_protocol::agent::InfoRequest { protocol_version: 99, ..Default::default() };
    let (code, text) = refusal(agent.client.info(common::soon(), &request).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert!(text.contains("99"), "{text}");
}

#[tokio::test]
async fn a_created_container_waits_and_can_be_killed() {
    need_root!();
    let agent = Agent::start().await;
    agent.create("c", &agent.shell("echo ran >/ran")).await.unwrap();
    assert_eq!(agent.pids("c").await.len(), 1);
    assert_eq!(refusal(agent.create("c", &agent.shell("true")).await).0, Code::ALREADY_EXISTS);
    assert!(timeout(Duration::from_millis(200), agent.wait("c", "")).await.is_err());
    agent.signal("c", "", 9, false).await.unwrap();
    assert_eq!(agent.wait("c", "").await, 137);
    assert_eq!(refusal(agent.start_process("c", "").await).1, "the process ended while it was set up");
    agent.delete("c").await.unwrap();
    // Deleted without ever having been started.
    agent.create("c", &agent.shell("true")).await.unwrap();
    agent.delete("c").await.unwrap();
    assert!(!agent.root().join("ran").exists());
}

/// The agent as the guest gets it, with a container that does nothing.
#[tokio::test]
async fn idle_it_takes_little_memory() {
    need_root!();
    let program = common::target().join(format!("{}-unknown-linux-gnu/agent/chsnap-agent", std::env::consts::ARCH));
    if !program.is_file() {
        return chsnap_test_skip::skip_without_setup(format!("no {}: run `make build`", program.display()));
    }
    let agent = Agent::start_program(&program).await;
    let main = agent.run("c", &agent.shell("echo up; exec sleep 100")).await;
    agent.read_until(main.stdout_stream, "up").await;
    eprintln!("{} kB resident", agent.resident());
    assert!(agent.resident() <= 3 << 10, "{} kB resident", agent.resident());
}

#[tokio::test]
async fn execs_join_the_container() {
    need_root!();
    let agent = Agent::start().await;
    let main = agent.run("c", &agent.shell("echo up; sleep 100")).await;
    agent.read_until(main.stdout_stream, "up").await;
    let spec = agent.shell("hostname; cat /proc/self/cgroup; id -u; pwd; cat");
    let spec = spec.set("/process/user", serde_json::json!({ "uid": 33, "gid": 33 }));
    let spec = spec.set("/process/cwd", serde_json::json!("/tmp"));
    // A process that is not root may not look at the namespaces of one that is.
    let root =
        agent.shell("for n in pid mnt uts ipc cgroup; do readlink /proc/1/ns/$n; readlink /proc/self/ns/$n; done");
    let streams = agent.exec("c", "e", &spec).await.unwrap();
    assert_eq!(refusal(agent.signal("c", "e", 9, false).await).0, Code::FAILED_PRECONDITION);
    let pid = agent.start_process("c", "e").await.unwrap();
    assert_eq!(refusal(agent.start_process("c", "e").await).0, Code::FAILED_PRECONDITION);
    agent.close_write(streams.stdin_stream).await.unwrap();
    let out = agent.text(streams.stdout_stream).await;
    assert!(out.starts_with("box\n") && out.contains("0::/\n33\n/tmp\n"), "{out}");
    assert_eq!(agent.wait("c", "e").await, 0);
    assert!(!agent.pids("c").await.contains(&pid));

    let streams = agent.exec("c", "r", &root).await.unwrap();
    agent.start_process("c", "r").await.unwrap();
    let out = agent.text(streams.stdout_stream).await;
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines.len(), 10, "{out}");
    assert!(lines.chunks(2).all(|pair| pair[0] == pair[1]), "{out}");

    // Its output ends a moment before it does.
    assert_eq!(agent.wait("c", "r").await, 0);
    let (code, text) = refusal(agent.exec("c", "r", &root).await);
    assert_eq!((code, text.as_str()), (Code::ALREADY_EXISTS, "\"r\" exists already"));
    agent.client.delete_process(common::soon(), &common::process("c", "r")).await.unwrap();
    assert_eq!(
        refusal(agent.client.delete_process(common::soon(), &common::process("c", "r")).await).0,
        Code::NOT_FOUND
    );
    assert_eq!(
        refusal(agent.client.delete_process(common::soon(), &common::process("c", "")).await).0,
        Code::FAILED_PRECONDITION
    );

    let nope = Spec::new(&agent.root(), &["nope"]);
    agent.exec("c", "n", &nope).await.unwrap();
    assert_eq!(refusal(agent.start_process("c", "n").await).0, Code::NOT_FOUND);
    // It says why before it ends.
    agent.wait("c", "n").await;
    agent.client.delete_process(common::soon(), &common::process("c", "n")).await.unwrap();
}

#[tokio::test]
async fn the_end_of_the_first_process_ends_all() {
    need_root!();
    let agent = Agent::start().await;
    let main = agent.run("c", &agent.shell("read x; exit 3")).await;
    agent.exec("c", "e", &agent.shell("sleep 100")).await.unwrap();
    agent.start_process("c", "e").await.unwrap();
    agent.write(main.stdin_stream, b"\n").await.unwrap();
    assert_eq!(agent.wait("c", "").await, 3);
    assert_eq!(agent.wait("c", "e").await, 137);
    let (code, _) = refusal(agent.exec("c", "late", &agent.shell("true")).await);
    assert_eq!(code, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn signals_reach_all_or_one() {
    need_root!();
    let agent = Agent::start().await;
    let script = "trap 'echo term; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let main = agent.run("c", &agent.shell(script)).await;
    agent.read_until(main.stdout_stream, "up").await;
    let exec = agent.exec("c", "e", &agent.shell(script)).await.unwrap();
    agent.start_process("c", "e").await.unwrap();
    agent.read_until(exec.stdout_stream, "up").await;
    agent.signal("c", "e", 15, false).await.unwrap();
    assert_eq!(agent.wait("c", "e").await, 5);
    assert!(timeout(Duration::from_millis(100), agent.wait("c", "")).await.is_err());
    agent.signal("c", "", 15, true).await.unwrap();
    assert_eq!(agent.wait("c", "").await, 5);
    for bad in [0, 65, -1] {
        assert_eq!(refusal(agent.signal("c", "", bad, true).await).0, Code::INVALID_ARGUMENT);
    }
}

#[tokio::test]
async fn orphans_are_reaped() {
    need_root!();
    let agent = Agent::start().await;
    agent.run("c", &agent.shell("sleep 100")).await;
    // The grandchildren of an exec are handed to the container's process, the exec itself is the agent's child.
    for round in 0..10 {
        let id = format!("e{round}");
        agent.exec("c", &id, &agent.shell("(sleep 0.1 &) ; (true &) ; exit 4")).await.unwrap();
        agent.start_process("c", &id).await.unwrap();
        assert_eq!(agent.wait("c", &id).await, 4);
    }
    agent.delete("c").await.unwrap();
    sleep(Duration::from_millis(200)).await;
    let pid = agent.pid();
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    assert_eq!(children.trim(), "", "zombies are left");
}

#[tokio::test]
async fn deleting_kills_and_leaves_nothing() {
    need_root!();
    let agent = Agent::start().await;
    let before = std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().count();
    for round in 0..5 {
        let id = format!("c{round}");
        let main = agent.run(&id, &agent.shell("trap '' TERM; echo up; while :; do sleep 1; done")).await;
        agent.read_until(main.stdout_stream, "up").await;
        agent.exec(&id, "e", &agent.shell("sleep 100").terminal()).await.unwrap();
        agent.exec(&id, "f", &agent.shell("sleep 100")).await.unwrap();
        agent.start_process(&id, "f").await.unwrap();
        // Twice at once: one does it, the other learns of it.
        let (a, b) = tokio::join!(agent.delete(&id), agent.delete(&id));
        assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    }
    let after = std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().count();
    assert_eq!(before, after, "descriptors leak");
    assert_eq!(agent.info().await.protocol_version, 1);
}

#[tokio::test]
async fn what_is_being_created_can_be_taken_back() {
    need_root!();
    let agent = Agent::start().await;
    for _ in 0..5 {
        let spec = agent.shell("true");
        let (created, deleted) = tokio::join!(agent.create("c", &spec), agent.delete("c"));
        created.unwrap();
        deleted.unwrap();
    }
    assert_eq!(refusal(agent.delete("c").await).0, Code::NOT_FOUND);
}

#[tokio::test]
async fn containers_outlive_a_session() {
    need_root!();
    let mut agent = Agent::start().await;
    let streams = agent.run("c", &agent.shell("echo before; read x; echo after $x")).await;
    assert_eq!(agent.read_until(streams.stdout_stream, "before\n").await, "before\n");
    for _ in 0..5 {
        // A reader waits while the session ends.
        assert!(timeout(Duration::from_millis(20), agent.read(streams.stdout_stream, 1)).await.is_err());
        agent.reconnect().await;
    }
    agent.write(streams.stdin_stream, b"all\n").await.unwrap();
    assert_eq!(agent.text(streams.stdout_stream).await, "after all\n");
    assert_eq!(agent.wait("c", "").await, 0);
}

#[tokio::test]
async fn stats_come_from_the_cgroup() {
    need_root!();
    let agent = Agent::start().await;
    let main =
        agent.run("c", &agent.shell("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo up; sleep 100")).await;
    agent.read_until(main.stdout_stream, "up").await;
    let request = chsnap_protocol::agent::ContainerRef { container_id: "c".into(), ..Default::default() };
    let stats = agent.client.stats(common::soon(), &request).await.unwrap();
    assert!(stats.cpu_usage_usec > 0, "{stats:?}");
    assert_eq!((stats.memory_max, stats.pids_max), (u64::MAX, u64::MAX));
}
