//! What containerd, and through it the person, is told.

use std::{error::Error as StdError, io, path::PathBuf};

use thiserror::Error;
use ttrpc::Code;

use super::{options::OptionsError, stdio::StdioError};
use crate::{
    agent::AgentError,
    config::{AnnotationError, ConfigError, ShapeError},
    sandbox::{ContainerError, PlanError, StartError},
    state::WriteError,
};

/// A call of containerd's failed.
#[derive(Debug, Error)]
pub enum TaskError {
    /// No such container or process.
    #[error("{what} {id:?} does not exist")]
    NotFound {
        /// Container or exec.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// There is one already.
    #[error("{what} {id:?} exists already")]
    Exists {
        /// Container or exec.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The process is not where it should be in its life.
    #[error("{what} {id:?} {state}")]
    State {
        /// Container or exec.
        what: &'static str,
        /// Its id.
        id: String,
        /// What is wrong.
        state: &'static str,
    },
    /// As runc says it; clients look for these words.
    #[error("process already finished")]
    Finished,
    /// An id that cannot be a directory's name.
    #[error("container id {0:?} is not usable: use letters, digits, '.', '_' and '-'")]
    Id(String),
    /// Processes to be restored.
    #[error(
        "the checkpoint {0:?} cannot be restored: processes in a microVM have none; create the container without it"
    )]
    Checkpoint(String),
    /// A call that makes no sense here, or not yet.
    #[error("a container in a microVM cannot be {0}")]
    Unsupported(&'static str),
    /// The bundle's specification.
    #[error("cannot read the OCI specification {path:?}")]
    Spec {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: oci_spec::OciSpecError,
    },
    /// The bundle's directory.
    #[error("cannot write {path:?}")]
    Bundle {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The specification asks for too much.
    #[error("the container cannot run in a microVM")]
    Plan(#[from] PlanError),
    /// The exec's specification.
    #[error("cannot read the exec's process specification")]
    Process(#[source] serde_json::Error),
    /// Runtime options.
    #[error("the runtime options cannot be used")]
    Options(#[from] OptionsError),
    /// Settings.
    #[error("the configuration cannot be used")]
    Config(#[from] ConfigError),
    /// Annotations.
    #[error("an annotation cannot be used")]
    Annotation(#[from] AnnotationError),
    /// CPU and memory.
    #[error("the VM cannot have the size asked for")]
    Shape(#[from] ShapeError),
    /// Streams.
    #[error("cannot open the process's streams")]
    Stdio(#[from] StdioError),
    /// The machine.
    #[error("cannot start the pod's VM")]
    Start(#[from] StartError),
    /// A further container.
    #[error("cannot add the container to the pod's VM")]
    Container(#[from] ContainerError),
    /// The agent.
    #[error("the guest refused")]
    Agent(#[from] AgentError),
    /// It said nothing.
    #[error("the guest does not answer")]
    NoAnswer(#[source] AgentError),
    /// Nobody waits for the container; the text is only for the log.
    #[error("containerd went away before the container {0:?} was created, so it was taken down")]
    Abandoned(String),
    /// The machine is gone.
    #[error("the pod's VM is gone: {0}")]
    Gone(String),
    /// The state file of `chsnap ps`.
    #[error("cannot record the pod")]
    Record(#[from] WriteError),
    /// Statistics, or what is told of a process.
    #[error("the answer cannot be encoded")]
    Encode(#[source] containerd_shim::Error),
}

impl TaskError {
    fn code(&self) -> Code {
        match self {
            Self::NotFound { .. } | Self::Finished => Code::NOT_FOUND,
            Self::Exists { .. } => Code::ALREADY_EXISTS,
            Self::State { .. } | Self::Container(ContainerError::NotShared) => Code::FAILED_PRECONDITION,
            Self::Id(_)
            | Self::Spec { .. }
            | Self::Plan(_)
            | Self::Process(_)
            | Self::Options(_)
            | Self::Config(_)
            | Self::Annotation(_)
            | Self::Shape(_)
            | Self::Stdio(_) => Code::INVALID_ARGUMENT,
            Self::Agent(AgentError::Refused { code, .. }) => *code,
            Self::Gone(_) | Self::Abandoned(_) => Code::UNAVAILABLE,
            Self::Checkpoint(_) | Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Bundle { .. }
            | Self::Start(_)
            | Self::Container(_)
            | Self::Agent(_)
            | Self::NoAnswer(_)
            | Self::Record(_)
            | Self::Encode(_) => Code::UNKNOWN,
        }
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        let text = chain(&error);
        log::warn!("{text}");
        Self::RpcStatus(ttrpc::get_status(error.code(), text))
    }
}

/// An error and its sources in one line; printed once, at the edge.
#[must_use]
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(e) = source {
        text.push_str(": ");
        text.push_str(&e.to_string());
        source = e.source();
    }
    text
}
