//! What has to happen between fork and exec, and other direct calls. With `vmm/kvm/sys.rs` the only `unsafe` there is.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
    ptr,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, FdFlag, fcntl},
    mount::MsFlags,
    sched::{CloneFlags, setns, unshare},
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
    /// Where it is on the network.
    pub network: Network,
    /// Judges the program's system calls, and those of everything it starts.
    pub filter: Option<BpfProgram>,
}

/// A network namespace.
#[derive(Debug)]
pub(crate) enum Network {
    /// The parent's.
    Same,
    /// One that nothing is in, not even a loopback that is up.
    Own,
    /// This one.
    Of(OwnedFd),
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
        match &before.network {
            Network::Same => {}
            Network::Own => unshare(CloneFlags::CLONE_NEWNET)?,
            Network::Of(namespace) => setns(namespace, CloneFlags::CLONE_NEWNET)?,
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
pub(crate) fn detach(command: &mut std::process::Command, home: Option<&'static File>) {
    let run = move || -> io::Result<()> {
        unistd::setsid()?;
        if let Some(home) = home {
            setns(home, CloneFlags::CLONE_NEWNS)?;
        }
        close_others_on_exec();
        Ok(())
    };
    // SAFETY: the closure only makes direct system calls, on a descriptor that is never closed.
    unsafe { std::os::unix::process::CommandExt::pre_exec(command, run) };
}

/// Whether this is one: ioctl_nsfs(2), since Linux 4.11.
pub(crate) fn is_network_namespace(file: &OwnedFd) -> bool {
    // SAFETY: takes a descriptor and no argument; other files refuse it.
    unsafe { libc::ioctl(file.as_raw_fd(), libc::NS_GET_NSTYPE) == libc::CLONE_NEWNET }
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

/// Sets flags on the mount behind `tree` and on all below it: mount_setattr(2), since Linux 5.12.
pub(crate) fn restrict_tree(tree: &OwnedFd, flags: MsFlags) -> nix::Result<()> {
    let attributes = [
        (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
        (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
        (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
        (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
    ];
    let set = attributes.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, set)| set).sum();
    let attr = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let whole = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is NUL-terminated, and the structure the kernel's mount_attr, of the size passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            whole,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result).map(drop)
}

/// Keeps to one heap, and gives large blocks back to the kernel at once. Each thread would else have a heap of its own, of which
/// what it had touched stays; and threads there are, for files and for looking up snapshots.
pub(crate) fn bound_malloc() {
    // SAFETY: takes numbers only.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 10);
    }
}

/// Gives back what the start of a pod has used of the heap.
pub(crate) fn trim_heap() {
    // SAFETY: takes a number only.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

/// Gives back what is mapped of this program's code and constants, and of its libraries': what is needed again is mapped again, from
/// the page cache. To start a pod takes most of the program, to watch over one takes little of it, and there is a shim for
/// each.
pub(crate) fn unmap_code() {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    for (start, end) in unchanged(&smaps) {
        let mapped = ptr::with_exposed_provenance_mut(start);
        // SAFETY: a private mapping of a file, that cannot be written through and has no page of its own (proc(5), Anonymous):
        // all of its pages are the file's, and come again from there.
        unsafe { libc::madvise(mapped, end - start, libc::MADV_DONTNEED) };
    }
}

/// Where files are mapped for reading, and no page differs from the file: relocated data is not among them.
fn unchanged(smaps: &str) -> Vec<(usize, usize)> {
    let (mut found, mut mapping) = (Vec::new(), None);
    for line in smaps.lines() {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        match words[..] {
            ["Anonymous:", "0", "kB"] => found.extend(mapping.take()),
            ["Anonymous:", ..] => mapping = None,
            [range, mode, _, _, _, path, ..] if range.contains('-') => {
                mapping = (matches!(mode, "r-xp" | "r--p") && path.starts_with('/'))
                    .then(|| range.split_once('-'))
                    .flatten()
                    .and_then(|(start, end)| {
                        Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
                    });
            }
            _ => {}
        }
    }
    found
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

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    /// The mapping of this program's code, and what of it is resident, in KiB.
    fn code() -> (Range<usize>, u64) {
        let program = fs::read_link("/proc/self/exe").unwrap();
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = smaps.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        let is_code = |words: &Vec<&str>| words.get(1) == Some(&"r-xp") && words.last() == program.to_str().as_ref();
        let (start, end) = lines.find(is_code).unwrap()[0].split_once('-').unwrap();
        let resident = lines.find(|words| words[0] == "Rss:").unwrap()[1].parse().unwrap();
        let number = |hexadecimal| usize::from_str_radix(hexadecimal, 16).unwrap();
        (number(start)..number(end), resident)
    }

    #[test]
    fn only_what_is_as_in_its_file_is_given_back() {
        let smaps = "\
1000-2000 r-xp 00000000 fe:00 7 /bin/shim
Rss: 4 kB
Anonymous:             0 kB
2000-3000 r--p 00001000 fe:00 7 /bin/shim
Anonymous:             4 kB
3000-4000 rw-p 00002000 fe:00 7 /bin/shim
Anonymous:             0 kB
5000-6000 r--p 00000000 00:00 0 [vvar]
Anonymous:             0 kB
7000-8000 r--p 00000000 fe:00 9 /lib/a library
Anonymous:             0 kB
";
        assert_eq!(unchanged(smaps), [(0x1000, 0x2000), (0x7000, 0x8000)]);
    }

    #[test]
    fn code_that_was_given_back_still_runs() {
        let given_back = || {
            // All of it, or it would depend on the linker's order how much of it other pieces of 64 KiB bring along.
            for page in code().0.step_by(4096) {
                // SAFETY: mapped for reading for as long as the program runs.
                let _ = unsafe { ptr::with_exposed_provenance::<u8>(page).read_volatile() };
            }
            let (_, before) = code();
            unmap_code();
            (code().1, before)
        };
        // The other tests run meanwhile, and bring what they need back at once.
        let tries: Vec<_> = (0..100).map(|_| given_back()).collect();
        assert!(tries.iter().any(|(after, before)| *after < before / 2), "(after, before) in KiB: {tries:?}");
    }
}
