//! Where the programs under test and what they need are. Set-up is `hack/setup.sh`'s and `hack/build.sh`'s duty.

use std::{
    env,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use crate::Version;

/// Every path the tests need.
#[derive(Debug)]
pub struct Tools {
    /// The workspace's target directory.
    pub target: PathBuf,
    /// Where the shim and `chsnap` are.
    pub bin: PathBuf,
    /// `vmlinux`, uncompressed, or arm64's `Image`.
    pub kernel: PathBuf,
    /// With the agent.
    pub initramfs: PathBuf,
    /// QEMU's system emulator.
    pub qemu: PathBuf,
    /// virtiofsd.
    pub virtiofsd: PathBuf,
    /// OCI archive with Python and the demo application.
    pub image: PathBuf,
    /// Cloud Hypervisor, where there is one.
    pub cloud_hypervisor: Option<PathBuf>,
}

impl Tools {
    /// Finds everything, once.
    ///
    /// # Panics
    /// Where something is missing: that is a mistake of the set-up, not a reason to skip.
    pub fn get() -> &'static Self {
        static TOOLS: OnceLock<Tools> = OnceLock::new();
        TOOLS.get_or_init(Self::find)
    }

    fn find() -> Self {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let target = env::var_os("CHSNAP_TARGET").map_or_else(|| workspace.join("target"), PathBuf::from);
        let target = target.canonicalize().unwrap_or_else(|e| panic!("{}: {e}; run hack/setup.sh", target.display()));
        let bin = env::var_os("CHSNAP_BIN_DIR").map_or_else(|| target.join("release"), PathBuf::from);
        let (arch, kernel) = if cfg!(target_arch = "aarch64") { ("arm64", "Image") } else { ("amd64", "vmlinux") };
        let tools = Self {
            kernel: there(target.join("guest").join(arch).join(kernel), "hack/setup.sh"),
            initramfs: there(target.join("guest").join(arch).join("initramfs"), "hack/build.sh"),
            qemu: there(target.join(format!("tools/bin/qemu-system-{}", env::consts::ARCH)), "hack/setup.sh"),
            virtiofsd: there(target.join("tools/bin/virtiofsd"), "hack/setup.sh"),
            image: there(target.join("image/python.tar"), "hack/image.sh"),
            cloud_hypervisor: cloud_hypervisor(),
            bin: bin.canonicalize().unwrap_or_else(|e| panic!("{}: {e}; run hack/build.sh", bin.display())),
            target,
        };
        there(tools.bin.join("containerd-shim-chsnap-v2"), "hack/build.sh");
        there(tools.bin.join("chsnap"), "hack/build.sh");
        tools
    }

    /// containerd's own programs.
    #[must_use]
    pub fn containerd(&self, version: Version) -> PathBuf {
        let dir = self.target.join(format!("tools/containerd-{version}/bin"));
        there(dir.join("containerd"), "hack/setup.sh");
        dir
    }
}

fn there(path: PathBuf, script: &str) -> PathBuf {
    assert!(path.is_file(), "{} is missing: run `make test`, or {script}", path.display());
    path
}

fn cloud_hypervisor() -> Option<PathBuf> {
    if let Some(path) = env::var_os("CHSNAP_CLOUD_HYPERVISOR") {
        return Some(PathBuf::from(path));
    }
    env::split_paths(&env::var_os("PATH")?).map(|dir| dir.join("cloud-hypervisor")).find(|path| path.is_file())
}
