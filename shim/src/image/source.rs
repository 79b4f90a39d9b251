//! What the operator named: a directory, a file system image, or a tar.

use std::{
    fs::{self, File},
    io::{self, Read, Seek},
    path::{Path, PathBuf},
};

use super::{ImageError, Layer, ext4};

/// A root file system in one of the forms that are taken.
#[derive(Debug)]
pub enum Source {
    /// A tree of files.
    Directory(PathBuf),
    /// An ext2, ext3 or ext4 image.
    Ext4(PathBuf),
    /// A tar archive.
    Tar(PathBuf, File, Compression),
}

/// How a tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// It is not.
    None,
    /// gzip
    Gzip,
    /// zstd
    Zstd,
}

/// Enough to reach every magic number looked for, btrfs's being the last.
const HEAD: u64 = 0x10048;

impl Source {
    /// Looks at the content; a file's name says nothing.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let error = |source| ImageError::Open { path: path.to_owned(), source };
        let metadata = fs::metadata(path).map_err(error)?;
        if metadata.is_dir() {
            let mut entries = fs::read_dir(path).map_err(error)?;
            return match entries.next() {
                None => Err(ImageError::Empty { path: path.to_owned() }),
                Some(_) => Ok(Self::Directory(path.to_owned())),
            };
        }
        if !metadata.is_file() {
            return Err(ImageError::Kind { path: path.to_owned() });
        }
        let mut file = File::open(path).map_err(error)?;
        let mut head = Vec::new();
        (&mut file).take(HEAD).read_to_end(&mut head).map_err(error)?;
        file.rewind().map_err(error)?;
        if head.is_empty() {
            return Err(ImageError::Empty { path: path.to_owned() });
        }
        let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
        let tar = |compression| Ok(Self::Tar(path.to_owned(), file, compression));
        if at(0, &[0x1f, 0x8b]) {
            return tar(Compression::Gzip);
        }
        if at(0, &[0x28, 0xb5, 0x2f, 0xfd]) {
            return tar(Compression::Zstd);
        }
        if is_tar(&head) {
            return tar(Compression::None);
        }
        if let Some(clean) = ext4::is_clean(&head) {
            return if clean {
                Ok(Self::Ext4(path.to_owned()))
            } else {
                Err(ImageError::Dirty { path: path.to_owned() })
            };
        }
        let what = [
            (at(0, b"\xfd7zXZ\0"), "compressed with xz, which image layers cannot be"),
            (at(0, b"BZh"), "compressed with bzip2, which image layers cannot be"),
            (at(0, b"hsqs"), "a squashfs image"),
            (at(1024, &[0xe2, 0xe1, 0xf5, 0xe0]), "an erofs image"),
            (at(0, b"XFSB"), "an xfs image"),
            (at(0x10040, b"_BHRfS_M"), "a btrfs image"),
            (at(0, b"QFI\xfb"), "a qcow2 disk image"),
            (at(0, b"\x7fELF"), "a program"),
            (at(510, &[0x55, 0xaa]), "a disk image with a partition table"),
        ];
        let what = what.into_iter().find_map(|(is, what)| is.then_some(what));
        Err(ImageError::Unknown { path: path.to_owned(), what: what.unwrap_or("of no known form") })
    }

    /// Packs it.
    pub fn into_layer(self) -> Result<Layer, ImageError> {
        match self {
            Self::Directory(path) => {
                Layer::from_tree(&path, None).map_err(|source| ImageError::Pack { path: path.clone(), source })
            }
            Self::Ext4(path) => ext4::with_mounted(&path, |root| {
                Layer::from_tree(root, ext4::own_directory(root))
                    .map_err(|source| ImageError::Pack { path: path.clone(), source })
            }),
            Self::Tar(path, file, compression) => Layer::from_tar(&path, file, compression),
        }
    }
}

/// By the header's checksum: old tars have no magic number.
fn is_tar(head: &[u8]) -> bool {
    let Some(block) = head.get(..512) else { return false };
    let mut header = tar::Header::new_old();
    header.as_mut_bytes().copy_from_slice(block);
    let sum: u32 =
        block.iter().enumerate().map(|(at, byte)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) }).sum();
    header.cksum().is_ok_and(|said| said == sum)
}

impl Compression {
    /// The layer's media type.
    pub(super) fn media_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    /// The plain tar.
    pub(super) fn reader<'a>(self, compressed: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::None => Box::new(compressed),
            // pigz and others write several members.
            Self::Gzip => Box::new(flate2::read::MultiGzDecoder::new(compressed)),
            Self::Zstd => Box::new(zstd::Decoder::new(compressed)?),
        })
    }
}
