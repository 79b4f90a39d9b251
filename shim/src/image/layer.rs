//! The image's one layer: a tar in an open file, with the digests that the manifest needs.

use std::{
    env,
    fmt::Write as _,
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, Write},
    path::Path,
};

use sha2::{Digest, Sha256};

use super::{ImageError, TreeError, source::Compression, tree};

/// A layer.
#[derive(Debug)]
pub struct Layer {
    file: File,
    /// Bytes in the file.
    pub size: u64,
    /// Digest of the file.
    pub digest: String,
    /// Digest of the uncompressed tar.
    pub diff_id: String,
    /// How the file is compressed.
    pub media_type: &'static str,
    /// Files, directories and other entries.
    pub entries: u64,
    /// Sockets, which no archive can hold.
    pub skipped: u64,
}

impl Layer {
    /// Packs a tree, except `omit`, into an unnamed temporary file, which vanishes with its descriptor.
    pub(super) fn from_tree(root: &Path, omit: Option<&Path>) -> Result<Self, TreeError> {
        let dir = env::temp_dir();
        let spool_error = |source| TreeError::Spool { dir: dir.clone(), source };
        let spool = tempfile::tempfile_in(&dir).map_err(spool_error)?;
        let mut out = Hashing::new(BufWriter::with_capacity(1 << 20, spool));
        let packed = tree::pack(root, omit, &mut out, &dir)?;
        let (digest, size, writer) = out.finish();
        let file = writer.into_inner().map_err(|error| spool_error(error.into_error()))?;
        Ok(Self {
            file,
            size,
            diff_id: digest.clone(),
            digest,
            media_type: Compression::None.media_type(),
            entries: packed.entries,
            skipped: packed.skipped,
        })
    }

    /// Takes a tar as it is, after reading it to its end.
    pub(super) fn from_tar(path: &Path, file: File, compression: Compression) -> Result<Self, ImageError> {
        let error = |source| ImageError::Tar { path: path.to_owned(), source };
        let mut compressed = Hashing::new(BufReader::with_capacity(1 << 20, file));
        let (diff_id, entries) = {
            let mut plain = Hashing::new(compression.reader(&mut compressed).map_err(error)?);
            let entries = count(&mut plain).map_err(error)?;
            // What follows the archive's end belongs to the digest too.
            io::copy(&mut plain, &mut io::sink()).map_err(error)?;
            (plain.finish().0, entries)
        };
        io::copy(&mut compressed, &mut io::sink()).map_err(error)?;
        let (digest, size, reader) = compressed.finish();
        match entries {
            Entries::Some(entries) => Ok(Self {
                file: reader.into_inner(),
                size,
                digest,
                diff_id,
                media_type: compression.media_type(),
                entries,
                skipped: 0,
            }),
            Entries::None => Err(ImageError::Empty { path: path.to_owned() }),
            Entries::Image => Err(ImageError::Archive { path: path.to_owned() }),
        }
    }

    /// The file from its start.
    pub(super) fn reader(&mut self) -> io::Result<impl Read> {
        self.file.rewind()?;
        Ok(BufReader::with_capacity(1 << 20, &self.file).take(self.size))
    }
}

enum Entries {
    None,
    Some(u64),
    Image,
}

fn count(tar: impl Read) -> io::Result<Entries> {
    let mut archive = tar::Archive::new(tar);
    let mut count = 0;
    let (mut index, mut blobs) = (false, false);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = entry.path_bytes();
        let name = name.strip_prefix(b"./").unwrap_or(&name);
        index |= matches!(name, b"oci-layout" | b"manifest.json");
        blobs |= name.starts_with(b"blobs/") || name.ends_with(b"/layer.tar");
        count += 1;
        // A header promises a size; that the bytes are there is seen only by reading them.
        let (promised, read) = (entry.size(), io::copy(&mut entry, &mut io::sink())?);
        if read < promised {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
    }
    Ok(match count {
        0 => Entries::None,
        _ if index && blobs => Entries::Image,
        n => Entries::Some(n),
    })
}

/// Hashes and counts what goes through.
pub(super) struct Hashing<T> {
    inner: T,
    hash: Sha256,
    size: u64,
}

impl<T> Hashing<T> {
    fn new(inner: T) -> Self {
        Self { inner, hash: Sha256::new(), size: 0 }
    }

    fn finish(self) -> (String, u64, T) {
        (named(self.hash), self.size, self.inner)
    }

    fn take_in(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.take_in(&buffer[..read]);
        Ok(read)
    }
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.take_in(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// `sha256:…` of some bytes.
pub(super) fn digest_of(bytes: &[u8]) -> String {
    named(Sha256::new_with_prefix(bytes))
}

fn named(hash: Sha256) -> String {
    let mut text = String::from("sha256:");
    for byte in hash.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}
