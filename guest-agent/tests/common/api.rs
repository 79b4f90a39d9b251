//! Calls to the agent, in the shape tests want them.

use std::{path::PathBuf, time::Duration};

use chsnap_protocol::{PROTOCOL_VERSION, agent::*, agent_ttrpc::AgentClient};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

use super::Spec;

/// No answer may take longer.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A session with an agent.
pub struct Api {
    pub client: AgentClient,
    /// The image, as the agent sees it.
    pub image: PathBuf,
}

impl Api {
    /// A container that runs `script` in a shell.
    pub fn shell(&self, script: &str) -> Spec {
        Spec::new(&self.image, &["/bin/sh", "-c", script])
    }

    pub async fn create(&self, id: &str, spec: &Spec) -> ttrpc::Result<CreateProcessResponse> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec_json: spec.json.to_string().into_bytes(),
            stdio: Some(spec.stdio.clone()).into(),
            ..Default::default()
        };
        self.client.create_container(soon(), &request).await
    }

    pub async fn start_process(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        self.client.start_process(soon(), &process(id, exec)).await.map(|answer| answer.pid)
    }

    /// Creates and starts a container.
    pub async fn run(&self, id: &str, spec: &Spec) -> CreateProcessResponse {
        let streams = self.create(id, spec).await.unwrap();
        self.start_process(id, "").await.unwrap();
        streams
    }

    pub async fn wait(&self, id: &str, exec: &str) -> u32 {
        self.client.wait_process(soon(), &process(id, exec)).await.unwrap().exit_status
    }

    pub async fn exec(&self, id: &str, exec: &str, spec: &Spec) -> ttrpc::Result<CreateProcessResponse> {
        let request = CreateExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process_json: spec.json["process"].to_string().into_bytes(),
            stdio: Some(spec.stdio.clone()).into(),
            ..Default::default()
        };
        self.client.create_exec(soon(), &request).await
    }

    pub async fn signal(&self, id: &str, exec: &str, signal: i32, all: bool) -> ttrpc::Result<()> {
        let request = SignalProcessRequest {
            process: Some(process(id, exec)).into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client.signal_process(soon(), &request).await.map(drop)
    }

    pub async fn delete(&self, id: &str) -> ttrpc::Result<()> {
        let request = ContainerRef { container_id: id.into(), ..Default::default() };
        self.client.delete_container(soon(), &request).await.map(drop)
    }

    pub async fn pids(&self, id: &str) -> Vec<u32> {
        let request = ContainerRef { container_id: id.into(), ..Default::default() };
        self.client.list_pids(soon(), &request).await.unwrap().pids
    }

    pub async fn read(&self, stream: u64, max: u32) -> ttrpc::Result<ReadStreamResponse> {
        let request = ReadStreamRequest { stream, max, ..Default::default() };
        self.client.read_stream(soon(), &request).await
    }

    /// All there is until the end.
    pub async fn read_all(&self, stream: u64) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let answer = self.read(stream, 1 << 20).await.unwrap();
            assert_eq!(answer.eof, answer.data.is_empty());
            if answer.eof {
                return all;
            }
            all.extend(answer.data);
        }
    }

    pub async fn text(&self, stream: u64) -> String {
        String::from_utf8(self.read_all(stream).await).unwrap()
    }

    /// Reads until `wanted` has been seen.
    pub async fn read_until(&self, stream: u64, wanted: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(wanted) {
            let answer = self.read(stream, 4096).await.unwrap();
            assert!(!answer.eof, "ended without {wanted:?}: {seen:?}");
            seen.push_str(std::str::from_utf8(&answer.data).unwrap());
        }
        seen
    }

    pub async fn write(&self, stream: u64, data: &[u8]) -> ttrpc::Result<()> {
        let request = WriteStreamRequest { stream, data: data.to_vec(), ..Default::default() };
        self.client.write_stream(soon(), &request).await.map(drop)
    }

    pub async fn close_write(&self, stream: u64) -> ttrpc::Result<()> {
        let request = StreamRef { stream, ..Default::default() };
        self.client.close_stream_write(soon(), &request).await.map(drop)
    }

    pub async fn close(&self, stream: u64) {
        let request = StreamRef { stream, ..Default::default() };
        self.client.close_stream(soon(), &request).await.unwrap();
    }

    pub async fn connect(&self, port: u32) -> ttrpc::Result<u64> {
        let request = ConnectPortRequest { port, ..Default::default() };
        self.client.connect_port(soon(), &request).await.map(|answer| answer.stream)
    }

    /// Runs `spec` to its end: exit status, stdout, stderr.
    pub async fn output(&self, id: &str, spec: &Spec) -> (u32, String, String) {
        let streams = self.run(id, spec).await;
        let (out, err) = tokio::join!(self.text(streams.stdout_stream), self.text(streams.stderr_stream));
        let status = self.wait(id, "").await;
        self.delete(id).await.unwrap();
        (status, out, err)
    }

    pub async fn info(&self) -> InfoResponse {
        let request = InfoRequest { protocol_version: PROTOCOL_VERSION, ..Default::default() };
        self.client.info(soon(), &request).await.unwrap()
    }
}

/// A client that is replaced before it is used.
pub fn nobody() -> AgentClient {
    let (unused, _) = tokio::io::duplex(1);
    AgentClient::new(Client::new(Socket::new(unused)))
}

pub fn soon() -> context::Context {
    context::with_duration(DEADLINE)
}

pub fn process(id: &str, exec: &str) -> ProcessRef {
    ProcessRef { container_id: id.into(), exec_id: exec.into(), ..Default::default() }
}

/// Code and text of a refusal.
pub fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a refusal: {other}"),
    }
}
