use serde_json::json;

use super::*;

fn spec(change: impl FnOnce(&mut serde_json::Value)) -> Spec {
    let mut value = json!({
        "ociVersion": "1.0.2",
        "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
            {"destination": "/run/lock", "type": "tmpfs", "source": "tmpfs"},
            {"destination": "/run/secrets", "type": "bind", "source": "/host/s", "options": ["rbind", "ro"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/host/hosts", "options": ["rbind"]}
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "mount"},
                                 {"type": "uts"}]}
    });
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

fn divide(plan: &Plan) -> Division {
    plan.divide("web", |place, _| Ok::<_, ()>(place.into())).unwrap()
}

#[test]
fn mounts_are_divided() {
    let whole = Plan::of("web", spec(|_| ())).unwrap();
    assert!(whole.readonly);
    let plan = divide(&whole);
    assert_eq!(plan.binds.len(), 1);
    assert_eq!(plan.binds[0].destination, Path::new("/etc/hosts"));
    assert_eq!(plan.staged.len(), 1, "what the guest's tmpfs would hide is bound by the guest");
    let places: Vec<_> = plan.mountpoints.iter().map(|place| (place.path.to_str().unwrap(), place.is_dir)).collect();
    assert_eq!(places, [("/proc", true), ("/run", true)]);
    let guest: Spec = serde_json::from_slice(&whole.spec_json(&plan).unwrap()).unwrap();
    assert_eq!(guest.hostname().as_deref(), Some("web"));
    let mounts = guest.mounts().as_ref().unwrap();
    assert_eq!(mounts.len(), 4);
    assert_eq!(mounts[3].source().as_ref().unwrap(), Path::new("/run/chsnap/share/web/binds/0"));
    assert_eq!(guest.root().as_ref().unwrap().path(), Path::new("/run/chsnap/share/web/rootfs"));
}

#[test]
fn a_place_is_judged_by_where_it_leads() {
    let mounts = json!([
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/var/run/secrets", "type": "bind", "source": "/host/s", "options": ["rbind", "ro"]},
        {"destination": "/var/run/lock", "type": "tmpfs", "source": "tmpfs"},
    ]);
    let whole = Plan::of("web", spec(|v| v["mounts"] = mounts)).unwrap();
    let plan = whole.divide("web", |place, hidden| {
        assert!(place == Path::new("/run") || hidden == [PathBuf::from("/run")]);
        Ok::<_, ()>(place.strip_prefix("/var").map_or(place.into(), |rest| Path::new("/").join(rest)))
    });
    let plan = plan.unwrap();
    assert_eq!((plan.binds.len(), plan.staged.len()), (0, 1), "the tmpfs would hide it");
    assert_eq!(plan.mountpoints, [Mountpoint { path: "/run".into(), is_dir: true }]);
    let places: Vec<_> = plan.for_guest.iter().map(|m| m.destination().to_str().unwrap()).collect();
    assert_eq!(places, ["/run", "/run/secrets", "/run/lock"]);
    assert_eq!(plan.for_guest[1].options().as_deref().unwrap(), ["rbind", "ro"]);
}

#[test]
fn what_the_share_does_not_carry_is_mounted_by_the_guest() {
    let mounts = json!([
        {"destination": "/bin/tool", "type": "bind", "source": "/proc/self/exe", "options": ["bind", "nosuid"]},
        {"destination": "/data", "type": "bind", "source": "/", "options": ["rbind", "rro", "noexec"]},
        {"destination": "/data/in", "type": "bind", "source": "/", "options": ["rbind"]},
    ]);
    let plan = divide(&Plan::of("web", spec(|v| v["mounts"] = mounts)).unwrap());
    let kinds: Vec<_> = plan.mountpoints.iter().map(|place| place.is_dir).collect();
    assert_eq!((plan.binds.len(), plan.staged.len(), kinds), (0, 3, vec![false, true]));
    let options: Vec<_> = plan.for_guest.iter().map(|m| m.options().clone().unwrap()).collect();
    assert_eq!(options, [vec!["rbind", "nosuid"], vec!["rbind", "ro", "noexec"], vec!["rbind"]]);
}

#[test]
fn a_process_that_can_be_saved_finds_what_it_needs_once() {
    let env = |plan: &Plan| plan.spec.process().as_ref().unwrap().env().clone().unwrap_or_default();
    let plan = Plan::of("web", spec(|v| v["process"]["env"] = json!(["PYTHONPATH=/app"]))).unwrap();
    assert_eq!(env(&plan.with_ready(None)), ["PYTHONPATH=/app"]);
    let plan = Plan::of("web", spec(|v| v["process"]["env"] = json!(["PYTHONPATH=/app"]))).unwrap();
    let plan = plan.with_ready(Some(&Ready::Notify));
    let expected = ["PYTHONPATH=/dev/chsnap/python:/app", "NOTIFY_SOCKET=/dev/chsnap/notify"];
    assert_eq!(env(&plan), expected);
    assert_eq!(env(&plan.with_ready(Some(&Ready::Notify))), expected);
}

