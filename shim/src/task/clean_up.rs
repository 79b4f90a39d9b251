//! The `delete` action: what is left of a pod whose shim containerd has lost.
//!
//! After a shim that was killed that is a directory and a cgroup: mounts and processes went with it. A shim that stands
//! still is as good as gone, but its socket takes connections for as long as it exists; so it is asked something, and
//! killed where it does not answer.

use std::{
    env,
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use containerd_shim_protos::{api::ConnectRequest, shim_async::TaskClient};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};
use ttrpc::{asynchronous::transport::Socket, context::Context};

use super::{chain, create::DIR_FILE, server::RUNTIME};
use crate::{cgroup::Cgroup, proc::start_ticks, sandbox::PodDir};

/// For a shim to answer, which has nothing to do but that. containerd gives this action five seconds.
const ANSWER: Duration = Duration::from_secs(2);
/// For the kernel to take a killed shim apart.
const DYING: Duration = Duration::from_secs(2);

/// In the bundle, where runc's shim has it, too: the pid that was told of the container.
const PID_FILE: &str = "init.pid";

/// For [`told_pid`], should this process be killed.
pub(super) fn note_pid(bundle: &str, pid: u32) {
    if let Err(error) = fs::write(Path::new(bundle).join(PID_FILE), pid.to_string()) {
        log::warn!("should the shim be killed, the container's end will be told without its pid: {error}");
    }
}

/// What was told of the container in this bundle; 0 where nothing was.
pub(super) fn told_pid(bundle: &Path) -> u32 {
    fs::read_to_string(bundle.join(PID_FILE)).ok().and_then(|pid| pid.trim().parse().ok()).unwrap_or_default()
}

/// Removes what is left of the container `id`, unless its pod's shim lives: that cleans up after itself.
pub(super) async fn clean_up(bundle: &Path, id: &str) {
    let address = fs::read_to_string(bundle.join("address")).unwrap_or_default();
    if let Some(socket) = address.trim().strip_prefix("unix://") {
        match shim_at(Path::new(socket), id).await {
            Shim::Answers => return,
            Shim::StandsStill(pid) if !end(pid).await => return,
            Shim::StandsStill(_) | Shim::Gone => {}
        }
        let _ = fs::remove_file(socket);
    }
    let spec = oci_spec::runtime::Spec::load(bundle.join("config.json")).ok();
    let cgroup = spec.as_ref().and_then(|s| s.linux().as_ref()).and_then(|l| l.cgroups_path().clone());
    // The note is there only in the bundle of a container that was in the pod's way of being made.
    let Ok(dir) = fs::read(bundle.join(DIR_FILE)) else { return };
    // Another containerd's pod of the same name may have it, and then nothing of it is ours.
    let dir = match PodDir::claim(Path::new(OsStr::from_bytes(&dir))) {
        Ok(dir) => dir,
        Err(e) => return eprintln!("{RUNTIME}: nothing is removed: {}", chain(&e)),
    };
    if let Some(path) = cgroup
        && let Ok(mut cgroup) = Cgroup::find(&path.to_string_lossy(), dir.path())
    {
        cgroup.remove();
    }
    dir.remove_of_dying();
}

/// What there is behind a shim's socket.
#[derive(Debug, PartialEq, Eq)]
enum Shim {
    /// A shim that does its work.
    Answers,
    /// The process that listens does not.
    StandsStill(u32),
    /// Nobody.
    Gone,
}

async fn shim_at(socket: &Path, id: &str) -> Shim {
    let Ok(Ok(stream)) = timeout(ANSWER, UnixStream::connect(socket)).await else { return Shim::Gone };
    // As the kernel knows it: the process that called listen().
    let listener = stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(|pid| u32::try_from(pid).ok());
    let client = TaskClient::new(ttrpc::r#async::Client::new(Socket::new(stream)));
    let request = ConnectRequest { id: id.into(), ..Default::default() };
    match (timeout(ANSWER, client.connect(Context::default(), &request)).await, listener) {
        (Ok(Ok(_) | Err(ttrpc::Error::RpcStatus(_))), _) => Shim::Answers,
        (_, Some(pid)) => Shim::StandsStill(pid),
        (_, None) => Shim::Gone,
    }
}

/// Kills the shim `pid`, and with it its VMM and virtiofsd. False where it is none, or does not end.
async fn end(pid: u32) -> bool {
    if start_ticks(pid).is_none() {
        return true;
    }
    if !is_shim(pid) {
        eprintln!("{RUNTIME}: nothing is removed: process {pid}, which has the shim's socket, is no shim");
        return false;
    }
    eprintln!("{RUNTIME}: the shim {pid} did not answer within {} s: killing it", ANSWER.as_secs());
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let killed = Instant::now();
    while start_ticks(pid).is_some() {
        if killed.elapsed() > DYING {
            eprintln!("{RUNTIME}: nothing is removed: the shim {pid} does not end");
            return false;
        }
        sleep(Duration::from_millis(10)).await;
    }
    true
}

/// Whether it runs this program, perhaps of another version that was installed since or before.
fn is_shim(pid: u32) -> bool {
    let theirs = fs::read_link(format!("/proc/{pid}/exe")).ok().and_then(|exe| program(&exe).map(OsStr::to_owned));
    let ours: Option<PathBuf> = env::current_exe().ok();
    theirs.is_some() && theirs.as_deref() == ours.as_deref().and_then(program)
}

/// The file's name, which the kernel marks where the file was removed.
fn program(exe: &Path) -> Option<&OsStr> {
    let name = exe.file_name()?.as_bytes();
    Some(OsStr::from_bytes(name.strip_suffix(b" (deleted)").unwrap_or(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_only_takes_connections_is_no_shim_that_answers() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        assert_eq!(shim_at(&socket, "web").await, Shim::Gone);
        let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let asked = Instant::now();
        assert_eq!(shim_at(&socket, "web").await, Shim::StandsStill(std::process::id()));
        assert!(asked.elapsed() < 2 * ANSWER, "{:?}", asked.elapsed());
        drop(listener);
        assert_eq!(shim_at(&socket, "web").await, Shim::Gone);
    }

    #[tokio::test]
    async fn only_a_shim_is_killed() {
        let mut other = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!end(other.id()).await);
        assert!(other.try_wait().unwrap().is_none());
        other.kill().unwrap();
        other.wait().unwrap();
        assert!(end(other.id()).await, "what is gone needs no killing");
    }

    #[test]
    fn a_program_that_was_replaced_keeps_its_name() {
        assert_eq!(program(Path::new("/bin/shim (deleted)")), program(Path::new("/usr/bin/shim")));
        assert!(is_shim(std::process::id()) && !is_shim(1));
    }
}
