//! What processes do before they are saved and after they are restored, by themselves: `docs/hooks.md` is the protocol.
//!
//! A process connects to a socket and is greeted; from then on it is asked, a line of JSON at a time, and answers. The
//! connection is part of the guest's memory, and so is still there in every clone.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, recv},
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, oneshot},
    time::timeout,
};

/// The version of the protocol, in the greeting.
const GREETING: &str = "{\"hooks\":1}\n";
/// Bytes of an answer; there is room for a stack trace in it.
const MAX_ANSWER: u64 = 64 << 10;
/// Processes of one guest, far more than workers of one server.
const MAX_PROCESSES: usize = 256;

/// What a process is asked.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event<'a> {
    /// It is about to be stopped and saved.
    BeforeSnapshot,
    /// It runs again, in another machine.
    AfterRestore {
        /// Of the pod it is in now.
        env: BTreeMap<&'a str, &'a str>,
        epoch: &'a str,
        hostname: &'a str,
    },
}

#[derive(Debug, Deserialize)]
struct Answer {
    ok: bool,
    #[serde(default)]
    error: String,
}

/// Why hooks were not run, or not all of them.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("the hooks of process {pid} failed: {error}")]
    Failed { pid: i32, error: String },
    #[error("process {pid} hung up before it said that its hooks had run")]
    HungUp { pid: i32 },
    #[error("process {pid} answered with what is no answer: {what}")]
    Nonsense { pid: i32, what: String },
    #[error("more than {MAX_PROCESSES} processes want to be asked, and not all of them would be")]
    TooMany,
    #[error("the hooks of {0} process(es) did not end within {1} ms")]
    TooSlow(usize, u128),
    #[error("cannot write down what is asked")]
    Encode(#[source] serde_json::Error),
}

type Question = (Arc<str>, oneshot::Sender<Result<(), HookError>>);

/// The processes that want to be asked.
#[derive(Debug, Clone, Default)]
pub struct Hooks(Arc<Mutex<Registry>>);

#[derive(Debug, Default)]
struct Registry {
    latest: u64,
    /// Somebody was turned away.
    overrun: bool,
    /// With their numbers in the guest.
    processes: BTreeMap<u64, (i32, mpsc::Sender<Question>)>,
}

impl Hooks {
    /// Listens at `path`, for as long as the agent runs.
    ///
    /// # Errors
    /// If there can be no socket.
    pub fn listen(&self, path: &Path) -> io::Result<()> {
        let listener = UnixListener::bind(path)?;
        // Whoever a container's process runs as.
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
        let hooks = self.clone();
        tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => hooks.welcome(stream),
                    // Out of descriptors, say: that passes.
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                }
            }
        });
        Ok(())
    }

    /// Nobody has any.
    pub fn is_empty(&self) -> bool {
        self.registry().processes.is_empty()
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn welcome(&self, stream: UnixStream) {
        let pid = stream.peer_cred().ok().and_then(|peer| peer.pid()).unwrap_or(0);
        let (ask, questions) = mpsc::channel(1);
        let mut registry = self.registry();
        if registry.processes.len() >= MAX_PROCESSES {
            registry.overrun = true;
            return;
        }
        registry.latest += 1;
        let number = registry.latest;
        registry.processes.insert(number, (pid, ask));
        drop(registry);
        let hooks = self.clone();
        tokio::spawn(async move {
            let (reader, writer) = stream.into_split();
            Process { pid, reader: BufReader::new(reader), writer }.serve(questions).await;
            hooks.registry().processes.remove(&number);
        });
    }

    /// Asks all of them at the same time, and waits for the answers.
    ///
    /// # Errors
    /// The first that is none, or not the right one. Nobody answers: nobody was asked.
    pub async fn run(&self, event: &Event<'_>, within: Duration) -> Result<(), HookError> {
        // A hook that never runs is one that fails.
        if self.registry().overrun {
            return Err(HookError::TooMany);
        }
        let mut line = serde_json::to_string(event).map_err(HookError::Encode)?;
        line.push('\n');
        let line: Arc<str> = line.into();
        let processes: Vec<_> = self.registry().processes.values().cloned().collect();
        let mut answers = FuturesUnordered::new();
        for (pid, process) in processes {
            let (answer, answered) = oneshot::channel();
            // One that has gone meanwhile has no hooks any more.
            if process.send((Arc::clone(&line), answer)).await.is_ok() {
                answers.push(async move { answered.await.unwrap_or(Err(HookError::HungUp { pid })) });
            }
        }
        let all = async {
            while let Some(answer) = answers.next().await {
                answer?;
            }
            Ok(())
        };
        let result = timeout(within, all).await;
        result.unwrap_or_else(|_| Err(HookError::TooSlow(answers.len(), within.as_millis())))
    }
}

