//! Snapshots: by what they are found, where they are kept, and for how long.
//!
//! `key` says what has to match for a snapshot to be used, `manifest` what one consists of, `store` keeps them and
//! `evict` lets go of them. `host` is what a host puts into a key, and `ladder` remembers on which rung snapshots work
//! there, `layers` which image a pod's directories are, `held` what a saved process has open. Nothing here knows how a machine is saved: that is the `vmm` room's, and `template` has it done.

mod digest;
mod error;
mod evict;
mod held;
mod host;
mod key;
mod ladder;
mod layers;
mod manifest;
mod store;
#[cfg(test)]
mod store_tests;
mod tree;

#[cfg(test)]
pub(crate) use key::tests::inputs as tests_inputs;
#[cfg(test)]
pub(crate) use tree::take_stock as stock_of;

pub(crate) use digest::{of_bytes as digest_of_bytes, of_file as digest_of};
pub use error::{BuildError, EvictError, FindError, ListError, OpenError};
pub use evict::{Evicted, Pruned};
pub use held::Held;
pub use host::{InputsError, Machine};
pub use key::{Inputs, Key, Kind, Process, VmmBuild};
pub use ladder::{Failure, Footing, Ladder, Outcome};
pub use layers::{Layers, nameless};
pub use manifest::{Manifest, ROOT, Refusal};
pub use store::{Building, Entry, InUse, Store};
pub use tree::Tree;
