//! What runs on this host: each pod's shim keeps one `state.json` in `<state dir>/<namespace>/<id>`, and `chsnap ps`
//! reads them all.

use std::{
    fmt, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    proc::{Identity, start_ticks},
    vmm::{Accelerator, VmmKind},
};

const FILE: &str = "state.json";
const HALF_WRITTEN: &str = ".state.json.new";

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The pod's id in containerd.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The shim's process.
    pub pid: u32,
    /// The VMM's process; none while no container has asked for a VM.
    pub vmm_pid: Option<u32>,
    /// Which VMM.
    pub vmm: Option<VmmKind>,
    /// What it runs the guest on.
    pub accelerator: Option<Accelerator>,
    /// The guest's `uname -r`.
    pub guest_kernel: Option<String>,
    /// How the VM was started.
    pub way: Option<Way>,
    /// Why not in a better way.
    pub why_not: Option<String>,
    /// RFC 3339, in UTC; see [`timestamp`].
    pub started_at: String,
    /// vCPUs of the guest.
    pub vcpus: u32,
    /// Memory of the guest.
    pub memory_mib: u64,
    /// Ports of the guest that the host can reach.
    pub exposed: Vec<Exposed>,
    /// What the start took, phase by phase in order, in microseconds.
    pub phases_us: Vec<(String, u64)>,
}

/// How a VM was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// A guest in which the image's process had initialised was restored.
    Image,
    /// A guest with kernel and agent up was restored, and the container started in it.
    Base,
    /// The kernel was booted.
    Direct,
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Image => "image",
            Self::Base => "base",
            Self::Direct => "direct",
        })
    }
}

/// A port of the guest that the host can reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exposed {
    /// On the guest's loopback.
    pub guest_port: u16,
    /// UNIX socket on the host.
    pub socket: PathBuf,
    /// TCP address on the host.
    pub listen: Option<SocketAddr>,
}

/// A pod that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// What its shim wrote.
    #[serde(flatten)]
    pub state: State,
    /// Whether that shim still runs.
    pub status: Status,
}

/// Whether the shim that wrote a state file still runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It does.
    Running,
    /// It was killed, and nothing has cleaned up after it yet.
    Dead,
}

/// The state file cannot be written.
#[derive(Debug, Error)]
#[error("cannot write the pod's state to {path:?}")]
pub struct WriteError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The state directory cannot be listed.
#[derive(Debug, Error)]
#[error("cannot list the pods in {path:?}")]
pub struct ListError {
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// A state file as it stands on disk.
#[derive(Serialize, Deserialize)]
struct Record<S> {
    #[serde(flatten)]
    state: S,
    /// When the shim's process started, in clock ticks since boot. Process ids are used again; this pair is not.
    pid_start: Option<u64>,
}

impl State {
    /// Writes `state.json` into the pod's directory; a reader sees the old one or the new one, never half of it.
    pub fn write(&self, dir: &Path) -> Result<(), WriteError> {
        let path = dir.join(FILE);
        let error = |source| WriteError { path: path.clone(), source };
        let record = Record { state: self, pid_start: start_ticks(self.pid) };
        let json = serde_json::to_vec_pretty(&record).map_err(|source| error(source.into()))?;
        let new = dir.join(HALF_WRITTEN);
        fs::write(&new, json).and_then(|()| fs::rename(&new, &path)).map_err(|source| {
            let _ = fs::remove_file(&new);
            error(source)
        })
    }

    /// All pods below the state directory, by namespace and id. A directory whose shim has not written yet, or is
    /// just removing it, is no pod.
    pub fn list(root: &Path) -> Result<Vec<Entry>, ListError> {
        let error = |path: &Path| {
            let path = path.to_owned();
            |source| ListError { path, source }
        };
        let mut entries = Vec::new();
        for namespace in directories(root).map_err(error(root))? {
            for pod in directories(&namespace).map_err(error(&namespace))? {
                match read(&pod.join(FILE)) {
                    Ok(entry) => entries.push(entry),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => log::warn!("{}: {error}", pod.join(FILE).display()),
                }
            }
        }
        entries.sort_by(|a, b| (&a.state.namespace, &a.state.id).cmp(&(&b.state.namespace, &b.state.id)));
        Ok(entries)
    }

