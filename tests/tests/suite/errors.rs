//! Everything that can be wrong, by the names of `docs/errors.md`: each case provokes its row and answers the message.

use std::{fs, io::Read, net::TcpListener, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Container, Env, Output, Settings, Started, Vmm, eventually, kill, patience, table};
use nix::sys::signal::Signal;

use crate::{
    errors_asked::{
        bind_socket, bind_source_missing, bind_source_stuck, bind_wrong_kind, capability_unknown, cgroup_file_unknown,
        cgroup_path, checkpoint, config_body, disk_limits, exec_cwd, foreign_mount_namespace, foreign_pid_namespace,
        host_cpus, host_device, host_ipc, host_network, host_pid, host_uts, id_too_long, intel_rdt, loop_root,
        mapped_mount, mount_option, mount_type, network_missing, no_oom_killer, no_program, oci_hooks, other_clock,
        pause, personality, propagation, rlimit_unknown, root_mount_fails, scheduling, sysctl_unknown, time_namespace,
        too_many_layers, user_namespace, vmm_without_kvm,
    },
    errors_host::{
        agent_missing, agent_of_another_release, annotation_of_pod, cgroup_refused, cloud_hypervisor_wanted,
        files_later, memory_of_pod, pod_exists, pod_without_shim, shim_killed, shim_killed_in_boot,
        virtiofsd_killed_in_boot, vmm_gives_up, vmm_killed_in_boot, vmm_says_nothing,
    },
    share::Tmpfs,
};

crate::errors! {
    // containerd has a part in what is said of these, or words it.
    Vms: pause, log_binary, pod_without_shim, shim_killed_in_boot, shim_killed, kill_finished;
    Once:
        config_missing, config_directory, config_relative, config_syntax, config_key_twice, config_unknown_key, config_unknown_table,
        config_body, config_bad_value, config_out_of_range, config_relative_value, annotation_unknown,
        annotation_value, annotation_of_pod, memory_of_pod, files_later, snapshot_required, vcpus_too_many,
        memory_too_large, limit_too_large, host_network, host_pid, host_ipc, host_uts, network_missing, no_program,
        host_device, foreign_pid_namespace, foreign_mount_namespace, user_namespace, oci_hooks, intel_rdt, other_clock,
        personality, scheduling, host_cpus, disk_limits, no_oom_killer, propagation, mapped_mount, mount_option,
        bind_socket, time_namespace, capability_unknown, rlimit_unknown, sysctl_unknown, cgroup_file_unknown,
        loop_root, root_mount_fails, too_many_layers, checkpoint, mount_type, bind_source_missing, bind_source_stuck,
        bind_wrong_kind, vmm_without_kvm, exec_cwd, cgroup_path, cgroup_refused, state_dir_unusable, state_dir_full,
        id_too_long, pod_exists, port_busy, kvm_wanted, cloud_hypervisor_wanted, vmm_missing, vmm_false, vmm_old,
        vmm_hangs, vmm_gives_up, vmm_says_nothing, virtiofsd_missing, virtiofsd_false, virtiofsd_old,
        virtiofsd_of_qemu, virtiofsd_ends, kernel_missing, kernel_wrong, initramfs_missing, initramfs_wrong,
        init_fails, guest_panics, guest_hangs, agent_missing, agent_of_another_release, vmm_killed_in_boot,
        virtiofsd_killed_in_boot, guest_crashes, vmm_killed, virtiofsd_killed, agent_silent, program_missing,
        exec_missing, exec_stopped, exec_twice;
}

/// Compares a message with its row.
pub fn check(name: &str, message: &str) -> Result<()> {
    let rows = table::rows()?;
    let row = rows.iter().find(|r| r.name == name).with_context(|| format!("docs/errors.md has no row {name}"))?;
    ensure!(row.matches(message), "docs/errors.md says\n  {}\nbut the message was\n  {}", row.text, message.trim());
    Ok(())
}

/// Every row has a case.
pub fn complete() -> Result<()> {
    let cases: Vec<&str> = CASES.iter().map(|c| c.name).collect();
    let orphans: Vec<String> = table::rows()?.into_iter().map(|r| r.name).filter(|n| !cases.contains(&&**n)).collect();
    ensure!(orphans.is_empty(), "rows of docs/errors.md that no case provokes: {orphans:?}");
    Ok(())
}

/// What refuses before a VM starts does not take longer than this on a busy machine.
pub const AT_ONCE: Duration = Duration::from_secs(10);
/// A boot that fails: the deadline's default is a minute.
pub const A_BOOT: Duration = Duration::from_secs(45);

/// The message of what has to fail, and in that time where no patience is asked for.
pub fn failed(output: Output, within: Duration) -> Result<String> {
    let within = within * patience();
    ensure!(output.code != 0, "it worked: {}", output.whole());
    ensure!(output.took < within, "{:?} instead of {within:?}: {}", output.took, output.whole());
    Ok(output.stderr)
}

