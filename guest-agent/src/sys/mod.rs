//! The room of system calls: everything unsafe, and what a child does between clone and exec.
//!
//! A child is described by a [`Plan`] made beforehand, for between clone and exec nothing may be allocated and no
//! lock taken. [`child`] carries the plan out; the first step that fails is reported by its number and errno.

mod child;
mod clone;
mod op;
mod steps;
mod wrap;

pub use child::{REPORT_LEN, Report};
pub use clone::{Child, Namespaces, spawn};
pub use op::{CapabilitySets, Op, Plan, Program};
pub use steps::MOUNT_ATTRIBUTES;
pub use wrap::{
    Pidfd, add_entropy, bound_malloc, bytes_available, in_pid_namespace, init_pid_namespace, open_terminal, reap,
    reseed, set_window_size, terminal_peer, watch,
};
