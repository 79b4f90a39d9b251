//! `chsnap snapshot` as an operator types it.
#![allow(clippy::unwrap_used)] // The helpers are test code too.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::{Duration, SystemTime},
};

use chsnap::{
    snapshot::{Key, Refusal, Store},
    vmm::Rung,
};
use inputs::inputs;
use serde_json::Value;
use tempfile::TempDir;

mod inputs;

struct Host {
    dir: TempDir,
    config: PathBuf,
    store: Store,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (root, config) = (dir.path().join("snapshots"), dir.path().join("config.toml"));
        fs::write(&config, format!("[snapshot]\ndir = {root:?}\nbudget = \"1MiB\"\n")).unwrap();
        // What is built here is to be more than the command line's budget.
        let store = Store::open(&root, 1 << 30).unwrap();
        Self { dir, config, store }
    }

    fn chsnap(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chsnap"));
        command.arg("snapshot").args(args).arg("--config").arg(&self.config).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn says(&self, args: &[&str]) -> String {
        let output = self.chsnap(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    fn fails(&self, args: &[&str]) -> String {
        let output = self.chsnap(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", text(&output.stdout));
        text(&output.stderr)
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.says(&[args, &["--json"]].concat())).unwrap()
    }

    fn build(&self, vcpus: u32) -> Key {
        let building = self.store.build(inputs(vcpus)).unwrap();
        fs::write(building.dir().join("machine"), vec![1; 100_000]).unwrap();
        let why = "cannot save the machine: SetSysRegister: Invalid argument (os error 22)";
        building.publish(vec![Refusal::new(Rung::Standard, why)], u64::MAX).unwrap()
    }

    fn file(&self, key: &Key, name: &str) -> PathBuf {
        self.dir.path().join("snapshots").join(key.as_str()).join(name)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn what_there_is_is_listed_and_shown() {
    let host = Host::new();
    assert_eq!(host.json(&["ls"]), Value::Array(vec![]));
    let key = host.build(2);
    let list = host.says(&["ls"]);
    for word in [key.short(), "image", "cloud-hypervisor 53.0", "kvm", "no-pmu", "512MiB", "python3 app.py", "of 1MiB"]
    {
        assert!(list.contains(word), "{word}: {list}");
    }
    let rows = host.json(&["ls"]);
    let row = &rows[0];
    assert_eq!(row["key"], key.as_str());
    assert_eq!(row["manifest"]["inputs"]["vmm"]["version"], "53.0");
    assert!(row["bytes"].as_u64().unwrap() >= 100_000);
    let shown = host.says(&["inspect", key.short()]);
    for word in ["not on standard", "os error 22", "Neoverse-N1", "file machine", "100000 bytes"] {
        assert!(shown.contains(word), "{word}: {shown}");
    }
    assert_eq!(host.json(&["inspect", key.as_str()])["manifest"]["refusals"][0]["rung"], "standard");
    assert!(!shown.contains("root difference"), "{shown}");
    let building = host.store.build(inputs(3)).unwrap();
    fs::create_dir_all(building.dir().join("root/etc")).unwrap();
    fs::write(building.dir().join("root/etc/conf"), "three").unwrap();
    let key = building.publish(vec![], u64::MAX).unwrap();
    let (shown, root) =
        (host.says(&["inspect", key.short()]), &host.json(&["inspect", key.short()])["manifest"]["root"]);
    for word in ["root difference", &format!("{} bytes in 2 entries", root["bytes"]), root["digest"].as_str().unwrap()]
    {
        assert!(shown.contains(word), "{word}: {shown}");
    }
}

#[test]
fn a_spoilt_one_is_told_and_can_only_be_removed() {
    let host = Host::new();
    let (good, bad) = (host.build(1), host.build(2));
    assert_eq!(host.says(&["verify", "--all"]).lines().count(), 2);
    fs::write(host.file(&bad, "machine"), vec![2; 100_000]).unwrap();
    let said = host.fails(&["verify", "--all"]);
    assert!(said.contains(bad.short()) && said.contains("machine has changed"), "{said}");
    let output = host.chsnap(&["verify", good.short(), bad.short(), "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let outcomes: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(outcomes[0], serde_json::json!({ "key": good }));
    assert!(outcomes[1]["key"] == bad.as_str() && outcomes[1]["problem"].as_str().unwrap().contains("machine"));
    assert!(host.says(&["verify", good.short()]).contains("fits"));
    fs::write(host.file(&bad, "manifest.json"), "{").unwrap();
    assert!(host.says(&["ls"]).contains("manifest.json is none"));
    assert!(host.fails(&["inspect", bad.short()]).contains("manifest.json is none"));
    assert!(host.says(&["rm", bad.short()]).contains("removed"));
    assert_eq!(host.json(&["rm", good.short()]), serde_json::json!([{ "key": good }]));
    assert_eq!(host.json(&["ls"]), Value::Array(vec![]));
}

#[test]
fn what_is_in_use_stays() {
    let host = Host::new();
    let key = host.build(1);
    let in_use = host.store.find(&key).unwrap().unwrap();
    let said = host.fails(&["rm", "--all"]);
    assert!(said.contains("is in use"), "{said}");
    assert_eq!(host.json(&["prune", "--budget", "0"]), Value::Array(vec![]));
    drop(in_use);
    assert_eq!(host.json(&["prune", "--budget", "0"])[0]["key"], key.as_str());
    assert!(host.fails(&["rm", key.short()]).contains("there is no snapshot"));
}

#[test]
fn what_a_killed_build_has_left_is_pruned() {
    let host = Host::new();
    let at = |name: &str| host.dir.path().join(name);
    let config = fs::read_to_string(&host.config).unwrap();
    fs::write(&host.config, format!("[state]\ndir = {:?}\n{config}ctr = {:?}\n", at("state"), at("ctr"))).unwrap();
    fs::create_dir_all(at("state/.builders/0")).unwrap();
    fs::write(at("state/.builders/0/fs.sock"), "").unwrap();
    let half = at("snapshots").join(format!(".new-{}", inputs(1).key()));
    fs::create_dir(&half).unwrap();
    let [old, young] = ["old", "young"].map(|name| at("snapshots").join(format!(".tmp-{name}")));
    let hour_ago = SystemTime::now() - Duration::from_secs(3600);
    fs::File::create(&old).unwrap().set_modified(hour_ago).unwrap();
    fs::write(&young, "").unwrap();
    // Field 22 of proc_pid_stat(5).
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let start = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap();
    let (alive, dead) = (format!("{}.{start}", std::process::id()), "4194999.1");
    let unfinished = |of: &str| ["snapshots", "state"].map(|dir| at(dir).join(format!(".tmp-{of}-ab")));
    [unfinished(&alive), unfinished(dead)].as_flattened().iter().for_each(|path| fs::write(path, "").unwrap());
    let list = format!("echo web; echo chsnap-build-{alive}; echo chsnap-build-{dead}");
    let views = format!("echo KEY PARENT KIND; echo chsnap-view-{alive}-ab; echo chsnap-view-{dead}-ab");
    let script = format!(
        "#!/bin/sh\necho \"$*\" >>{:?}\ncase \"$*\" in *' ls -q') {list};; *' native ls') {views};; esac\n",
        at("log")
    );
    fs::write(at("ctr"), script).unwrap();
    fs::set_permissions(at("ctr"), PermissionsExt::from_mode(0o755)).unwrap();
    fs::write(at("sock"), "").unwrap();
    host.says(&["prune", "--namespace", "n", "--address", at("sock").to_str().unwrap()]);
    assert!(!half.exists() && !at("state/.builders").exists());
    assert!(!old.exists() && young.exists(), "somebody may be about to put it in its place");
    assert!(unfinished(&alive).iter().all(|path| path.exists()));
    assert!(!unfinished(dead).iter().any(|path| path.exists()), "nobody is left to do that");
    let said = fs::read_to_string(at("log")).unwrap();
    assert_eq!(said.matches("native rm").count(), 1, "{said}");
    assert!(said.contains(&format!("snapshots --snapshotter native rm chsnap-view-{dead}-ab")), "{said}");
    assert_eq!(said.matches("containers rm").count(), 1, "{said}");
    assert!(said.contains(&format!("--namespace n containers rm chsnap-build-{dead}")), "{said}");
    // Without a containerd there is nothing to ask; what stays of the rest is told.
    fs::remove_file(at("log")).unwrap();
    let stuck = at("snapshots").join(format!(".old-{}-0", inputs(1).key()));
    fs::write(&stuck, "").unwrap();
    let said = host.fails(&["prune", "--address", at("none").to_str().unwrap()]);
    assert!(said.contains("cannot remove") && said.contains(".old-"), "{said}");
    assert!(!at("log").exists());
}

#[test]
fn keys_are_found_by_their_beginning_if_that_is_enough() {
    let host = Host::new();
    (1..=17).for_each(|vcpus| drop(host.build(vcpus)));
    // Of 17 keys two begin alike.
    let keys: Vec<String> = host.store.list().unwrap().iter().map(|entry| entry.key.to_string()).collect();
    let twice = keys.iter().find(|key| keys.iter().filter(|other| other[..1] == key[..1]).count() > 1).unwrap();
    assert!(host.fails(&["inspect", &twice[..1]]).contains("several snapshots"));
    assert!(host.fails(&["inspect", ""]).contains("several snapshots"));
    assert!(host.fails(&["inspect", "x"]).contains("chsnap snapshot ls"));
    // 17 of 100 kB are more than the budget.
    assert!(!host.json(&["prune"]).as_array().unwrap().is_empty());
    let rest: u64 = host.json(&["ls"]).as_array().unwrap().iter().map(|row| row["bytes"].as_u64().unwrap()).sum();
    assert!(rest <= 1 << 20, "{rest}");
}

#[test]
fn a_store_that_cannot_be_is_an_error() {
    let host = Host::new();
    fs::write(&host.config, "[snapshot]\ndir = \"/dev/null/x\"\n").unwrap();
    assert!(host.fails(&["ls"]).contains("[snapshot] dir"));
    fs::write(&host.config, "[snapshot]\nbudget = 3\n").unwrap();
    assert!(host.fails(&["ls"]).contains("budget"));
}
