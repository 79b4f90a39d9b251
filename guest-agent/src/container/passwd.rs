//! The user list of an image, which may be anything: a link, a pipe, a file without end.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _},
    os::fd::AsFd,
    path::Path,
};

use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2},
    sys::stat::{Mode, SFlag, fstat},
};

/// No user list is longer.
const MAX_LENGTH: u64 = 1 << 20;

/// Opens a file below `root` without ever leaving it.
pub fn open_inside(root: &Path, path: &str, flags: OFlag) -> nix::Result<File> {
    let root = open(root, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    // openat2(2) takes no flag with O_PATH that would mean nothing.
    let careful = match flags.contains(OFlag::O_PATH) {
        true => OFlag::O_CLOEXEC,
        false => OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY,
    };
    let how = OpenHow::new()
        .flags(flags | careful)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root.as_fd(), path, how).map(File::from)
}

/// The home directory of `uid`, `/` where the image does not know the user.
pub fn home(root: &Path, uid: u32) -> String {
    look_up(root, uid).unwrap_or_else(|| "/".to_owned())
}

fn look_up(root: &Path, uid: u32) -> Option<String> {
    let file = open_inside(root, "etc/passwd", OFlag::O_RDONLY).ok()?;
    let kind = SFlag::from_bits_truncate(fstat(&file).ok()?.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFREG {
        return None;
    }
    let mut lines = BufReader::new(file.take(MAX_LENGTH)).lines().map_while(Result::ok);
    lines.find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let found = fields.next()?.parse::<u32>().ok()? == uid;
        let home = fields.nth(2)?;
        (found && !home.is_empty() && !home.contains('\0')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_home_directory_comes_from_the_image() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(home(root.path(), 0), "/");
        fs::create_dir(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/real"), "root:x:0:0:root:/root:/bin/sh\nshort:x\nweb:x:33:33::/srv:\n")
            .unwrap();
        // A link that is absolute in the image.
        std::os::unix::fs::symlink("/etc/real", root.path().join("etc/passwd")).unwrap();
        assert_eq!(home(root.path(), 0), "/root");
        assert_eq!(home(root.path(), 33), "/srv");
        assert_eq!(home(root.path(), 34), "/");
    }

    #[test]
    fn a_user_list_that_is_a_pipe_is_none() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        nix::unistd::mkfifo(&root.path().join("etc/passwd"), Mode::S_IRWXU).unwrap();
        assert_eq!(home(root.path(), 0), "/");
    }
}
