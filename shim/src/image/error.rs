//! Why no image could be made, or none imported.

use std::{ffi::OsString, io, path::PathBuf, process::ExitStatus};

use thiserror::Error;

/// A root file system could not be packed.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The path does not lead to anything readable.
    #[error("cannot read {path:?}")]
    Open {
        /// What was named.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A device, socket or pipe.
    #[error("{path:?} is neither a file nor a directory")]
    Kind {
        /// What was named.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("{path:?} is empty: there is nothing to make an image of")]
    Empty {
        /// What was named.
        path: PathBuf,
    },
    /// None of the forms that are taken.
    #[error(
        "{path:?} is {what}; an ext2/3/4 file system image, a directory, or a tar (plain, gzip or zstd) can be imported"
    )]
    Unknown {
        /// What was named.
        path: PathBuf,
        /// What it looks like.
        what: &'static str,
    },
    /// An image archive where a root file system belongs.
    #[error("{path:?} is an image archive already; import it with `ctr images import`")]
    Archive {
        /// What was named.
        path: PathBuf,
    },
    /// Broken, or cut short.
    #[error("{path:?} is not a complete tar archive")]
    Tar {
        /// What was named.
        path: PathBuf,
        /// What the reader met.
        #[source]
        source: io::Error,
    },
    /// The journal holds what the file system does not.
    #[error("the file system in {path:?} was not cleanly unmounted; repair it with `e2fsck -f {}`", path.display())]
    Dirty {
        /// The image.
        path: PathBuf,
    },
    /// Not root.
    #[error(
        "reading the file system image {path:?} needs root, since it is mounted read-only; run as root, or import a \
         directory or a tar"
    )]
    NeedsRoot {
        /// The image.
        path: PathBuf,
    },
    /// It was refused by the kernel, or there is no loop device.
    #[error("cannot mount {path:?} read-only: {message}")]
    Mount {
        /// The image.
        path: PathBuf,
        /// mount's own words.
        message: String,
    },
    /// A step around the mount.
    #[error("cannot {step} to mount {path:?}")]
    MountStep {
        /// The image.
        path: PathBuf,
        /// Which.
        step: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The tree could not be packed.
    #[error("cannot pack {path:?}")]
    Pack {
        /// What was named.
        path: PathBuf,
        /// Why not.
        #[source]
        source: TreeError,
    },
}

/// A file in the tree could not be packed.
#[derive(Debug, Error)]
pub enum TreeError {
    /// It cannot be read.
    #[error("cannot read {path:?} in it")]
    Read {
        /// Relative to the root.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It became shorter while it was read.
    #[error("{path:?} in it changed while it was read; nothing may write there meanwhile")]
    Changed {
        /// Relative to the root.
        path: PathBuf,
    },
    /// containerd would delete something instead of making this file.
    #[error("{path:?} in it starts with \".wh.\", which in an image layer means a deletion; rename it")]
    Whiteout {
        /// Relative to the root.
        path: PathBuf,
    },
    /// Mostly: no space.
    #[error("cannot write the layer to a temporary file in {dir:?} (TMPDIR names another directory)")]
    Spool {
        /// Where.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// An image could not be handed to containerd.
#[derive(Debug, Error)]
pub enum ImportError {
    /// Nobody listens there.
    #[error("cannot reach containerd at {address:?}; --address names another socket")]
    Unreachable {
        /// The socket.
        address: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no such program.
    #[error("cannot run {program:?}; --ctr names another")]
    Ctr {
        /// What was tried.
        program: OsString,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It could not read or store the image.
    #[error("`{command}` failed with {status}: {message}")]
    Failed {
        /// What was run.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// The last it said.
        message: String,
    },
    /// The archive could not be streamed.
    #[error("cannot send the image to `{command}`")]
    Send {
        /// What was run.
        command: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// ctr was content, and containerd has another image, or none.
    #[error("containerd took the image, but has {found} under the name {reference}, not {digest}")]
    Mismatch {
        /// The image's name.
        reference: String,
        /// What was imported.
        digest: String,
        /// What is there.
        found: String,
    },
}
