//! More of what can be wrong, see `errors.rs`: what a host has beside the pod.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use chsnap_tests::{Containerd, Env, IMAGE, Tools, Version, Vmm, eventually, http, kill};
use nix::sys::signal::Signal;

use crate::{
    errors::{A_BOOT, AT_ONCE, failed, refused, script_at, with_vmm},
    events::{Event, follow},
    faulty::Faulty,
};

/// Two containerds that share a state directory, each with a pod of that namespace and name.
pub fn pod_exists(env: &Env) -> Result<String> {
    let started = env.container().annotation("io.chsnap.expose", "8080").start()?;
    started.wait_log("listening on port 8080")?;
    let other = if env.daemon.version == Version::V1_6 { Version::V2_1 } else { Version::V1_6 };
    let there = Env::new(Containerd::of(other, env.daemon.lane)?, env.vmm, env.way)?;
    let same_namespace = |args: &[&str]| there.ctr().run(args).env("CONTAINERD_NAMESPACE", &env.daemon.namespace);
    same_namespace(&["image", "import"]).arg(&Tools::get().image).limit(Duration::from_secs(120)).text()?;
    let twin = there.container().id(&started.id).settings(|s| s.path("state", "dir", env.daemon.pods()));
    let output = twin.command(["true"]).run()?.env("CONTAINERD_NAMESPACE", &env.daemon.namespace).output();
    same_namespace(&["image", "rm", "--sync", IMAGE]).text()?;
    let message = failed(output?, A_BOOT)?;
    // The first one has lost nothing: neither directory nor cgroup, in which its VMM is.
    let socket = started.pod_dir().join("8080.sock");
    let (status, _) = http::request(&mut *http::unix(&socket)?, "GET", "/healthz", b"")?;
    ensure!(status == 200 && started.pod_dir().join("state.json").exists(), "{status}");
    ensure!(started.sh("echo still here")? == "still here");
    started.remove()?;
    Ok(message)
}