/// The message of what is refused before a VM starts.
pub fn refused(container: Container<'_>) -> Result<String> {
    failed(container.command(["true"]).output()?, AT_ONCE)
}

fn with(env: &Env, change: impl FnOnce(Settings) -> Settings) -> Container<'_> {
    env.container().settings(change)
}

fn config_missing(env: &Env) -> Result<String> {
    refused(env.container().flags(["--runtime-config-path", "/no/such/config.toml"]))
}

fn config_directory(env: &Env) -> Result<String> {
    let dir = env.dir.join("config.d");
    fs::create_dir(&dir)?;
    refused(env.container().flags(["--runtime-config-path", &dir.display().to_string()]))
}

fn config_relative(env: &Env) -> Result<String> {
    refused(env.container().flags(["--runtime-config-path", "config.toml"]))
}

fn config_syntax(env: &Env) -> Result<String> {
    refused(with(env, |s| s.raw("[guest]\nkernel = = \"/x\"\n")))
}

fn config_key_twice(env: &Env) -> Result<String> {
    refused(with(env, |s| s.raw("[guest]\nkernel = \"/x\"\nkernel = \"/y\"\n")))
}

fn config_unknown_key(env: &Env) -> Result<String> {
    refused(with(env, |s| s.raw("[guest]\nkernal = \"/x\"\n")))
}

fn config_unknown_table(env: &Env) -> Result<String> {
    refused(with(env, |s| s.raw("[guests]\nkernel = \"/x\"\n")))
}

fn config_bad_value(env: &Env) -> Result<String> {
    refused(with(env, |s| s.raw("[guest]\ndefault_memory = 512\n")))
}

fn config_out_of_range(env: &Env) -> Result<String> {
    refused(with(env, |s| s.raw("[deadlines]\nboot = \"1 day\"\n")))
}

fn config_relative_value(env: &Env) -> Result<String> {
    refused(with(env, |s| s.raw("[guest]\nkernel = \"vmlinux\"\n")))
}

fn annotation_unknown(env: &Env) -> Result<String> {
    refused(env.container().annotation("io.chsnap.vcpu", "2"))
}

fn annotation_value(env: &Env) -> Result<String> {
    refused(env.container().annotation("io.chsnap.memory", "lots"))
}

fn snapshot_required(env: &Env) -> Result<String> {
    let elsewhere = env.dir.join("snapshots");
    refused(with(env, |s| s.path("snapshot", "dir", elsewhere)).annotation("io.chsnap.snapshot", "require"))
}

fn vcpus_too_many(env: &Env) -> Result<String> {
    refused(env.container().annotation("io.chsnap.vcpus", "4096"))
}

fn memory_too_large(env: &Env) -> Result<String> {
    refused(env.container().annotation("io.chsnap.memory", "64000GiB"))
}

fn limit_too_large(env: &Env) -> Result<String> {
    let limit = (2_u64 << 30).to_string();
    refused(with(env, |s| s.set("guest", "max_memory", "\"1GiB\"")).flags(["--memory-limit", &limit]))
}

fn log_binary(env: &Env) -> Result<String> {
    let run = env.container().command(["true"]).ctr(&["run"], &["-d", "--log-uri", "binary:///bin/cat"], None)?;
    let id = env.ctr().text(["container", "ls", "-q"])?;
    ensure!(id.is_empty(), "{id}");
    let message = failed(run.output()?, AT_ONCE)?;
    // `ctr run` without --rm leaves the container, as with any runtime.
    for id in env.ctr().text(["container", "ls", "-q"])?.lines() {
        env.ctr().text(["container", "rm", id])?;
    }
    Ok(message)
}

fn state_dir_unusable(env: &Env) -> Result<String> {
    let file = env.dir.join("a-file");
    fs::write(&file, "")?;
    refused(with(env, |s| s.path("state", "dir", file.join("pods"))))
}

fn state_dir_full(env: &Env) -> Result<String> {
    let small = Tmpfs::mount(env, "full", "64k")?;
    let _ = fs::write(small.path.join("fill"), vec![1; 1 << 20]);
    let container = with(env, |s| s.path("state", "dir", small.path.join("pods")));
    let message = failed(container.command(["true"]).output()?, A_BOOT)?;
    let left: Vec<_> = fs::read_dir(&small.path)?.flatten().map(|e| e.file_name()).filter(|n| n != "fill").collect();
    // The directory that was configured may stay, what was in it not.
    let inside = fs::read_dir(small.path.join("pods")).into_iter().flatten().count();
    ensure!(inside == 0, "{left:?} is left with {inside} entries");
    Ok(message)
}

