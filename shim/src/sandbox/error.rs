//! Why a pod or one of its containers could not be started.

use std::{io, path::PathBuf};

use thiserror::Error;

use super::{DirError, ExposeError, PlanError};
use crate::{
    agent::AgentError,
    cgroup::CgroupError,
    guest::KernelError,
    share::{GraftError, ShareError, VirtiofsdError},
    vmm::{BootError, ChannelError, SelectError},
};

/// A container's root file system is not as wanted.
#[derive(Debug, Error)]
pub enum RootError {
    /// On the host.
    #[error("cannot share the root file system")]
    Share(#[from] ShareError),
    /// For the guest.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// The pod's machine could not be started.
#[derive(Debug, Error)]
pub enum StartError {
    /// The pod's directory.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The pod's cgroup.
    #[error("cannot set up the pod's cgroup")]
    Cgroup(#[from] CgroupError),
    /// No VMM can run here.
    #[error("no VMM can be used; `chsnap doctor` tells more")]
    Select(#[from] SelectError),
    /// Kernel or initramfs.
    #[error("cannot read the guest {what} {path:?}; set [guest] {what} in the configuration")]
    GuestFile {
        /// Which of the two.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel is none that a VMM can boot.
    #[error("the guest kernel {path:?} cannot be booted")]
    Kernel {
        /// Where.
        path: PathBuf,
        /// What it is instead.
        #[source]
        source: KernelError,
    },
    /// The root file system.
    #[error(transparent)]
    Root(#[from] RootError),
    /// A pod that is being taken down.
    #[error("the pod has no share any more")]
    NoShare,
    /// virtiofsd cannot be run.
    #[error("cannot serve the root file system")]
    Virtiofsd(#[from] VirtiofsdError),
    /// virtiofsd ended before the guest was up.
    #[error("virtiofsd ended before the guest was up: {0}")]
    VirtiofsdEnded(String),
    /// The VMM cannot start the machine.
    #[error("cannot start the VM")]
    Boot(#[from] BootError),
    /// The machine died before the agent answered.
    #[error("the VM died before its agent answered: {how}")]
    Died {
        /// Status and console.
        how: String,
    },
    /// The guest hangs.
    #[error("the guest's agent did not answer within {seconds} s ([deadlines] {key}); guest console: {console}")]
    NoAgent {
        /// The deadline.
        seconds: f32,
        /// Where it is set.
        key: &'static str,
        /// Its last lines.
        console: String,
    },
    /// The agent channel.
    #[error("cannot reach the guest's agent")]
    Channel(#[from] ChannelError),
    /// The session with the agent.
    #[error("cannot talk to the guest's agent")]
    Agent(#[from] AgentError),
    /// The host has no random numbers.
    #[error("the host gives no random numbers for the restored guest")]
    Fresh(#[source] io::Error),
    /// A restored process does not bear it.
    #[error("the restored process ended with status {0} as soon as it went on")]
    Ended(u32),
    /// What is restored is still what it was restored from.
    #[error("the restored guest cannot be made one of its own")]
    Resume(#[source] AgentError),
    /// What the process holds is not known.
    #[error("cannot read what the saved process has open in {path:?}")]
    Held {
        /// The snapshot.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What the process holds may be another file here.
    #[error("the saved process holds {path:?}, open or in memory, and this container has files of its own there")]
    Covered {
        /// By its path in the container.
        path: PathBuf,
    },
    /// What the process wrote would be hidden.
    #[error("the saved process has written to {path:?}, where this container has something of its own")]
    Hidden {
        /// By its path in the container.
        path: PathBuf,
    },
    /// A restored process is still its template's.
    #[error("the restored container cannot be made this pod's")]
    Adopt(#[source] AgentError),
    /// What the template wrote is not there.
    #[error("the container's root cannot be made the restored one's")]
    Graft(#[from] GraftError),
    /// What a restored process wrote stays where the next way would find it.
    #[error("cannot take back what the restored container wrote to {path:?}")]
    Upper {
        /// The container's own directory, or its overlay's.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is no other way left.
    #[error("annotation io.chsnap.snapshot = \"require\", but no snapshot could be used: {why}")]
    Required {
        /// Why not.
        why: String,
    },
    /// The agent refused the container.
    #[error("the guest cannot create the container")]
    Container(#[source] AgentError),
    /// A port.
    #[error("cannot expose a port")]
    Expose(#[from] ExposeError),
}

impl StartError {
    /// Whether it is that the agent could no longer be reached, for which there may be a reason.
    pub(super) fn is_of_channel(&self) -> bool {
        match self {
            Self::Channel(_) => true,
            Self::Agent(e) | Self::Resume(e) | Self::Adopt(e) | Self::Container(e) => e.is_of_channel(),
            _ => false,
        }
    }

    /// Whether it is that the guest does not answer although nothing has ended.
    pub(super) fn is_of_silence(&self) -> bool {
        matches!(self, Self::NoAgent { .. }) || self.is_of_channel()
    }
}

/// A container could not be added to a running pod.
#[derive(Debug, Error)]
pub enum ContainerError {
    /// The root file system.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The agent refused it.
    #[error("the guest cannot create the container")]
    Agent(#[source] AgentError),
    /// The host's files in a pod whose guest would not look at them again.
    #[error(
        "the pod's VM was started for a container without files of the host's and takes none later: annotate that \
         first container as a pod's (io.kubernetes.cri.sandbox-id), or set [share] cache = \"revalidate\""
    )]
    NotShared,
    /// The pod is being stopped.
    #[error("the pod is being stopped")]
    Stopped,
    /// There is no machine to add it to.
    #[error("the pod's VM is gone: {0}")]
    Gone(String),
}
