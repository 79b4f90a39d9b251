//! `chsnap` as an operator types it: what is printed where, and the exit status.
#![allow(clippy::unwrap_used)] // The helpers are test code too.

use std::{
    fs,
    process::{Command, Output, Stdio},
};

use chsnap::{
    state::{Exposed, State, Way, timestamp},
    vmm::{Accelerator, VmmKind},
};
use serde_json::Value;

fn chsnap(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_chsnap")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn version_help_and_usage() {
    let version = chsnap(&["--version"]);
    assert_eq!(text(&version.stdout), format!("chsnap {}\n", env!("CARGO_PKG_VERSION")));
    assert!(version.status.success());
    assert!(chsnap(&["image", "import", "--help"]).status.success());
    for wrong in [&[][..], &["snapshto"], &["ps", "--jsno"], &["image"]] {
        let output = chsnap(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty());
    }
}

#[test]
fn ps_lists_what_shims_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("state");
    let config = dir.path().join("config.toml");
    fs::write(&config, format!("[state]\ndir = {root:?}\n")).unwrap();
    let ps = |json: &[&str]| chsnap(&[&["ps", "--config", config.to_str().unwrap()], json].concat());
    assert_eq!(text(&ps(&["--json"]).stdout), "[]\n");
    assert_eq!(text(&ps(&[]).stdout).lines().count(), 1);

    let mut state = State {
        id: "web".into(),
        namespace: "default".into(),
        pid: std::process::id(),
        vmm_pid: Some(1),
        vmm: Some(VmmKind::Qemu),
        accelerator: Some(Accelerator::Tcg),
        way: Some(Way::Direct),
        why_not: Some("no snapshot".into()),
        guest_kernel: Some("6.12.95".into()),
        phases_us: vec![("share".into(), 1)],
        started_at: timestamp(),
        vcpus: 2,
        memory_mib: 576,
        exposed: vec![
            Exposed { guest_port: 8080, socket: "/run/web/8080.sock".into(), listen: None },
            Exposed { guest_port: 80, socket: "/run/web/80.sock".into(), listen: "127.0.0.1:18080".parse().ok() },
        ],
    };
    let pod = root.join("default/web");
    fs::create_dir_all(&pod).unwrap();
    state.write(&pod).unwrap();
    // Asleep, without a VM, and its shim is gone: no process has the largest id.
    state = State {
        id: "old".into(),
        namespace: "k8s.io".into(),
        pid: u32::MAX,
        vmm: None,
        accelerator: None,
        way: None,
        exposed: vec![],
        ..state
    };
    fs::create_dir_all(root.join("k8s.io/old")).unwrap();
    state.write(&root.join("k8s.io/old")).unwrap();

    let table = text(&ps(&[]).stdout);
    let lines: Vec<Vec<&str>> =
        table.lines().map(|line| line.split("  ").filter(|cell| !cell.is_empty()).map(str::trim).collect()).collect();
    let pid = std::process::id().to_string();
    assert_eq!(lines[1][..8], ["default", "web", "running", &pid, "qemu", "tcg", "2", "576MiB"]);
    assert_eq!(lines[1][9..], ["direct (no snapshot)", "/run/web/8080.sock->8080,127.0.0.1:18080->80"]);
    assert_eq!((lines[2][1], lines[2][2], lines[2][4]), ("old", "dead", "-"));
    let json: Value = serde_json::from_slice(&ps(&["--json"]).stdout).unwrap();
    assert_eq!(json.as_array().map(Vec::len), Some(2));
    assert_eq!(json[0]["exposed"][1]["listen"], "127.0.0.1:18080");
    assert_eq!((&json[0]["status"], &json[1]["status"]), (&"running".into(), &"dead".into()));
}

#[test]
fn an_error_is_one_line_with_its_causes() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.toml");
    let ps = || chsnap(&["ps", "--config", config.to_str().unwrap()]);
    let missing = ps();
    let expected =
        format!("chsnap: cannot read the configuration file {config:?}: No such file or directory (os error 2)\n");
    assert_eq!((text(&missing.stderr), missing.status.code()), (expected, Some(1)));
    fs::write(&config, "[state]\ndri = '/x'\n").unwrap();
    let wrong = ps();
    let expected = format!("chsnap: {}:2:1: state.dri: unknown key; did you mean \"dir\"?\n", config.display());
    assert_eq!((text(&wrong.stderr), wrong.status.code()), (expected, Some(1)));
}

#[test]
fn a_reader_that_leaves_is_no_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_chsnap"))
        .args(["ps", "--config", "/dev/null"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert_eq!((text(&output.stderr), output.status.code()), (String::new(), Some(0)));
}
