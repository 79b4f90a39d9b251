//! The child between clone and exec.
//!
//! Only system calls here: no allocation, no lock, no panic. Whatever needs memory was put into the plan.

use std::{
    ffi::CStr,
    os::fd::RawFd,
    ptr::{null, null_mut},
};

use libc::{c_char, c_int, c_long, c_uint};

use super::{
    op::{Op, Plan, Program},
    steps::{
        AT_RECURSIVE, OPEN_TREE_CLONE, attach, drop_bounding, enter, mask, read_only, set_attributes, set_capabilities,
        stdio, terminal, untouched, write,
    },
};

/// The bytes of a [`Report`] on the pipe.
pub const REPORT_LEN: usize = 12;

/// What a child tells its parent. That the pipe closes without one means that the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// Parked before exec. The number is the child's descriptor of the terminal, if it opened one.
    Ready { terminal: Option<RawFd> },
    /// The number of the step (one past the last: the program itself), and why.
    Failed { step: usize, errno: c_int },
}

impl Report {
    fn encode(self) -> [u8; REPORT_LEN] {
        let (kind, a, b) = match self {
            Self::Ready { terminal } => (1u32, terminal.unwrap_or(-1), 0),
            Self::Failed { step, errno } => (2, step as i32, errno),
        };
        let mut bytes = [0; REPORT_LEN];
        let words = [kind.to_ne_bytes(), a.to_ne_bytes(), b.to_ne_bytes()];
        for (to, from) in bytes.iter_mut().zip(words.iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// Reads what the child wrote; `None` if it is not a report.
    pub fn decode(bytes: [u8; REPORT_LEN]) -> Option<Self> {
        let [k0, k1, k2, k3, a0, a1, a2, a3, b0, b1, b2, b3] = bytes;
        let a = i32::from_ne_bytes([a0, a1, a2, a3]);
        let errno = i32::from_ne_bytes([b0, b1, b2, b3]);
        match u32::from_ne_bytes([k0, k1, k2, k3]) {
            1 => Some(Self::Ready { terminal: (a >= 0).then_some(a) }),
            2 => Some(Self::Failed { step: usize::try_from(a).ok()?, errno }),
            _ => None,
        }
    }
}

/// Everything the child works with, allocated by the parent.
pub(super) struct Context<'a> {
    pub plan: &'a Plan,
    /// NULL-terminated.
    pub argv: &'a [*const c_char],
    /// NULL-terminated.
    pub envp: &'a [*const c_char],
    pub slots: &'a mut [RawFd],
    pub report: RawFd,
    /// The descriptors that survive the clone besides stdio, ascending.
    pub keep: &'a [RawFd],
    pub terminal: Option<RawFd>,
}

pub(super) type Step = Result<(), c_int>;

fn errno() -> c_int {
    // SAFETY: the location is the calling thread's own.
    unsafe { *libc::__errno_location() }
}

pub(super) fn check(result: impl Into<c_long>) -> Result<c_long, c_int> {
    let result = result.into();
    if result < 0 { Err(errno()) } else { Ok(result) }
}

/// An error that is no news.
fn unless(step: Result<c_long, c_int>, fine: c_int) -> Step {
    match step {
        Err(e) if e != fine => Err(e),
        _ => Ok(()),
    }
}

/// Runs the plan; never returns.
pub(super) fn run(mut context: Context<'_>) -> ! {
    let plan = context.plan;
    reset_signals();
    close_others(context.keep);
    for (step, op) in plan.ops.iter().enumerate() {
        if let Err(errno) = carry_out(op, &mut context) {
            report(context.report, Report::Failed { step, errno });
            exit(125);
        }
    }
    let Some(program) = &plan.program else { exit(0) };
    let run = any_of(program, |path| {
        // SAFETY: the arrays end with NULL and their strings live in the plan.
        unsafe { libc::execve(path.as_ptr(), context.argv.as_ptr(), context.envp.as_ptr()) };
        Err(errno())
    });
    unfit(&context, run.err().unwrap_or_default())
}

/// The program does not run.
fn unfit(context: &Context<'_>, errno: c_int) -> ! {
    report(context.report, Report::Failed { step: context.plan.ops.len(), errno });
    exit(if errno == libc::ENOENT { 127 } else { 126 })
}

/// Tries the candidates as execvp does: one that is missing or not allowed does not end the search.
fn any_of(program: &Program, attempt: impl Fn(&CStr) -> Step) -> Step {
    let mut verdict = libc::ENOENT;
    for path in &program.candidates {
        match attempt(path) {
            Ok(()) => return Ok(()),
            Err(libc::ENOENT | libc::ENOTDIR) => {}
            Err(libc::EACCES) => verdict = libc::EACCES,
            Err(other) => return Err(other),
        }
    }
    Err(verdict)
}

/// Whether this may be run by who this is, as far as can be told without running it. It has its capabilities by now, so
/// they count: not access(2), which asks for the real user without any. What cannot be told (faccessat2 is of
/// Linux 5.8) passes for there.
fn there(path: &CStr) -> Step {
    // SAFETY: all fields are numbers.
    let mut found: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the string ends with NUL and lives in the plan, the structure outlives the call.
    let looked = unsafe {
        let how = (libc::AT_FDCWD, libc::X_OK, libc::AT_EACCESS);
        let may = check(libc::syscall(libc::SYS_faccessat2, how.0, path.as_ptr(), how.1, how.2));
        may.and(check(libc::stat(path.as_ptr(), &raw mut found)))
    };
    match looked {
        // A directory may be "run", too, and is refused as execve(2) would.
        Ok(_) if found.st_mode & libc::S_IFMT == libc::S_IFDIR => Err(libc::EACCES),
        Ok(_) | Err(libc::ENOSYS) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn exit(code: c_int) -> ! {
    // SAFETY: _exit runs no handlers of the parent's.
    unsafe { libc::_exit(code) }
}

fn report(fd: RawFd, report: Report) {
    let bytes = report.encode();
    // SAFETY: the buffer outlives the call. The pipe has room, at most two reports are ever sent.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// The parent's handlers must not run here (they would write to its descriptors), and an ignored SIGPIPE would be
/// inherited by the program.
fn reset_signals() {
    // The kernel's sigaction: handler, flags, (restorer,) mask; all zero is the default action. Not the C library's
    // call, which keeps two signals for itself.
    let default = [0u64; 4];
    // SAFETY: plain system calls on valid local memory; signals that cannot be changed are refused.
    unsafe {
        for signal in 1..=64 {
            let old = null_mut::<u64>();
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), old, size_of::<u64>());
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, null_mut());
    }
}

/// A child may be parked for long, and must not keep open what belongs to other processes.
fn close_others(keep: &[RawFd]) {
    let mut from: c_uint = 3;
    for fd in keep.iter().map(|fd| *fd as c_uint).chain([c_uint::MAX]) {
        if fd > from {
            // SAFETY: the descriptors closed are copies that nothing in this process uses any more.
            unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0 as c_uint) };
        }
        from = from.max(fd.saturating_add(1));
    }
}

