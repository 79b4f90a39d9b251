//! Programs on the host, other than the VMMs.

use std::{
    env,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{process::Command, time::timeout};

use super::Check;
use crate::{config::ShareConfig, share};

const PATIENCE: Duration = Duration::from_secs(10);

pub(super) async fn virtiofsd(config: &ShareConfig) -> Check {
    let name = "virtiofsd";
    let mend =
        "install virtiofsd 1.14 or newer (`cargo install virtiofsd`, or `make setup`), or name it in [share] virtiofsd";
    let program = share::virtiofsd_program(config);
    let path = if program.is_absolute() { Some(program.clone()) } else { in_path(&program) };
    let Some(path) = path else { return Check::missing(name, "not found", mend) };
    let said = match first_line(&path).await {
        Ok(said) => said,
        Err(error) => return Check::missing(name, format!("{}: {error}", path.display()), mend),
    };
    let found = |what: &str| format!("{what} ({})", path.display());
    // QEMU's old one, in C, says "virtiofsd version 7.2.22"; the new one "virtiofsd 1.14.0".
    match said.strip_prefix("virtiofsd ") {
        Some(version) if version.starts_with("version") => {
            Check::missing(name, found(&format!("QEMU's old one, {version}")), mend)
        }
        Some(version) if numbers(version) >= Some((1, 14)) => Check::ok(name, found(version)),
        Some(version) => Check::missing(name, found(&format!("{version} is too old")), mend),
        None => Check::missing(name, found(&format!("it says {said:?}, which is not virtiofsd")), mend),
    }
}

/// containerd looks for it in its own PATH, which is not ours but mostly like it.
pub(super) fn shim() -> Check {
    let (name, file) = ("shim", Path::new("containerd-shim-chsnap-v2"));
    if let Some(path) = in_path(file) {
        return Check::ok(name, path.display().to_string());
    }
    let beside = env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(file))).filter(|path| is_program(path));
    match beside {
        Some(path) => Check::warn(
            name,
            format!("{} (not in PATH)", path.display()),
            "put its directory into containerd's PATH, or name the file as the runtime's path",
        ),
        None => Check::missing(name, "containerd-shim-chsnap-v2 is not in PATH", "`make install` installs it"),
    }
}

/// Only a hint: containerd may well run from elsewhere.
pub(super) async fn containerd() -> Check {
    let name = "containerd";
    let mend = "install containerd 1.6 or newer; `ctr run --runtime io.containerd.chsnap.v2` then runs containers";
    let Some(path) = in_path(Path::new("containerd")) else { return Check::warn(name, "not in PATH", mend) };
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

/// Major and minor.
fn numbers(version: &str) -> Option<(u64, u64)> {
    let (major, rest) = version.split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((major.parse().ok()?, minor.parse().ok()?))
}

fn in_path(name: &Path) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::doctor::Status;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(numbers("1.14.0") > numbers("1.9.0"));
        assert_eq!(numbers("1.13.3-dirty"), Some((1, 13)));
        assert_eq!(numbers("one.two"), None);
    }

    #[tokio::test]
    async fn virtiofsd_is_judged_by_what_it_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("virtiofsd");
        for (script, status, found) in [
            ("echo virtiofsd 1.14.0", Status::Ok, "1.14.0 ("),
            ("echo virtiofsd 1.13.3", Status::Missing, "1.13.3 is too old ("),
            ("echo virtiofsd version 7.2.22; echo using FUSE", Status::Missing, "QEMU's old one, version 7.2.22 ("),
            ("echo GNU coreutils 9.1", Status::Missing, "it says \"GNU coreutils 9.1\", which is not virtiofsd ("),
            ("echo broken >&2; exit 3", Status::Missing, "exit status: 3: broken"),
        ] {
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            let check = virtiofsd(&ShareConfig { virtiofsd: Some(path.clone()), ..ShareConfig::default() }).await;
            assert_eq!(check.status, status, "{check:?}");
            assert!(check.found.contains(found), "{check:?}");
            assert_eq!(check.mend.is_some(), status == Status::Missing);
        }
        fs::remove_file(&path).unwrap();
        let check = virtiofsd(&ShareConfig { virtiofsd: Some(path), ..ShareConfig::default() }).await;
        assert_eq!(check.status, Status::Missing);
    }
}