#[test]
fn a_long_id_becomes_a_name_that_a_kernel_takes() {
    let id = "x".repeat(76);
    let plan = Plan::of(&id, spec(|_| ())).unwrap();
    assert_eq!(plan.spec.hostname().as_deref().unwrap().len(), 63);
}

#[test]
fn what_cannot_be_given_is_named() {
    type Change = fn(&mut serde_json::Value);
    let cases: [(Change, &str); 25] = [
        (|v| v["hooks"] = json!({"poststart": [{"path": "/bin/x"}]}), "OCI hooks"),
        (|v| v["linux"]["devices"] = json!([{"path": "/dev/kvm", "type": "c"}]), "/dev/kvm"),
        (|v| v["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "ipc"}]), "network namespace"),
        (|v| v["linux"]["namespaces"].as_array_mut().unwrap().truncate(4), "the host's UTS namespace"),
        (|v| v["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"})), "user namespace"),
        (|v| v["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/pid"), "PID namespace"),
        (|v| v["linux"]["namespaces"][3]["path"] = json!("/proc/1/ns/mnt"), "another mount namespace"),
        (|v| v["linux"]["timeOffsets"] = json!({"monotonic": {"secs": 1}}), "linux.timeOffsets"),
        (|v| v["linux"]["memoryPolicy"] = json!({"mode": "MPOL_BIND", "nodes": "0"}), "linux.memoryPolicy"),
        (|v| v["linux"]["netDevices"] = json!({"eth0": {"name": "eth1"}}), "linux.netDevices"),
        (|v| v["linux"]["intelRdt"] = json!({"closID": "gold"}), "linux.intelRdt"),
        (|v| v["linux"]["personality"] = json!({"domain": "LINUX32"}), "linux.personality"),
        (|v| v["process"]["scheduler"] = json!({"policy": "SCHED_FIFO", "priority": 1}), "process.scheduler"),
        (|v| v["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 1}), "process.ioPriority"),
        (|v| v["linux"]["resources"] = json!({"cpu": {"cpus": "0-1"}}), "cpu.cpus"),
        (|v| v["linux"]["resources"] = json!({"cpu": {"realtimeRuntime": 950_000}}), "cpu.realtimeRuntime"),
        (|v| v["linux"]["resources"] = json!({"blockIO": {"weight": 10}}), "resources.blockIO"),
        (|v| v["linux"]["resources"] = json!({"network": {"classID": 7}}), "resources.network"),
        (|v| v["mounts"][0]["type"] = json!("nfs"), "\"nfs\""),
        (|v| v["mounts"][4]["options"] = json!(["rbind", "readonly"]), "\"readonly\" of \"/etc/hosts\""),
        (|v| v["mounts"][4]["options"] = json!(["rbind", "rshared"]), "\"rshared\""),
        (
            |v| v["mounts"][4]["uidMappings"] = json!([{"containerID": 0, "hostID": 1000, "size": 1}]),
            "another owner's mount",
        ),
        (|v| v["linux"]["rootfsPropagation"] = json!("rshared"), "rootfsPropagation"),
        (|v| v["linux"]["resources"] = json!({"memory": {"disableOOMKiller": true}}), "disableOOMKiller"),
        (|v| v["process"]["args"] = json!([]), "process.args"),
    ];
    for (change, expected) in cases {
        let error = Plan::of("web", spec(change)).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_asks_for_nothing_is_no_reason_to_refuse() {
    let nothing = json!({
        "cpu": {"shares": 2, "cpus": "", "mems": "", "realtimeRuntime": 0},
        "blockIO": {},
        "network": {},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]
    });
    Plan::of("web", spec(|v| v["linux"]["resources"] = nothing)).unwrap();
}

#[test]
fn a_sandbox_s_namespaces_are_no_reason_to_refuse() {
    let sandbox = |v: &mut serde_json::Value| {
        v["linux"]["namespaces"][1]["path"] = json!("/run/netns/cni-1");
        v["linux"]["namespaces"][2]["path"] = json!("/proc/1/ns/ipc");
        v["linux"]["namespaces"][4]["path"] = json!("/proc/1/ns/uts");
        v["linux"]["personality"] = json!({"domain": "LINUX"});
    };
    Plan::of("web", spec(sandbox)).unwrap();
}

#[test]
fn host_confinement_is_reported_as_ignored() {
    let plan = Plan::of("web", spec(|v| v["process"]["apparmorProfile"] = json!("x"))).unwrap();
    assert_eq!(plan.ignored, ["process.apparmorProfile"]);
}
