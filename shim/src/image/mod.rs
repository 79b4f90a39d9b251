//! `chsnap image import`: a root file system becomes an OCI image of one layer in containerd.
//!
//! A directory and an ext4 image are packed into a layer; a tar is a layer already and is passed through. The layer
//! is known by its digest before the archive can name it, so it is spooled into an unnamed temporary file, from which
//! the archive is streamed.

use std::{io::Write, path::Path};

mod archive;
mod ctr;
mod error;
mod ext4;
mod layer;
mod reference;
mod source;
mod tree;

pub use archive::Process;
pub use ctr::Ctr;
pub use error::{ImageError, ImportError, TreeError};
pub use layer::Layer;
pub use reference::{Reference, ReferenceError};
pub use source::Source;

/// A packed image, ready to be written as an archive.
#[derive(Debug)]
pub struct Image {
    /// Its name.
    pub reference: Reference,
    layer: Layer,
    config: archive::Blob,
    manifest: archive::Blob,
}

impl Image {
    /// Packs the file system at `path`.
    pub fn pack(path: &Path, reference: Reference, process: &Process) -> Result<Self, ImageError> {
        let layer = Source::open(path)?.into_layer()?;
        let config = archive::config(&layer, process);
        let manifest = archive::manifest(&layer, &config);
        Ok(Self { reference, layer, config, manifest })
    }

    /// The manifest's digest, by which containerd knows the image.
    pub fn digest(&self) -> &str {
        &self.manifest.digest
    }

    /// The layer.
    pub fn layer(&self) -> &Layer {
        &self.layer
    }

    /// Writes an OCI image archive.
    pub fn write(&mut self, out: impl Write) -> std::io::Result<()> {
        archive::write(out, &self.reference, &mut self.layer, &self.config, &self.manifest)
    }
}
