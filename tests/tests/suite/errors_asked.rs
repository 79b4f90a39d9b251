//! More of what can be wrong, see `errors.rs`: what a microVM cannot give.

use std::fs;

use anyhow::Result;
use chsnap_tests::Env;
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

pub fn mount_type(env: &Env) -> Result<String> {
    refused(env.container().flags(["--mount", "type=nfs,src=host:/x,dst=/mnt"]))
}

/// One byte more than the directory has room for.
pub fn id_too_long(env: &Env) -> Result<String> {
    let free = 96 - env.daemon.pods().join(&env.daemon.namespace).join("").as_os_str().len();
    refused(env.container().id(&"x".repeat(free + 1)))
}
