//! Why a call to the agent failed, in words that are fit to be shown.

use std::io;

use thiserror::Error;
use ttrpc::Code;

use crate::text::shortened;

/// Longest text taken from the guest for an error message, characters.
const MAX_MESSAGE: usize = 2048;

/// A call to the agent failed.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The channel broke before a session was open.
    #[error("the agent did not answer the greeting")]
    Session(#[source] io::Error),
    /// The agent said no.
    #[error("{message}")]
    Refused {
        /// Why, as ttrpc code.
        code: Code,
        /// The agent's words, cut to a bearable length.
        message: String,
    },
    /// No answer: the guest hangs or is gone.
    #[error("the agent did not answer {call}: {reason}")]
    Lost {
        /// Which call.
        call: &'static str,
        /// What ttrpc said.
        reason: String,
    },
    /// The guest's clock may be wrong by more than it may.
    #[error("the guest takes so long to be told the time that its clock may be {most_ms} ms late")]
    Clock {
        /// Not by more.
        most_ms: i64,
    },
    /// An answer that makes no sense.
    #[error("the agent answered {call} with {what}")]
    Nonsense {
        /// Which call.
        call: &'static str,
        /// What was wrong.
        what: String,
    },
}

impl AgentError {
    /// True where there was no answer, so that what was asked for may have been done, or may be yet.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }

    /// True where nobody is at the other end, or nobody who is understood.
    #[must_use]
    pub fn is_of_channel(&self) -> bool {
        matches!(self, Self::Session(_) | Self::Lost { .. })
    }

    /// True where the agent said that there is no such process, container or file.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { code: Code::NOT_FOUND, .. })
    }
}

/// What became of `call`.
pub(super) fn failed(call: &'static str) -> impl Fn(ttrpc::Error) -> AgentError {
    move |error| match error {
        ttrpc::Error::RpcStatus(status) if status.code() != Code::DEADLINE_EXCEEDED => {
            AgentError::Refused { code: status.code(), message: printable(&status.message) }
        }
        other => AgentError::Lost { call, reason: printable(&other.to_string()) },
    }
}

/// The guest's words without control characters, and not more than a person wants to read.
fn printable(text: &str) -> String {
    shortened(text, MAX_MESSAGE).replace(char::is_control, " ")
}
