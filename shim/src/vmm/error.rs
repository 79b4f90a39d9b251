//! Why a machine could not be started or reached.

use std::{io, path::PathBuf};

use thiserror::Error;

/// Starting a machine failed.
#[derive(Debug, Error)]
pub enum BootError {
    /// The VMM's program cannot be run.
    #[error("cannot run the VMM {program:?}")]
    Spawn {
        /// What was tried.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The agent channel cannot be had.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The VMM's end of the channel.
    #[error("cannot connect to the agent channel {path:?}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}
