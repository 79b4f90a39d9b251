//! Pods beside each other, and several containers in one pod.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{
    Container, Env, IMAGE, Started, Tools, eventually, http, kill, patience,
    ways::{self, Way},
};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::events::follow;

crate::cases! {
    Once: shared_cgroup, two_containers, sandbox_without_vm, second_too_late, longest_id;
}

/// The path of a cgroup is whatever the specification says: two containers may have the same one.
fn shared_cgroup(env: &Env) -> Result<()> {
    let path = format!("/{}/shared", env.daemon.namespace);
    let start = || env.container().flags(["--cgroup", &path]).sh("echo up; sleep 1000").start();
    let (first, second) = (start()?, start()?);
    second.wait_log("up")?;
    first.remove()?;
    let alive = eventually(Duration::from_secs(2), || (env.processes(env.vmm_name()).len() != 1).then_some(()));
    ensure!(alive.is_none(), "{:?}", env.processes(env.vmm_name()));
    ensure!(second.sh("echo still here")? == "still here");
    second.remove()
}

/// A further container of the pod.
fn beside<'a>(env: &'a Env, first: &Started<'_>) -> Container<'a> {
    env.container().of_pod(&first.id, "container")
}

/// As CRI has it: containers are given these namespaces of the pod's sandbox.
const SANDBOX_S: [&str; 4] = ["--with-ns", "ipc:/proc/1/ns/ipc", "--with-ns", "uts:/proc/1/ns/uts"];

/// A pod's second container comes into a machine that runs: what is closed for writing has to be closed there too.
fn two_containers(env: &Env) -> Result<()> {
    let first = env.container();
    let id = first.id.clone();
    let first =
        first.annotation("io.kubernetes.cri.sandbox-id", &id).flags(SANDBOX_S).sh("echo up; sleep 1000").start()?;
    first.wait_log("up")?;
    let volume = env.dir.join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("word"), "secret\n")?;
    let mount = format!("type=bind,src={},dst=/mnt/volume,options=rbind:ro", volume.display());
    let second = beside(env, &first).flags(SANDBOX_S).flags(["--read-only", "--mount", &mount]);
    let second = second.sh("echo up; sleep 1000").start()?;
    second.wait_log("up")?;
    let alone = beside(env, &first).sh("sleep 1000").start()?;
    for (kind, of_it) in [("ipc", "shared memory (shmget(2))"), ("uts", "a name")] {
        let namespace = |one: &Started<'_>| one.sh(&format!("readlink /proc/self/ns/{kind}"));
        ensure!(namespace(&first)? == namespace(&second)?, "they cannot have {of_it} in common");
        ensure!(namespace(&first)? != namespace(&alone)?, "it has not {of_it} of its own though it was given none");
    }
    // Nothing else gave the pod a name.
    let name = |one: &Started<'_>| one.sh("uname -n");
    ensure!(name(&first)? == first.id && name(&second)? == first.id && name(&alone)? == alone.id);
    alone.remove()?;
    ensure!(env.processes(env.vmm_name()).len() == 1, "{:?}", env.processes(env.vmm_name()));
    ensure!(second.sh("cat /mnt/volume/word")? == "secret");
    // Volumes change while a pod runs: names are believed for a second.
    fs::write(volume.join("later"), "seen\n")?;
    fs::rename(volume.join("later"), volume.join("word"))?;
    let seen = || second.sh("cat /mnt/volume/word").ok().filter(|word| word == "seen");
    ensure!(eventually(Duration::from_secs(10), seen).is_some(), "the host's later file is not seen");
    for place in ["/mnt/volume/word", "/mnt/volume/new", "/etc/new"] {
        let said = second.exec(["sh", "-c", &format!("echo x > {place}")]).output()?;
        ensure!(said.code != 0 && said.stderr.contains("Read-only file system"), "{place}: {}", said.whole());
    }
    ensure!(fs::read_to_string(volume.join("word"))? == "seen\n" && !volume.join("new").exists());
    // Each has its own processes and root, and its own end.
    ensure!(first.sh("test -e /mnt/volume; echo $?")? == "1");
    second.exec(["sh", "-c", "exit 4"]).output()?.code(4)?;
    second.remove()?;
    ensure!(first.sh("echo still here")? == "still here");
    first.remove()
}

