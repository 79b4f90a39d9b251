//! The client of the agent in the guest. The guest is hostile: what it answers is bounded and checked here.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use chsnap_protocol::{
    MAX_CHUNK, PROTOCOL_VERSION,
    agent::{
        AdoptRequest, AwaitReadyRequest, ConnectPortRequest, ContainerRef, CreateContainerRequest, CreateExecRequest,
        CreateProcessResponse, Empty, FreezeRequest, HttpProbe, InfoRequest, InfoResponse, ProcessRef,
        ReadStreamRequest, ResizeTerminalRequest, ResumeRequest, SetClockRequest, SignalProcessRequest, StatsResponse,
        Stdio, StreamRef, WaitOomRequest, WaitProcessResponse, WriteStreamRequest, await_ready_request::Sign,
    },
    agent_ttrpc::AgentClient,
    session,
};
use tokio::time::timeout;
use ttrpc::{asynchronous::transport::Socket, context::Context};

use crate::{config::Ready, vmm::Channel};

/// A request, answered in time or given up: `ask!(agent, "Name", method(request))`.
macro_rules! ask {
    ($agent:expr, $call:literal, $method:ident($request:expr)) => {
        $agent.knocking($call, ask_patiently!($agent, $call, $method($request)))
    };
}

/// A request whose answer may take for ever.
///
/// A task of its own carries it: ttrpc closes the connection, and with it every other call, when a request is given up
/// while its frame is being written, which takes long when the guest is slow to read.
macro_rules! ask_patiently {
    ($agent:expr, $call:literal, $method:ident($request:expr)) => {{
        let (client, request) = (Arc::clone(&$agent.client), $request);
        let carrier = tokio::spawn(async move { client.$method(Context::default(), &request).await });
        async move {
            match carrier.await {
                Ok(answer) => answer.map_err(failed($call)),
                Err(ended) => Err(AgentError::Lost { call: $call, reason: ended.to_string() }),
            }
        }
    }};
}

mod clock;
mod error;
mod fresh;
mod knock;
mod pump;

use clock::{Clock, TRIES as CLOCK_TRIES};
pub use error::AgentError;
use error::failed;
pub use fresh::Fresh;
pub use pump::{read_into, write_from};

/// The agent of one VM. Clones share the session.
#[derive(Clone)]
pub struct Agent {
    client: Arc<AgentClient>,
    deadline: Duration,
    unanswered: knock::Unanswered,
}

impl Agent {
    /// Opens a session on `channel`. `deadline` bounds each call that does not wait for somebody else.
    ///
    /// # Errors
    /// Where the channel breaks, or the agent does not speak this protocol. The caller bounds the time.
    pub async fn open(mut channel: Box<dyn Channel>, deadline: Duration) -> Result<(Self, InfoResponse), AgentError> {
        let number = u64::from(std::process::id()) << 32 ^ now_ns().unsigned_abs();
        session::open(&mut channel, number).await.map_err(AgentError::Session)?;
        let client = ttrpc::r#async::Client::new(Socket::new(channel));
        let agent = Self { client: Arc::new(AgentClient::new(client)), deadline, unanswered: Arc::default() };
        let info = agent.knocking("Info", agent.info()).await?;
        Ok((agent, info))
    }

    async fn info(&self) -> Result<InfoResponse, AgentError> {
        let request = InfoRequest { protocol_version: PROTOCOL_VERSION, ..Default::default() };
        ask_patiently!(self, "Info", info(request)).await
    }

    async fn within_deadline<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, AgentError> {
        let reason = || format!("nothing came for {} s ([deadlines] agent_call)", self.deadline.as_secs_f32());
        timeout(self.deadline, answer).await.unwrap_or_else(|_| Err(AgentError::Lost { call, reason: reason() }))
    }

