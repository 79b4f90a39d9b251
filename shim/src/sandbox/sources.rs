//! Whether the files of the host answer that a container is to have. A file system whose server is gone (NFS) holds whoever
//! looks at it, and the shim has one thread for all containers of a pod: so the first look is taken by a thread that may
//! stay behind.

use std::{path::Path, thread, time::Duration};

use oci_spec::runtime::{Mount, Spec};
use tokio::{sync::oneshot, time::timeout};

use super::PlanError;

/// Looks at the source of each bind mount, for so long.
///
/// # Errors
/// Which one does not answer.
pub(crate) async fn answer(spec: &Spec, patience: Duration) -> Result<(), PlanError> {
    for mount in spec.mounts().iter().flatten() {
        let Some(source) = source(mount) else { continue };
        let (tell, told) = oneshot::channel();
        let path = source.to_owned();
        thread::spawn(move || {
            // What is wrong with it is told by who needs it.
            let _ = path.metadata();
            let _ = tell.send(());
        });
        if timeout(patience, told).await.is_err() {
            let seconds = patience.as_secs_f32();
            return Err(PlanError::Unanswered { path: source.into(), seconds });
        }
    }
    Ok(())
}

fn source(mount: &Mount) -> Option<&Path> {
    let is_bind = |word: &String| word == "bind" || word == "rbind";
    let binds = mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(is_bind);
    mount.source().as_deref().filter(|_| binds)
}
