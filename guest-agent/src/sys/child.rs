//! The child between clone and exec.
//!
//! Only system calls here: no allocation, no lock, no panic. Whatever needs memory was put into the plan.

use std::{
    ffi::CStr,
    os::fd::RawFd,
    ptr::{null, null_mut},
};

use libc::{c_char, c_int, c_long, c_uint};

use super::op::{CapabilitySets, Op, Plan};

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

type Step = Result<(), c_int>;

fn errno() -> c_int {
    // SAFETY: the location is the calling thread's own.
    unsafe { *libc::__errno_location() }
}

fn check(result: impl Into<c_long>) -> Result<c_long, c_int> {
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
    let errno = exec(&context);
    report(context.report, Report::Failed { step: plan.ops.len(), errno });
    exit(if errno == libc::ENOENT { 127 } else { 126 })
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
    // SAFETY: plain system calls on valid local memory; signals that cannot be changed are refused.
    unsafe {
        for signal in 1..=64 {
            libc::signal(signal, libc::SIG_DFL);
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

/// Tries the candidates as execvp does: one that is missing or not allowed does not end the search.
fn exec(context: &Context<'_>) -> c_int {
    let mut verdict = libc::ENOENT;
    for path in &context.plan.program.candidates {
        // SAFETY: the arrays end with NULL and their strings live in the plan.
        unsafe { libc::execve(path.as_ptr(), context.argv.as_ptr(), context.envp.as_ptr()) };
        match errno() {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => verdict = libc::EACCES,
            other => return other,
        }
    }
    verdict
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
            Op::Attach { slot, target, read_only } => {
                let tree = *context.slots.get(*slot).ok_or(libc::EINVAL)?;
                attach(tree, target)?;
                if *read_only {
                    set_read_only(target, AT_RECURSIVE)?;
                }
                check(libc::close(tree))?
            }
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

// Missing from libc for the C libraries used here.
const OPEN_TREE_CLONE: c_uint = 1;
const AT_RECURSIVE: c_uint = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 4;
const MOUNT_ATTR_RDONLY: u64 = 1;

#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

fn attach(tree: RawFd, target: &CStr) -> Step {
    // SAFETY: the strings are NUL-terminated.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree,
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    check(result).map(drop)
}

fn set_read_only(path: &CStr, flags: c_uint) -> Step {
    let attr = MountAttr { set: MOUNT_ATTR_RDONLY, clear: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the structure is the kernel's mount_attr, of the size passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    check(result).map(drop)
}

fn exists(path: &CStr) -> bool {
    // SAFETY: the string is NUL-terminated.
    unsafe { libc::access(path.as_ptr(), libc::F_OK) == 0 }
}

fn mask(path: &CStr) -> Step {
    if !exists(path) {
        return Ok(());
    }
    // SAFETY: all strings are NUL-terminated.
    unsafe {
        match check(libc::mount(c"/dev/null".as_ptr(), path.as_ptr(), null(), libc::MS_BIND, null())) {
            Err(libc::ENOTDIR) => {
                let (tmpfs, options) = (c"tmpfs".as_ptr(), c"size=0,mode=0755".as_ptr());
                check(libc::mount(tmpfs, path.as_ptr(), tmpfs, libc::MS_RDONLY, options.cast())).map(drop)
            }
            other => other.map(drop),
        }
    }
}

fn read_only(path: &CStr) -> Step {
    if !exists(path) {
        return Ok(());
    }
    // The root is a mount already; a second one on top of it would not be the process's root.
    if path != c"/" {
        // SAFETY: the string is NUL-terminated.
        check(unsafe { libc::mount(path.as_ptr(), path.as_ptr(), null(), libc::MS_BIND | libc::MS_REC, null()) })?;
        return set_read_only(path, AT_RECURSIVE);
    }
    set_read_only(path, 0)
}

fn write(path: &CStr, data: &[u8]) -> Step {
    // SAFETY: the string is NUL-terminated, the buffer lives through the call.
    unsafe {
        let fd = check(libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC))? as c_int;
        let written = check(libc::write(fd, data.as_ptr().cast(), data.len()) as c_long);
        libc::close(fd);
        written.map(drop)
    }
}

/// The terminal is one of the container's own devpts, so that it has a name there.
fn terminal(context: &mut Context<'_>, uid: u32, console: bool) -> Step {
    // SAFETY: plain system calls on descriptors made here and NUL-terminated strings.
    unsafe {
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK;
        let master = check(libc::open(c"/dev/ptmx".as_ptr(), flags))? as c_int;
        let unlock: c_int = 0;
        check(libc::ioctl(master, libc::TIOCSPTLCK, &raw const unlock))?;
        let peer_flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        let slave = check(libc::ioctl(master, libc::TIOCGPTPEER, peer_flags))? as c_int;
        check(libc::fchown(slave, uid, u32::MAX))?;
        if console {
            let tree = libc::syscall(
                libc::SYS_open_tree,
                slave,
                c"".as_ptr(),
                OPEN_TREE_CLONE | libc::AT_EMPTY_PATH as c_uint | libc::O_CLOEXEC as c_uint,
            );
            let tree = check(tree)? as c_int;
            attach(tree, c"/dev/console")?;
            libc::close(tree);
        }
        stdio([slave; 3])?;
        context.terminal = Some(master);
    }
    Ok(())
}

fn stdio(fds: [RawFd; 3]) -> Step {
    for (number, fd) in fds.into_iter().enumerate() {
        // SAFETY: the descriptors are the parent's, and above 2 since its own stdio is open.
        check(unsafe { libc::dup2(fd, number as c_int) })?;
    }
    Ok(())
}

/// Refuses a directory outside the root, into which a leaked descriptor could lead.
fn enter(path: &CStr) -> Step {
    let mut name = [0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer is as long as said.
    unsafe {
        check(libc::chdir(path.as_ptr()))?;
        check(libc::syscall(libc::SYS_getcwd, name.as_mut_ptr(), name.len()))?;
    }
    if name.first() == Some(&b'/') { Ok(()) } else { Err(libc::EACCES) }
}

fn drop_bounding(keep: u64) -> Step {
    for capability in 0..64u64 {
        if keep & (1 << capability) != 0 {
            continue;
        }
        // SAFETY: takes numbers only. EINVAL: one past the last capability of this kernel.
        let result = check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) });
        if result == Err(libc::EINVAL) {
            break;
        }
        result?;
    }
    Ok(())
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

fn set_capabilities(sets: &CapabilitySets) -> Step {
    const VERSION_3: u32 = 0x2008_0522;
    let header = CapHeader { version: VERSION_3, pid: 0 };
    let half = |shift: u32| CapData {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: header and data have the layout of version 3, which takes two data structures.
    unsafe {
        check(libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()))?;
        check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))?;
        for capability in (0..64u64).filter(|c| sets.ambient & (1 << c) != 0) {
            check(libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0))?;
        }
    }
    Ok(())
}
