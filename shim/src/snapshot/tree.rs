//! The root difference: a directory tree as overlayfs keeps it, with whiteouts (character devices 0:0) and `trusted.overlay.*`
//! attributes, which has to come back exactly as it was.

use std::{
    collections::BTreeMap,
    fs::{self, Metadata},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::digest::{hex, of_file};
use crate::files::Identity;

/// What a tree consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// Files, directories and everything else below its top.
    pub entries: u64,
    /// Bytes on the disk.
    pub bytes: u64,
    /// Of every path with its kind, owner, mode, time, attributes and contents.
    pub digest: String,
}

/// One path, as it enters the digest. Names are escaped, so nothing is lost of those that are no UTF-8.
#[derive(Serialize)]
struct Entry {
    path: String,
    kind: Kind,
    mode: u32,
    owner: (u32, u32),
    /// Of a directory it is left out: mounting an overlay on top may well change it.
    modified: Option<(i64, i64)>,
    attributes: BTreeMap<String, String>,
}

#[derive(Serialize)]
enum Kind {
    Directory,
    /// Its digest and size.
    File(String, u64),
    /// The same file as at this path.
    Hardlink(String),
    Symlink(String),
    Device(char, u64),
    Fifo,
    Socket,
}

/// Takes stock of everything below `top`, contents included.
pub fn take_stock(top: &Path) -> io::Result<Tree> {
    let mut tree = Tree { entries: 0, bytes: 0, digest: String::new() };
    let mut hash = Sha256::new();
    let mut seen = BTreeMap::new();
    walk(top, &mut |path, meta| {
        let name = escaped(path.strip_prefix(top).unwrap_or(path));
        let first =
            (meta.nlink() > 1 && !meta.is_dir()).then(|| seen.entry(meta.ino()).or_insert_with(|| name.clone()));
        let entry = match first {
            Some(first) if *first != name => Kind::Hardlink(first.clone()),
            _ => {
                tree.bytes += meta.blocks() * 512;
                kind(path, meta)?
            }
        };
        tree.entries += 1;
        hash.update(serde_json::to_vec(&Entry {
            path: name,
            kind: entry,
            mode: meta.mode() & 0o7777,
            owner: (meta.uid(), meta.gid()),
            modified: (!meta.is_dir()).then_some((meta.mtime(), meta.mtime_nsec())),
            attributes: attributes(path)?,
        })?);
        Ok(())
    })?;
    tree.digest = hex(&hash.finalize());
    Ok(tree)
}

/// Changes when anything below `top` is written to, replaced, added or removed, without a look at contents; but not with the
/// name of `top`, which is another once a snapshot is published.
pub fn identity(top: &Path) -> io::Result<String> {
    let mut hash = Sha256::new();
    walk(top, &mut |path, meta| {
        hash.update(path.strip_prefix(top).unwrap_or(path).as_os_str().as_bytes());
        hash.update(serde_json::to_vec(&Identity::from(meta))?);
        Ok(())
    })?;
    Ok(hex(&hash.finalize()))
}

/// Calls `each` for everything below `top`, in an order that is always the same.
fn walk(top: &Path, each: &mut impl FnMut(&Path, &Metadata) -> io::Result<()>) -> io::Result<()> {
    let mut below: Vec<PathBuf> = fs::read_dir(top)?.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    below.sort();
    for path in below {
        let meta = fs::symlink_metadata(&path)?;
        each(&path, &meta)?;
        if meta.is_dir() {
            walk(&path, each)?;
        }
    }
    Ok(())
}

fn kind(path: &Path, meta: &Metadata) -> io::Result<Kind> {
    let of = meta.file_type();
    Ok(if of.is_dir() {
        Kind::Directory
    } else if of.is_file() {
        Kind::File(of_file(path)?, meta.len())
    } else if of.is_symlink() {
        Kind::Symlink(escaped(&fs::read_link(path)?))
    } else if of.is_char_device() {
        Kind::Device('c', meta.rdev())
    } else if of.is_block_device() {
        Kind::Device('b', meta.rdev())
    } else if of.is_fifo() {
        Kind::Fifo
    } else {
        Kind::Socket
    })
}

