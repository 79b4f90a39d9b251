//! The OCI image archive: layout, index, manifest, configuration, layer.

use std::{
    env, io,
    io::{Read, Write},
};

use serde_json::{Value, json};
use tar::{EntryType, Header};

use super::{Layer, Reference, layer::digest_of};

/// What the image runs where `ctr run` says nothing else.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Process {
    /// Program and arguments.
    pub cmd: Vec<String>,
    /// `KEY=value`
    pub env: Vec<String>,
    /// Working directory.
    pub workdir: Option<String>,
    /// `user[:group]`, by name or number.
    pub user: Option<String>,
}

/// A small JSON document with its digest.
#[derive(Debug)]
pub(super) struct Blob {
    pub digest: String,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(value: &Value) -> Self {
        let bytes = value.to_string().into_bytes();
        Self { digest: digest_of(&bytes), bytes }
    }
}

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The image's configuration. It holds no time of creation, so that the same input gives the same image.
pub(super) fn config(layer: &Layer, process: &Process) -> Blob {
    let mut env = process.env.clone();
    if !env.iter().any(|variable| variable.starts_with("PATH=")) {
        env.insert(0, PATH.into());
    }
    let mut run = json!({ "Env": env });
    let fields = [
        ("Cmd", (!process.cmd.is_empty()).then(|| json!(process.cmd))),
        ("WorkingDir", process.workdir.as_ref().map(|dir| json!(dir))),
        ("User", process.user.as_ref().map(|user| json!(user))),
    ];
    for (name, value) in fields.into_iter().filter_map(|(name, value)| Some((name, value?))) {
        run[name] = value;
    }
    Blob::new(&json!({
        "architecture": architecture(),
        "os": "linux",
        "config": run,
        "rootfs": { "type": "layers", "diff_ids": [layer.diff_id] },
        "history": [{ "created_by": "chsnap image import" }],
    }))
}

/// The host's, in Go's spelling.
fn architecture() -> &'static str {
    match env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

pub(super) fn manifest(layer: &Layer, config: &Blob) -> Blob {
    Blob::new(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config.digest,
            "size": config.bytes.len(),
        },
        "layers": [{ "mediaType": layer.media_type, "digest": layer.digest, "size": layer.size }],
    }))
}

pub(super) fn write(
    out: impl Write,
    reference: &Reference,
    layer: &mut Layer,
    config: &Blob,
    manifest: &Blob,
) -> io::Result<()> {
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest.digest,
            "size": manifest.bytes.len(),
            "platform": { "architecture": architecture(), "os": "linux" },
            "annotations": {
                // containerd takes the first; the second is what the specification knows.
                "io.containerd.image.name": reference.as_str(),
                "org.opencontainers.image.ref.name": reference.tag(),
            },
        }],
    });
    let mut tar = tar::Builder::new(out);
    let layout = json!({ "imageLayoutVersion": "1.0.0" }).to_string();
    add(&mut tar, "oci-layout", layout.len() as u64, layout.as_bytes())?;
    let index = index.to_string();
    add(&mut tar, "index.json", index.len() as u64, index.as_bytes())?;
    for blob in [config, manifest] {
        add(&mut tar, &blob_path(&blob.digest), blob.bytes.len() as u64, blob.bytes.as_slice())?;
    }
    let path = blob_path(&layer.digest);
    let size = layer.size;
    add(&mut tar, &path, size, layer.reader()?)?;
    tar.into_inner()?.flush()
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

fn add(tar: &mut tar::Builder<impl Write>, path: &str, size: u64, content: impl Read) -> io::Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o644);
    header.set_size(size);
    header.set_mtime(0);
    header.set_path(path)?;
    header.set_cksum();
    tar.append(&header, content)
}
