//! What a container's process sees and may do, on the real agent.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Agent, Spec, refusal};
use serde_json::json;
use ttrpc::Code;

/// What `script` writes; it must succeed.
async fn output(agent: &Agent, spec: &Spec) -> String {
    let (status, out, err) = agent.output("c", spec).await;
    assert_eq!((status, err.as_str()), (0, ""), "{out}");
    out
}

#[tokio::test]
async fn namespaces_are_the_containers_own() {
    need_root!();
    let agent = Agent::start().await;
    let spec = agent.shell(
        "echo $$; hostname; cat /proc/self/cgroup; readlink /proc/self/ns/net; ls /proc | grep -c '^[0-9]'; \
         for n in pid mnt uts ipc cgroup; do readlink /proc/self/ns/$n; done",
    );
    let out = output(&agent, &spec).await;
    let lines: Vec<_> = out.lines().collect();
    assert_eq!(lines[0], "1");
    assert_eq!(lines[1], "box");
    assert!(lines.contains(&"0::/"), "{out}");
    for name in ["pid", "mnt", "uts", "ipc", "cgroup"] {
        let own = std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert!(!lines.contains(&own.to_str().unwrap()), "{name} is shared: {out}");
        assert!(out.contains(&format!("{name}:[")), "{out}");
    }
    let net = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert!(lines.contains(&net.to_str().unwrap()), "the network is the VM's: {out}");
}

#[tokio::test]
async fn mounts_are_only_the_containers() {
    need_root!();
    let agent = Agent::start().await;
    let out = output(&agent, &agent.shell("cat /proc/self/mountinfo")).await;
    let mut targets: Vec<_> = out.lines().map(|l| l.split(' ').nth(4).unwrap()).collect();
    targets.sort_unstable();
    targets.dedup();
    let known = ["/", "/dev", "/dev/pts", "/dev/shm", "/proc", "/run", "/sys", "/sys/fs/cgroup", "/sys/firmware"];
    let unknown: Vec<_> = targets.iter().filter(|t| !known.contains(t) && !t.starts_with("/proc/")).collect();
    assert!(unknown.is_empty(), "{unknown:?}");
    assert!(out.lines().any(|l| l.contains(" /dev/shm ") && l.contains("nosuid,nodev,noexec")), "{out}");
}

#[tokio::test]
async fn devices_are_there() {
    need_root!();
    let agent = Agent::start().await;
    let script = "for d in null zero full random urandom tty; do stat -c '%n %t:%T %a' /dev/$d; done; \
                  for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done; echo x >/dev/null; \
                  head -c 4 /dev/zero | wc -c; echo through >/dev/stdout";
    let out = output(&agent, &agent.shell(script)).await;
    let expected = "/dev/null 1:3 666\n/dev/zero 1:5 666\n/dev/full 1:7 666\n/dev/random 1:8 666\n\
                    /dev/urandom 1:9 666\n/dev/tty 5:0 666\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n\
                    /proc/self/fd/2\npts/ptmx\n4\nthrough\n";
    assert_eq!(out, expected);
}

#[tokio::test]
async fn a_read_only_root_stays_so() {
    need_root!();
    let agent = Agent::start().await;
    let spec = agent.shell("touch /x 2>&1; touch /run/y && echo run; echo 1 >/proc/sys/kernel/panic; ls /sys/firmware");
    let (_, out, err) = agent.output("c", &spec.clone().set("/root/readonly", json!(true))).await;
    assert!(out.contains("Read-only file system") && out.contains("run\n"), "{out}");
    assert!(err.contains("/proc/sys/kernel/panic: Read-only file system"), "{err}");
    // Masked: empty.
    assert!(out.ends_with("run\n"), "{out}");
    let (_, out, _) = agent.output("c", &spec).await;
    assert!(!out.contains("Read-only"), "{out}");
}

#[tokio::test]
async fn a_user_is_complete() {
    need_root!();
    let agent = Agent::start().await;
    let spec = agent
        .shell("id -u; id -g; id -G; umask; echo $HOME; pwd; grep -h ^Cap /proc/self/status; echo own >/dev/stdout")
        .set("/process/user", json!({ "uid": 33, "gid": 44, "umask": 63, "additionalGids": [55, 66] }))
        .set("/process/cwd", json!("/made/by/the/agent"));
    let out = output(&agent, &spec).await;
    assert!(out.starts_with("33\n44\n44 55 66\n0077\n/srv\n/made/by/the/agent\n"), "{out}");
    let effective = out.lines().find(|l| l.starts_with("CapEff:")).unwrap();
    assert!(effective.ends_with("0000000000000000"), "not root, so none is effective after exec: {effective}");
    assert!(out.ends_with("own\n"), "{out}");
}

#[tokio::test]
async fn capabilities_are_what_was_asked() {
    need_root!();
    let agent = Agent::start().await;
    let some = json!(["CAP_CHOWN", "CAP_NET_BIND_SERVICE"]);
    let sets = json!({ "bounding": some, "effective": some, "permitted": some, "inheritable": some, "ambient": some });
    let spec = agent
        .shell("grep -E '^(Cap|NoNewPrivs)' /proc/self/status")
        .set("/process/user", json!({ "uid": 33, "gid": 33 }))
        .set("/process/capabilities", sets);
    let out = output(&agent, &spec).await;
    assert_eq!(out.matches("0000000000000401").count(), 5, "{out}");
    assert!(out.contains("NoNewPrivs:\t1"), "{out}");
    let out = output(&agent, &agent.shell("grep ^CapBnd /proc/self/status")).await;
    assert_eq!(out.trim(), "CapBnd:\t00000000a80425fb".replace("a80425fb", "880425fb").trim());
}

