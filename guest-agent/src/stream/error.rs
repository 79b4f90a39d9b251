//! Why a stream did not do as asked.

use std::io;

use chsnap_protocol::MAX_CHUNK;
use ttrpc::Code;

use super::MAX_STREAMS;
use crate::error::{Coded, code_of};

/// Why a stream did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("no stream {0}")]
    NotFound(u64),
    #[error("stream {0} cannot be read")]
    NotReadable(u64),
    #[error("stream {0} cannot be written (any more)")]
    NotWritable(u64),
    #[error("stream {0} has been closed")]
    Closed(u64),
    #[error("a chunk must have 1 to {MAX_CHUNK} bytes, not {0}")]
    BadSize(usize),
    #[error("the reader of stream {0} has gone")]
    ReaderGone(u64),
    #[error("too many streams ({MAX_STREAMS} are open); close some")]
    TooMany,
    #[error("stream {0}")]
    Io(u64, #[source] io::Error),
}

impl Coded for StreamError {
    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::NotReadable(_) | Self::NotWritable(_) | Self::ReaderGone(_) => Code::FAILED_PRECONDITION,
            Self::Closed(_) => Code::CANCELLED,
            Self::BadSize(_) => Code::INVALID_ARGUMENT,
            Self::TooMany => Code::RESOURCE_EXHAUSTED,
            Self::Io(_, e) => match e.kind() {
                io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted => Code::ABORTED,
                _ => code_of(e),
            },
        }
    }
}
