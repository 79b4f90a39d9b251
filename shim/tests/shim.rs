//! The shim's program, as containerd runs it, without containerd.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::process::{Command, Output, Stdio};

use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::Message;

fn shim(dir: &std::path::Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_containerd-shim-chsnap-v2"))
        .args(args)
        .current_dir(dir)
        .env_remove("TTRPC_ADDRESS")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn info_names_the_runtime() {
    let dir = tempfile::tempdir().unwrap();
    let output = shim(dir.path(), &["-info"]);
    assert!(output.status.success(), "{output:?}");
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(info.name, "io.containerd.chsnap.v2");
    assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    assert!(info.features.type_url.ends_with("/features/Features"));
    let features: oci_spec::runtime::Features = serde_json::from_slice(&info.features.value).unwrap();
    assert!(features.mount_options().as_ref().unwrap().iter().any(|word| word == "rro"));
    let idmap = features.linux().as_ref().and_then(|linux| linux.mount_extensions().as_ref()?.idmap().as_ref());
    assert_eq!(idmap.and_then(|idmap| *idmap.enabled()), Some(false));
}

#[test]
fn a_server_that_does_not_start_says_why_through_start() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let output = shim(dir.path(), &["-namespace", "none", "-id", "x", "-address", "/no/such/containerd.sock", "start"]);
    assert!(!output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("TTRPC_ADDRESS is not set"), "{said}");
    assert!(said.contains("the shim's server did not start"), "{said}");
}

#[test]
fn a_builder_that_a_person_starts_points_to_the_command_for_people() {
    let dir = tempfile::tempdir().unwrap();
    let output = shim(dir.path(), &["build-template"]);
    assert!(!output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("`chsnap snapshot build`"), "{said}");
}