fn attributes(path: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for name in xattr::list(path)? {
        let value = xattr::get(path, &name)?.unwrap_or_default();
        found.insert(name.as_bytes().escape_ascii().to_string(), value.escape_ascii().to_string());
    }
    Ok(found)
}

fn escaped(path: &Path) -> String {
    path.as_os_str().as_bytes().escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use nix::sys::stat::{Mode, SFlag, mknod};

    use super::*;

    fn made(change: impl FnOnce(&Path)) -> Tree {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().join("root");
        fs::create_dir_all(top.join("usr/lib")).unwrap();
        for name in ["usr/lib/a.pyc", "usr/lib/b.pyc"] {
            fs::write(top.join(name), "bytecode").unwrap();
        }
        symlink("a.pyc", top.join("usr/lib/link")).unwrap();
        change(&top);
        let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1);
        for name in ["usr/lib/a.pyc", "usr/lib/b.pyc"] {
            if let Ok(file) = fs::File::options().append(true).open(top.join(name)) {
                file.set_modified(at).unwrap();
            }
        }
        let link = std::ffi::CString::new(top.join("usr/lib/link").as_os_str().as_bytes()).unwrap();
        let times = nix::sys::time::TimeSpec::new(1, 0);
        let _ = nix::sys::stat::utimensat(
            nix::fcntl::AT_FDCWD,
            &*link,
            &times,
            &times,
            nix::sys::stat::UtimensatFlags::NoFollowSymlink,
        );
        take_stock(&top).unwrap()
    }

    #[test]
    fn everything_counts() {
        let plain = made(|_| ());
        assert_eq!(plain, made(|_| ()), "the same twice");
        assert_eq!(plain.entries, 5);
        type Change = fn(&Path);
        let changes: [(&str, Change); 9] = [
            ("contents", |t| fs::write(t.join("usr/lib/a.pyc"), "byteCode").unwrap()),
            ("a file more", |t| fs::write(t.join("usr/lib/c"), "").unwrap()),
            ("a file less", |t| fs::remove_file(t.join("usr/lib/b.pyc")).unwrap()),
            ("a mode", |t| {
                fs::set_permissions(t.join("usr/lib/a.pyc"), fs::Permissions::from_mode(0o600)).unwrap();
            }),
            ("an attribute", |t| xattr::set(t.join("usr/lib"), "user.overlay", b"y").unwrap()),
            ("another link", |t| {
                fs::remove_file(t.join("usr/lib/link")).unwrap();
                symlink("b.pyc", t.join("usr/lib/link")).unwrap();
            }),
            ("a hard link", |t| {
                fs::remove_file(t.join("usr/lib/b.pyc")).unwrap();
                fs::hard_link(t.join("usr/lib/a.pyc"), t.join("usr/lib/b.pyc")).unwrap();
            }),
            ("a fifo", |t| mknod(&t.join("fifo"), SFlag::S_IFIFO, Mode::S_IRWXU, 0).unwrap()),
            ("a directory", |t| fs::create_dir(t.join("etc")).unwrap()),
        ];
        for (what, change) in changes {
            assert_ne!(made(change).digest, plain.digest, "{what}");
        }
    }

    #[test]
    fn a_whiteout_is_kept_in_mind() {
        if !nix::unistd::geteuid().is_root() {
            return chsnap_test_skip::skip("only root may make a whiteout");
        }
        let plain = made(|_| ());
        let hidden = made(|t| mknod(&t.join("hidden"), SFlag::S_IFCHR, Mode::empty(), 0).unwrap());
        assert_ne!(hidden.digest, plain.digest);
        assert_eq!(hidden.entries, plain.entries + 1);
    }

    #[test]
    fn a_look_at_times_is_enough_to_see_a_change() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        let file = dir.path().join("d/f");
        fs::write(&file, "one").unwrap();
        let before = identity(dir.path()).unwrap();
        assert_eq!(identity(dir.path()).unwrap(), before);
        let elsewhere = dir.path().with_extension("elsewhere");
        fs::rename(dir.path(), &elsewhere).unwrap();
        assert_eq!(identity(&elsewhere).unwrap(), before, "the same at another place");
        fs::rename(&elsewhere, dir.path()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(&file, "two").unwrap();
        assert_ne!(identity(dir.path()).unwrap(), before);
    }
}
