//! An ext2, ext3 or ext4 image, read by the kernel's own driver: nothing else keeps owners, extended attributes and
//! devices. It is mounted read-only where nobody else sees it, and unmounted from everywhere before it is read.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::Uid,
};

use super::ImageError;

const SUPERBLOCK: usize = 1024;

/// None where `head` is no such image, else whether its journal is empty.
pub(super) fn is_clean(head: &[u8]) -> Option<bool> {
    let field = |offset: usize, len: usize| head.get(SUPERBLOCK + offset..SUPERBLOCK + offset + len);
    if field(56, 2)? != [0x53, 0xef] {
        return None;
    }
    const NEEDS_RECOVERY: u8 = 0x4;
    Some(field(96, 1)?[0] & NEEDS_RECOVERY == 0)
}

/// mkfs and e2fsck make it for themselves; with something in it, it is the operator's.
pub(super) fn own_directory(root: &Path) -> Option<&'static Path> {
    let name = Path::new("lost+found");
    let empty = fs::read_dir(root.join(name)).is_ok_and(|mut entries| entries.next().is_none());
    empty.then_some(name)
}

/// Calls `read` with the image's root directory.
pub(super) fn with_mounted<T: Send>(
    image: &Path,
    read: impl FnOnce(&Path) -> Result<T, ImageError> + Send,
) -> Result<T, ImageError> {
    if !Uid::effective().is_root() {
        return Err(ImageError::NeedsRoot { path: image.to_owned() });
    }
    // A mount namespace belongs to a thread; this one ends with the work.
    thread::scope(|scope| {
        let work = scope.spawn(|| {
            let root = mounted(image)?;
            read(&PathBuf::from(format!("/proc/self/fd/{}/", root.as_raw_fd())))
        });
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The root of the mounted image. The mount is detached already and lives as long as the descriptor, so that not even
/// a killed process leaves it behind.
fn mounted(image: &Path) -> Result<File, ImageError> {
    let step = |step| move |source: io::Error| ImageError::MountStep { path: image.to_owned(), step, source };
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).map_err(io::Error::from).map_err(step("make a mount namespace"))?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(io::Error::from)
        .map_err(step("keep mounts private"))?;
    let point = tempfile::tempdir().map_err(step("make a directory"))?;
    // mount(8) finds a free loop device and lets the kernel give it back with the mount.
    let output = Command::new("mount")
        .args(["-n", "-t", "ext4", "-o", "loop,ro,noload,nosuid,nodev,noexec"])
        .args([image, point.path()])
        .stdin(Stdio::null())
        .output()
        .map_err(step("run mount(8)"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let message = said.split_whitespace().collect::<Vec<_>>().join(" ");
        return Err(ImageError::Mount { path: image.to_owned(), message });
    }
    let root = File::open(point.path());
    umount2(point.path(), MntFlags::MNT_DETACH).map_err(io::Error::from).map_err(step("detach the mount point"))?;
    root.map_err(step("open the mount point"))
}
