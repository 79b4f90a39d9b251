//! The edge: an operation's error becomes the status the shim sees.

use std::{error::Error, fmt::Write as _};

use ttrpc::Code;

/// An error that knows what kind of refusal it is.
pub trait Coded: Error {
    fn code(&self) -> Code;
}

/// The error and all it came from, outermost first.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        // Writing to a string does not fail.
        let _ = write!(text, ": {source}");
        next = source.source();
    }
    text
}

/// What ttrpc sends.
pub fn status(error: &dyn Coded) -> ttrpc::Error {
    let text = chain(&AsError(error));
    ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), text))
}

/// A refusal of the request itself.
pub fn invalid(text: impl Into<String>) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INVALID_ARGUMENT, text.into()))
}

#[derive(Debug)]
struct AsError<'a>(&'a dyn Coded);

impl std::fmt::Display for AsError<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self.0, f)
    }
}

impl Error for AsError<'_> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

/// The code that fits an error of the operating system.
pub fn code_of(error: &std::io::Error) -> Code {
    use std::io::ErrorKind as Kind;
    match error.kind() {
        Kind::NotFound => Code::NOT_FOUND,
        Kind::PermissionDenied => Code::PERMISSION_DENIED,
        Kind::AlreadyExists => Code::ALREADY_EXISTS,
        Kind::InvalidInput => Code::INVALID_ARGUMENT,
        Kind::OutOfMemory | Kind::StorageFull | Kind::QuotaExceeded => Code::RESOURCE_EXHAUSTED,
        _ => Code::INTERNAL,
    }
}
