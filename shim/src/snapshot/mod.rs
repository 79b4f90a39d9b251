//! Snapshots: by what they are found, where they are kept, and for how long.
//!
//! `key` says what has to match for a snapshot to be used, `manifest` what one consists of, `store` keeps them and
//! `evict` lets go of them. Nothing here knows how a machine is saved: that is the `vmm` room's.

mod digest;
mod error;
mod evict;
mod key;
mod manifest;
mod store;
#[cfg(test)]
mod store_tests;
mod tree;

pub use error::{BuildError, EvictError, FindError, ListError, OpenError};
pub use evict::Evicted;
pub use key::{Inputs, Key, Kind, Process, VmmBuild};
pub use manifest::{Manifest, ROOT, Refusal};
pub use store::{Building, Entry, InUse, Store};
pub use tree::Tree;
