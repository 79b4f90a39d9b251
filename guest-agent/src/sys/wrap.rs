//! System calls that nix does not offer, made safe.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use libc::{c_int, c_uint};
use tokio::io::{Interest, unix::AsyncFd};

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A process that cannot be mistaken for another, whatever becomes of its number.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl From<OwnedFd> for Pidfd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Pidfd {
    /// Opens the process with this number.
    ///
    /// # Errors
    /// ESRCH if there is none.
    pub fn open(pid: i32) -> io::Result<Self> {
        // SAFETY: takes numbers only; the descriptor returned is new.
        unsafe {
            let fd = check(libc::syscall(libc::SYS_pidfd_open, pid, 0 as c_uint))?;
            Ok(Self(OwnedFd::from_raw_fd(fd as RawFd)))
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// ESRCH if the process has been reaped, EINVAL for a number that is no signal.
    pub fn signal(&self, signal: c_int) -> io::Result<()> {
        // SAFETY: a null siginfo asks for the ordinary one.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<libc::siginfo_t>(),
                0 as c_uint,
            )
        };
        check(result).map(drop)
    }

    /// Takes a copy of one of the process's descriptors.
    ///
    /// # Errors
    /// Of the kernel: no such process or descriptor.
    pub fn descriptor(&self, number: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: takes numbers only; the descriptor returned is new.
        unsafe {
            let fd = check(libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), number, 0 as c_uint))?;
            Ok(OwnedFd::from_raw_fd(fd as RawFd))
        }
    }
}

/// Reaps a child that has ended, if one has: its number, and how it ended as a shell tells it. Not by nix, which knows no
/// real-time signal and refuses to tell of a child that one of these killed, when it is reaped already.
///
/// # Errors
/// ECHILD where there are no children.
pub fn reap() -> io::Result<Option<(i32, u32)>> {
    loop {
        let mut status: c_int = 0;
        // SAFETY: stores an int.
        let pid = check(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG | libc::__WALL) }.into())? as i32;
        if pid == 0 {
            return Ok(None);
        }
        if libc::WIFEXITED(status) {
            return Ok(Some((pid, libc::WEXITSTATUS(status) as u32)));
        }
        if libc::WIFSIGNALED(status) {
            return Ok(Some((pid, 128 + libc::WTERMSIG(status) as u32)));
        }
    }
}

/// The namespace in which this process's own children are numbered, to return to.
///
/// # Errors
/// If /proc is not there.
pub fn init_pid_namespace() -> io::Result<File> {
    File::open("/proc/self/ns/pid")
}

/// Runs `action`, whose children are born in the PID namespace of `process`.
///
/// # Errors
/// Of joining it, or of `action`. That the way back fails is fatal, for every later child would be misplaced.
pub fn in_pid_namespace<T>(process: &Pidfd, own: &File, action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // SAFETY: changes where this thread's children are born, nothing of this process.
    check(unsafe { libc::setns(process.0.as_raw_fd(), libc::CLONE_NEWPID) }.into())?;
    let result = action();
    // SAFETY: as above.
    if let Err(error) = check(unsafe { libc::setns(own.as_raw_fd(), libc::CLONE_NEWPID) }.into()) {
        eprintln!("chsnap-agent: fatal: cannot return to the own PID namespace: {error}");
        std::process::exit(1);
    }
    result
}

/// Lets the runtime watch a descriptor.
///
/// # Errors
/// If its kind cannot be waited for.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd stays the same descriptor, and open, as long as it lives.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// How many bytes can be read at once.
///
/// # Errors
/// If the descriptor's kind does not know.
pub fn bytes_available(fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut count: c_int = 0;
    // SAFETY: FIONREAD stores an int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) }.into())?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// Sets the size of a terminal in characters.
///
/// # Errors
/// If it is none.
pub fn set_window_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads a winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into()).map(drop)
}

/// Unlocks what a ptmx gave.
///
/// # Errors
/// If it is no such thing.
pub fn open_terminal(master: BorrowedFd<'_>) -> io::Result<()> {
    let unlock: c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) }.into()).map(drop)
}

/// Opens the other side of a terminal.
///
/// # Errors
/// If it is none.
pub fn terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: takes flags; the descriptor returned is new.
    unsafe {
        let fd = check(libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags).into())?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// Mixes `bytes` into the kernel's random numbers, and counts them as such.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`, or without /dev/urandom.
pub fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    /// `_IOW('R', 0x03, int[2])`
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    // struct rand_pool_info: bits, bytes, and the bytes themselves.
    let number = |value: usize| c_int::try_from(value).map_err(|_| io::ErrorKind::InvalidInput);
    let mut info = Vec::with_capacity(8 + bytes.len());
    info.extend(number(bytes.len().saturating_mul(8))?.to_ne_bytes());
    info.extend(number(bytes.len())?.to_ne_bytes());
    info.extend(bytes);
    let random = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: the kernel reads the two numbers, with no regard to their alignment, and as many bytes as the second says,
    // all of which are there.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) }.into()).map(drop)
}

/// Has the kernel's random numbers seeded anew, from what was mixed in so far.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`, or without /dev/urandom.
pub fn reseed() -> io::Result<()> {
    /// `_IO('R', 0x07)`
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let random = File::options().write(true).open("/dev/urandom")?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }.into()).map(drop)
}

/// Gives large blocks back to the kernel at once: what the agent holds is held by every snapshot.
pub fn bound_malloc() {
    // SAFETY: takes numbers only.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
    }
}
