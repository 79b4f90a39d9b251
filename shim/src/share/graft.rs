//! Writes a difference, as overlayfs keeps one, into a directory that is a copy of what the difference is of. Afterwards the
//! directory has what an overlay of both would show.
//!
//! Both belong to containers, whose links may lead anywhere: nothing here follows one.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File, Metadata},
    io::{self, Read, Seek, SeekFrom},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::{
    fcntl::AT_FDCWD,
    sys::{
        stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat},
        time::TimeSpec,
    },
};
use thiserror::Error;

use super::clone::{BROKEN, USED};
use crate::files;

const OVERLAY: &[u8] = b"trusted.overlay.";
const OPAQUE: &str = "trusted.overlay.opaque";
/// Of a file, at once: the time is looked at in between.
const PIECE: u64 = 16 << 20;
/// Of what stands in another place, or only half in this one.
const ELSEWHERE: [&str; 2] = ["trusted.overlay.redirect", "trusted.overlay.metacopy"];

/// The directory has a part of the difference.
#[derive(Debug, Error)]
pub enum GraftError {
    /// A step failed.
    #[error("cannot write the root difference to {path:?}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// overlayfs kept it by reference.
    #[error("the root difference has {path:?} by reference only ({attribute})")]
    Elsewhere {
        /// Which.
        path: PathBuf,
        /// What says so.
        attribute: &'static str,
    },
    /// The disk is slow, or has other things to do.
    #[error("the root difference was not written within {} s", patience.as_secs_f32())]
    Late {
        /// What it may take.
        patience: Duration,
    },
}

/// Writes `difference` into `onto`, in no more time than `patience`.
///
/// # Errors
/// See [`GraftError`].
pub fn graft(difference: &Path, onto: &Path, patience: Duration) -> Result<(), GraftError> {
    let meta = fs::symlink_metadata(difference).map_err(|source| io_error(difference, source))?;
    Graft { links: BTreeMap::new(), began: Instant::now(), patience }.directory(difference, &meta, onto)
}

fn io_error(path: &Path, source: io::Error) -> GraftError {
    GraftError::Io { path: path.into(), source }
}

struct Graft {
    /// Where the first name of each file with several went.
    links: BTreeMap<(u64, u64), PathBuf>,
    began: Instant,
    patience: Duration,
}

impl Graft {
    fn directory(&mut self, from: &Path, meta: &Metadata, to: &Path) -> Result<(), GraftError> {
        for attribute in ELSEWHERE {
            if xattr::get(from, attribute).map_err(|source| io_error(from, source))?.is_some() {
                return Err(GraftError::Elsewhere { path: from.into(), attribute });
            }
        }
        let failed = |source| io_error(to, source);
        let opaque = xattr::get(from, OPAQUE).map_err(failed)?.is_some_and(|value| value == b"y");
        match fs::symlink_metadata(to) {
            Ok(there) if there.is_dir() && !opaque => {}
            _ => {
                remove(to).map_err(failed)?;
                fs::create_dir(to).map_err(failed)?;
            }
        }
        for entry in fs::read_dir(from).map_err(|source| io_error(from, source))? {
            let entry = entry.map_err(|source| io_error(from, source))?;
            self.entry(&entry.path(), &to.join(entry.file_name()))?;
        }
        // Last: the time is that of the last entry otherwise, and the mode may forbid one.
        attributes(from, meta, to).map_err(failed)
    }

    fn entry(&mut self, from: &Path, to: &Path) -> Result<(), GraftError> {
        self.in_time()?;
        let failed = |source| io_error(to, source);
        let meta = fs::symlink_metadata(from).map_err(|source| io_error(from, source))?;
        if meta.is_dir() {
            return self.directory(from, &meta, to);
        }
        remove(to).map_err(failed)?;
        let of = meta.file_type();
        if of.is_char_device() && meta.rdev() == 0 {
            return Ok(());
        }
        if meta.nlink() > 1 {
            if let Some(first) = self.links.get(&(meta.dev(), meta.ino())) {
                return fs::hard_link(first, to).map_err(failed);
            }
            self.links.insert((meta.dev(), meta.ino()), to.into());
        }
        if of.is_file() {
            for attribute in ELSEWHERE {
                if xattr::get(from, attribute).map_err(failed)?.is_some() {
                    return Err(GraftError::Elsewhere { path: from.into(), attribute });
                }
            }
            self.copy(from, to)?;
        } else if of.is_symlink() {
            fs::read_link(from).and_then(|target| symlink(target, to)).map_err(failed)?;
        } else {
            let kind = SFlag::from_bits_truncate(meta.mode() & SFlag::S_IFMT.bits());
            mknod(to, kind, Mode::empty(), meta.rdev()).map_err(|error| failed(error.into()))?;
        }
        attributes(from, &meta, to).map_err(failed)
    }
}

