//! Containers and processes from their creation to their end, on the real agent.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, Spec, refusal};
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
        agent.create("c", &Spec::new(&agent.root(), &[name])).await.unwrap();
        assert_eq!(refusal(agent.start_process("c", "").await), (code, text.into()));
        agent.delete("c").await.unwrap();
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
