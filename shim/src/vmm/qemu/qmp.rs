//! A client of QEMU's machine protocol: JSON lines, answers matched to commands by id, events in between.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{Mutex as AsyncMutex, oneshot},
    task::JoinHandle,
    time::timeout,
};

use crate::vmm::ControlError;

/// A longer line is not believed: the VMM is what a hostile guest breaks into first.
const MAX_LINE: u64 = 1 << 20;

type Pending = Arc<Mutex<Waiting>>;

/// The conversation.
#[derive(Debug)]
pub struct Qmp {
    writer: AsyncMutex<OwnedWriteHalf>,
    pending: Pending,
    version: Arc<OnceLock<Version>>,
    patience: Duration,
}

/// QEMU's version, as it greets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 10 in 10.0.2.
    pub major: u64,
    /// 0 in 10.0.2.
    pub minor: u64,
    /// 2 in 10.0.2.
    pub micro: u64,
}

#[derive(Debug, Default)]
struct Waiting {
    next_id: u64,
    answers: HashMap<u64, oneshot::Sender<Result<Value, String>>>,
    closed: bool,
}

impl Qmp {
    /// Starts the conversation on a connected socket. The task ends with the socket, and tells whether the guest
    /// asked for the end of the machine. `patience` is for one command; the first is answered only when QEMU has built
    /// the machine.
    pub fn start(stream: UnixStream, patience: Duration) -> (Self, JoinHandle<bool>) {
        let (reader, writer) = stream.into_split();
        let pending = Pending::default();
        let version = Arc::new(OnceLock::new());
        let listener = tokio::spawn(listen(reader, pending.clone(), version.clone()));
        (Self { writer: AsyncMutex::new(writer), pending, version, patience }, listener)
    }

    /// How long one command may take.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Leaves negotiation, which QEMU answers once the machine is built, and tells the version.
    pub async fn negotiate(&self) -> Result<Version, ControlError> {
        let command = "qmp_capabilities";
        self.execute(command, Value::Null).await?;
        let what = "no greeting came before the first answer".into();
        self.version.get().copied().ok_or_else(|| ControlError::Garbled { command: command.into(), what })
    }

    /// Executes a command, and returns what it returns.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, ControlError> {
        let (sender, answer) = oneshot::channel();
        let id = {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            if pending.closed {
                return Err(ControlError::Closed { command: command.into() });
            }
            pending.next_id += 1;
            let id = pending.next_id;
            pending.answers.insert(id, sender);
            id
        };
        let mut request = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        let late = || ControlError::Late { command: command.into(), seconds: self.patience.as_secs_f32() };
        let answered = timeout(self.patience, async {
            let line = format!("{request}\n");
            match self.writer.lock().await.write_all(line.as_bytes()).await {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(ControlError::Closed { command: command.into() });
                }
                Err(source) => return Err(ControlError::Io { command: command.into(), source }),
            }
            answer.await.map_err(|_| ControlError::Closed { command: command.into() })
        });
        let answered = answered.await;
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).answers.remove(&id);
        let answer = answered.map_err(|_| late())??;
        answer.map_err(|answer| ControlError::Refused { command: command.into(), answer })
    }
}

async fn listen(reader: OwnedReadHalf, pending: Pending, version: Arc<OnceLock<Version>>) -> bool {
    let mut reader = BufReader::new(reader);
    let mut by_guest = false;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await;
        // A line without its end is the socket's last, or too long.
        if read.is_err() || line.last() != Some(&b'\n') {
            break;
        }
        let Ok(message) = serde_json::from_slice::<Value>(&line) else { break };
        if let Some(greeted) = message.pointer("/QMP/version/qemu").and_then(Version::parse) {
            let _ = version.set(greeted);
        } else if message.get("event").is_some() {
            by_guest |= is_end_by_guest(&message);
        } else if let Some(id) = message["id"].as_u64() {
            let waiting = pending.lock().unwrap_or_else(PoisonError::into_inner).answers.remove(&id);
            if let Some(waiting) = waiting {
                let _ = waiting.send(outcome(message));
            }
        }
    }
    let mut pending = pending.lock().unwrap_or_else(PoisonError::into_inner);
    pending.closed = true;
    pending.answers.clear();
    by_guest
}

fn outcome(mut message: Value) -> Result<Value, String> {
    match message.get("error") {
        Some(error) => Err(error["desc"].as_str().map_or_else(|| error.to_string(), str::to_owned)),
        None => Ok(message["return"].take()),
    }
}

/// Power off, a reset (which is how a panic ends, see the kernel's command line), or a panic that a device reports.
fn is_end_by_guest(message: &Value) -> bool {
    match message["event"].as_str() {
        Some("SHUTDOWN") => message["data"]["guest"].as_bool().unwrap_or(false),
        Some("GUEST_PANICKED") => true,
        _ => false,
    }
}

impl Version {
    fn parse(value: &Value) -> Option<Self> {
        let number = |name: &str| value[name].as_u64();
        Some(Self { major: number("major")?, minor: number("minor")?, micro: number("micro")? })
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}
