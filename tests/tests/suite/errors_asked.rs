//! More of what can be wrong, see `errors.rs`: what a microVM cannot give.

use std::{fs, os::fd::AsRawFd, path::Path, time::Duration};

use anyhow::{Result, bail, ensure};
use chsnap_tests::{Env, patience};
use containerd_shim_protos::{
    api::{CreateTaskRequest, Mount, UpdateTaskRequest},
    protobuf::well_known_types::any::Any,
    ttrpc::{self, context::with_duration},
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::{Value, json};

use crate::errors::{A_BOOT, AT_ONCE, failed, refused, sleeper};

pub fn host_network(env: &Env) -> Result<String> {
    refused(env.container().flags(["--net-host"]))
}

pub fn host_device(env: &Env) -> Result<String> {
    refused(env.container().flags(["--device", "/dev/null"]))
}

pub fn bind_source_missing(env: &Env) -> Result<String> {
    refused(env.container().flags(["--mount", "type=bind,src=/no/such/source,dst=/mnt,options=rbind:ro"]))
}

pub fn bind_wrong_kind(env: &Env) -> Result<String> {
    // The other way round, and one that the guest makes.
    let other = refused(env.container().flags(["--mount", "type=bind,src=/etc,dst=/etc/passwd,options=rbind:noexec"]))?;
    ensure!(
        other.contains("\"/etc/passwd\" in the container is a file, but what is to be mounted there is a dir"),
        "{other}"
    );
    refused(env.container().flags(["--mount", "type=bind,src=/etc/hostname,dst=/etc,options=rbind:ro"]))
}

pub fn vmm_without_kvm(env: &Env) -> Result<String> {
    let container =
        env.container().settings(|s| s.set("vmm", "choice", "\"qemu\"").set("vmm", "accelerator", "\"tcg\""));
    refused(container.annotation("io.chsnap.vmm", "cloud-hypervisor"))
}

pub fn exec_cwd(env: &Env) -> Result<String> {
    let started = sleeper(env)?;
    let message = failed(started.exec_with(&["--cwd", "/no/such/dir"], ["true"]).output()?, AT_ONCE)?;
    started.remove()?;
    Ok(message)
}

pub fn cgroup_path(env: &Env) -> Result<String> {
    refused(env.container().flags(["--cgroup", "relative"]))
}

pub fn network_missing(env: &Env) -> Result<String> {
    refused(env.container().flags(["--with-ns", "network:/run/netns/no-such"]))
}

pub fn no_program(env: &Env) -> Result<String> {
    specified(env, |spec| spec["process"]["args"] = json!([]))
}

pub fn foreign_pid_namespace(env: &Env) -> Result<String> {
    refused(env.container().flags(["--with-ns", "pid:/proc/1/ns/pid"]))
}

pub fn foreign_mount_namespace(env: &Env) -> Result<String> {
    refused(env.container().flags(["--with-ns", "mount:/proc/1/ns/mnt"]))
}

/// With a specification of one's own, for what `ctr` has no flag.
fn specified(env: &Env, change: impl FnOnce(&mut Value)) -> Result<String> {
    specified_within(env, AT_ONCE, change)
}

/// The same, for what only the guest can tell.
fn specified_for_guest(env: &Env, change: impl FnOnce(&mut Value)) -> Result<String> {
    specified_within(env, A_BOOT, change)
}

fn specified_within(env: &Env, within: Duration, change: impl FnOnce(&mut Value)) -> Result<String> {
    let root = env.dir.join("root");
    fs::create_dir(&root)?;
    let mut spec = specification(&root);
    change(&mut spec);
    let file = env.dir.join("spec.json");
    fs::write(&file, spec.to_string())?;
    let file = file.display().to_string();
    failed(env.container().image("").command::<&str>([]).flags(["--config", &file]).output()?, within)
}

fn specification(root: &Path) -> Value {
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|typ| json!({ "type": typ }));
    json!({
        "ociVersion": "1.0.2",
        "process": { "args": ["true"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "root": { "path": root },
        "linux": { "namespaces": namespaces },
    })
}

fn without_namespace(env: &Env, typ: &str) -> Result<String> {
    specified(env, |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        namespaces.into_iter().for_each(|all| all.retain(|namespace| namespace["type"] != typ));
    })
}

pub fn host_pid(env: &Env) -> Result<String> {
    without_namespace(env, "pid")
}

pub fn host_ipc(env: &Env) -> Result<String> {
    without_namespace(env, "ipc")
}

pub fn host_uts(env: &Env) -> Result<String> {
    without_namespace(env, "uts")
}

pub fn user_namespace(env: &Env) -> Result<String> {
    specified(env, |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        namespaces.into_iter().for_each(|all| all.push(json!({ "type": "user" })));
    })
}

