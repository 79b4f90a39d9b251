//! A tree of files as a layer: owners, modes, times, extended attributes, hard links and devices are kept, and the
//! same tree gives the same bytes.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::libc;
use tar::{EntryType, Header};

use super::TreeError;

/// What was packed.
#[derive(Debug, Default)]
pub(super) struct Packed {
    pub entries: u64,
    pub skipped: u64,
}

/// Packs the tree below `root` except `omit`; `spool` is where `out` writes to, for the error.
pub(super) fn pack(root: &Path, omit: Option<&Path>, out: impl Write, spool: &Path) -> Result<Packed, TreeError> {
    let metadata = fs::metadata(root).map_err(|source| TreeError::Read { path: PathBuf::from("/"), source })?;
    let mut walk = Walk {
        root,
        omit,
        spool,
        device: metadata.dev(),
        links: HashMap::new(),
        packed: Packed::default(),
        tar: tar::Builder::new(out),
    };
    walk.add(Path::new(""), &metadata)?;
    walk.directory(Path::new(""))?;
    walk.tar.finish().map_err(|source| TreeError::Spool { dir: spool.to_owned(), source })?;
    Ok(walk.packed)
}

struct Walk<'a, W: Write> {
    root: &'a Path,
    omit: Option<&'a Path>,
    spool: &'a Path,
    /// A file system mounted inside the tree is not part of it.
    device: u64,
    /// Where each file with several names was first met.
    links: HashMap<(u64, u64), PathBuf>,
    packed: Packed,
    tar: tar::Builder<W>,
}

