//! More of what can be wrong, see `errors.rs`: what a microVM cannot give.

use std::fs;

use anyhow::{Result, bail, ensure};
use chsnap_tests::Env;
use containerd_shim_protos::{
    api::CreateTaskRequest,
    ttrpc::{self, context::with_duration},
};
use serde_json::{Value, json};

use crate::errors::{AT_ONCE, failed, refused};

pub fn host_network(env: &Env) -> Result<String> {
    refused(env.container().flags(["--net-host"]))
}

pub fn host_device(env: &Env) -> Result<String> {
    refused(env.container().flags(["--device", "/dev/null"]))
}

pub fn foreign_pid_namespace(env: &Env) -> Result<String> {
    refused(env.container().flags(["--with-ns", "pid:/proc/1/ns/pid"]))
}

pub fn foreign_mount_namespace(env: &Env) -> Result<String> {
    refused(env.container().flags(["--with-ns", "mount:/proc/1/ns/mnt"]))
}

/// With a specification of one's own, for what `ctr` has no flag.
fn specified(env: &Env, change: impl FnOnce(&mut Value)) -> Result<String> {
    let root = env.dir.join("root");
    fs::create_dir(&root)?;
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|typ| json!({ "type": typ }));
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "process": { "args": ["true"], "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        "root": { "path": root },
        "linux": { "namespaces": namespaces },
    });
    change(&mut spec);
    let file = env.dir.join("spec.json");
    fs::write(&file, spec.to_string())?;
    let file = file.display().to_string();
    failed(env.container().image("").command::<&str>([]).flags(["--config", &file]).output()?, AT_ONCE)
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

/// The container goes on.
pub fn pause(env: &Env) -> Result<String> {
    let started = env.container().sh("sleep 1000").start()?;
    let message = failed(env.ctr().output(["task", "pause", &started.id])?, AT_ONCE)?;
    let resumed = failed(env.ctr().output(["task", "resume", &started.id])?, AT_ONCE)?;
    ensure!(resumed.contains("cannot be paused, so there is nothing to resume"), "{resumed}");
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
    let answer = started.shim()?.create(with_duration(AT_ONCE), &request);
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
