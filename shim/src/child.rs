//! The shim's own child processes (VMM, virtiofsd): in the pod's cgroup, and never alive without the shim.

use std::{
    ffi::OsStr,
    fs::OpenOptions,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use seccompiler::BpfProgram;
use tokio::process::Command;

use crate::sys::{self, Network};

/// How long the end of one that was killed is waited for: the kernel may not let go of it (a device that does not answer).
pub const KILLED: Duration = Duration::from_secs(10);

/// A command that starts `program` in `cgroups` (directories: one on v2, one per controller on v1), with `keep`
/// open under the numbers that [`fd_number`] tells. stdin is null, stdout and stderr are pipes, and dropping the
/// child kills it. To be spawned from the runtime's main thread, whose end ends the child (PR_SET_PDEATHSIG).
///
/// # Errors
/// Where a cgroup cannot be joined.
pub fn command(program: impl AsRef<OsStr>, cgroups: &[PathBuf], keep: Vec<OwnedFd>) -> io::Result<Command> {
    confined(program, cgroups, keep, Network::Same, None)
}

/// The same in a network namespace and under a seccomp filter.
///
/// # Errors
/// Where a cgroup cannot be joined.
pub(crate) fn confined(
    program: impl AsRef<OsStr>,
    cgroups: &[PathBuf],
    keep: Vec<OwnedFd>,
    network: Network,
    filter: Option<BpfProgram>,
) -> io::Result<Command> {
    let cgroups = cgroups.iter().map(|dir| open_procs(dir)).collect::<io::Result<Vec<_>>>()?;
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    sys::before_exec(&mut command, sys::BeforeExec { cgroups, keep, network, filter });
    Ok(command)
}

/// How a child that keeps `fd` finds it.
#[must_use]
pub fn fd_number(fd: &OwnedFd) -> i32 {
    sys::number(fd)
}

fn open_procs(dir: &Path) -> io::Result<OwnedFd> {
    let path = dir.join("cgroup.procs");
    let file = OpenOptions::new()
        .write(true)
        .open(&path)
        .map_err(|e| io::Error::new(e.kind(), format!("cannot open {}: {e}", path.display())))?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_child_gets_its_descriptors_and_a_session() {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let theirs = theirs.into_std().unwrap();
        theirs.set_nonblocking(false).unwrap();
        let theirs: OwnedFd = theirs.into();
        let n = fd_number(&theirs);
        let mut command = command("/bin/bash", &[], vec![theirs]).unwrap();
        // One that nobody marked close-on-exec, as a careless parent leaves them.
        let stray = nix::unistd::dup(std::io::stderr()).unwrap();
        let stray_number = fd_number(&stray);
        command.arg("-c").arg(format!(
            "read line <&{n}; echo $line $(ps -o sid= -p $$) $$ $(test -e /proc/$$/fd/{stray_number} && echo stray)"
        ));
        let mut child = command.spawn().unwrap();
        drop(command);
        let mut ours = ours;
        ours.write_all(b"hello\n").await.unwrap();
        let mut out = String::new();
        child.stdout.take().unwrap().read_to_string(&mut out).await.unwrap();
        let words: Vec<_> = out.split_whitespace().collect();
        assert_eq!(words[0], "hello");
        assert_eq!(words[1], words[2], "the child leads its own session");
        assert_eq!(words.len(), 3, "a stray descriptor was inherited");
        assert!(child.wait().await.unwrap().success());
    }
}
