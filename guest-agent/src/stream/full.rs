//! Whether there is room for what somebody writes: who initialises with nobody to read may wait for that without end.

use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::OpenOptionsExt,
    },
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Channel, Kind};
use crate::sys;

impl Channel {
    /// Whether whoever writes to it has to wait for a reader.
    pub(super) fn is_full(&self) -> bool {
        match self.kind {
            // How much fits is the kernel's to know, since what is written in pieces takes more room: the other end is
            // asked. Not where nobody has that any more: a reader might take this one for a writer.
            Kind::Pipe => {
                let hung_up = seen(self.fd.as_fd(), PollFlags::POLLIN).is_none_or(|s| s.contains(PollFlags::POLLHUP));
                let own = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
                let peer = || File::options().write(true).custom_flags(libc::O_NONBLOCK).open(own).ok();
                !hung_up && peer().is_some_and(|peer| is_unwritable(peer.as_fd()))
            }
            Kind::Terminal => sys::terminal_peer(self.fd.as_fd()).is_ok_and(|peer| is_unwritable(peer.as_fd())),
            Kind::Tcp => false,
        }
    }
}

/// What holds of a descriptor now, if that can be said.
fn seen(fd: BorrowedFd<'_>, events: PollFlags) -> Option<PollFlags> {
    let mut fds = [PollFd::new(fd, events)];
    poll(&mut fds, PollTimeout::ZERO).ok()?;
    let [fd] = fds;
    fd.revents()
}

fn is_unwritable(fd: BorrowedFd<'_>) -> bool {
    seen(fd, PollFlags::POLLOUT).is_some_and(|seen| seen.is_empty())
}

#[cfg(test)]
mod tests {
    use nix::{
        fcntl::{FcntlArg, OFlag, fcntl},
        pty::openpty,
        unistd::{pipe, write},
    };

    use super::*;

    #[tokio::test]
    async fn a_writer_that_has_to_wait_is_seen() {
        // Of 3000 bytes, a page of the pipe has room for one.
        for size in [512, 3000] {
            let (read, pipe_end) = pipe().unwrap();
            let terminal = openpty(None, None).unwrap();
            for (ours, theirs, kind) in
                [(read, pipe_end, Kind::Pipe), (terminal.master, terminal.slave, Kind::Terminal)]
            {
                let channel = Channel::new(ours, kind).unwrap();
                assert!(!channel.is_full(), "{kind:?}");
                fcntl(&theirs, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
                while write(&theirs, &vec![b'x'; size]).is_ok() {}
                assert!(channel.is_full(), "{kind:?}, by {size}");
            }
        }
    }

    #[tokio::test]
    async fn a_look_is_no_writer() {
        let (ours, theirs) = pipe().unwrap();
        let channel = Channel::new(ours, Kind::Pipe).unwrap();
        write(&theirs, b"last").unwrap();
        let looked = async {
            // In the midst of it, and after its end.
            for writer in [Some(theirs), None] {
                tokio::task::yield_now().await;
                assert!(!channel.is_full());
                drop(writer);
            }
        };
        let read = async {
            assert_eq!(channel.read(100).await.unwrap(), b"last");
            tokio::time::timeout(std::time::Duration::from_secs(5), channel.read(100)).await.unwrap().unwrap()
        };
        let (rest, ()) = tokio::join!(read, looked);
        assert_eq!(rest, b"");
        assert!(!channel.is_full());
    }
}