pub fn oci_hooks(env: &Env) -> Result<String> {
    specified(env, |spec| spec["hooks"] = json!({ "createRuntime": [{ "path": "/bin/true" }] }))
}

pub fn intel_rdt(env: &Env) -> Result<String> {
    specified(env, |spec| spec["linux"]["intelRdt"] = json!({ "closID": "gold" }))
}

/// A file system nobody serves: whoever looks at it waits.
pub fn bind_source_stuck(env: &Env) -> Result<String> {
    let dir = env.dir.join("stuck");
    fs::create_dir(&dir)?;
    let device = fs::File::options().read(true).write(true).open("/dev/fuse")?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    mount(Some("stuck"), &dir, Some("fuse"), MsFlags::empty(), Some(options.as_str()))?;
    let flag = format!("type=bind,src={},dst=/mnt,options=rbind", dir.display());
    let container = env.container().settings(|s| s.set("deadlines", "boot", "\"2s\"")).flags(["--mount", &flag]);
    let output = container.command(["true"]).output();
    // It is answered now, with an error.
    drop(device);
    umount2(&dir, MntFlags::MNT_DETACH)?;
    failed(output?, AT_ONCE)
}

pub fn other_clock(env: &Env) -> Result<String> {
    specified(env, |spec| spec["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": 86400 } }))
}

pub fn personality(env: &Env) -> Result<String> {
    specified(env, |spec| spec["linux"]["personality"] = json!({ "domain": "LINUX32" }))
}

pub fn host_cpus(env: &Env) -> Result<String> {
    specified(env, |spec| spec["linux"]["resources"] = json!({ "cpu": { "cpus": "0" } }))
}

pub fn disk_limits(env: &Env) -> Result<String> {
    specified(env, |spec| spec["linux"]["resources"] = json!({ "blockIO": { "weight": 10 } }))
}

pub fn scheduling(env: &Env) -> Result<String> {
    specified(env, |spec| spec["process"]["scheduler"] = json!({ "policy": "SCHED_FIFO", "priority": 1 }))
}

pub fn no_oom_killer(env: &Env) -> Result<String> {
    specified(env, |spec| spec["linux"]["resources"] = json!({ "memory": { "disableOOMKiller": true } }))
}

pub fn propagation(env: &Env) -> Result<String> {
    specified(env, |spec| spec["linux"]["rootfsPropagation"] = json!("rshared"))
}

/// containerd 2 refuses it itself, as the runtime says that it has no such mounts; so the shim of a pod is asked.
pub fn mapped_mount(env: &Env) -> Result<String> {
    let mapping = json!([{ "containerID": 0, "hostID": 1000, "size": 1 }]);
    let mount = json!({
        "destination": "/mnt", "type": "bind", "source": "/", "options": ["rbind"],
        "uidMappings": mapping, "gidMappings": mapping,
    });
    further(env, |spec| spec["mounts"] = json!([mount]), |_| ())
}

pub fn mount_option(env: &Env) -> Result<String> {
    refused(env.container().flags(["--mount", "type=bind,src=/,dst=/mnt,options=rbind:readonly"]))
}

/// A socket's other end is a process of the host's, and a kernel of its own does not know it.
pub fn bind_socket(env: &Env) -> Result<String> {
    let socket = env.dir.join("docker.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let mount = format!("type=bind,src={},dst=/run/docker.sock,options=rbind", socket.display());
    refused(env.container().flags(["--mount", &mount]))
}

pub fn time_namespace(env: &Env) -> Result<String> {
    specified_for_guest(env, |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut();
        namespaces.into_iter().for_each(|all| all.push(json!({ "type": "time" })));
    })
}

pub fn capability_unknown(env: &Env) -> Result<String> {
    specified_for_guest(env, |spec| spec["process"]["capabilities"] = json!({ "bounding": ["CAP_FLY"] }))
}

pub fn rlimit_unknown(env: &Env) -> Result<String> {
    specified_for_guest(env, |spec| {
        spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_PATIENCE", "soft": 1, "hard": 1 }]);
    })
}

pub fn sysctl_unknown(env: &Env) -> Result<String> {
    specified_for_guest(env, |spec| spec["linux"]["sysctl"] = json!({ "kernel.no_such": "1" }))
}

pub fn cgroup_file_unknown(env: &Env) -> Result<String> {
    specified_for_guest(env, |spec| spec["linux"]["resources"] = json!({ "unified": { "memory.no_such": "1" } }))
}

/// No snapshotter of `ctr` mounts one, so the shim of a pod is asked for a further container on it.
pub fn loop_root(env: &Env) -> Result<String> {
    on_root(env, "erofs", "/image.erofs", &["ro", "loop"])
}

