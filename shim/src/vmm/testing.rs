//! What tests of real VMMs need: the tools of `hack/setup`, a guest made of busybox, a share.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::LazyLock,
    time::Duration,
};

use chsnap_test_skip::{skip, skip_without_setup};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use super::{Rung, Vm, VmExit, VmSpec};

/// For a boot by translation on a machine that is busy with other tests; `CHSNAP_TEST_PATIENCE` times longer on an
/// emulated host.
pub static BOOT: LazyLock<Duration> = LazyLock::new(|| {
    let times = env::var("CHSNAP_TEST_PATIENCE").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(90 * times.unwrap_or(1))
});

/// Whether the host is said to have this: `CHSNAP_TEST_FEATURES` names what there is, with commas between.
pub fn is_said_to_have(feature: &str) -> bool {
    env::var("CHSNAP_TEST_FEATURES").is_ok_and(|all| all.split(',').any(|one| one == feature))
}

fn target() -> PathBuf {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
    fs::canonicalize(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| default.into())).unwrap()
}

/// The tool that `variable` names, else the set-up's, else the `PATH`'s. Says so where there is none: a test that
/// gets `None` is skipped.
pub fn tool(variable: &str, name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let candidates =
        env::var_os(variable).map(PathBuf::from).into_iter().chain([target().join("tools/bin").join(name)]);
    let found = candidates.chain(env::split_paths(&path).map(|dir| dir.join(name))).find(|path| path.is_file());
    if found.is_none() {
        let what = format!("no {name}: set {variable}");
        // Cloud Hypervisor is in no registry from which a set-up could take it.
        if variable == "CHSNAP_CLOUD_HYPERVISOR" {
            skip(what);
        } else {
            skip_without_setup(format!("{what}, or run `make setup`"));
        }
    }
    found
}

/// What a kernel that can be booted is called on this architecture.
const KERNEL: &str = if cfg!(target_arch = "aarch64") { "Image" } else { "vmlinux" };

/// A guest's directory with its kernel and its initramfs, which has the drivers of all of its devices, and busybox.
fn guest() -> Option<PathBuf> {
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let dir = env::var_os("CHSNAP_TEST_GUEST").map_or_else(|| target().join("guest").join(arch), PathBuf::from);
    if dir.join(KERNEL).is_file() && dir.join("initramfs").is_file() {
        return Some(dir);
    }
    skip_without_setup(format!("no {KERNEL} and initramfs in {dir:?}: set CHSNAP_TEST_GUEST, or run `make build`"));
    None
}

/// A machine to boot, with its directory and its running virtiofsd.
pub struct Bench {
    pub spec: VmSpec,
    dir: TempDir,
    snapshot: PathBuf,
    share: Child,
}

impl Bench {
    /// A guest whose only process is this shell script, beside drivers for its devices; a machine that panics where it ends.
    pub async fn new(init: &str) -> Option<Self> {
        let (guest, virtiofsd) = (guest()?, tool("CHSNAP_VIRTIOFSD", "virtiofsd")?);
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("root")).unwrap();
        fs::create_dir(at("run")).unwrap();
        fs::write(at("root/hello"), "from the host").unwrap();
        fs::write(at("initramfs"), initramfs(fs::read(guest.join("initramfs")).unwrap(), init)).unwrap();
        let share = Command::new(virtiofsd)
            .args(["--sandbox=none", "--inode-file-handles=never", "--migration-mode=find-paths", "--log-level=error"])
            .arg("--shared-dir")
            .arg(at("root"))
            .arg("--socket-path")
            .arg(at("share.sock"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        timeout(*BOOT, async {
            while !at("share.sock").exists() {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .unwrap();
        let spec = VmSpec {
            cpus: 1,
            memory_mib: 256,
            kernel: guest.join(KERNEL),
            initramfs: at("initramfs"),
            cmdline: vec![],
            share_socket: at("share.sock"),
            run_dir: at("run"),
            cgroups: vec![],
            network: None,
            rung: Rung::Standard,
            snapshot_dir: None,
            deadline: *BOOT,
        };
        let snapshot = at("snapshot");
        fs::create_dir(&snapshot).unwrap();
        Some(Self { spec, dir, snapshot, share })
    }

    /// The same with the guest's own initramfs, whose first process is the agent.
    pub async fn with_agent() -> Option<Self> {
        let initramfs = guest()?.join("initramfs");
        let mut bench = Self::new("").await?;
        bench.spec.initramfs = initramfs;
        Some(bench)
    }

    /// An empty directory for a snapshot.
    pub fn snapshot_dir(&self) -> &Path {
        &self.snapshot
    }

    /// Changes what the share says.
    pub fn says(&self, text: &str) {
        fs::write(self.dir.path().join("root/hello"), text).unwrap();
    }

    /// Files that a VMM left in its directory.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        fs::read_dir(self.dir.path().join("run")).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.share.kill();
        let _ = self.share.wait();
    }
}

/// Waits for the end of a VM.
pub async fn end(vm: &dyn Vm) -> VmExit {
    let mut exited = vm.exited();
    match timeout(*BOOT, exited.wait_for(Option::is_some)).await {
        Ok(exit) => exit.unwrap().clone().unwrap(),
        Err(_) => panic!("still running; console: {}", vm.console()),
    }
}

/// Waits for a word on the console.
pub async fn shows(vm: &dyn Vm, word: &str) {
    let seen = timeout(*BOOT, async {
        while !vm.console().contains(word) && vm.exited().borrow().is_none() {
            sleep(Duration::from_millis(20)).await;
        }
    });
    let seen = seen.await;
    assert!(seen.is_ok() && vm.console().contains(word), "{word} is not on the console: {}", vm.console());
}

/// The guest's own with another first program: the kernel takes several archives in one, and of a name the last.
fn initramfs(mut archive: Vec<u8>, init: &str) -> Vec<u8> {
    // Cloud Hypervisor 53 panics when it restores a device that no driver has set up.
    let prologue = "#!/bin/busybox sh\nbusybox=/bin/busybox\n$busybox mkdir /proc /sys /mnt\n\
        $busybox mount -t devtmpfs dev /dev; $busybox mount -t proc proc /proc; $busybox mount -t sysfs sys /sys\n\
        while read -r _ module; do $busybox insmod $module; done </etc/modules.load\n$busybox --install -s /bin\n";
    archive.resize(archive.len().next_multiple_of(4), 0);
    entry(&mut archive, Path::new("init"), 0o100_755, format!("{prologue}{init}\n").as_bytes());
    entry(&mut archive, Path::new("TRAILER!!!"), 0, b"");
    archive
}

/// One file of a cpio archive, `newc` format.
fn entry(archive: &mut Vec<u8>, name: &Path, mode: u32, content: &[u8]) {
    let name = name.to_str().unwrap();
    let fields = [0, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    archive.extend(b"070701");
    fields.iter().for_each(|field| archive.extend(format!("{field:08x}").bytes()));
    for part in [[name.as_bytes(), b"\0"].concat().as_slice(), content] {
        archive.extend(part);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
}

/// True where `pid` was reaped.
pub fn is_gone(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}
