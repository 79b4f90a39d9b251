//! The harness of the integration tests: a private containerd, containers on it, and the check that nothing is left.
//!
//! Nothing here touches a system's own containerd. All that a run makes lies below one directory in `/run`, carries
//! that directory's name in its environment, and is looked for after every test.

mod containerd;
mod ctr;
mod env;
mod leak;
mod pod;
mod proc;
mod pty;
mod run;
mod settings;
mod tools;

pub mod http;
pub mod table;
pub mod ways;

pub use containerd::{Containerd, Version, keep_logs, stop_all, sweep, tell_knocks};
pub use ctr::Ctr;
pub use env::{Env, Vmm};
pub use leak::Baseline;
pub use pod::{Container, IMAGE, Started};
pub use proc::{Process, kill, marked, rss_kib, rss_parts};
pub use pty::Pty;
pub use run::{Output, Run, Running, eventually, patience};
pub use settings::Settings;
pub use tools::Tools;
