//! What can go wrong with the store.

use std::{io, path::PathBuf};

use thiserror::Error;

use super::Key;

/// The store cannot be used.
#[derive(Debug, Error)]
pub enum OpenError {
    /// It cannot be made or looked at.
    #[error("cannot use the store of snapshots {path:?}, [snapshot] dir")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Others could put machines into it.
    #[error(
        "the store of snapshots {path:?} belongs to another user or can be written by others: make it root's, mode 0700"
    )]
    Open {
        /// Where.
        path: PathBuf,
    },
}

/// The store cannot be listed.
#[derive(Debug, Error)]
#[error("cannot list the snapshots in {path:?}")]
pub struct ListError {
    pub(super) path: PathBuf,
    #[source]
    pub(super) source: io::Error,
}

/// A snapshot that is there cannot be used.
#[derive(Debug, Error)]
pub enum FindError {
    /// It cannot be read.
    #[error("cannot read {path:?} of the snapshot")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is not what its manifest says.
    #[error("the snapshot {} does not fit its manifest: {what}; the next that is built takes its place, or `chsnap snapshot rm {}` removes it", key.short(), key.short())]
    Spoilt {
        /// Which.
        key: Key,
        /// What does not fit.
        what: String,
    },
}

/// A snapshot was not built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// Another process is at it.
    #[error("the snapshot {} is being built by another process", key.short())]
    Busy {
        /// Which.
        key: Key,
    },
    /// It is there already.
    #[error("the snapshot {} exists", key.short())]
    Exists {
        /// Which.
        key: Key,
    },
    /// It would push out everything else, and still not fit.
    #[error("the snapshot has {bytes} bytes and the store's budget is {budget}: raise [snapshot] budget")]
    TooLarge {
        /// On the disk.
        bytes: u64,
        /// Of all snapshots.
        budget: u64,
    },
    /// All others are in use.
    #[error(
        "the snapshot has {bytes} bytes, those in use have {in_use}, and the store's budget is {budget}: raise [snapshot] budget"
    )]
    Full {
        /// On the disk.
        bytes: u64,
        /// Of those that stay.
        in_use: u64,
        /// Of all snapshots.
        budget: u64,
    },
    /// Of a process that writes more than somebody thought reasonable.
    #[error(
        "the process wrote {bytes} bytes to its root file system before it was ready, and [snapshot] root_limit is {limit}"
    )]
    RootTooLarge {
        /// On the disk.
        bytes: u64,
        /// What may be.
        limit: u64,
    },
    /// What was saved cannot be kept.
    #[error(
        "the snapshot cannot consist of {path:?}: only plain files, and the directory of the root difference, can be kept"
    )]
    Strange {
        /// What it is.
        path: PathBuf,
    },
    /// It cannot be written.
    #[error("cannot write the snapshot to {path:?}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A snapshot was not removed.
#[derive(Debug, Error)]
pub enum EvictError {
    /// There is none.
    #[error("there is no snapshot {}", key.short())]
    Missing {
        /// Which.
        key: Key,
    },
    /// A machine is being restored from it.
    #[error("the snapshot {} is in use", key.short())]
    InUse {
        /// Which.
        key: Key,
    },
    /// It cannot be removed.
    #[error("cannot remove {path:?}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}
