//! Starting a child.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr::null,
};

use libc::c_char;

use super::{
    child::{self, Context},
    op::Plan,
    wrap::Pidfd,
};

/// A child that has been started.
#[derive(Debug)]
pub struct Child {
    pub pid: i32,
    pub pidfd: Pidfd,
}

/// Which namespaces a child gets at birth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Namespaces {
    /// The parent's.
    Same,
    /// A container's own: PID, mount, and those that it does not share with its pod.
    New {
        /// Whether it has one of IPC of its own.
        ipc: bool,
        /// Whether it has one of names of its own.
        uts: bool,
    },
}

// libc has it in a type it does not fit.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([null()]).collect()
}

/// Clones a child that carries out the plan in the given cgroup. It reports on `report`.
///
/// # Errors
/// If the kernel refuses the clone.
pub fn spawn(plan: &Plan, namespaces: Namespaces, cgroup: BorrowedFd<'_>, report: BorrowedFd<'_>) -> io::Result<Child> {
    let (args, env) = plan.program.as_ref().map(|program| (&*program.args, &*program.env)).unwrap_or_default();
    let (argv, envp) = (pointers(args), pointers(env));
    let mut slots = vec![-1; plan.slots];
    let mut keep: Vec<RawFd> = plan.descriptors().chain([report.as_raw_fd()]).collect();
    keep.sort_unstable();
    let mut pidfd: RawFd = -1;
    let flags = match namespaces {
        Namespaces::Same => 0,
        Namespaces::New { ipc, uts } => {
            let own = |flag, wanted| if wanted { flag } else { 0 };
            let shared = own(libc::CLONE_NEWIPC, ipc) | own(libc::CLONE_NEWUTS, uts);
            libc::CLONE_NEWPID | libc::CLONE_NEWNS | shared
        }
    };
    // SAFETY: all fields are numbers, for which zero is "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags as u64 | libc::CLONE_PIDFD as u64 | CLONE_INTO_CGROUP;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM and a stack this is a fork; the child only runs `child::run`, which allocates
    // nothing, takes no lock and never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match pid {
        0 => child::run(Context {
            plan,
            argv: &argv,
            envp: &envp,
            slots: &mut slots,
            report: report.as_raw_fd(),
            keep: &keep,
            terminal: None,
        }),
        pid if pid < 0 => Err(io::Error::last_os_error()),
        pid => {
            // SAFETY: the kernel stored a new descriptor there, and nobody else knows it.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Child { pid: pid as i32, pidfd: Pidfd::from(pidfd) })
        }
    }
}