    /// The shim that has recorded itself in a pod's directory, if it still runs and is not this process.
    pub fn living_shim(dir: &Path) -> Option<u32> {
        let Entry { state, status } = read(&dir.join(FILE)).ok()?;
        (status == Status::Running && state.pid != std::process::id()).then_some(state.pid)
    }
}

/// Now, as `started_at` wants it.
pub fn timestamp() -> String {
    rfc3339(SystemTime::now())
}

/// A time as people and programs write it, in UTC.
pub fn rfc3339(at: SystemTime) -> String {
    humantime::format_rfc3339_millis(at).to_string()
}

fn read(path: &Path) -> io::Result<Entry> {
    let Record { state, pid_start } = serde_json::from_slice::<Record<State>>(&fs::read(path)?)?;
    let lives = pid_start.is_some_and(|start| Identity { pid: state.pid, start }.lives());
    let status = if lives { Status::Running } else { Status::Dead };
    Ok(Entry { state, status })
}

/// None where the directory is gone, which is no error: pods come and go.
fn directories(path: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// The record of a shim with that pid.
    pub fn state(id: &str, pid: u32) -> State {
        State {
            id: id.into(),
            namespace: "default".into(),
            pid,
            vmm_pid: Some(7),
            vmm: Some(VmmKind::Qemu),
            accelerator: Some(Accelerator::Tcg),
            guest_kernel: None,
            way: Some(Way::Direct),
            why_not: None,
            started_at: timestamp(),
            vcpus: 1,
            memory_mib: 512,
            exposed: vec![Exposed { guest_port: 8080, socket: "/s".into(), listen: "[::1]:1".parse().ok() }],
            phases_us: vec![("kernel".into(), 7)],
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::{testing::state, *};

    #[test]
    fn what_was_written_is_listed_in_order() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(State::list(&root.path().join("none")).unwrap(), []);
        for id in ["b", "a"] {
            let dir = root.path().join("default").join(id);
            fs::create_dir_all(&dir).unwrap();
            let state = state(id, std::process::id());
            state.write(&dir).unwrap();
            state.write(&dir).unwrap();
            let names: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(names, [FILE]);
        }
        // Half-dead: no file yet, half a file, a stray file.
        fs::create_dir_all(root.path().join("default/starting")).unwrap();
        fs::create_dir_all(root.path().join("default/broken")).unwrap();
        fs::write(root.path().join("default/broken/state.json"), "{").unwrap();
        fs::write(root.path().join("stray"), "").unwrap();
        let entries = State::list(root.path()).unwrap();
        let ids: Vec<_> = entries.iter().map(|entry| (entry.state.id.as_str(), entry.status)).collect();
        assert_eq!(ids, [("a", Status::Running), ("b", Status::Running)]);
        let json = serde_json::to_value(&entries[0]).unwrap();
        assert_eq!(
            (&json["vmm"], &json["way"], &json["status"]),
            (&"qemu".into(), &"direct".into(), &"running".into())
        );
    }

    #[test]
    fn a_shim_that_is_gone_leaves_a_dead_entry() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("default/x");
        fs::create_dir_all(&dir).unwrap();
        let mut shim = Command::new("sleep").arg("60").spawn().unwrap();
        state("x", shim.id()).write(&dir).unwrap();
        let status = || State::list(root.path()).unwrap()[0].status;
        assert_eq!(status(), Status::Running);
        shim.kill().unwrap();
        // Killed and not yet reaped is gone already.
        let waited = std::time::Instant::now();
        while status() == Status::Running && waited.elapsed().as_secs() < 5 {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(status(), Status::Dead);
        shim.wait().unwrap();
        assert_eq!(status(), Status::Dead);
        // The id belongs to another process now.
        let path = dir.join(FILE);
        let text = fs::read_to_string(&path).unwrap();
        let old = format!("\"pid\": {}", shim.id());
        assert!(text.contains(&old));
        fs::write(&path, text.replace(&old, &format!("\"pid\": {}", std::process::id()))).unwrap();
        assert_eq!(status(), Status::Dead);
    }

    #[test]
    fn a_write_that_fails_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let error = state("x", 1).write(&missing).unwrap_err().to_string();
        assert_eq!(error, format!("cannot write the pod's state to {:?}", missing.join(FILE)));
    }
}
