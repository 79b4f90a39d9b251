//! What containerd is told of the runtime before there is a container: `-info`.
//!
//! containerd asks before it passes on what only some runtimes can do, ID-mapped mounts for one, and the kubelet learns
//! from it whether a pod may ask for `recursiveReadOnly` mounts.

use containerd_shim_protos::{protobuf::well_known_types::any::Any, types::introspection::RuntimeInfo};
use serde_json::json;

use super::server::RUNTIME;
use crate::share;

/// By this name containerd knows the OCI runtime specification's `features.json`.
const TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Name, version and features.
pub(super) fn runtime_info() -> RuntimeInfo {
    let off = json!({ "enabled": false });
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": oci_spec::runtime::VERSION,
        "hooks": [],
        "mountOptions": share::words_of_bind().collect::<Vec<_>>(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "cgroup": { "v1": true, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
            "seccomp": off, "apparmor": off, "selinux": off, "intelRdt": off,
            "mountExtensions": { "idmap": off },
        },
    });
    let mut info = RuntimeInfo::new();
    info.name = RUNTIME.into();
    info.version = Some(containerd_shim_protos::types::introspection::RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").into(),
        ..Default::default()
    })
    .into();
    let features = Any { type_url: TYPE.into(), value: features.to_string().into_bytes(), ..Default::default() };
    info.features = Some(features).into();
    info
}