/// As Kubernetes does it: first a sandbox container, which knows nothing of what is to run, then containers, of which one
/// may be followed by its successor. The machine is there for as long as something runs in it.
fn sandbox_without_vm(env: &Env) -> Result<()> {
    let vms = || env.processes(env.vmm_name()).len();
    let pause = env.container();
    let id = pause.id.clone();
    let pause = pause
        .of_pod(&id, "sandbox")
        .annotation("io.kubernetes.cri.sandbox-memory", &(600_u64 << 20).to_string())
        .annotation("io.chsnap.expose", "8080")
        // As it would be anyway; there is no snapshot of this size.
        .annotation("io.chsnap.snapshot", "auto")
        .flags(["--hostname", "web-0"])
        .command(["/pause"]);
    let mut events = follow(env, &id)?;
    let pause = pause.start()?;
    ensure!(vms() == 0, "the sandbox costs a VM: {:?}", env.processes(env.vmm_name()));
    env.ctr().wait_status(&id, "RUNNING")?;
    let said = pause.exec(["true"]).output()?;
    ensure!(said.code != 0 && said.stderr.contains("in which there is nothing to execute"), "{}", said.whole());
    for round in ["first", "its successor"] {
        let run = beside(env, &pause).flags(SANDBOX_S).sh("uname -n; sleep 1000").start()?;
        run.wait_log("web-0")?;
        ensure!(vms() == 1, "{round}: {:?}", env.processes(env.vmm_name()));
        // What the sandbox was told of the pod holds for its machine: 600 MiB, a 64th and 96 MiB beside.
        let pods: Value = serde_json::from_str(&env.chsnap(["ps", "--json"])?.text()?)?;
        let pod = pods.as_array().into_iter().flatten().find(|pod| pod["id"] == id).context("chsnap ps: no pod")?;
        ensure!(pod["memory_mib"] == 706 && pod["exposed"][0]["guest_port"] == 8080, "{round}: {pod}");
        ensure!(pause.pod_dir().join("8080.sock").exists(), "{round}");
        let beside_it = beside(env, &pause).flags(SANDBOX_S).command(["uname", "-n"]).output()?.success()?;
        ensure!(beside_it.text() == "web-0\n" && vms() == 1, "{round}: {}", beside_it.whole());
        run.remove()?;
        ensure!(vms() == 0, "{round}: nothing runs in the VM any more: {:?}", env.processes(env.vmm_name()));
        ensure!(env.ctr().status(&id)?.as_deref() == Some("RUNNING"), "{round}");
    }
    pause.kill("SIGTERM")?.success()?;
    env.ctr().wait_status(&id, "STOPPED")?;
    let exits: Vec<_> = events("/tasks/exit")?.into_iter().filter(|event| event.topic == "/tasks/exit").collect();
    ensure!(exits.len() == 1 && exits[0].content["exit_status"].as_u64().unwrap_or(0) == 0, "{exits:?}");
    pause.remove()
}

/// A second container that was not created in time is none, in the guest neither: its name can be used again.
fn second_too_late(env: &Env) -> Result<()> {
    let seconds = 3 * patience();
    let started = env.container().settings(|s| s.set("deadlines", "agent_call", seconds.to_string()));
    let started = started.sh("echo up; sleep 1000");
    let first = started.start()?;
    first.wait_log("up")?;
    let vmm = env.process(env.vmm_name())?.pid;
    let second = || beside(env, &first).id("late").command(["echo", "in time"]);
    kill(vmm, Signal::SIGSTOP)?;
    let late = second().run()?.start()?;
    // Between the two deadlines: that of the creation, and that of taking it back.
    std::thread::sleep(Duration::from_millis(4500) * patience());
    kill(vmm, Signal::SIGCONT)?;
    let output = late.output()?;
    ensure!(output.code != 0 && output.stderr.contains("did not answer CreateContainer"), "{}", output.whole());
    let output = second().output()?.success()?;
    ensure!(output.text() == "in time\n", "{}", output.whole());
    first.remove()
}

/// containerd's longest id in a state directory as long as the default one: all sockets find their place.
fn longest_id(env: &Env) -> Result<()> {
    // Of each lane another one, since the case may run in several ways at once.
    let state = PathBuf::from(format!("/run/c{:04x}{:x}", std::process::id() & 0xffff, env.daemon.lane & 0xf));
    ensure!(state.as_os_str().len() == "/run/chsnap".len(), "{}", state.display());
    let id = "x".repeat(76);
    let container = env.container().id(&id).settings(|s| s.path("state", "dir", &state));
    let container = container.annotation("io.chsnap.expose", "8080,65535");
    if env.way != Way::Direct {
        ways::expect(env, &id, Way::Base);
    }
    let in_default = |args: &[&str]| env.ctr().run(args).env("CONTAINERD_NAMESPACE", "default");
    in_default(&["image", "import"]).arg(&Tools::get().image).limit(Duration::from_secs(120)).text()?;
    let log = format!("file://{}", env.dir.join("log").display());
    let run = container.ctr(&["run"], &["-d", "--log-uri", &log], None)?.env("CONTAINERD_NAMESPACE", "default");
    let answers = run.output().and_then(chsnap_tests::Output::success).and_then(|_| {
        let dir = state.join("default").join(&id);
        ensure!(dir.join("65535.sock").exists());
        let status = eventually(Duration::from_secs(20), || {
            http::request(&mut *http::unix(&dir.join("8080.sock")).ok()?, "GET", "/healthz", b"").ok()
        });
        ensure!(status.as_ref().is_some_and(|(code, _)| *code == 200), "{status:?}");
        Ok(())
    });
    in_default(&["task", "rm", "-f", &id]).output()?;
    in_default(&["container", "rm", &id]).output()?;
    in_default(&["image", "rm", "--sync", IMAGE]).text()?;
    answers?;
    fs::remove_file(state.join("host.json"))?;
    fs::remove_dir(&state).with_context(|| format!("{} is not empty", state.display()))
}
