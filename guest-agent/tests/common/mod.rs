//! The real agent as pid 1 of a PID namespace, with its channel on a UNIX socket, and images made of busybox.

#![allow(dead_code, unused_imports, clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod api;

use std::{
    fs,
    io::Write as _,
    ops::{Deref, DerefMut},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio as Std},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use chsnap_protocol::{agent::Stdio, agent_ttrpc::AgentClient, session};
use tempfile::TempDir;
use tokio::net::UnixListener;
use ttrpc::r#async::{Client, transport::Socket};

pub use api::{Api, DEADLINE, nobody, process, refusal, soon};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Why these tests cannot run here, if they cannot.
pub fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root: namespaces, mounts and cgroups are needed".into());
    }
    if cgroup_root().is_none() {
        return Some("no cgroup v2 hierarchy is mounted".into());
    }
    busybox().is_none().then(|| "no static busybox: run `make build`, or install busybox-static".into())
}

/// Ends the test early where it cannot run.
#[macro_export]
macro_rules! need_root {
    () => {
        if let Some(why) = common::obstacle() {
            chsnap_test_skip::skip_without_setup(why);
            return;
        }
    };
}

/// Where `make build` puts everything.
pub fn target() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::env::var_os("CHSNAP_TARGET").map_or_else(|| workspace.join("target"), PathBuf::from)
}

/// The guest's own, which is static, else the system's if it is.
fn busybox() -> Option<PathBuf> {
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    if let Ok(path) = fs::canonicalize(target().join("guest").join(arch).join("busybox")) {
        return Some(path);
    }
    let path = fs::canonicalize("/bin/busybox").ok()?;
    let listed = Command::new("ldd").arg(&path).output().ok()?;
    // ldd fails for a static program.
    (!listed.status.success()).then_some(path)
}

fn cgroup_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let line = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
    line.split(' ').nth(4).map(PathBuf::from)
}

pub struct Agent {
    api: Api,
    listener: UnixListener,
    process: Child,
    dir: TempDir,
    cgroup: PathBuf,
}

impl Agent {
    pub async fn start() -> Self {
        let mut agent = Self::silent();
        agent.api.client = agent.session().await;
        agent
    }

    /// Another build of it.
    pub async fn start_program(program: &Path) -> Self {
        let mut agent = Self::silent_program(program);
        agent.api.client = agent.session().await;
        agent
    }

    /// An agent nobody has greeted yet.
    pub fn silent() -> Self {
        let program = std::env::var_os("CHSNAP_TEST_AGENT").unwrap_or(env!("CARGO_BIN_EXE_chsnap-agent").into());
        Self::silent_program(Path::new(&program))
    }

    fn silent_program(program: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let cgroup = cgroup_root().unwrap().join(format!("chsnap-test-{}-{number}", std::process::id()));
        fs::create_dir(&cgroup).unwrap();
        let process = Command::new("unshare")
            .args(["--pid", "--fork", "--mount-proc", "--ipc", "--uts", "--kill-child=SIGKILL"])
            .arg(program)
            .arg("--unix")
            .arg(&socket)
            .arg("--cgroup-root")
            .arg(&cgroup)
            .stdin(Std::null())
            .spawn()
            .unwrap();
        let image = dir.path().join("rootfs");
        make_image(&image);
        Self { api: Api { client: nobody(), image }, listener, process, dir, cgroup }
    }

    /// Gives up the session and opens the next one.
    pub async fn reconnect(&mut self) {
        self.api.client = nobody();
        self.api.client = self.session().await;
    }

    /// The agent's connection, before the greeting.
    pub async fn connection(&self) -> tokio::net::UnixStream {
        tokio::time::timeout(DEADLINE, self.listener.accept()).await.unwrap().unwrap().0
    }

    pub async fn session(&self) -> AgentClient {
        let mut channel = self.connection().await;
        session::open(&mut channel, 42).await.unwrap();
        AgentClient::new(Client::new(Socket::new(channel)))
    }

    /// The agent's own number; unshare is its parent.
    pub fn pid(&self) -> u32 {
        let id = self.process.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        children.trim().parse().unwrap()
    }

    /// Kilobytes.
    pub fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    pub fn root(&self) -> PathBuf {
        self.api.image.clone()
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }
}

impl Deref for Agent {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl DerefMut for Agent {
    fn deref_mut(&mut self) -> &mut Api {
        &mut self.api
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // unshare takes the agent with it, and pid 1's end everything else.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.cgroup).is_err() && std::time::Instant::now() < deadline {
            remove_tree(&self.cgroup);
            std::thread::sleep(Duration::from_millis(10));
        }
        if !std::thread::panicking() {
            assert!(!self.cgroup.exists(), "the cgroup {} is left", self.cgroup.display());
        }
    }
}

/// Cgroups go by rmdir alone.
fn remove_tree(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_tree(&entry.path());
            let _ = fs::remove_dir(entry.path());
        }
    }
}

pub fn make_image(root: &Path) {
    for dir in ["bin", "etc", "proc", "sys", "dev", "tmp", "srv", "root"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    fs::copy(busybox().unwrap(), root.join("bin/busybox")).unwrap();
    let applets = "sh echo cat sleep id ls mount stat tty stty head tail dd wc env pwd kill ps hostname mkdir touch \
                   grep readlink test ulimit seq tr true false yes nc mknod chmod sort";
    for applet in applets.split_whitespace() {
        symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    let mut users = fs::File::create(root.join("etc/passwd")).unwrap();
    users.write_all(b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:33:web:/srv:/bin/sh\n").unwrap();
    fs::write(root.join("bin/plain"), "not a program").unwrap();
}

/// An OCI specification like containerd's, and which stdio is wanted.
#[derive(Clone)]
pub struct Spec {
    pub json: serde_json::Value,
    pub stdio: Stdio,
}

impl Spec {
    pub fn new(root: &Path, args: &[&str]) -> Self {
        let capabilities = serde_json::json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FSETID",
            "CAP_FOWNER",
            "CAP_MKNOD",
            "CAP_NET_RAW",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SETFCAP",
            "CAP_SETPCAP",
            "CAP_NET_BIND_SERVICE",
            "CAP_SYS_CHROOT",
            "CAP_KILL",
        ]);
        let json = serde_json::json!({
            "ociVersion": "1.1.0",
            "root": { "path": root },
            "hostname": "box",
            "process": {
                "user": { "uid": 0, "gid": 0, "additionalGids": [0, 10] },
                "args": args,
                "env": ["PATH=/usr/bin:/bin", "TERM=xterm"],
                "cwd": "/",
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                },
                "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
                "noNewPrivileges": true,
            },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                  "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs",
                  "options": ["nosuid", "noexec", "nodev", "ro"] },
                { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                  "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] },
                { "destination": "/run", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            ],
            "linux": {
                "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                               { "type": "network" }, { "type": "cgroup" }],
                "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                                "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
                "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            },
        });
        let stdio = Stdio { stdin: true, stdout: true, stderr: true, ..Default::default() };
        Self { json, stdio }
    }

    pub fn set(mut self, pointer: &str, value: serde_json::Value) -> Self {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        self.json.pointer_mut(parent).unwrap()[key] = value;
        self
    }

    pub fn terminal(mut self) -> Self {
        self.stdio = Stdio { stdin: true, stdout: true, terminal: true, ..Default::default() };
        self
    }
}
