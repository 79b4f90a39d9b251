//! Whether there is room for what somebody writes: who initialises with nobody to read may wait for that without end.

use std::os::fd::AsFd;

use nix::{
    fcntl::{FcntlArg, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};

use super::{Channel, Kind};
use crate::sys;

impl Channel {
    /// Whether whoever writes to it has to wait for a reader.
    pub(super) fn is_full(&self) -> bool {
        match self.kind {
            Kind::Pipe => {
                let size = fcntl(self.fd.get_ref(), FcntlArg::F_GETPIPE_SZ).ok();
                let held = sys::bytes_available(self.fd.as_fd()).ok();
                // What does not fit into the last page has to wait.
                held.zip(size.and_then(|size| usize::try_from(size).ok()))
                    .is_some_and(|(held, size)| held + libc::PIPE_BUF > size)
            }
            // How much fits is the kernel's to know: its other end is asked.
            Kind::Terminal => {
                let Ok(peer) = sys::terminal_peer(self.fd.as_fd()) else { return false };
                let mut writable = [PollFd::new(peer.as_fd(), PollFlags::POLLOUT)];
                poll(&mut writable, PollTimeout::ZERO).is_ok_and(|ready| ready == 0)
            }
            Kind::Tcp => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::{
        fcntl::OFlag,
        pty::openpty,
        unistd::{pipe, write},
    };

    use super::*;

    #[tokio::test]
    async fn a_writer_that_has_to_wait_is_seen() {
        let (read, pipe_end) = pipe().unwrap();
        let terminal = openpty(None, None).unwrap();
        for (ours, theirs, kind) in [(read, pipe_end, Kind::Pipe), (terminal.master, terminal.slave, Kind::Terminal)] {
            let channel = Channel::new(ours, kind).unwrap();
            assert!(!channel.is_full(), "{kind:?}");
            fcntl(&theirs, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
            while write(&theirs, &[b'x'; 512]).is_ok() {}
            assert!(channel.is_full(), "{kind:?}");
        }
    }
}
