//! What the guest may cache of the share.
//!
//! With virtiofsd's own `auto` the guest forgets what it has of a file whenever that is opened: each program that is
//! started reads its libraries anew, and every process that has them mapped has to fetch them again. It is only needed
//! where somebody else may have written.

use super::{NewContainer, Request};
use crate::{config::CacheMode, share::Overlay};

/// Nobody but the guest writes: the root is layers of a snapshotter, which the shim has mounted where nobody else sees
/// them, nothing of the host's is in it, and no further container is to be expected, which may have some.
pub(super) fn is_alone(request: &Request<'_>, first: &NewContainer<'_>) -> bool {
    request.config.share.cache == CacheMode::Auto
        && !first.plan.in_a_pod()
        && !first.plan.has_host_files()
        && Overlay::of(first.rootfs).is_some()
}

/// As it is for a template's guest: what is in use there outlives it, and may not be believed for ever.
pub(crate) fn of_template(configured: CacheMode) -> CacheMode {
    if configured == CacheMode::Always { CacheMode::Revalidate } else { configured }
}

/// As it is for the pod that starts with `first`.
pub(super) fn mode(request: &Request<'_>, first: &NewContainer<'_>) -> CacheMode {
    if is_alone(request, first) { CacheMode::Always } else { request.config.share.cache }
}
