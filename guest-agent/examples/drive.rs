//! Runs one program in a booted guest, by hand: `drive SOCKET [--] ROOT ARG...`.
//!
//! SOCKET is the host's end of the agent channel (`listen:PATH` over vsock, where the agent connects), ROOT the
//! container's root as the guest sees it. What the program writes goes to stdout, the guest's figures to stderr. For
//! looking at an agent without containerd.

use std::{error::Error, io::Write as _, time::Instant};

use chsnap_protocol::{
    PROTOCOL_VERSION,
    agent::{ContainerRef, CreateContainerRequest, InfoRequest, ProcessRef, ReadStreamRequest, StatsResponse, Stdio},
    agent_ttrpc::AgentClient,
    session,
};
use tokio::net::{UnixListener, UnixStream};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

const ID: &str = "drive";

fn spec(root: &str, args: &[String]) -> serde_json::Value {
    serde_json::json!({
        "root": { "path": root },
        "hostname": "drive",
        "process": { "args": args, "env": ["PATH=/usr/local/bin:/usr/bin:/bin"], "cwd": "/" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["newinstance", "ptmxmode=0666"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] },
        ],
    })
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut given = std::env::args().skip(1).filter(|a| a != "--");
    let usage = "usage: drive SOCKET ROOT ARG...";
    let (socket, root) = (given.next().ok_or(usage)?, given.next().ok_or(usage)?);
    let args: Vec<String> = given.collect();

    let begin = Instant::now();
    // Over vsock it is the agent who connects.
    let mut channel = match socket.strip_prefix("listen:") {
        Some(path) => UnixListener::bind(path)?.accept().await?.0,
        None => UnixStream::connect(&socket).await?,
    };
    session::open(&mut channel, u64::from(std::process::id())).await?;
    eprintln!("session after {:?}", begin.elapsed());
    let agent = AgentClient::new(Client::new(Socket::new(channel)));
    let none = context::with_timeout(0);

    let request = InfoRequest { protocol_version: PROTOCOL_VERSION, ..Default::default() };
    let begin = Instant::now();
    let info = agent.info(none.clone(), &request).await?;
    eprintln!(
        "kernel {}, agent {}, init after {} ms, agent ready after {} ms, one call {:?}",
        info.kernel_release,
        info.agent_version,
        info.init_start_ns / 1_000_000,
        info.agent_ready_ns / 1_000_000,
        begin.elapsed()
    );

    let begin = Instant::now();
    let request = CreateContainerRequest {
        container_id: ID.into(),
        spec_json: spec(&root, &args).to_string().into_bytes(),
        stdio: Some(Stdio { stdout: true, stderr: true, ..Default::default() }).into(),
        ..Default::default()
    };
    let streams = agent.create_container(none.clone(), &request).await?;
    eprintln!("created in {:?}", begin.elapsed());
    let begin = Instant::now();
    let process = ProcessRef { container_id: ID.into(), ..Default::default() };
    let pid = agent.start_process(none.clone(), &process).await?.pid;
    eprintln!("pid {pid} started in {:?}", begin.elapsed());

    let mut bytes = 0;
    for stream in [streams.stdout_stream, streams.stderr_stream] {
        loop {
            let request = ReadStreamRequest { stream, max: 1 << 20, ..Default::default() };
            let answer = agent.read_stream(none.clone(), &request).await?;
            if answer.eof {
                break;
            }
            bytes += answer.data.len();
            std::io::stdout().write_all(&answer.data)?;
        }
    }
    let exit = agent.wait_process(none.clone(), &process).await?;
    eprintln!("exit status {} after {:?}, {bytes} bytes", exit.exit_status, begin.elapsed());
    let container = ContainerRef { container_id: ID.into(), ..Default::default() };
    let StatsResponse { cpu_usage_usec, memory_current, pids_current, .. } =
        agent.stats(none.clone(), &container).await?;
    eprintln!("cpu {cpu_usage_usec} us, memory {memory_current}, pids {pids_current}");
    agent.delete_container(none, &container).await?;
    Ok(())
}