fn carry_out(op: &Op, context: &mut Context<'_>) -> Step {
    // SAFETY: all pointers are NUL-terminated strings or buffers of the plan, which outlive the calls; the calls
    // change nothing but this process, its namespaces and what the operation names.
    unsafe {
        match op {
            Op::Join { pidfd, namespaces } => check(libc::setns(*pidfd, *namespaces))?,
            Op::Unshare(flags) => check(libc::unshare(*flags))?,
            Op::PrivateMounts => {
                let root = c"/".as_ptr();
                check(libc::mount(null(), root, null(), libc::MS_REC | libc::MS_PRIVATE, null()))?
            }
            Op::HostName(name) => check(libc::sethostname(name.as_ptr(), name.count_bytes()))?,
            Op::DomainName(name) => check(libc::setdomainname(name.as_ptr(), name.count_bytes()))?,
            Op::Write { path, data } => return write(path, data.to_bytes()),
            Op::TakeTree { path, slot } => {
                let flags = OPEN_TREE_CLONE | AT_RECURSIVE | libc::O_CLOEXEC as c_uint;
                let fd = check(libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags))?;
                *context.slots.get_mut(*slot).ok_or(libc::EINVAL)? = fd as RawFd;
                fd
            }
            Op::Detach(path) => {
                libc::umount2(path.as_ptr(), libc::MNT_DETACH);
                0
            }
            Op::EnterRoot { slot } => {
                let tree = *context.slots.get(*slot).ok_or(libc::EINVAL)?;
                attach(tree, c"/")?;
                check(libc::fchdir(tree))?;
                check(libc::chroot(c".".as_ptr()))?;
                check(libc::close(tree))?
            }
            Op::Attach { slot, target, attributes } => {
                let tree = *context.slots.get(*slot).ok_or(libc::EINVAL)?;
                attach(tree, target)?;
                if *attributes != 0 {
                    set_attributes(target, AT_RECURSIVE, *attributes)?;
                }
                check(libc::close(tree))?
            }
            Op::Untouched(path) => return untouched(path),
            Op::Dir(path) => return unless(check(libc::mkdir(path.as_ptr(), 0o755)), libc::EEXIST),
            Op::File(path) => {
                let fd = libc::open(path.as_ptr(), libc::O_CREAT | libc::O_CLOEXEC | libc::O_NONBLOCK, 0o644);
                check(libc::close(check(fd)? as c_int))?
            }
            Op::Mount { source, target, kind, flags, data } => {
                let data = if data.is_empty() { null() } else { data.as_ptr().cast() };
                check(libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), *flags, data))?
            }
            Op::Node { path, mode, device } => {
                unless(check(libc::mknod(path.as_ptr(), *mode, *device)), libc::EEXIST)?;
                // The umask is the agent's.
                check(libc::chmod(path.as_ptr(), *mode & 0o7777))?
            }
            Op::Symlink { target, path } => {
                return unless(check(libc::symlink(target.as_ptr(), path.as_ptr())), libc::EEXIST);
            }
            Op::Mask(path) => return mask(path),
            Op::ReadOnly(path) => return read_only(path),
            Op::Terminal { uid, console } => return terminal(context, *uid, *console),
            Op::Stdio(fds) => return stdio(*fds),
            Op::Session => check(libc::setsid())?,
            Op::ControllingTerminal => check(libc::ioctl(0, libc::TIOCSCTTY, 0))?,
            Op::Limit { resource, soft, hard } => {
                let limit = libc::rlimit64 { rlim_cur: *soft, rlim_max: *hard };
                check(libc::syscall(libc::SYS_prlimit64, 0, *resource, &raw const limit, null_mut::<u8>()))?
            }
            Op::Umask(mask) => {
                libc::umask(*mask);
                0
            }
            Op::MakeCwd(path) => {
                libc::mkdir(path.as_ptr(), 0o755);
                0
            }
            Op::Cwd(path) => return enter(path),
            Op::Bounding(keep) => return drop_bounding(*keep),
            Op::User { uid, gid, groups } => {
                check(libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0))?;
                // Raw calls: the C library's own would wait for threads that do not exist here.
                check(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
                check(libc::syscall(libc::SYS_setresgid, *gid, *gid, *gid))?;
                check(libc::syscall(libc::SYS_setresuid, *uid, *uid, *uid))?;
                check(libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0))?
            }
            Op::Capabilities(sets) => return set_capabilities(sets),
            Op::NoNewPrivileges => check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?,
            Op::Park { start } => {
                // What cannot run is told while the container can still be refused as a whole.
                if let Some(Err(errno)) = context.plan.program.as_ref().map(|program| any_of(program, there)) {
                    unfit(context, errno);
                }
                report(context.report, Report::Ready { terminal: context.terminal });
                let mut go = 0u8;
                // End of file: nobody will start this process any more.
                match check(libc::read(*start, (&raw mut go).cast(), 1) as c_long)? {
                    1 => 0,
                    _ => exit(125),
                }
            }
        };
    }
    Ok(())
}
