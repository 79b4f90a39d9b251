//! Why a machine could not be started or reached.

use std::{io, path::PathBuf};

use thiserror::Error;

/// Starting a machine failed.
#[derive(Debug, Error)]
pub enum BootError {
    /// The VMM's program cannot be run.
    #[error("cannot run the VMM {program:?}; install it, or correct its path in the configuration")]
    Spawn {
        /// What was tried.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM may not be counted where the pod is.
    #[error("the VMM cannot join the pod's cgroup")]
    Cgroup(#[source] io::Error),
    /// There is no such network namespace.
    #[error("cannot enter the pod's network namespace {path:?}")]
    Network {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The filter that hides CPU features.
    #[error("cannot make the filter that hides CPU features from the VMM")]
    Mask(#[source] seccompiler::BackendError),
    /// A socket between the shim and the VMM.
    #[error("cannot make the {what} socket for the VMM")]
    Socket {
        /// Which.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM ended before it ran the guest.
    #[error("the VMM {program:?} gave up ({status}): {said}{advice}")]
    Died {
        /// What ran.
        program: PathBuf,
        /// How it ended.
        status: String,
        /// The last it wrote to stderr.
        said: String,
        /// What to do, where that is known; begins with a separator.
        advice: &'static str,
    },
    /// The VMM is too old.
    #[error("the VMM {program:?} is version {found}; {needed} or newer is needed")]
    Version {
        /// What runs.
        program: PathBuf,
        /// What it says it is.
        found: String,
        /// What it takes.
        needed: String,
    },
    /// A snapshot that cannot be given to the VMM.
    #[error("cannot prepare {path:?} of the snapshot for the VMM")]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The VMM runs but does not do as told.
    #[error("the VMM {program:?} did not start the machine")]
    Control {
        /// What runs.
        program: PathBuf,
        /// What was said and answered.
        #[source]
        source: ControlError,
    },
}

/// A machine could not be written down.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The VMM did not do it.
    #[error("the VMM did not save the machine")]
    Control(#[source] ControlError),
    /// The VMM ended over it.
    #[error("the VMM ended while it saved the machine ({status}): {said}")]
    Died {
        /// How it ended.
        status: String,
        /// The last it wrote to stderr.
        said: String,
    },
}

/// A conversation with a VMM on its control socket failed.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The socket.
    #[error("the control socket failed while doing {command:?}")]
    Io {
        /// What was asked.
        command: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The VMM closed the socket.
    #[error("the VMM closed its control socket while doing {command:?}")]
    Closed {
        /// What was asked.
        command: String,
    },
    /// An answer that is none.
    #[error("the VMM answered {command:?} with something that is not of the protocol: {what}")]
    Garbled {
        /// What was asked.
        command: String,
        /// What is wrong with the answer.
        what: String,
    },
    /// A file that the VMM cannot be told of.
    #[error("the path {path:?} is not UTF-8 or has a quote in it, and the VMM takes no such")]
    Path {
        /// Which.
        path: PathBuf,
    },
    /// The VMM said no.
    #[error("the VMM refused {command:?}: {answer}")]
    Refused {
        /// What was asked.
        command: String,
        /// Its reason.
        answer: String,
    },
    /// No answer in time.
    #[error("the VMM did not answer {command:?} within {seconds} s ([deadlines] boot, or restore)")]
    Late {
        /// What was asked.
        command: String,
        /// How long was waited.
        seconds: f32,
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
    /// The host's end of it.
    #[error("cannot open the host's end of the agent channel")]
    Duplicate(#[source] io::Error),
}
