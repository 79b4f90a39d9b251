//! What can be wrong with what was configured.

use std::{fmt, io, path::PathBuf};

use thiserror::Error;

use super::Size;

/// Where in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub file: PathBuf,
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.file.display(), self.line, self.column)
    }
}

/// The configuration file cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration file {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It is not TOML.
    #[error("{place}: not valid TOML: {message}")]
    Syntax {
        /// Where.
        place: Place,
        /// What the parser says.
        message: String,
    },
    /// A key that does not exist.
    #[error("{place}: {key}: unknown key; {hint}")]
    UnknownKey {
        /// Where.
        place: Place,
        /// The key with its table.
        key: String,
        /// The nearest key, or all there are.
        hint: String,
    },
    /// A key with a value that cannot be.
    #[error("{place}: {key}: {message}")]
    Value {
        /// Where.
        place: Place,
        /// The key with its table.
        key: String,
        /// What is wrong and what is allowed.
        message: String,
    },
}

/// An annotation of the container cannot be honoured.
#[derive(Debug, Clone, Error, PartialEq, Eq)]
pub enum AnnotationError {
    /// No annotation of that name exists.
    #[error("annotation {name}: unknown; {hint}")]
    Unknown {
        /// Its name.
        name: String,
        /// The nearest name, or all there are.
        hint: String,
    },
    /// It exists, the value does not fit.
    #[error("annotation {name} = {value:?}: {message}")]
    Value {
        /// Its name.
        name: &'static str,
        /// What it was set to.
        value: String,
        /// What is wrong and what is allowed.
        message: String,
    },
}

/// No machine of the wanted shape can be had.
#[derive(Debug, Error)]
pub enum ShapeError {
    /// Too many vCPUs.
    #[error("{asked_by} asks for {asked} vCPUs, but {limited_by} allows {allowed}")]
    Vcpus {
        /// What was asked for.
        asked: u64,
        /// The annotation, limit or setting that did.
        asked_by: String,
        /// How many there can be.
        allowed: u32,
        /// What says so.
        limited_by: &'static str,
    },
    /// Too much memory.
    #[error(
        "{asked_by} asks for a guest with {}MiB of memory, but {limited_by} allows {}MiB",
        asked.as_mib(),
        allowed.as_bytes() >> 20
    )]
    Memory {
        /// What was asked for, with the guest's overhead.
        asked: Size,
        /// The annotation, limit or setting that did.
        asked_by: String,
        /// How much there can be.
        allowed: Size,
        /// What says so.
        limited_by: &'static str,
    },
    /// A further container's.
    #[error(
        "the memory limit of {limit} with guest.memory_overhead = {overhead} asks for {}MiB, but the pod's VM, which runs \
         already, has {}MiB: set io.chsnap.memory on the pod (sandbox) or on its first container",
        asked.as_mib(),
        has.as_mib()
    )]
    Pod {
        /// The container's.
        limit: Size,
        /// What the guest needs beside it.
        overhead: Size,
        /// Both.
        asked: Size,
        /// What there is.
        has: Size,
    },
    /// The host does not tell its own size.
    #[error("cannot find out how many CPUs and how much memory the host has from {from}")]
    Host {
        /// Which file or call.
        from: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// "did you mean …" where a name is near, else the list of all.
pub(super) fn hint<'a>(wrong: &str, what: &str, names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let near = names.iter().map(|name| (strsim::damerau_levenshtein(wrong, name), *name)).min();
    match near {
        // A third of the letters may be wrong before a guess misleads.
        Some((distance, name)) if distance <= name.len().max(wrong.len()).div_ceil(3) => {
            format!("did you mean {name:?}?")
        }
        _ => format!("{what}: {}", names.join(", ")),
    }
}