impl Graft {
    /// With its holes: a file may be longer than the disk.
    fn copy(&self, from: &Path, to: &Path) -> Result<(), GraftError> {
        let failed = |source| io_error(to, source);
        let mut from = File::open(from).map_err(|source| io_error(from, source))?;
        let length = from.metadata().map_err(failed)?.len();
        let mut to = File::create_new(to).and_then(|to| to.set_len(length).map(|()| to)).map_err(failed)?;
        let mut at = 0;
        while let Some(data) = files::next_data(&from, at, length).map_err(failed)? {
            self.in_time()?;
            let end = files::next_hole(&from, data, length).map_err(failed)?.min(data + PIECE);
            let piece = from.seek(SeekFrom::Start(data)).and_then(|_| to.seek(SeekFrom::Start(data)));
            piece.and_then(|_| io::copy(&mut (&mut from).take(end - data), &mut to)).map_err(failed)?;
            at = end;
        }
        Ok(())
    }

    fn in_time(&self) -> Result<(), GraftError> {
        match self.began.elapsed() < self.patience {
            true => Ok(()),
            false => Err(GraftError::Late { patience: self.patience }),
        }
    }
}

/// Whatever has that name; nothing, where nothing has.
fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => files::remove_tree(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Owner before mode: to give a file away clears its set-user-ID bit. overlayfs's own attributes mean nothing here.
fn attributes(from: &Path, meta: &Metadata, to: &Path) -> io::Result<()> {
    lchown(to, Some(meta.uid()), Some(meta.gid()))?;
    if !meta.is_symlink() {
        fs::set_permissions(to, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    }
    let own = |name: &OsStr| !name.as_bytes().starts_with(OVERLAY);
    let wanted: BTreeMap<_, _> = xattr::list(from)?
        .filter(|name| own(name))
        .map(|name| Ok((name.clone(), xattr::get(from, &name)?.unwrap_or_default())))
        .collect::<io::Result<_>>()?;
    for name in xattr::list(to)?.filter(|name| own(name) && !wanted.contains_key(name) && !kept(name)) {
        xattr::remove(to, &name)?;
    }
    for (name, value) in wanted {
        xattr::set(to, name, &value)?;
    }
    let (accessed, modified) =
        (TimeSpec::new(meta.atime(), meta.atime_nsec()), TimeSpec::new(meta.mtime(), meta.mtime_nsec()));
    Ok(utimensat(AT_FDCWD, to, &accessed, &modified, UtimensatFlags::NoFollowSymlink)?)
}

/// Of the host's, not of the image's: what marks the directory, and what a security module has to say of it.
fn kept(name: &OsStr) -> bool {
    [USED, BROKEN].iter().any(|mark| name == *mark) || name.as_bytes().starts_with(b"security.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::stock_of;

    const PATIENCE: Duration = Duration::from_secs(600);

    fn dir_with(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    #[test]
    fn the_outcome_is_what_an_overlay_shows() {
        if !nix::unistd::geteuid().is_root() {
            return chsnap_test_skip::skip("only root may make a whiteout");
        }
        let image = [("a/kept", "1"), ("a/changed", "old"), ("a/gone", "2"), ("b/x", "3"), ("c/y", "4"), ("d", "5")];
        let onto = dir_with(&image);
        symlink("/nowhere", onto.path().join("link")).unwrap();
        let difference = dir_with(&[("a/changed", "new"), ("b/z", "6"), ("c", "file"), ("d/e", "7"), ("link/f", "8")]);
        let from = |name: &str| difference.path().join(name);
        mknod(&from("a/gone"), SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
        xattr::set(from("b"), OPAQUE, b"y").unwrap();
        xattr::set(from("a/changed"), "trusted.overlay.origin", b"x").unwrap();
        xattr::set(from("a/changed"), "user.kind", b"new").unwrap();
        fs::hard_link(from("a/changed"), from("a/again")).unwrap();
        fs::set_permissions(from("a/changed"), fs::Permissions::from_mode(0o4750)).unwrap();
        lchown(from("b/z"), Some(7), Some(8)).unwrap();
        mknod(&from("fifo"), SFlag::S_IFIFO, Mode::S_IRWXU, 0).unwrap();
        symlink("kept", from("a/link")).unwrap();
        graft(difference.path(), onto.path(), PATIENCE).unwrap();

        let expected = dir_with(&[
            ("a/kept", "1"),
            ("a/changed", "new"),
            ("b/z", "6"),
            ("c", "file"),
            ("d/e", "7"),
            ("link/f", "8"),
        ]);
        let to = |name: &str| expected.path().join(name);
        xattr::set(to("a/changed"), "user.kind", b"new").unwrap();
        fs::hard_link(to("a/changed"), to("a/again")).unwrap();
        fs::set_permissions(to("a/changed"), fs::Permissions::from_mode(0o4750)).unwrap();
        lchown(to("b/z"), Some(7), Some(8)).unwrap();
        mknod(&to("fifo"), SFlag::S_IFIFO, Mode::S_IRWXU, 0).unwrap();
        symlink("kept", to("a/link")).unwrap();
        for name in ["a/kept", "a/changed", "b/z", "c", "d/e", "link/f", "fifo", "a/link"] {
            for top in [onto.path(), expected.path()] {
                let at = TimeSpec::new(1, 0);
                utimensat(AT_FDCWD, &top.join(name), &at, &at, UtimensatFlags::NoFollowSymlink).unwrap();
            }
        }
        assert_eq!(stock_of(onto.path()).unwrap().digest, stock_of(expected.path()).unwrap().digest);
    }

    #[test]
    fn times_come_with_it_and_references_are_refused() {
        if !nix::unistd::geteuid().is_root() {
            return chsnap_test_skip::skip("only root may set the attributes of overlayfs");
        }
        let (onto, difference) = (dir_with(&[("a/b", "1")]), dir_with(&[("a/c", "2")]));
        for name in ["a/c", "a"] {
            let at = TimeSpec::new(1, 2);
            let path = difference.path().join(name);
            utimensat(AT_FDCWD, &path, &at, &at, UtimensatFlags::NoFollowSymlink).unwrap();
        }
        graft(difference.path(), onto.path(), PATIENCE).unwrap();
        for name in ["a/c", "a"] {
            let meta = fs::metadata(onto.path().join(name)).unwrap();
            assert_eq!((meta.mtime(), meta.mtime_nsec()), (1, 2), "{name}");
        }
        for (name, attribute) in [("a", ELSEWHERE[0]), ("a/c", ELSEWHERE[1])] {
            let difference = dir_with(&[("a/c", "2")]);
            xattr::set(difference.path().join(name), attribute, b"x").unwrap();
            let error = graft(difference.path(), onto.path(), PATIENCE).unwrap_err();
            assert!(error.to_string().contains(attribute), "{error}");
        }
    }

    #[test]
    fn holes_stay_holes() {
        if !nix::unistd::geteuid().is_root() {
            return chsnap_test_skip::skip("only root may read the attributes of overlayfs");
        }
        let (onto, difference) = (dir_with(&[]), dir_with(&[]));
        let file = File::create(difference.path().join("sparse")).unwrap();
        // Longer than most disks, with something in two places, one of them longer than a piece.
        let (length, places) = (1 << 42, [(3 << 20, vec![1; 5]), (1 << 41, vec![2; PIECE as usize + 5])]);
        file.set_len(length).unwrap();
        for (at, bytes) in &places {
            std::os::unix::fs::FileExt::write_all_at(&file, bytes, *at).unwrap();
        }
        graft(difference.path(), onto.path(), PATIENCE).unwrap();
        let copy = File::open(onto.path().join("sparse")).unwrap();
        let meta = copy.metadata().unwrap();
        assert!(meta.len() == length && meta.blocks() * 512 < 2 * PIECE, "{meta:?}");
        for (at, bytes) in &places {
            let mut found = vec![0; bytes.len()];
            std::os::unix::fs::FileExt::read_exact_at(&copy, &mut found, *at).unwrap();
            assert!(found == *bytes, "{at}");
        }
    }

    #[test]
    fn what_takes_too_long_is_given_up() {
        let (onto, difference) = (dir_with(&[]), dir_with(&[("a", "1")]));
        let error = graft(difference.path(), onto.path(), Duration::ZERO).unwrap_err();
        assert!(matches!(error, GraftError::Late { .. }), "{error}");
        assert!(!onto.path().join("a").exists());
    }
}
