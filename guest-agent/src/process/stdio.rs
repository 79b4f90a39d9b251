//! Standard input, output and error: pipes, or a terminal.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    unistd::{Uid, fchown, pipe2},
};
use ttrpc::Code;

use crate::{
    error::Coded,
    stream::{Channel, Kind, StreamError, Streams},
};

/// Bytes of output that may wait for the shim. The kernel takes them as they come.
const PIPE: i32 = 256 << 10;

/// Which of them the shim wants.
#[derive(Debug, Clone, Copy)]
pub struct Wanted {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub terminal: bool,
}

impl From<&chsnap_protocol::agent::Stdio> for Wanted {
    fn from(stdio: &chsnap_protocol::agent::Stdio) -> Self {
        Self { stdin: stdio.stdin, stdout: stdio.stdout, stderr: stdio.stderr, terminal: stdio.terminal }
    }
}

/// The numbers of a process's streams; 0: none.
#[derive(Debug, Clone, Copy, Default)]
pub struct StreamIds {
    pub stdin: u64,
    pub stdout: u64,
    pub stderr: u64,
}

impl StreamIds {
    pub fn all(&self) -> impl Iterator<Item = u64> + use<> {
        [self.stdin, self.stdout, self.stderr].into_iter().filter(|id| *id != 0)
    }
}

/// Why there is no stdio.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    #[error("cannot make the process's stdio")]
    Make(#[source] io::Error),
    #[error("cannot open a stream for the process's stdio")]
    Stream(#[source] StreamError),
}

impl Coded for StdioError {
    fn code(&self) -> Code {
        match self {
            Self::Make(_) => Code::INTERNAL,
            Self::Stream(e) => e.code(),
        }
    }
}

/// The process's side.
#[derive(Debug)]
pub enum Ends {
    Pipes([OwnedFd; 3]),
    Terminal(OwnedFd),
}

impl Ends {
    pub fn fds(&self) -> [BorrowedFd<'_>; 3] {
        match self {
            Self::Pipes(fds) => fds.each_ref().map(OwnedFd::as_fd),
            Self::Terminal(fd) => [fd.as_fd(); 3],
        }
    }
}

/// Pipes where the shim wants them, /dev/null elsewhere. They belong to the process's user, who may open them again
/// through /dev/stdout.
///
/// # Errors
/// If the kernel refuses, or there are too many streams.
pub fn pipes(wanted: Wanted, uid: u32, streams: &Streams) -> Result<(StreamIds, Ends), StdioError> {
    let mut ids = StreamIds::default();
    let result = (|| {
        let stdin = match wanted.stdin {
            true => {
                let (theirs, ours) = pipe(uid, false)?;
                ids.stdin = streams.add_writer(ours).map_err(StdioError::Stream)?;
                theirs
            }
            false => null()?,
        };
        let output = |wanted, id: &mut u64| match wanted {
            true => {
                let (theirs, ours) = pipe(uid, true)?;
                *id = streams.add_reader(ours).map_err(StdioError::Stream)?;
                Ok(theirs)
            }
            false => null(),
        };
        let stdout = output(wanted.stdout, &mut ids.stdout)?;
        let stderr = output(wanted.stderr, &mut ids.stderr)?;
        Ok(Ends::Pipes([stdin, stdout, stderr]))
    })();
    match result {
        Ok(ends) => Ok((ids, ends)),
        Err(error) => {
            ids.all().for_each(|id| streams.close(id));
            Err(error)
        }
    }
}

/// The streams of a terminal whose master is `master`.
///
/// # Errors
/// If it cannot be waited for, or there are too many streams.
pub fn terminal(wanted: Wanted, master: OwnedFd, streams: &Streams) -> Result<(StreamIds, Arc<Channel>), StdioError> {
    let channel = Arc::new(Channel::new(master, Kind::Terminal).map_err(StdioError::Make)?);
    let mut ids = StreamIds::default();
    if wanted.stdin {
        ids.stdin = streams.add_writer(channel.clone()).map_err(StdioError::Stream)?;
    }
    if wanted.stdout {
        match streams.add_reader(channel.clone()) {
            Ok(id) => ids.stdout = id,
            Err(error) => {
                streams.close(ids.stdin);
                return Err(StdioError::Stream(error));
            }
        }
    }
    Ok((ids, channel))
}

/// The process's end and the agent's.
fn pipe(uid: u32, output: bool) -> Result<(OwnedFd, Arc<Channel>), StdioError> {
    let make = || -> io::Result<_> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        let (theirs, ours) = if output { (write, read) } else { (read, write) };
        if output {
            // One chunk a call then carries more. Where it may not grow, the kernel's default will do.
            let _ = fcntl(&ours, FcntlArg::F_SETPIPE_SZ(PIPE));
        }
        fchown(&theirs, Some(Uid::from_raw(uid)), None)?;
        Ok((theirs, Arc::new(Channel::new(ours, Kind::Pipe)?)))
    };
    make().map_err(StdioError::Make)
}

fn null() -> Result<OwnedFd, StdioError> {
    let open = OpenOptions::new().read(true).write(true).open("/dev/null");
    open.map(|file: File| file.into()).map_err(StdioError::Make)
}
