//! chsnap: every pod is a microVM.
//!
//! Each concern is a room with one door. Data flows one way: `task` (containerd's API) → `sandbox` (a pod's life)
//! → `share` (its root file systems), `vmm` (the machine), `agent` (the guest). `config` says how, `snapshot` from what;
//! `template` builds snapshots beside the pods, `origin` asks containerd of which image a root is.
//! `docs/architecture.md` follows one `ctr run` through the rooms.

pub mod agent;
pub mod cgroup;
pub mod child;
pub mod config;
pub mod doctor;
mod files;
mod guest;
pub mod image;
mod oom;
pub mod origin;
mod proc;
pub mod program;
mod ring;
pub mod sandbox;
pub mod share;
pub mod snapshot;
pub mod state;
mod sys;
pub mod task;
pub mod template;
mod text;
pub mod told;
pub mod vmm;
