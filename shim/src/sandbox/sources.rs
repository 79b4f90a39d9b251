//! Whether the files of the host answer that a container is to have. A file system whose server is gone (NFS) holds whoever
//! looks at it, and the shim has one thread for all containers of a pod: so the first look is taken by a thread that may
//! stay behind.

use std::{thread, time::Duration};

use oci_spec::runtime::Spec;
use tokio::{sync::oneshot, time::timeout};

use super::{PlanError, plan::is_bind};

/// Looks at the source of each bind mount, for so long.
///
/// # Errors
/// Which one does not answer.
pub(crate) async fn answer(spec: &Spec, patience: Duration) -> Result<(), PlanError> {
    let binds = spec.mounts().iter().flatten().filter(|mount| is_bind(mount));
    for source in binds.filter_map(|bind| bind.source().as_ref()) {
        let (tell, told) = oneshot::channel();
        let path = source.clone();
        thread::spawn(move || {
            // What is wrong with it is told by who needs it.
            let _ = path.metadata();
            let _ = tell.send(());
        });
        if timeout(patience, told).await.is_err() {
            let seconds = patience.as_secs_f32();
            return Err(PlanError::Unanswered { path: source.clone(), seconds });
        }
    }
    Ok(())
}