/// As after somebody has removed a snapshot's directory behind containerd's back.
pub fn root_mount_fails(env: &Env) -> Result<String> {
    on_root(env, "overlay", "overlay", &["lowerdir=/no/such/layer:/no/such/other"])
}

/// More than mount(2) takes, even by their shortest names.
pub fn too_many_layers(env: &Env) -> Result<String> {
    let layers = (0..500).map(|n| format!("/var/lib/containerd/snapshots/{n:064}/fs")).collect::<Vec<_>>().join(":");
    on_root(env, "overlay", "overlay", &[&format!("lowerdir={layers}")])
}

fn on_root(env: &Env, kind: &str, source: &str, options: &[&str]) -> Result<String> {
    let options = options.iter().map(ToString::to_string).collect();
    let root = Mount { type_: kind.into(), source: source.into(), options, ..Default::default() };
    further(env, |_| (), |request| request.rootfs = vec![root])
}

/// What containerd's CRI sends of a runtime's options table without a `ConfigPath`, for which `ctr` has no flag.
pub fn config_body(env: &Env) -> Result<String> {
    let mut options = Any::new();
    options.type_url = "runtimeoptions.v1.Options".into();
    let body = "TypeUrl = 'runtimeoptions.v1.Options'\ndefault_memory = '1GiB'\n";
    options.value = [&[3 << 3 | 2, u8::try_from(body.len())?], body.as_bytes()].concat();
    further(env, |_| (), |request| request.options = Some(options).into())
}

/// What the shim of a pod says when it is asked for a further container.
fn further(env: &Env, change: impl FnOnce(&mut Value), ask: impl FnOnce(&mut CreateTaskRequest)) -> Result<String> {
    let started = env.container().sh("sleep 1000").start()?;
    let bundle = env.dir.join("bundle");
    fs::create_dir(&bundle)?;
    let mut spec = specification(&bundle);
    change(&mut spec);
    fs::write(bundle.join("config.json"), spec.to_string())?;
    let (id, bundle) = ("further".into(), bundle.display().to_string());
    let mut request = CreateTaskRequest { id, bundle, ..Default::default() };
    ask(&mut request);
    let answer = started.shim()?.create(with_duration(AT_ONCE * patience()), &request);
    let Err(ttrpc::Error::RpcStatus(status)) = answer else { bail!("{answer:?}") };
    ensure!(started.sh("echo still here")? == "still here");
    started.remove()?;
    Ok(status.message)
}

/// The container goes on.
pub fn pause(env: &Env) -> Result<String> {
    let started = env.container().sh("sleep 1000").start()?;
    let message = failed(env.ctr().output(["task", "pause", &started.id])?, AT_ONCE)?;
    let resumed = failed(env.ctr().output(["task", "resume", &started.id])?, AT_ONCE)?;
    ensure!(resumed.contains("cannot be paused, so there is nothing to resume"), "{resumed}");
    let saved = env.dir.join("checkpoint").display().to_string();
    let checkpoint = failed(env.ctr().output(["task", "checkpoint", "--image-path", &saved, &started.id])?, AT_ONCE)?;
    ensure!(checkpoint.contains("cannot be paused"), "{checkpoint}");
    let update = UpdateTaskRequest { id: started.id.clone(), ..Default::default() };
    let answer = started.shim()?.update(with_duration(AT_ONCE * patience()), &update);
    let Err(ttrpc::Error::RpcStatus(status)) = answer else { bail!("{answer:?}") };
    ensure!(status.code() == ttrpc::Code::UNIMPLEMENTED, "{status:?}");
    ensure!(started.sh("echo still here")? == "still here");
    started.remove()?;
    Ok(message)
}

/// `ctr` takes one only with its image, so the shim of a pod is asked for a further container from it.
pub fn checkpoint(env: &Env) -> Result<String> {
    let started = env.container().sh("sleep 1000").start()?;
    let request = CreateTaskRequest {
        id: "restored".into(),
        bundle: env.dir.display().to_string(),
        checkpoint: "/some/checkpoint".into(),
        ..Default::default()
    };
    let answer = started.shim()?.create(with_duration(AT_ONCE * patience()), &request);
    let Err(ttrpc::Error::RpcStatus(status)) = answer else { bail!("{answer:?}") };
    ensure!(status.code() == ttrpc::Code::UNIMPLEMENTED, "{status:?}");
    started.remove()?;
    Ok(status.message)
}

pub fn mount_type(env: &Env) -> Result<String> {
    refused(env.container().flags(["--mount", "type=nfs,src=host:/x,dst=/mnt"]))
}

/// One byte more than the directory has room for.
pub fn id_too_long(env: &Env) -> Result<String> {
    let free = 96 - env.daemon.pods().join(&env.daemon.namespace).join("").as_os_str().len();
    refused(env.container().id(&"x".repeat(free + 1)))
}
