//! QEMU's snapshots: a migration into a file and out of it again.
//!
//! With the capability `mapped-ram` each page has its place in the file: the file is sparse, is written and read at the
//! disk's speed, and does not grow with how often a page changed. Not `x-ignore-shared`, which would leave the memory
//! where it is: together with `mapped-ram` it fails ("Bad address"), and private memory breaks virtiofs.

use std::{path::Path, time::Duration};

use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::qmp::Qmp;
use crate::vmm::ControlError;

/// The machine's file in a snapshot's directory.
pub const FILE: &str = "machine";
/// Between two looks at how far it is.
const PAUSE: Duration = Duration::from_millis(2);
/// Bytes a second. The default is a network's, and holds for files, too.
const BANDWIDTH: u64 = 1 << 40;

/// Stops the guest's CPUs and writes the machine.
pub async fn save(qmp: &Qmp, into: &Path) -> Result<(), ControlError> {
    qmp.execute("stop", Value::Null).await?;
    prepare(qmp).await?;
    qmp.execute("migrate", json!({ "channels": channel(into)? })).await?;
    finished(qmp, "migrate").await
}

/// Reads the machine, and starts its CPUs.
pub async fn load(qmp: &Qmp, from: &Path) -> Result<(), ControlError> {
    prepare(qmp).await?;
    // By default QEMU exits, and says why on stderr only.
    let arguments = json!({ "channels": channel(from)?, "exit-on-error": false });
    qmp.execute("migrate-incoming", arguments).await?;
    finished(qmp, "migrate-incoming").await?;
    qmp.execute("cont", Value::Null).await.map(drop)
}

async fn prepare(qmp: &Qmp) -> Result<(), ControlError> {
    let capabilities = json!({ "capabilities": [{ "capability": "mapped-ram", "state": true }] });
    qmp.execute("migrate-set-capabilities", capabilities).await?;
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH })).await.map(drop)
}

/// As an object, in which no character of the path has a meaning.
fn channel(dir: &Path) -> Result<Value, ControlError> {
    let path = dir.join(FILE);
    let name = path.to_str().ok_or_else(|| ControlError::Path { path: path.clone() })?;
    Ok(json!([{ "channel-type": "main", "addr": { "transport": "file", "filename": name, "offset": 0 } }]))
}

async fn finished(qmp: &Qmp, command: &str) -> Result<(), ControlError> {
    let done = async {
        loop {
            let state = qmp.execute("query-migrate", Value::Null).await?;
            match state["status"].as_str() {
                Some("completed") => return Ok(()),
                Some(status @ ("failed" | "cancelled")) => {
                    let answer = state["error-desc"].as_str().unwrap_or(status).to_owned();
                    return Err(ControlError::Refused { command: command.into(), answer });
                }
                _ => sleep(PAUSE).await,
            }
        }
    };
    let late = |_| ControlError::Late { command: command.into(), seconds: qmp.patience().as_secs_f32() };
    timeout(qmp.patience(), done).await.map_err(late)?
}
