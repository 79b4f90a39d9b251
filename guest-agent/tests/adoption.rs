//! How a container that was frozen becomes another pod's, on the real agent.

#![allow(clippy::unwrap_used)]

mod common;

use chsnap_protocol::agent::{AdoptRequest, FreezeRequest, Stdio};
use common::{Agent, Api, refusal, soon};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use serde_json::json;

/// A container that was started, and stands still.
async fn frozen(agent: &Api, id: &str) -> u64 {
    // The name is left alone, which is what the filter below is about.
    let spec = agent.shell("echo up; read x; hostname").set("/hostname", json!(""));
    let streams = agent.run(id, &spec).await;
    agent.read_until(streams.stdout_stream, "up").await;
    agent.client.freeze(soon(), &FreezeRequest { container_id: id.into(), ..Default::default() }).await.unwrap();
    agent.write(streams.stdin_stream, b"x\n").await.unwrap();
    streams.stdout_stream
}

fn adoption() -> AdoptRequest {
    let stdio = Stdio { stdin: true, stdout: true, stderr: true, ..Default::default() };
    AdoptRequest {
        from: "t".into(),
        container_id: "c".into(),
        hostname: "clone".into(),
        stdio: Some(stdio).into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn a_frozen_container_gets_another_name() {
    need_root!();
    let agent = Agent::start().await;
    let out = frozen(&agent, "t").await;
    agent.client.adopt(soon(), &adoption()).await.unwrap();
    agent.start_process("c", "").await.unwrap();
    assert_eq!(agent.text(out).await, "clone\n");
    agent.delete("c").await.unwrap();
}

#[tokio::test]
async fn a_process_that_has_ended_is_not_saved() {
    need_root!();
    let agent = Agent::start().await;
    agent.run("t", &agent.shell("exit 4")).await;
    agent.wait("t", "").await;
    let request = FreezeRequest { container_id: "t".into(), ..Default::default() };
    let said = refusal(agent.client.freeze(soon(), &request).await).1;
    assert_eq!(said, "the process ended with status 4 after it was ready, before it could be saved");
    agent.delete("t").await.unwrap();
}

/// As by the OOM killer: no report, and its end of the pipe is closed.
#[test]
fn a_helper_that_is_killed_half_way_is_no_success() {
    need_root!();
    // Here nobody but the helper sets a host name.
    let filter = SeccompFilter::new(
        [(libc::SYS_sethostname, vec![])].into(),
        SeccompAction::Allow,
        SeccompAction::KillProcess,
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let filter: BpfProgram = filter.unwrap().try_into().unwrap();
    let killed = async {
        let agent = Agent::start().await;
        frozen(&agent, "t").await;
        refusal(agent.client.adopt(soon(), &adoption()).await).1
    };
    // What a thread may not call, its children may not either.
    let thread = std::thread::spawn(move || {
        apply_filter(&filter).unwrap();
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(killed)
    });
    let said = thread.join().unwrap();
    // 128 + SIGSYS
    assert!(said.contains("with status 159"), "{said}");
}