/// One that is connected.
struct Process {
    pid: i32,
    reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

/// What a process has done that was asked nothing.
#[derive(Debug, PartialEq, Eq)]
enum Unasked {
    Nothing,
    HungUp,
    Spoke,
}

impl Process {
    async fn serve(mut self, mut questions: mpsc::Receiver<Question>) {
        if self.writer.write_all(GREETING.as_bytes()).await.is_err() {
            return has_left(questions).await;
        }
        loop {
            let question = tokio::select! {
                question = questions.recv() => question,
                // This is how its end is noticed. What it says instead waits for the next question, to spoil that.
                said = self.reader.fill_buf() => match said {
                    Ok([_, ..]) => questions.recv().await,
                    _ => return has_left(questions).await,
                },
            };
            let Some((line, answer)) = question else { return };
            let result = match self.unasked() {
                Unasked::Nothing => self.ask(&line).await,
                // One that ended before it was asked has nothing to say.
                Unasked::HungUp => Ok(()),
                Unasked::Spoke => {
                    Err(HookError::Nonsense { pid: self.pid, what: "it came before the question".into() })
                }
            };
            let lost = matches!(result, Err(HookError::HungUp { .. } | HookError::Nonsense { .. }));
            let _ = answer.send(result);
            if lost {
                return;
            }
        }
    }

    /// Asked of the kernel, since the news may still be on its way through the runtime: what is there before the question
    /// is not to be taken for its answer.
    fn unasked(&self) -> Unasked {
        if !self.reader.buffer().is_empty() {
            return Unasked::Spoke;
        }
        let socket: &UnixStream = self.reader.get_ref().as_ref();
        match recv(socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
            Ok(1..) => Unasked::Spoke,
            Err(Errno::EAGAIN | Errno::EINTR) => Unasked::Nothing,
            Ok(0) | Err(_) => Unasked::HungUp,
        }
    }

