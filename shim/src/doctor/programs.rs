//! Programs on the host, other than the VMMs.

use std::{env, fs, path::Path, time::Duration};

use tokio::{process::Command, time::timeout};

use super::Check;
use crate::{
    config::ShareConfig,
    proc,
    program::{Scout, in_path, is_executable, numbers},
    share,
    task::chain,
};

const PATIENCE: Duration = Duration::from_secs(10);

pub(super) async fn virtiofsd(config: &ShareConfig, scout: &mut Scout) -> Check {
    let name = "virtiofsd";
    match share::find_virtiofsd(config, scout).await {
        Ok(found) => Check::ok(name, format!("{} ({})", found.version, found.path.display())),
        Err(error) => Check::missing(
            name,
            chain(&error),
            "`cargo install virtiofsd` brings one, `make install` installs the one that was built",
        ),
    }
}

/// containerd looks for it in its own PATH, which is not ours but mostly like it.
pub(super) fn shim() -> Check {
    let (name, file) = ("shim", "containerd-shim-chsnap-v2");
    if let Some(path) = in_path(file) {
        return Check::ok(name, path.display().to_string());
    }
    let beside =
        env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(file))).filter(|path| is_executable(path));
    match beside {
        Some(path) => Check::warn(
            name,
            format!("{} (not in PATH)", path.display()),
            "put its directory into containerd's PATH, or name the file as the runtime's path",
        ),
        None => Check::missing(name, "containerd-shim-chsnap-v2 is not in PATH", "`make install` installs it"),
    }
}

/// Its program, or where that is part of another one, as k3s has it, that it runs.
pub(super) async fn containerd() -> Check {
    let name = "containerd";
    let mend = "install containerd 1.6 or newer; `ctr run --runtime io.containerd.chsnap.v2` then runs containers";
    let Some(path) = in_path("containerd") else {
        // The name of a socket is whatever its owner wrote.
        let sockets = fs::read("/proc/net/unix").unwrap_or_default();
        let found = match (proc::named("containerd"), listening(&String::from_utf8_lossy(&sockets))) {
            (Some(pid), _) => format!("process {pid}"),
            (None, Some(socket)) => format!("one listens at {socket}"),
            (None, None) => return Check::missing(name, "not in PATH, and none runs", mend),
        };
        return Check::ok(name, format!("{found} (not in PATH)"));
    };
    let said = match first_line(&path).await {
        Ok(said) => said,
        Err(error) => return Check::warn(name, format!("{}: {error}", path.display()), mend),
    };
    // "containerd github.com/containerd/containerd v2.1.9 <commit>"
    let version = said.split_whitespace().map(|word| word.trim_start_matches('v')).find(|word| numbers(word).is_some());
    let found = format!("{} ({})", version.unwrap_or("of unknown version"), path.display());
    match version.and_then(numbers) {
        Some(version) if version < (1, 6) => Check::warn(name, found, mend),
        _ => Check::ok(name, found),
    }
}

/// The first socket of a containerd in a table as proc_net_unix(5) has it: number, references, protocol, flags, type, state,
/// inode, path.
fn listening(table: &str) -> Option<String> {
    /// Of the flags (linux/net.h): somebody listens.
    const ACCEPTS: u32 = 1 << 16;
    table.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let flags = u32::from_str_radix(words.nth(3)?, 16).ok()?;
        words.nth(3).filter(|path| flags & ACCEPTS != 0 && path.ends_with("/containerd.sock")).map(Into::into)
    })
}

/// The first line that it prints about its version.
async fn first_line(program: &Path) -> Result<String, String> {
    let output = Command::new(program).arg("--version").stdin(std::process::Stdio::null()).kill_on_drop(true).output();
    match timeout(PATIENCE, output).await {
        Err(_) => Err(format!("gives no version within {} s", PATIENCE.as_secs())),
        Ok(Err(error)) => Err(error.to_string()),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(if output.stdout.is_empty() { &output.stderr } else { &output.stdout });
            let line: String = said.lines().next().unwrap_or_default().trim().chars().take(200).collect();
            if output.status.success() { Ok(line) } else { Err(format!("{}: {line}", output.status)) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::listening;

    #[test]
    fn a_containerd_within_another_program_is_found() {
        let table = "Num       RefCount Protocol Flags    Type St Inode Path\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 20671 /run/old/containerd.sock\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 20672 /run/k3s/containerd/containerd.sock.ttrpc\n\
            0000000000000000: 00000003 00000000 00000000 0001 03 20673\n\
            0000000000000000: 00000002 00000000 00010000 0001 01 20674 /run/k3s/containerd/containerd.sock\n";
        assert_eq!(listening(table).as_deref(), Some("/run/k3s/containerd/containerd.sock"));
        assert_eq!(listening(table.lines().next().unwrap_or_default()), None);
    }
}
