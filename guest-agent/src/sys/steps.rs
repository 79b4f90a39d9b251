//! The longer steps of a child. The same rules as in [`super::child`]: nothing but system calls.

use std::{ffi::CStr, os::fd::RawFd, ptr::null};

use libc::{c_int, c_long, c_uint};

use super::{
    child::{Context, Step, check},
    op::CapabilitySets,
};

// Missing from libc for the C libraries used here.
pub(super) const OPEN_TREE_CLONE: c_uint = 1;
pub(super) const AT_RECURSIVE: c_uint = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 4;
const MOUNT_ATTR_RDONLY: u64 = 1;

/// mount(2)'s flags that a mount can have beside its file system's, and those of mount_setattr(2).
pub const MOUNT_ATTRIBUTES: [(libc::c_ulong, u64); 4] =
    [(libc::MS_RDONLY, MOUNT_ATTR_RDONLY), (libc::MS_NOSUID, 2), (libc::MS_NODEV, 4), (libc::MS_NOEXEC, 8)];

#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

pub(super) fn attach(tree: RawFd, target: &CStr) -> Step {
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

pub(super) fn set_attributes(path: &CStr, flags: c_uint, set: u64) -> Step {
    let attr = MountAttr { set, clear: 0, propagation: 0, userns_fd: 0 };
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

pub(super) fn mask(path: &CStr) -> Step {
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

pub(super) fn read_only(path: &CStr) -> Step {
    if !exists(path) {
        return Ok(());
    }
    // The root is a mount already; a second one on top of it would not be the process's root.
    if path != c"/" {
        // SAFETY: the string is NUL-terminated.
        check(unsafe { libc::mount(path.as_ptr(), path.as_ptr(), null(), libc::MS_BIND | libc::MS_REC, null()) })?;
        return set_attributes(path, AT_RECURSIVE, MOUNT_ATTR_RDONLY);
    }
    set_attributes(path, 0, MOUNT_ATTR_RDONLY)
}

/// As getdents64(2) writes an entry: its length, and its name.
const ENTRY_LENGTH: usize = 16;
const ENTRY_NAME: usize = 19;

/// In a file system in memory, ENOTEMPTY for a directory with something in it, EEXIST for a file that has bytes. What is not in
/// memory the host has looked at.
pub(super) fn untouched(path: &CStr) -> Step {
    let mut entries = [0u8; 1024];
    // SAFETY: the string is NUL-terminated, and all that is written to is as long as said.
    let read = unsafe {
        let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
        // What cannot be opened, the mount will tell of.
        let Ok(fd) = check(libc::open(path.as_ptr(), flags)) else { return Ok(()) };
        let fd = fd as c_int;
        let (mut system, mut size) = (std::mem::zeroed::<libc::statfs>(), std::mem::zeroed::<libc::stat>());
        let known = check(libc::fstatfs(fd, &raw mut system)).and_then(|_| check(libc::fstat(fd, &raw mut size)));
        let read =
            known.and_then(|_| check(libc::syscall(libc::SYS_getdents64, fd, entries.as_mut_ptr(), entries.len())));
        libc::close(fd);
        if system.f_type != libc::TMPFS_MAGIC {
            return Ok(());
        }
        match read {
            Err(libc::ENOTDIR) => return if size.st_size > 0 { Err(libc::EEXIST) } else { Ok(()) },
            read => read? as usize,
        }
    };
    // Two short names are there in any case, and the first ones fit.
    let mut rest = entries.get(..read).unwrap_or_default();
    while let Some(&[low, high]) = rest.get(ENTRY_LENGTH..ENTRY_LENGTH + 2) {
        let (entry, behind) = rest.split_at_checked(u16::from_ne_bytes([low, high]).into()).unwrap_or((rest, &[]));
        let name = entry.get(ENTRY_NAME..).unwrap_or_default();
        if !name.starts_with(b".\0") && !name.starts_with(b"..\0") {
            return Err(libc::ENOTEMPTY);
        }
        rest = behind;
    }
    Ok(())
}

pub(super) fn write(path: &CStr, data: &[u8]) -> Step {
    // SAFETY: the string is NUL-terminated, the buffer lives through the call.
    unsafe {
        let fd = check(libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC))? as c_int;
        let written = check(libc::write(fd, data.as_ptr().cast(), data.len()) as c_long);
        libc::close(fd);
        written.map(drop)
    }
}

/// The terminal is one of the container's own devpts, so that it has a name there.
pub(super) fn terminal(context: &mut Context<'_>, uid: u32, console: bool) -> Step {
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

pub(super) fn stdio(fds: [RawFd; 3]) -> Step {
    for (number, fd) in fds.into_iter().enumerate() {
        // SAFETY: the descriptors are the parent's, and above 2 since its own stdio is open.
        check(unsafe { libc::dup2(fd, number as c_int) })?;
    }
    Ok(())
}

/// Refuses a directory outside the root, into which a leaked descriptor could lead.
pub(super) fn enter(path: &CStr) -> Step {
    let mut name = [0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer is as long as said.
    unsafe {
        check(libc::chdir(path.as_ptr()))?;
        check(libc::syscall(libc::SYS_getcwd, name.as_mut_ptr(), name.len()))?;
    }
    if name.first() == Some(&b'/') { Ok(()) } else { Err(libc::EACCES) }
}

pub(super) fn drop_bounding(keep: u64) -> Step {
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

pub(super) fn set_capabilities(sets: &CapabilitySets) -> Step {
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

#[cfg(test)]
mod tests {
    use std::{ffi::CString, fs, os::unix::ffi::OsStrExt};

    #[test]
    fn what_has_been_written_to_is_told() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let untouched = |name: &str| {
            let path = CString::new(dir.path().join(name).as_os_str().as_bytes()).unwrap();
            super::untouched(&path)
        };
        for name in ["empty", "full", "full/.hidden"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("file"), "").unwrap();
        fs::write(dir.path().join("written"), "1").unwrap();
        assert_eq!((untouched("empty"), untouched("file"), untouched("none")), (Ok(()), Ok(()), Ok(())));
        assert_eq!((untouched("full"), untouched("written")), (Err(libc::ENOTEMPTY), Err(libc::EEXIST)));
        // Whose files have a size, and are nobody's to write.
        assert_eq!(super::untouched(c"/sys/kernel/mm"), Ok(()));
    }
}
