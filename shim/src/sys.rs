//! What has to happen between fork and exec. With `vmm/kvm/sys.rs` the only `unsafe` there is.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sched::{CloneFlags, setns},
    sys::{prctl, signal::Signal},
    unistd,
};
use seccompiler::BpfProgram;
use tokio::process::Command;

/// What a child does before exec; everything is prepared, since after fork only async-signal-safe calls are allowed.
#[derive(Debug)]
pub(crate) struct BeforeExec {
    /// Open `cgroup.procs` files, which the child joins.
    pub cgroups: Vec<OwnedFd>,
    /// Descriptors the program gets, under their present numbers.
    pub keep: Vec<OwnedFd>,
    /// Judges the program's system calls, and those of everything it starts.
    pub filter: Option<BpfProgram>,
}

/// Installs `before` in `command`. The child also gets a session of its own, so that a terminal's signals pass it
/// by, and dies with the thread that forks it: spawn only from the shim's main thread.
pub(crate) fn before_exec(command: &mut Command, before: BeforeExec) {
    let parent = unistd::getpid();
    let run = move || -> io::Result<()> {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // The parent may have died before the line above.
        if unistd::getppid() != parent {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        unistd::setsid()?;
        for procs in &before.cgroups {
            unistd::write(procs, b"0")?;
        }
        close_others_on_exec();
        for fd in &before.keep {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        before.filter.as_ref().map_or(Ok(()), install)
    };
    // SAFETY: the closure only makes direct system calls on data that was allocated before the fork; it neither
    // allocates nor takes locks (nix, seccompiler and io::Error::from(errno | kind) do not).
    unsafe { command.pre_exec(run) };
}

/// Lets a child live on without this process: in a session of its own, with nothing of ours open but its stdio, and in
/// the mount namespace `home`, since what is mounted in ours would otherwise stay for as long as the child.
pub(crate) fn detach(command: &mut Command, home: Option<&'static File>) {
    let run = move || -> io::Result<()> {
        unistd::setsid()?;
        if let Some(home) = home {
            setns(home, CloneFlags::CLONE_NEWNS)?;
        }
        close_others_on_exec();
        Ok(())
    };
    // SAFETY: the closure only makes direct system calls, on a descriptor that is never closed.
    unsafe { command.pre_exec(run) };
}

/// Lets other processes go first, and those it starts from now on.
pub(crate) fn stand_back() -> io::Result<()> {
    const NICE: libc::c_int = 10;
    // SAFETY: takes numbers only.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Last, for it is not known to let the other calls through.
fn install(filter: &BpfProgram) -> io::Result<()> {
    seccompiler::apply_filter(filter).map_err(|error| match error {
        seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
        _ => io::ErrorKind::InvalidInput.into(),
    })
}

/// Whatever else is open stays here: a descriptor that somebody forgot to mark is not the VMM's business. Kernels before
/// 5.11 do not know the call, and there the marks set at opening have to do.
fn close_others_on_exec() {
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: a plain system call that only sets the close-on-exec flag of this process's own descriptors.
    unsafe { libc::close_range(3, libc::c_uint::MAX, flags) };
}

/// The number under which `fd` is known to a child that keeps it.
pub(crate) fn number(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}