fn port_busy(env: &Env) -> Result<String> {
    let taken = TcpListener::bind("127.0.0.1:0")?;
    let expose = format!("{}:8080", taken.local_addr()?);
    failed(env.container().annotation("io.chsnap.expose", &expose).command(["true"]).output()?, A_BOOT)
}

fn kvm_wanted(env: &Env) -> Result<String> {
    let container = with(env, |s| s.set("vmm", "accelerator", "\"kvm\""));
    failed(container.command(["true"]).output()?, A_BOOT)
}

/// The configuration's key of this VMM's program.
pub fn vmm_key(env: &Env) -> &'static str {
    if env.vmm == Vmm::CloudHypervisor { "cloud_hypervisor" } else { "qemu" }
}

fn vmm_missing(env: &Env) -> Result<String> {
    refused(with(env, |s| s.path("vmm", vmm_key(env), "/no/such/vmm")))
}

fn vmm_false(env: &Env) -> Result<String> {
    refused(with_vmm(env, "exit 1")?)
}

/// A VMM that is this shell script.
pub fn with_vmm<'a>(env: &'a Env, script: &str) -> Result<Container<'a>> {
    let program = env.dir.join("vmm");
    script_at(&program, script)?;
    Ok(with(env, |s| s.path("vmm", vmm_key(env), program)))
}

pub fn script_at(path: &Path, script: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{script}\n"))?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}

fn vmm_old(env: &Env) -> Result<String> {
    refused(with_vmm(env, "echo 'emulator version 7.2.0'")?)
}

fn vmm_hangs(env: &Env) -> Result<String> {
    let container = with_vmm(env, "exec sleep 1000")?.settings(|s| s.set("deadlines", "boot", "\"2s\""));
    refused(container)
}

fn virtiofsd_missing(env: &Env) -> Result<String> {
    refused(with(env, |s| s.path("share", "virtiofsd", "/no/such/virtiofsd")))
}

fn virtiofsd_false(env: &Env) -> Result<String> {
    refused(with(env, |s| s.path("share", "virtiofsd", "/bin/false")))
}

/// A virtiofsd that is this shell script.
fn with_virtiofsd<'a>(env: &'a Env, script: &str) -> Result<Container<'a>> {
    let program = env.dir.join("virtiofsd");
    script_at(&program, script)?;
    Ok(with(env, |s| s.path("share", "virtiofsd", program)))
}

fn virtiofsd_old(env: &Env) -> Result<String> {
    refused(with_virtiofsd(env, "echo 'virtiofsd 1.13.3'")?)
}

fn virtiofsd_of_qemu(env: &Env) -> Result<String> {
    refused(with_virtiofsd(env, "echo 'virtiofsd version 7.2.22 (Debian 1:7.2)'; echo 'using FUSE kernel interface'")?)
}

/// One that finds something wrong when it is to serve.
fn virtiofsd_ends(env: &Env) -> Result<String> {
    let script = "[ \"$1\" = --version ] && exec echo virtiofsd 1.14.0\necho 'no namespaces here' >&2; exit 3";
    failed(with_virtiofsd(env, script)?.command(["true"]).output()?, A_BOOT)
}

fn kernel_missing(env: &Env) -> Result<String> {
    refused(with(env, |s| s.path("guest", "kernel", "/no/such/vmlinux")))
}

fn kernel_wrong(env: &Env) -> Result<String> {
    let text = env.dir.join("kernel");
    fs::write(&text, "this is no kernel\n".repeat(1000))?;
    refused(with(env, |s| s.path("guest", "kernel", text)))
}

fn initramfs_missing(env: &Env) -> Result<String> {
    refused(with(env, |s| s.path("guest", "initramfs", "/no/such/initramfs")))
}

fn initramfs_wrong(env: &Env) -> Result<String> {
    let text = env.dir.join("initramfs");
    fs::write(&text, "this is no archive\n".repeat(1000))?;
    failed(with(env, |s| s.path("guest", "initramfs", text)).command(["true"]).output()?, A_BOOT)
}

/// virtiofs is not there to be mounted.
fn init_fails(env: &Env) -> Result<String> {
    let container = with(env, |s| s.set("guest", "cmdline", "\"initcall_blacklist=virtio_fs_init\""));
    failed(container.command(["true"]).output()?, A_BOOT)
}

fn guest_panics(env: &Env) -> Result<String> {
    let container = with(env, |s| s.set("guest", "cmdline", "\"rdinit=/nonexistent init=/nonexistent\""));
    failed(container.command(["true"]).output()?, A_BOOT)
}

fn guest_hangs(env: &Env) -> Result<String> {
    let settings = |s: Settings| {
        s.set("guest", "cmdline", "\"rdinit=/bin/busybox -- sleep 1000\"").set("deadlines", "boot", "\"3s\"")
    };
    let output = with(env, settings).command(["true"]).output()?;
    failed(output, Duration::from_secs(15))
}