impl<W: Write> Walk<'_, W> {
    fn directory(&mut self, inside: &Path) -> Result<(), TreeError> {
        let error = |source| TreeError::Read { path: inside.to_owned(), source };
        let entries = fs::read_dir(self.root.join(inside)).map_err(error)?;
        let mut names: Vec<OsString> =
            entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<_>>().map_err(error)?;
        names.sort_unstable();
        for name in names {
            let path = inside.join(&name);
            if self.omit == Some(&path) {
                continue;
            }
            if name.as_bytes().starts_with(b".wh.") {
                return Err(TreeError::Whiteout { path });
            }
            let metadata = fs::symlink_metadata(self.root.join(&path))
                .map_err(|source| TreeError::Read { path: path.clone(), source })?;
            self.add(&path, &metadata)?;
            if metadata.is_dir() && metadata.dev() == self.device {
                self.directory(&path)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, metadata: &Metadata) -> Result<(), TreeError> {
        let full = self.root.join(path);
        let kind = metadata.file_type();
        if kind.is_socket() {
            self.packed.skipped += 1;
            return Ok(());
        }
        self.packed.entries += 1;
        let mut entry = Entry::new(path, metadata);
        if !kind.is_dir() && metadata.nlink() > 1 {
            let first = self.links.entry((metadata.dev(), metadata.ino())).or_insert_with(|| path.to_owned());
            if first != path {
                entry.header.set_entry_type(EntryType::Link);
                entry.link(first.as_os_str().as_bytes());
                return self.append(entry, io::empty(), 0);
            }
        }
        entry.attributes(&full).map_err(|source| TreeError::Read { path: path.to_owned(), source })?;
        if kind.is_symlink() {
            let target = fs::read_link(&full).map_err(|source| TreeError::Read { path: path.to_owned(), source })?;
            entry.header.set_entry_type(EntryType::Symlink);
            entry.link(target.as_os_str().as_bytes());
        } else if kind.is_dir() {
            entry.header.set_entry_type(EntryType::Directory);
        } else if kind.is_fifo() {
            entry.header.set_entry_type(EntryType::Fifo);
        } else if kind.is_char_device() || kind.is_block_device() {
            entry.device(metadata.rdev(), kind.is_char_device());
        } else {
            entry.header.set_entry_type(EntryType::Regular);
            return self.regular(entry, path, &full);
        }
        self.append(entry, io::empty(), 0)
    }

    fn regular(&mut self, entry: Entry, path: &Path, full: &Path) -> Result<(), TreeError> {
        let error = |source| TreeError::Read { path: path.to_owned(), source };
        // What was a file a moment ago must not lead elsewhere now.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(full).map_err(error)?;
        let size = file.metadata().map_err(error)?.len();
        let mut content = Content { file, left: size, failed: None };
        let appended = self.append(entry, &mut content, size);
        match content {
            Content { failed: Some(source), .. } => Err(error(source)),
            Content { left: 1.., .. } if appended.is_ok() => Err(TreeError::Changed { path: path.to_owned() }),
            _ => appended,
        }
    }

    fn append(&mut self, mut entry: Entry, content: impl Read, size: u64) -> Result<(), TreeError> {
        let spool = |source| TreeError::Spool { dir: self.spool.to_owned(), source };
        if !entry.pax.is_empty() {
            let records = entry.pax.iter().map(|(key, value)| (key.as_str(), value.as_slice()));
            self.tar.append_pax_extensions(records).map_err(spool)?;
        }
        entry.header.set_size(size);
        entry.header.set_cksum();
        self.tar.append(&entry.header, content).map_err(spool)
    }
}

/// A header with what did not fit into it.
struct Entry {
    header: Header,
    pax: Vec<(String, Vec<u8>)>,
}

impl Entry {
    fn new(path: &Path, metadata: &Metadata) -> Self {
        let mut header = Header::new_ustar();
        header.set_mode(metadata.mode() & 0o7777);
        header.set_uid(u64::from(metadata.uid()));
        header.set_gid(u64::from(metadata.gid()));
        header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
        let mut entry = Self { header, pax: Vec::new() };
        let mut name = path.as_os_str().as_bytes().to_vec();
        if name.is_empty() {
            name.push(b'.');
        }
        if metadata.is_dir() {
            name.push(b'/');
        }
        entry.put("path", &name);
        entry
    }

    fn link(&mut self, target: &[u8]) {
        self.put("linkpath", target);
    }

    /// Into the header's 100 bytes as far as they go; the whole into a record where they do not suffice.
    fn put(&mut self, key: &str, value: &[u8]) {
        if let Some(ustar) = self.header.as_ustar_mut() {
            let field = if key == "path" { &mut ustar.name } else { &mut ustar.linkname };
            let fits = value.len().min(field.len());
            field[..fits].copy_from_slice(&value[..fits]);
            if fits == value.len() {
                return;
            }
        }
        self.pax.push((key.into(), value.to_vec()));
    }

    fn device(&mut self, rdev: u64, char: bool) {
        self.header.set_entry_type(if char { EntryType::Char } else { EntryType::Block });
        // Both fields exist in a ustar header.
        let _ = self.header.set_device_major(libc::major(rdev));
        let _ = self.header.set_device_minor(libc::minor(rdev));
    }

    fn attributes(&mut self, full: &Path) -> io::Result<()> {
        let names = match xattr::list(full) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut names: Vec<OsString> = names.filter(|name| belongs(name.as_bytes())).collect();
        names.sort_unstable();
        for name in names {
            // A record's key is text; a name that is none cannot be carried.
            let Some(text) = name.to_str() else { continue };
            if let Some(value) = xattr::get(full, &name)? {
                self.pax.push((format!("SCHILY.xattr.{text}"), value));
            }
        }
        Ok(())
    }
}

/// The host's labels and overlayfs's own marks say nothing about the image.
fn belongs(name: &[u8]) -> bool {
    !name.starts_with(b"trusted.overlay.") && !name.starts_with(b"user.overlay.") && name != b"security.selinux"
}

/// Exactly as many bytes as the header promises. Remembers a failure to read, which else looks like one to write.
struct Content {
    file: File,
    left: u64,
    failed: Option<io::Error>,
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Ok(0);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        match self.file.read(&mut buffer[..most]) {
            Ok(read) => {
                self.left -= read as u64;
                Ok(read)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
            Err(error) => {
                let same = io::Error::from(error.kind());
                self.failed = Some(error);
                Err(same)
            }
        }
    }
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;