    /// Makes a restored machine one of its own: the first call on one, and where it fails, the last.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn resume(&self, fresh: Fresh, mount_share: bool) -> Result<(), AgentError> {
        let Fresh { entropy, epoch } = fresh;
        let mut request = ResumeRequest { entropy, epoch, mount_share, ..Default::default() };
        // Last of all, since it is late from now on.
        let asked = now_ns();
        request.wall_clock_ns = asked;
        let guest = ask!(self, "Resume", resume(request)).await?.wall_clock_ns;
        self.clock_is_right(asked, guest).await
    }

    /// Sets the guest's wall clock to the host's.
    ///
    /// # Errors
    /// See [`AgentError`]; [`AgentError::Clock`] where it was set, perhaps late.
    pub async fn set_clock(&self) -> Result<(), AgentError> {
        let asked = now_ns();
        let guest = self.ask_clock(asked).await?;
        self.clock_is_right(asked, guest).await
    }

    async fn ask_clock(&self, wall_clock_ns: i64) -> Result<i64, AgentError> {
        let request = SetClockRequest { wall_clock_ns, ..Default::default() };
        Ok(ask!(self, "SetClock", set_clock(request)).await?.wall_clock_ns)
    }

    /// Sets it again until it is, having been asked to at `asked` and said `guest`.
    async fn clock_is_right(&self, mut asked: i64, mut guest: i64) -> Result<(), AgentError> {
        let mut tries = 0..CLOCK_TRIES;
        loop {
            match (Clock::seen(asked, guest, now_ns()), tries.next()) {
                (Clock::Right, _) => return Ok(()),
                (_, Some(_)) => {}
                (Clock::Late(ns), None) => return Err(AgentError::Clock { most_ms: ns / 1_000_000 }),
                (Clock::Wrong(ns), None) => {
                    let what = format!("a clock that is wrong by {} ms", ns / 1_000_000);
                    return Err(AgentError::Nonsense { call: "SetClock", what });
                }
            }
            asked = now_ns();
            guest = self.ask_clock(asked).await?;
        }
    }

    /// Makes a container. `spec_json` as in `agent.proto`.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn create_container(
        &self,
        container: &str,
        spec_json: Vec<u8>,
        stdio: Stdio,
    ) -> Result<CreateProcessResponse, AgentError> {
        let request = CreateContainerRequest {
            container_id: container.into(),
            spec_json,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        ask!(self, "CreateContainer", create_container(request)).await
    }

    /// Makes the frozen container `from` the container `adoption` is about. `hooks` is what its processes may take.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn adopt(&self, adoption: AdoptRequest, hooks: Duration) -> Result<CreateProcessResponse, AgentError> {
        let request = AdoptRequest { hooks_ms: milliseconds(hooks), ..adoption };
        self.longer_by(hooks).knocking("Adopt", ask_patiently!(self, "Adopt", adopt(request))).await
    }

    /// Waits until the container's process is ready, at most for `patience`.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn await_ready(&self, container: &str, ready: &Ready, patience: Duration) -> Result<(), AgentError> {
        let sign = match ready {
            Ready::Notify => Sign::Notify(Empty::default()),
            Ready::Http { port, path } => {
                Sign::Http(HttpProbe { port: u32::from(*port), path: path.clone(), ..Default::default() })
            }
            Ready::Tcp { port } => Sign::Tcp(u32::from(*port)),
            Ready::File { path } => Sign::File(path.display().to_string()),
        };
        let request = AwaitReadyRequest {
            container_id: container.into(),
            sign: Some(sign),
            timeout_ms: milliseconds(patience),
            ..Default::default()
        };
        // It waits for somebody else, and the agent may well have nothing to say.
        self.longer_by(patience)
            .within_deadline("AwaitReady", ask_patiently!(self, "AwaitReady", await_ready(request)))
            .await
            .map(drop)
    }

    /// Has a container stand still, after its hooks, and tells which files of its root it has open.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn freeze(&self, container: &str, hooks: Duration) -> Result<Vec<String>, AgentError> {
        let request =
            FreezeRequest { container_id: container.into(), hooks_ms: milliseconds(hooks), ..Default::default() };
        let frozen = self.longer_by(hooks).knocking("Freeze", ask_patiently!(self, "Freeze", freeze(request))).await?;
        Ok(frozen.open)
    }

    fn longer_by(&self, patience: Duration) -> Self {
        Self { deadline: self.deadline + patience, ..self.clone() }
    }

    /// Adds a process to a container.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn create_exec(
        &self,
        container: &str,
        exec: &str,
        process_json: Vec<u8>,
        stdio: Stdio,
    ) -> Result<CreateProcessResponse, AgentError> {
        let request = CreateExecRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            process_json,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        ask!(self, "CreateExec", create_exec(request)).await
    }

    /// Starts a created process and tells its pid in the guest.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn start(&self, container: &str, exec: &str) -> Result<u32, AgentError> {
        Ok(ask!(self, "StartProcess", start_process(process(container, exec))).await?.pid)
    }

    /// Waits, without bound, for the end of a process.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn wait(&self, container: &str, exec: &str) -> Result<WaitProcessResponse, AgentError> {
        let answer = ask_patiently!(self, "WaitProcess", wait_process(process(container, exec))).await?;
        if answer.exit_status > 255 {
            let what = format!("exit status {}", answer.exit_status);
            return Err(AgentError::Nonsense { call: "WaitProcess", what });
        }
        Ok(answer)
    }

    /// Waits for the guest's OOM killer to have ended more than `known` processes of the container, or for the container's own
    /// process to have ended. Answers how many it has.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn wait_oom(&self, container: &str, known: u64) -> Result<u64, AgentError> {
        let request = WaitOomRequest { container_id: container.into(), known, ..Default::default() };
        Ok(ask_patiently!(self, "WaitOom", wait_oom(request)).await?.kills)
    }

    /// Signals a process, or with `all` every process of the container.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn signal(&self, container: &str, exec: &str, signal: u32, all: bool) -> Result<(), AgentError> {
        let request =
            SignalProcessRequest { process: Some(process(container, exec)).into(), signal, all, ..Default::default() };
        ask!(self, "SignalProcess", signal_process(request)).await.map(drop)
    }

    /// Forgets a process.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn delete_process(&self, container: &str, exec: &str) -> Result<(), AgentError> {
        ask!(self, "DeleteProcess", delete_process(process(container, exec))).await.map(drop)
    }

    /// Forgets a container.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn delete_container(&self, container: &str) -> Result<(), AgentError> {
        let request = ContainerRef { container_id: container.into(), ..Default::default() };
        ask!(self, "DeleteContainer", delete_container(request)).await.map(drop)
    }

    /// The container's processes, by the guest's numbers.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn pids(&self, container: &str) -> Result<Vec<u32>, AgentError> {
        let request = ContainerRef { container_id: container.into(), ..Default::default() };
        Ok(ask!(self, "ListPids", list_pids(request)).await?.pids)
    }

    /// The container's resource use.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn stats(&self, container: &str) -> Result<StatsResponse, AgentError> {
        let request = ContainerRef { container_id: container.into(), ..Default::default() };
        ask!(self, "Stats", stats(request)).await
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn resize(&self, container: &str, exec: &str, width: u32, height: u32) -> Result<(), AgentError> {
        let request = ResizeTerminalRequest {
            process: Some(process(container, exec)).into(),
            width,
            height,
            ..Default::default()
        };
        ask!(self, "ResizeTerminal", resize_terminal(request)).await.map(drop)
    }

    /// Waits, without bound, for bytes of a stream; `None` at its end.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn read(&self, stream: u64, max: usize) -> Result<Option<Vec<u8>>, AgentError> {
        let max = max.min(MAX_CHUNK);
        let request = ReadStreamRequest { stream, max: max as u32, ..Default::default() };
        let answer = ask_patiently!(self, "ReadStream", read_stream(request)).await?;
        match (answer.data.len(), answer.eof) {
            (0, true) => Ok(None),
            (n, _) if n > 0 && n <= max => Ok(Some(answer.data)),
            (n, _) => Err(AgentError::Nonsense { call: "ReadStream", what: format!("{n} bytes where 1 to {max} fit") }),
        }
    }

    /// Writes to a stream; answers, without bound, when the guest has taken everything.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn write(&self, stream: u64, data: Vec<u8>) -> Result<(), AgentError> {
        let request = WriteStreamRequest { stream, data, ..Default::default() };
        ask_patiently!(self, "WriteStream", write_stream(request)).await.map(drop)
    }

    /// Half-closes a stream.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn close_write(&self, stream: u64) -> Result<(), AgentError> {
        let request = StreamRef { stream, ..Default::default() };
        ask!(self, "CloseStreamWrite", close_stream_write(request)).await.map(drop)
    }

    /// Gives a stream up.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn close(&self, stream: u64) -> Result<(), AgentError> {
        let request = StreamRef { stream, ..Default::default() };
        ask!(self, "CloseStream", close_stream(request)).await.map(drop)
    }

    /// Connects to a TCP port of the guest.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub async fn connect_port(&self, port: u16) -> Result<u64, AgentError> {
        let request = ConnectPortRequest { port: port.into(), ..Default::default() };
        Ok(ask!(self, "ConnectPort", connect_port(request)).await?.stream)
    }

    /// Asks the guest to sync and power off.
    ///
    /// # Errors
    /// See [`AgentError`]; that the channel breaks is what a guest that obeys looks like.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        ask!(self, "Shutdown", shutdown(Empty::default())).await.map(drop)
    }
}

fn milliseconds(duration: Duration) -> u32 {
    duration.as_millis().try_into().unwrap_or(u32::MAX)
}

fn process(container: &str, exec: &str) -> ProcessRef {
    ProcessRef { container_id: container.into(), exec_id: exec.into(), ..Default::default() }
}

/// Wall clock, nanoseconds since the epoch.
fn now_ns() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}