/// A container that sleeps, and then what happens to its pod.
pub fn sleeper(env: &Env) -> Result<Started<'_>> {
    let container = with(env, |s| s.set("deadlines", "agent_call", "\"2s\"")).sh("echo up; sleep 1000");
    let started = container.start()?;
    started.wait_log("up")?;
    Ok(started)
}

/// The pod is gone: status 137, a word to the container's stderr, and it can be removed.
fn gone(env: &Env, started: Started<'_>) -> Result<String> {
    env.ctr().wait_status(&started.id, "STOPPED")?;
    started.wait_log("chsnap: ")?;
    let message = started.log();
    let removed = env.ctr().output(["task", "rm", &started.id])?;
    ensure!(removed.code == 137 || removed.stderr.contains("137"), "{}", removed.whole());
    started.remove()?;
    Ok(message)
}

fn vmm_killed(env: &Env) -> Result<String> {
    let mut waits = env.container().sh("echo up; sleep 1000").run()?.start()?;
    waits.child.stdout.as_mut().context("no stdout")?.read_exact(&mut [0; 3])?;
    kill(env.process(env.vmm_name())?.pid, Signal::SIGKILL)?;
    // Its reader does not go before it is told.
    let told = failed(waits.output()?.code(137)?, A_BOOT)?;
    ensure!(told.contains("chsnap: the pod's VM is gone: "), "{told}");
    let started = sleeper(env)?;
    kill(env.process(env.vmm_name())?.pid, Signal::SIGKILL)?;
    gone(env, started)
}

fn virtiofsd_killed(env: &Env) -> Result<String> {
    let started = sleeper(env)?;
    kill(env.process("virtiofsd")?.pid, Signal::SIGKILL)?;
    let left = eventually(Duration::from_secs(10), || env.processes(env.vmm_name()).is_empty().then_some(()));
    ensure!(left.is_some(), "the VMM runs on without its files");
    gone(env, started)
}

/// A container with the means to crash its kernel does.
fn guest_crashes(env: &Env) -> Result<String> {
    const CRASH: &str = "\
import ctypes, os
os.mkdir('/tmp/p')
ctypes.CDLL(None).mount(b'proc', b'/tmp/p', b'proc', 0, None)
open('/tmp/p/sysrq-trigger', 'w').write('c')
";
    let started = env.container().flags(["--cap-add", "CAP_SYS_ADMIN"]).python(CRASH).start()?;
    gone(env, started)
}

/// The VMM stands still: calls fail within their deadline, and a SIGKILL still ends the container.
fn agent_silent(env: &Env) -> Result<String> {
    let started = sleeper(env)?;
    let vmm = env.process(env.vmm_name())?.pid;
    kill(vmm, Signal::SIGSTOP)?;
    let message = failed(started.exec(["true"]).output()?, Duration::from_secs(10))?;
    started.kill("SIGKILL")?.success()?;
    env.ctr().wait_status(&started.id, "STOPPED")?;
    let left = eventually(Duration::from_secs(5), || env.processes(env.vmm_name()).is_empty().then_some(()));
    ensure!(left.is_some(), "the VMM that stands still was not killed");
    started.remove()?;
    Ok(message)
}

fn program_missing(env: &Env) -> Result<String> {
    failed(env.container().command(["/no/such/program"]).output()?, A_BOOT)
}

fn exec_missing(env: &Env) -> Result<String> {
    let started = sleeper(env)?;
    let message = failed(started.exec(["/no/such/program"]).output()?, AT_ONCE)?;
    started.remove()?;
    Ok(message)
}

fn exec_stopped(env: &Env) -> Result<String> {
    let started = env.container().sh("exit 0").start()?;
    env.ctr().wait_status(&started.id, "STOPPED")?;
    let message = failed(started.exec(["true"]).output()?, AT_ONCE)?;
    started.remove()?;
    Ok(message)
}

fn exec_twice(env: &Env) -> Result<String> {
    let started = sleeper(env)?;
    let twin = || started.exec_with(&["--exec-id", "twin"], ["sh", "-c", "echo > /tmp/first; sleep 2"]);
    let first = twin().start()?;
    let up = eventually(Duration::from_secs(10), || started.sh("cat /tmp/first").ok());
    ensure!(up.is_some(), "the first exec did not start");
    let message = failed(twin().output()?, AT_ONCE)?;
    first.output()?.success()?;
    started.remove()?;
    Ok(message)
}

fn kill_finished(env: &Env) -> Result<String> {
    let started = env.container().sh("exit 0").start()?;
    env.ctr().wait_status(&started.id, "STOPPED")?;
    let message = failed(started.kill("SIGTERM")?, AT_ONCE)?;
    started.remove()?;
    Ok(message)
}