/// In the place of the agent there is a file that is no program: an initramfs may be several archives, the last of which wins.
pub fn agent_missing(env: &Env) -> Result<String> {
    let mut archive = fs::read(&Tools::get().initramfs)?;
    for (name, mode) in [("sbin/chsnap-agent", 0o100_644), ("TRAILER!!!", 0)] {
        let numbers = [0, mode, 1, 0, 0, 0, 0, 0, 0, 0, 0, name.len() + 1, 0];
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(b"070701");
        archive.extend(numbers.iter().flat_map(|number| format!("{number:08x}").into_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
    }
    archive.resize(archive.len().next_multiple_of(4), 0);
    let path = env.dir.join("initramfs");
    fs::write(&path, archive)?;
    failed(env.container().settings(|s| s.path("guest", "initramfs", path)).command(["true"]).output()?, A_BOOT)
}

/// What makes the VM is the pod's; a further container may only repeat it.
pub fn annotation_of_pod(env: &Env) -> Result<String> {
    let started = env.container().annotation("io.chsnap.expose", "8080").sh("echo up; sleep 1000").start()?;
    started.wait_log("up")?;
    let beside = || env.container().annotation("io.kubernetes.cri.sandbox-id", &started.id);
    let ports = failed(beside().annotation("io.chsnap.expose", "9090").command(["true"]).output()?, AT_ONCE)?;
    ensure!(ports.contains("io.chsnap.expose = \"9090\": the pod's VM has 8080"), "{ports}");
    let message = failed(beside().annotation("io.chsnap.memory", "1GiB").command(["true"]).output()?, AT_ONCE)?;
    let same = beside().annotation("io.chsnap.expose", "8080").annotation("io.chsnap.vcpus", "1");
    same.command(["true"]).output()?.success()?;
    ensure!(started.sh("echo still here")? == "still here");
    started.remove()?;
    Ok(message)
}

/// A further container that alone wants more memory than the pod's machine has.
pub fn memory_of_pod(env: &Env) -> Result<String> {
    let started = env.container().sh("echo up; sleep 1000").start()?;
    started.wait_log("up")?;
    let beside = |mib: u64| {
        let container = env.container().annotation("io.kubernetes.cri.sandbox-id", &started.id);
        container.flags(["--memory-limit", &(mib << 20).to_string()]).command(["true"])
    };
    let message = failed(beside(1024).output()?, AT_ONCE)?;
    beside(64).output()?.success()?;
    ensure!(started.sh("echo still here")? == "still here");
    started.remove()?;
    Ok(message)
}

/// A further container that brings files of the host's into a pod whose guest would not see them change.
pub fn files_later(env: &Env) -> Result<String> {
    let started = env.container().sh("echo up; sleep 1000").start()?;
    started.wait_log("up")?;
    let beside = || env.container().annotation("io.kubernetes.cri.sandbox-id", &started.id).command(["true"]);
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:ro", env.dir.display());
    let message = failed(beside().flags(["--mount", &mount]).output()?, AT_ONCE)?;
    beside().output()?.success()?;
    started.remove()?;
    Ok(message)
}

/// The shim of the pod was killed: what is to be added to it has nowhere to go.
pub fn pod_without_shim(env: &Env) -> Result<String> {
    let container = env.container().annotation("io.kubernetes.cri.sandbox-id", "no-such-pod").command(["true"]);
    failed(container.output()?, AT_ONCE)
}

/// One that tells its version, and not more.
fn pretending(env: &Env, then: &str) -> Result<String> {
    let version =
        if env.vmm == Vmm::CloudHypervisor { "cloud-hypervisor v53.0.0" } else { "QEMU emulator version 10.0.2" };
    Ok(format!("[ \"$1\" = --version ] && exec echo '{version}'\n{then}"))
}

pub fn vmm_gives_up(env: &Env) -> Result<String> {
    let script = pretending(env, "echo 'no such machine here' >&2; exit 3")?;
    failed(with_vmm(env, &script)?.annotation("io.chsnap.snapshot", "off").command(["true"]).output()?, A_BOOT)
}

pub fn vmm_says_nothing(env: &Env) -> Result<String> {
    let container = with_vmm(env, &pretending(env, "exec sleep 1000")?)?.annotation("io.chsnap.snapshot", "off");
    let container = container.settings(|s| s.set("deadlines", "boot", "\"3s\"").set("vmm", "accelerator", "\"auto\""));
    failed(container.command(["true"]).output()?, A_BOOT)
}

/// Nobody is left to say anything in the container's output. containerd tells the end, and knows no such task any more;
/// that the name can be used again, too, is `restart::shim_killed`.
pub fn shim_killed(env: &Env) -> Result<String> {
    let container = env.container().annotation("io.chsnap.expose", "8080").sh("echo up; sleep 1000");
    let mut events = follow(env, &container.id)?;
    let started = container.start()?;
    started.wait_log("up")?;
    let pid = env.process(env.vmm_name())?.pid;
    kill(env.process("containerd-shim-chsnap")?.pid, Signal::SIGKILL)?;
    let exits: Vec<Event> = events("/tasks/exit")?.into_iter().filter(|e| e.topic == "/tasks/exit").collect();
    let exit = exits.first().context("its end is not told")?;
    ensure!(exits.len() == 1 && exit.content["exit_status"] == 137 && exit.content["pid"] == pid, "{exits:?}");
    let unlisted = eventually(Duration::from_secs(10), || env.ctr().status(&started.id).ok()?.is_none().then_some(()));
    ensure!(unlisted.is_some(), "`ctr task ls` still shows it");
    let message = failed(env.ctr().output(["task", "kill", &started.id])?, AT_ONCE)?;
    env.ctr().text(["container", "rm", &started.id])?;
    started.forget();
    Ok(message)
}

/// The kernel takes no name with a line's end, in either version of cgroups.
pub fn cgroup_refused(env: &Env) -> Result<String> {
    refused(env.container().flags(["--cgroup", &format!("/{}/no\nsuch", env.daemon.namespace)]))
}

/// Cloud Hypervisor is there, as far as can be seen without a machine.
pub fn cloud_hypervisor_wanted(env: &Env) -> Result<String> {
    let program = env.dir.join("cloud-hypervisor");
    script_at(&program, "echo 'cloud-hypervisor v53.0.0'")?;
    let container = env.container().settings(|s| {
        let s = s.path("vmm", "cloud_hypervisor", program);
        s.set("vmm", "choice", "\"cloud-hypervisor\"").set("vmm", "accelerator", "\"auto\"")
    });
    failed(container.command(["true"]).output()?, A_BOOT)
}

/// What the shim says of its version is changed on the way to the guest.
pub fn agent_of_another_release(env: &Env) -> Result<String> {
    let other = Faulty { at: "version", text: "", unless: None, only: None, hangs: None };
    let settings = other.set(env.settings(), env, "another-release")?.set("snapshot", "mode", "\"off\"");
    failed(env.container().settings(|_| settings).command(["true"]).output()?, A_BOOT)
}

/// Kills the process of that name as soon as the VMM is there, which is long before the guest is.
fn killed_in_boot(env: &Env, name: &str) -> Result<String> {
    // A restore that fails is followed by a boot.
    let run = env.container().command(["true"]).annotation("io.chsnap.snapshot", "off").run()?.start()?;
    let there = eventually(Duration::from_secs(20), || env.process(env.vmm_name()).ok());
    ensure!(there.is_some(), "no VMM was started: {}", run.output()?.whole());
    kill(env.process(name)?.pid, Signal::SIGKILL)?;
    failed(run.output()?, A_BOOT)
}

pub fn vmm_killed_in_boot(env: &Env) -> Result<String> {
    killed_in_boot(env, env.vmm_name())
}

pub fn virtiofsd_killed_in_boot(env: &Env) -> Result<String> {
    killed_in_boot(env, "virtiofsd")
}

/// containerd tells that its connection has ended, and cleans up.
pub fn shim_killed_in_boot(env: &Env) -> Result<String> {
    killed_in_boot(env, "containerd-shim-chsnap")
}
