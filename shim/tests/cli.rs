//! `chsnap` as an operator types it: what is printed where, and the exit status.
#![allow(clippy::unwrap_used)] // The helpers are test code too.

use std::{
    env, fs,
    path::{Path, PathBuf},
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

/// Every check that there is, in order.
const CHECKS: [&str; 18] = [
    "configuration",
    "root",
    "host kernel",
    "host size",
    "cgroups",
    "kvm",
    "cloud-hypervisor",
    "qemu",
    "driver",
    "virtiofsd",
    "guest kernel",
    "guest initramfs",
    "shim",
    "containerd",
    "overlayfs",
    "/dev/net/tun",
    "state directory",
    "snapshots",
];

fn doctor(path: &str, config: &str, args: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    fs::write(&file, format!("{config}\n[state]\ndir = {:?}\n", dir.path().join("state"))).unwrap();
    let command = [&["doctor", "--config", file.to_str().unwrap()], args].concat();
    Command::new(env!("CARGO_BIN_EXE_chsnap")).args(command).env("PATH", path).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn doctor_on_a_bare_host_names_what_is_missing() {
    let config = "[guest]\nkernel = '/nowhere/vmlinux'\ninitramfs = '/dev/null'\n[share]\nvirtiofsd = '/nowhere/v'\n";
    let output = doctor("/nowhere", config, &["--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["ok"], &report["driver"]), (&false.into(), &Value::Null));
    let checks = report["checks"].as_array().unwrap();
    let names: Vec<_> = checks.iter().map(|check| check["name"].as_str().unwrap()).collect();
    assert_eq!(names, CHECKS);
    for check in checks {
        let status = check["status"].as_str().unwrap();
        assert!(["ok", "warn", "missing"].contains(&status), "{check}");
        assert!(!check["found"].as_str().unwrap().is_empty(), "{check}");
        assert_eq!(status == "ok", check["mend"].is_null(), "{check}");
    }
    let found = |name| &checks[CHECKS.iter().position(|check| *check == name).unwrap()];
    for name in ["driver", "virtiofsd", "guest kernel", "guest initramfs"] {
        assert_eq!(found(name)["status"], "missing", "{name}");
    }
    assert_eq!(found("guest kernel")["found"], "/nowhere/vmlinux: No such file or directory (os error 2)");
    assert_eq!(found("guest initramfs")["found"], "/dev/null: not a file");

    let table = doctor("/nowhere", config, &[]);
    assert_eq!(table.status.code(), Some(1));
    let table = text(&table.stdout);
    assert!(table.contains("\nmissing  guest kernel "), "{table}");
    assert!(table.ends_with("\nNo container can run.\n"), "{table}");
}

#[test]
fn doctor_finds_a_wrong_configuration_and_looks_on() {
    // Where the file says that findings are kept is not known, so they are not.
    let kept = || fs::metadata("/run/chsnap/host.json").and_then(|meta| meta.modified()).ok();
    let before = kept();
    let output = doctor("/nowhere", "[guest]\ndefault_memory = '1MiB'\n", &["--json"]);
    assert_eq!(kept(), before);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["checks"][0]["status"], "missing");
    let found = report["checks"][0]["found"].as_str().unwrap();
    assert!(
        found.ends_with("config.toml:2:18: guest.default_memory: 1MiB is too little for a guest; the least is 64MiB"),
        "{found}"
    );
    assert_eq!(report["checks"].as_array().unwrap().len(), CHECKS.len());
}

/// With what `make build` made.
#[test]
fn doctor_is_content_where_everything_is_there() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = env::var_os("CHSNAP_TARGET").map_or_else(|| workspace.join("target"), PathBuf::from);
    let arch = if cfg!(target_arch = "x86_64") { ("amd64", "vmlinux") } else { ("arm64", "Image") };
    let (tools, guest) = (target.join("tools/bin"), target.join("guest").join(arch.0));
    let containerd = target.join("tools/containerd-1.6/bin");
    let needed = [tools.join("virtiofsd"), guest.join(arch.1), guest.join("initramfs"), containerd.join("containerd")];
    if let Some(missing) = needed.iter().find(|path| !path.exists()) {
        chsnap_test_skip::skip_without_setup(format!("{} is not there: run `make build`", missing.display()));
        return;
    }
    let shims = Path::new(env!("CARGO_BIN_EXE_chsnap")).parent().unwrap();
    let path =
        env::join_paths([&tools, &containerd, shims, Path::new("/usr/bin"), Path::new("/usr/sbin"), Path::new("/bin")])
            .unwrap();
    let config = format!("[vmm]\nchoice = 'qemu'\n[guest]\nkernel = {:?}\ninitramfs = {:?}\n", needed[1], needed[2]);
    let examined = |config: &str| {
        let output = doctor(path.to_str().unwrap(), config, &["--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((output.status.code(), &report["ok"]), (Some(0), &true.into()), "{report:#}");
        report
    };
    let report = examined(&format!("{config}[snapshot]\nctr = '/bin/true'\n"));
    assert_eq!(report["driver"]["vmm"], "qemu");
    assert_eq!(report["ladder"], Value::Null);
    let snapshots = report["checks"].as_array().unwrap().last().unwrap();
    assert!(snapshots["found"].as_str().unwrap().starts_with("not tried yet"), "{snapshots}");
    let without = examined(&format!("{config}[snapshot]\nctr = '/no/such/ctr'\n"));
    let snapshots = without["checks"].as_array().unwrap().last().unwrap();
    assert!(
        snapshots["status"] == "warn" && snapshots["mend"].as_str().unwrap().contains("[snapshot] ctr"),
        "{snapshots}"
    );
}