#[tokio::test]
async fn limits_and_sysctls_are_set() {
    need_root!();
    let agent = Agent::start().await;
    let spec = agent
        .shell("ulimit -n; ulimit -Hn; ulimit -c; cat /proc/sys/kernel/shmmni /proc/self/oom_score_adj")
        .set(
            "/process/rlimits",
            json!([
                { "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }, { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
            ]),
        )
        .set("/linux/sysctl", json!({ "kernel.shmmni": "1234" }))
        .set("/process/oomScoreAdj", json!(500));
    assert_eq!(output(&agent, &spec).await, "100\n200\n0\n1234\n500\n");
}

/// More than a kernel gives by itself, and no less than runc does.
#[tokio::test]
async fn without_a_limit_files_are_many() {
    need_root!();
    let agent = Agent::start().await;
    let all = std::fs::read_to_string(format!("/proc/{}/limits", agent.pid())).unwrap();
    let all = all.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let all = all.split_whitespace().nth(4).unwrap();
    // It may raise its own in a guest; a sandbox may keep root from that.
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    if u64::from_str_radix(effective, 16).unwrap() & (1 << 24) != 0 {
        assert_eq!(all, "1048576");
    }
    let look = "ulimit -n; ulimit -Hn; echo";
    let streams = agent.run("c", &agent.shell(&format!("{look}; sleep 100")).set("/process/rlimits", json!([]))).await;
    assert_eq!(agent.read_until(streams.stdout_stream, "\n\n").await, format!("{all}\n{all}\n\n"));
    let exec = agent.exec("c", "e", &agent.shell(look).set("/process/rlimits", json!(null))).await.unwrap();
    agent.start_process("c", "e").await.unwrap();
    assert_eq!(agent.text(exec.stdout_stream).await, format!("{all}\n{all}\n\n"));
    agent.delete("c").await.unwrap();
}

#[tokio::test]
async fn no_descriptor_leaks_and_no_signal_is_ignored() {
    need_root!();
    let agent = Agent::start().await;
    // Another container's pipes are open in the agent.
    agent.run("other", &agent.shell("sleep 100")).await;
    let spec = agent.shell("exec ls /proc/self/fd");
    let out = output(&agent, &spec).await;
    // 3 is the directory ls reads.
    assert_eq!(out, "0\n1\n2\n3\n");
    let spec = agent.shell("exec grep -E '^Sig(Blk|Ign)' /proc/self/status");
    let out = output(&agent, &spec).await;
    assert_eq!(out, "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
}

#[tokio::test]
async fn a_hostile_image_leads_nowhere() {
    need_root!();
    let agent = Agent::start().await;
    let root = agent.root();
    let outside = tempfile::tempdir().unwrap();
    // Mount points that are links out of the image.
    for name in ["proc", "sys"] {
        std::fs::remove_dir(root.join(name)).unwrap();
        std::os::unix::fs::symlink(outside.path(), root.join(name)).unwrap();
    }
    let (_, text) = refusal(agent.create("c", &agent.shell("true")).await);
    assert!(text.contains("mount proc at \"/proc\""), "{text}");
    assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    std::fs::create_dir_all(root.join(outside.path().strip_prefix("/").unwrap())).unwrap();
    agent.create("c", &agent.shell("true")).await.unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(outside.path().to_str().unwrap()));
}

#[tokio::test]
async fn what_the_guest_cannot_do_is_named() {
    need_root!();
    let agent = Agent::start().await;
    let spec = agent.shell("true");
    let cases = [
        (spec.clone().set("/mounts/0/type", json!("nfs")), Code::UNIMPLEMENTED, "nfs"),
        (spec.clone().set("/mounts/1/options", json!(["sise=1"])), Code::INVALID_ARGUMENT, "sise=1"),
        (spec.clone().set("/linux/devices", json!([{ "path": "/dev/fuse" }])), Code::UNIMPLEMENTED, "/dev/fuse"),
        (spec.clone().set("/linux/namespaces", json!([{ "type": "user" }])), Code::UNIMPLEMENTED, "user"),
        (spec.clone().set("/process/args", json!([])), Code::INVALID_ARGUMENT, "process.args"),
        (spec.clone().set("/process/cwd", json!("x")), Code::INVALID_ARGUMENT, "process.cwd"),
        (spec.clone().set("/process/capabilities/bounding", json!(["CAP_FLY"])), Code::INVALID_ARGUMENT, "CAP_FLY"),
        (spec.clone().set("/process/rlimits/0/type", json!("RLIMIT_FUN")), Code::INVALID_ARGUMENT, "RLIMIT_FUN"),
        (spec.clone().set("/linux/sysctl", json!({ "a/../b": "1" })), Code::INVALID_ARGUMENT, "a/../b"),
        (spec.clone().set("/linux/sysctl", json!({ "no.such": "1" })), Code::INTERNAL, "/proc/sys/no/such"),
        (spec.clone().set("/root/path", json!("/no/such/root")), Code::INTERNAL, "/no/such/root"),
        (spec.clone().set("/root/path", json!("relative")), Code::INVALID_ARGUMENT, "root.path"),
        (spec.clone().set("/process", json!(7)), Code::INVALID_ARGUMENT, "invalid type"),
    ];
    for (spec, code, word) in cases {
        let (found, text) = refusal(agent.create("c", &spec).await);
        assert_eq!(found, code, "{text}");
        assert!(text.contains(word), "{text}");
    }
    // Each left nothing: no cgroup, no process, no stream.
    assert_eq!(
        std::fs::read_dir(agent.cgroup().join("chsnap")).unwrap().flatten().filter(|e| e.path().is_dir()).count(),
        0
    );
    for bad in ["", "..", "a/b"] {
        assert_eq!(refusal(agent.create(bad, &agent.shell("true")).await).0, Code::INVALID_ARGUMENT);
    }
}
