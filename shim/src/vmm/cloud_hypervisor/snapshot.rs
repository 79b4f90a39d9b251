//! Cloud Hypervisor's snapshots: a directory with the configuration, the devices' state and the memory.
//!
//! The configuration has the paths of the machine that was saved. A restore reads a directory in which that file
//! is another and the rest are links to the snapshot's.

use std::{fs, io, os::unix::fs::symlink, path::Path};

use serde_json::{Value, json};

use super::{api::Api, own::text};
use crate::{
    config::MemoryRestore,
    vmm::{BootError, ControlError, VmSpec},
};

/// In a snapshot's directory.
const CONFIG: &str = "config.json";
/// Beside the machine's sockets, while it is restored.
const LINKS: &str = "restore";

/// Stops the guest's CPUs and writes the machine.
pub async fn save(api: &Api, into: &Path) -> Result<(), ControlError> {
    api.put("vm.pause", None).await?;
    api.put("vm.snapshot", Some(&json!({ "destination_url": url(into)? }))).await
}

/// Reads the machine, and starts its CPUs.
pub async fn load(api: &Api, from: &Path, memory: MemoryRestore) -> Result<(), ControlError> {
    let mode = match memory {
        MemoryRestore::Copy => "Copy",
        MemoryRestore::OnDemand => "OnDemand",
    };
    let order = json!({ "source_url": url(from)?, "resume": true, "memory_restore_mode": mode });
    api.put("vm.restore", Some(&order)).await
}

/// A snapshot as it is for one machine; gone when dropped.
#[derive(Debug)]
pub struct Links(std::path::PathBuf);

impl Drop for Links {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            log::warn!("cannot remove {:?}: {error}", self.0);
        }
    }
}

impl Links {
    /// For the machine of `spec`.
    pub fn make(spec: &VmSpec, vsock: &Path, from: &Path) -> Result<Self, BootError> {
        let dir = spec.run_dir.join(LINKS);
        let failed = |path: &Path, source| BootError::Snapshot { path: path.to_owned(), source };
        remove(&dir).and_then(|()| fs::create_dir(&dir)).map_err(|error| failed(&dir, error))?;
        let links = Self(dir);
        let entries = fs::read_dir(from).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        for entry in entries.map_err(|error| failed(from, error))? {
            if entry.file_name() != CONFIG {
                let link = links.0.join(entry.file_name());
                symlink(entry.path(), &link).map_err(|error| failed(&link, error))?;
            }
        }
        let original = from.join(CONFIG);
        let config = fs::read(&original).and_then(|text| Ok(serde_json::from_slice(&text)?));
        let config = rewritten(config.map_err(|error| failed(&original, error))?, spec, vsock)
            .map_err(|what| failed(&original, io::Error::other(what)))?;
        let copy = links.0.join(CONFIG);
        fs::write(&copy, config.to_string()).map_err(|error| failed(&copy, error))?;
        Ok(links)
    }

    /// What the VMM is to read.
    pub fn dir(&self) -> &Path {
        &self.0
    }
}

/// Removes what a restore has left in the machine's directory `run_dir` that was killed in the middle.
pub fn remove_leftovers(run_dir: &Path) -> io::Result<()> {
    remove(&run_dir.join(LINKS))
}

/// The links, not what they lead to. There is no directory among them: what is none of ours stays.
fn remove(dir: &Path) -> io::Result<()> {
    match fs::symlink_metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(meta) if !meta.is_dir() => return fs::remove_file(dir),
        Ok(_) => {}
    }
    for entry in fs::read_dir(dir)? {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(dir)
}

/// The saved machine's configuration with this one's paths.
fn rewritten(mut config: Value, spec: &VmSpec, vsock: &Path) -> Result<Value, String> {
    let path = |path: &Path| text(path).map(Value::from).map_err(|error| error.to_string());
    for (at, value) in [
        ("/fs/0/socket", path(&spec.share_socket)?),
        ("/vsock/socket", path(vsock)?),
        ("/payload/kernel", path(&spec.kernel)?),
        ("/payload/initramfs", path(&spec.initramfs)?),
        // Where the snapshot was written, which is nothing to a restored machine.
        ("/landlock_rules", Value::Null),
    ] {
        *config.pointer_mut(at).ok_or_else(|| format!("the machine has no {at}"))? = value;
    }
    Ok(config)
}

fn url(dir: &Path) -> Result<String, ControlError> {
    Ok(format!("file://{}", text(dir)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::cloud_hypervisor::tests::spec;

    fn saved() -> Value {
        json!({
            "cpus": { "boot_vcpus": 1 }, "fs": [{ "tag": "chsnap", "socket": "/old/fs.sock" }],
            "vsock": { "cid": 3, "socket": "/old/vsock" }, "payload": { "kernel": "/old/k", "initramfs": "/old/i" },
            "landlock_rules": [{ "path": "/old/snapshot", "access": "rw" }],
        })
    }

    #[test]
    fn a_restored_machine_has_its_own_paths_and_nothing_else_of_its_own() {
        let config = rewritten(saved(), &spec(), Path::new("/run/pod/vsock")).unwrap();
        let expected = json!({
            "cpus": { "boot_vcpus": 1 }, "fs": [{ "tag": "chsnap", "socket": "/run/pod/share.sock" }],
            "vsock": { "cid": 3, "socket": "/run/pod/vsock" },
            "payload": { "kernel": "/guest/vmlinux", "initramfs": "/guest/initramfs" },
            "landlock_rules": null,
        });
        assert_eq!(config, expected);
        let mut lacking = saved();
        lacking["fs"] = json!([]);
        let error = rewritten(lacking, &spec(), Path::new("/run/pod/vsock")).unwrap_err();
        assert_eq!(error, "the machine has no /fs/0/socket");
    }

    #[test]
    fn the_links_lead_to_the_snapshot_and_go_with_the_restore() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("snapshot");
        fs::create_dir(&from).unwrap();
        fs::write(from.join(CONFIG), saved().to_string()).unwrap();
        fs::write(from.join("memory-ranges"), "memory").unwrap();
        let spec = VmSpec { run_dir: dir.path().into(), ..spec() };
        let links = Links::make(&spec, Path::new("/run/pod/vsock"), &from).unwrap();
        assert_eq!(fs::read_to_string(links.dir().join("memory-ranges")).unwrap(), "memory");
        assert!(fs::read_to_string(links.dir().join(CONFIG)).unwrap().contains("/run/pod/share.sock"));
        assert!(fs::read_to_string(from.join(CONFIG)).unwrap().contains("/old/fs.sock"));
        let at = links.dir().to_owned();
        drop(links);
        assert!(!at.exists());
        assert_eq!(fs::read_to_string(from.join("memory-ranges")).unwrap(), "memory");

        // Of a shim that was killed in the middle.
        std::mem::forget(Links::make(&spec, Path::new("/run/pod/vsock"), &from).unwrap());
        assert!(at.exists());
        drop(Links::make(&spec, Path::new("/run/pod/vsock"), &from).unwrap());
        assert!(!at.exists());
        symlink(&from, &at).unwrap();
        remove_leftovers(dir.path()).unwrap();
        remove_leftovers(dir.path()).unwrap();
        assert!(fs::symlink_metadata(&at).is_err());
        assert_eq!(fs::read_to_string(from.join("memory-ranges")).unwrap(), "memory");

        fs::write(from.join(CONFIG), "{").unwrap();
        let error = Links::make(&spec, Path::new("/run/pod/vsock"), &from).unwrap_err();
        assert!(error.to_string().contains("snapshot/config.json"), "{error}");
        assert!(!at.exists());
    }
}
