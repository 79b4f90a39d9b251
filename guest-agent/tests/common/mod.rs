//! The real agent as pid 1 of a PID namespace, with its channel on a UNIX socket, and images made of busybox.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio as Std},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use chsnap_protocol::{PROTOCOL_VERSION, agent::*, agent_ttrpc::AgentClient, session};
use tempfile::TempDir;
use tokio::net::UnixListener;
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

/// No answer may take longer.
const DEADLINE: Duration = Duration::from_secs(30);

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Why these tests cannot run here, if they cannot.
pub fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root: namespaces, mounts and cgroups are needed".into());
    }
    if cgroup_root().is_none() {
        return Some("no cgroup v2 hierarchy is mounted".into());
    }
    busybox().is_none().then(|| "no static busybox at /bin/busybox (package busybox-static)".into())
}

/// Ends the test early where it cannot run.
#[macro_export]
macro_rules! need_root {
    () => {
        if let Some(why) = common::obstacle() {
            eprintln!("SKIPPED: {why}");
            return;
        }
    };
}

fn busybox() -> Option<PathBuf> {
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
    pub client: AgentClient,
    listener: UnixListener,
    process: Child,
    dir: TempDir,
    cgroup: PathBuf,
}

impl Agent {
    pub async fn start() -> Self {
        let mut agent = Self::silent();
        agent.client = agent.session().await;
        agent
    }

    /// An agent nobody has greeted yet.
    pub fn silent() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let cgroup = cgroup_root().unwrap().join(format!("chsnap-test-{}-{number}", std::process::id()));
        fs::create_dir(&cgroup).unwrap();
        let process = Command::new("unshare")
            .args(["--pid", "--fork", "--mount-proc", "--ipc", "--uts", "--kill-child=SIGKILL"])
            .arg(env!("CARGO_BIN_EXE_chsnap-agent"))
            .arg("--unix")
            .arg(&socket)
            .arg("--cgroup-root")
            .arg(&cgroup)
            .stdin(Std::null())
            .spawn()
            .unwrap();
        Self { client: nobody(), listener, process, dir, cgroup }
    }

    /// Gives up the session and opens the next one.
    pub async fn reconnect(&mut self) {
        self.client = nobody();
        self.client = self.session().await;
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
        let root = self.dir.path().join("rootfs");
        if !root.exists() {
            image(&root);
        }
        root
    }

    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// A container that runs `script` in a shell.
    pub fn shell(&self, script: &str) -> Spec {
        Spec::new(&self.root(), &["/bin/sh", "-c", script])
    }

    pub async fn create(&self, id: &str, spec: &Spec) -> ttrpc::Result<CreateProcessResponse> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec_json: spec.json.to_string().into_bytes(),
            stdio: Some(spec.stdio.clone()).into(),
            ..Default::default()
        };
        self.client.create_container(soon(), &request).await
    }

    pub async fn start_process(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        self.client.start_process(soon(), &process(id, exec)).await.map(|answer| answer.pid)
    }

    /// Creates and starts a container.
    pub async fn run(&self, id: &str, spec: &Spec) -> CreateProcessResponse {
        let streams = self.create(id, spec).await.unwrap();
        self.start_process(id, "").await.unwrap();
        streams
    }

    pub async fn wait(&self, id: &str, exec: &str) -> u32 {
        self.client.wait_process(soon(), &process(id, exec)).await.unwrap().exit_status
    }

    pub async fn exec(&self, id: &str, exec: &str, spec: &Spec) -> ttrpc::Result<CreateProcessResponse> {
        let request = CreateExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process_json: spec.json["process"].to_string().into_bytes(),
            stdio: Some(spec.stdio.clone()).into(),
            ..Default::default()
        };
        self.client.create_exec(soon(), &request).await
    }

    pub async fn signal(&self, id: &str, exec: &str, signal: i32, all: bool) -> ttrpc::Result<()> {
        let request = SignalProcessRequest {
            process: Some(process(id, exec)).into(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client.signal_process(soon(), &request).await.map(drop)
    }

    pub async fn delete(&self, id: &str) -> ttrpc::Result<()> {
        let request = ContainerRef { container_id: id.into(), ..Default::default() };
        self.client.delete_container(soon(), &request).await.map(drop)
    }

    pub async fn pids(&self, id: &str) -> Vec<u32> {
        let request = ContainerRef { container_id: id.into(), ..Default::default() };
        self.client.list_pids(soon(), &request).await.unwrap().pids
    }

    pub async fn read(&self, stream: u64, max: u32) -> ttrpc::Result<ReadStreamResponse> {
        let request = ReadStreamRequest { stream, max, ..Default::default() };
        self.client.read_stream(soon(), &request).await
    }

    /// All there is until the end.
    pub async fn read_all(&self, stream: u64) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let answer = self.read(stream, 1 << 20).await.unwrap();
            assert_eq!(answer.eof, answer.data.is_empty());
            if answer.eof {
                return all;
            }
            all.extend(answer.data);
        }
    }

    pub async fn text(&self, stream: u64) -> String {
        String::from_utf8(self.read_all(stream).await).unwrap()
    }

    /// Reads until `wanted` has been seen.
    pub async fn read_until(&self, stream: u64, wanted: &str) -> String {
        let mut seen = String::new();
        while !seen.contains(wanted) {
            let answer = self.read(stream, 4096).await.unwrap();
            assert!(!answer.eof, "ended without {wanted:?}: {seen:?}");
            seen.push_str(std::str::from_utf8(&answer.data).unwrap());
        }
        seen
    }

    pub async fn write(&self, stream: u64, data: &[u8]) -> ttrpc::Result<()> {
        let request = WriteStreamRequest { stream, data: data.to_vec(), ..Default::default() };
        self.client.write_stream(soon(), &request).await.map(drop)
    }

    pub async fn close_write(&self, stream: u64) -> ttrpc::Result<()> {
        let request = StreamRef { stream, ..Default::default() };
        self.client.close_stream_write(soon(), &request).await.map(drop)
    }

    pub async fn close(&self, stream: u64) {
        let request = StreamRef { stream, ..Default::default() };
        self.client.close_stream(soon(), &request).await.unwrap();
    }

    pub async fn connect(&self, port: u32) -> ttrpc::Result<u64> {
        let request = ConnectPortRequest { port, ..Default::default() };
        self.client.connect_port(soon(), &request).await.map(|answer| answer.stream)
    }

    /// Runs `spec` to its end: exit status, stdout, stderr.
    pub async fn output(&self, id: &str, spec: &Spec) -> (u32, String, String) {
        let streams = self.run(id, spec).await;
        let (out, err) = tokio::join!(self.text(streams.stdout_stream), self.text(streams.stderr_stream));
        let status = self.wait(id, "").await;
        self.delete(id).await.unwrap();
        (status, out, err)
    }

    pub async fn info(&self) -> InfoResponse {
        let request = InfoRequest { protocol_version: PROTOCOL_VERSION, ..Default::default() };
        self.client.info(soon(), &request).await.unwrap()
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

/// A client that is replaced before it is used.
fn nobody() -> AgentClient {
    let (unused, _) = tokio::io::duplex(1);
    AgentClient::new(Client::new(Socket::new(unused)))
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

pub fn soon() -> context::Context {
    context::with_duration(DEADLINE)
}

pub fn process(id: &str, exec: &str) -> ProcessRef {
    ProcessRef { container_id: id.into(), exec_id: exec.into(), ..Default::default() }
}

/// Code and text of a refusal.
pub fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a refusal: {other}"),
    }
}

fn image(root: &Path) {
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