    async fn ask(&mut self, line: &str) -> Result<(), HookError> {
        let pid = self.pid;
        let mut answer = String::new();
        let asked = async {
            self.writer.write_all(line.as_bytes()).await?;
            (&mut self.reader).take(MAX_ANSWER).read_line(&mut answer).await
        };
        match asked.await {
            Ok(read) if read > 0 && answer.ends_with('\n') => {}
            Ok(0) | Err(_) => return Err(HookError::HungUp { pid }),
            Ok(_) => return Err(HookError::Nonsense { pid, what: "it does not end".into() }),
        }
        let answer: Answer =
            serde_json::from_str(&answer).map_err(|e| HookError::Nonsense { pid, what: e.to_string() })?;
        match answer.ok {
            true => Ok(()),
            false => Err(HookError::Failed { pid, error: answer.error }),
        }
    }
}

/// Nobody is there who could be asked.
async fn has_left(mut questions: mpsc::Receiver<Question>) {
    questions.close();
    while let Some((_, answer)) = questions.recv().await {
        let _ = answer.send(Ok(()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(10);

    async fn registered(path: &Path) -> BufReader<UnixStream> {
        let mut stream = BufReader::new(UnixStream::connect(path).await.unwrap());
        let mut greeting = String::new();
        stream.read_line(&mut greeting).await.unwrap();
        assert_eq!(greeting, GREETING);
        stream
    }

    async fn answered(mut stream: BufReader<UnixStream>, answer: &'static str) -> (String, BufReader<UnixStream>) {
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        stream.write_all(answer.as_bytes()).await.unwrap();
        (line, stream)
    }

    #[tokio::test]
    async fn all_who_registered_are_asked_and_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let hooks = Hooks::default();
        hooks.listen(&path).unwrap();
        hooks.run(&Event::BeforeSnapshot, LONG).await.unwrap();

        let (one, two) = (registered(&path).await, registered(&path).await);
        let event = Event::BeforeSnapshot;
        let (result, (line, one), (_, two)) =
            tokio::join!(hooks.run(&event, LONG), answered(one, "{\"ok\":true}\n"), answered(two, "{\"ok\":true}\n"));
        result.unwrap();
        assert_eq!(line, "{\"event\":\"before-snapshot\"}\n");

        let env = BTreeMap::from([("A", "b=\"c\"")]);
        let event = Event::AfterRestore { env, epoch: "e", hostname: "h" };
        let refusal = "{\"ok\":false,\"error\":\"no database\"}\n";
        let (result, (line, _one), (_, two)) =
            tokio::join!(hooks.run(&event, LONG), answered(one, "{\"ok\":true}\n"), answered(two, refusal));
        let text = result.unwrap_err().to_string();
        assert!(text.contains(&std::process::id().to_string()) && text.ends_with("failed: no database"), "{text}");
        let asked: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(asked["env"]["A"], "b=\"c\"");

        let (result, _) = tokio::join!(hooks.run(&event, Duration::from_millis(50)), answered(two, "{\"ok\":true}\n"));
        assert!(matches!(result, Err(HookError::TooSlow(1, 50))), "{result:?}");
    }

    #[tokio::test]
    async fn who_hangs_up_or_talks_nonsense_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let hooks = Hooks::default();
        hooks.listen(&path).unwrap();
        let one = registered(&path).await;
        let event = Event::BeforeSnapshot;
        let (result, _) = tokio::join!(hooks.run(&event, LONG), answered(one, "yes\n"));
        assert!(matches!(result, Err(HookError::Nonsense { .. })), "{result:?}");
        let mut other = registered(&path).await;
        let leaves = async {
            other.read_line(&mut String::new()).await.unwrap();
            drop(other);
        };
        let (result, ()) = tokio::join!(hooks.run(&event, LONG), leaves);
        assert!(matches!(result, Err(HookError::HungUp { .. })), "{result:?}");
        // And is no longer asked.
        hooks.run(&event, LONG).await.unwrap();
        drop(registered(&path).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
        hooks.run(&event, LONG).await.unwrap();
    }

    #[tokio::test]
    async fn who_speaks_unasked_spoils_the_next_question() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let hooks = Hooks::default();
        hooks.listen(&path).unwrap();
        let event = Event::BeforeSnapshot;
        // Noticed or not by the time it is asked; and what came first would do as an answer.
        for early in [true, false] {
            let mut one = registered(&path).await;
            one.write_all(b"{\"ok\":true}\n").await.unwrap();
            if early {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let result = hooks.run(&event, LONG).await;
            assert!(matches!(result, Err(HookError::Nonsense { .. })), "{result:?}");
        }
        // The answer to the next question, with that to this one.
        let one = registered(&path).await;
        let (result, (_, _one)) =
            tokio::join!(hooks.run(&event, LONG), answered(one, "{\"ok\":true}\n{\"ok\":true}\n"));
        result.unwrap();
        let result = hooks.run(&event, LONG).await;
        assert!(matches!(result, Err(HookError::Nonsense { .. })), "{result:?}");
    }

    #[tokio::test]
    async fn a_question_that_nobody_answers_is_not_answered() {
        let hooks = Hooks::default();
        let (ask, mut questions) = mpsc::channel(1);
        hooks.registry().processes.insert(1, (7, ask));
        let lost = async { drop(questions.recv().await.unwrap()) };
        let (result, ()) = tokio::join!(hooks.run(&Event::BeforeSnapshot, LONG), lost);
        assert!(matches!(result, Err(HookError::HungUp { pid: 7 })), "{result:?}");

        // But one that had hung up before has no hooks, be the question on its way or not.
        let (ask, questions) = mpsc::channel(1);
        hooks.registry().processes.insert(1, (7, ask));
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let (reader, writer) = ours.into_split();
        let process = Process { pid: 7, reader: BufReader::new(reader), writer };
        let (result, ()) = tokio::join!(hooks.run(&Event::BeforeSnapshot, LONG), process.serve(questions));
        result.unwrap();
    }
}
