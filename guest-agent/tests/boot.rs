//! The agent as pid 1 of a real guest: QEMU by translation, virtiofs, the channel over virtio-serial.
//!
//! Takes the guest that `make build` made; where there is none, these tests say so and end.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    env, fs,
    ops::Deref,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use chsnap_protocol::{SERIAL_PORT, SHARE_MOUNT, SHARE_TAG, agent::*, agent_ttrpc::AgentClient, session};
use common::{Api, Spec, make_image, nobody, process, refusal, soon};
use serde_json::json;
use tempfile::TempDir;
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};
use ttrpc::r#async::{Client, transport::Socket};

/// For a boot by translation on a busy machine.
const BOOT: Duration = Duration::from_secs(120);

struct Guest {
    api: Api,
    dir: TempDir,
    qemu: Child,
    virtiofsd: Child,
}

/// `variable`, else a file below the target directory. `None` where it does not exist.
fn file(variable: &str, below: &str) -> Option<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let target = env::var_os("CHSNAP_TARGET").map_or_else(|| workspace.join("target"), PathBuf::from);
    let path = env::var_os(variable).map_or_else(|| target.join(below), PathBuf::from);
    if path.is_file() {
        return Some(path);
    }
    chsnap_test_skip::skip_without_setup(format!("no {}: set {variable}, or run `make build`", path.display()));
    None
}

impl Guest {
    async fn boot() -> Option<Self> {
        if cfg!(not(target_arch = "x86_64")) {
            chsnap_test_skip::skip("this test boots x86_64 guests");
            return None;
        }
        let kernel = file("CHSNAP_TEST_KERNEL", "guest/amd64/vmlinux")?;
        let initramfs = file("CHSNAP_TEST_INITRAMFS", "guest/amd64/initramfs")?;
        let qemu = file("CHSNAP_QEMU", "tools/bin/qemu-system-x86_64")?;
        let virtiofsd = file("CHSNAP_VIRTIOFSD", "tools/bin/virtiofsd")?;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).into_os_string().into_string().unwrap();
        make_image(&dir.path().join("share/c/rootfs"));
        let virtiofsd = Command::new(virtiofsd)
            .args(["--sandbox=none", "--inode-file-handles=never", "--log-level=error"])
            .args(["--shared-dir", &at("share"), "--socket-path", &at("fs.sock")])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        timeout(BOOT, async {
            while !dir.path().join("fs.sock").exists() {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .unwrap();
        let qemu = Command::new(qemu)
            .args(["-M", "q35,smm=off,usb=off,vmport=off,hpet=off,i8042=off,sata=off,memory-backend=mem"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "256M", "-display", "none"])
            .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on", "-nodefaults", "-no-user-config"])
            .args(["-no-reboot", "-append", "console=ttyS0 quiet panic=-1 cryptomgr.notests"])
            .args(["-serial", &format!("file:{}", at("console"))])
            .args(["-chardev", &format!("socket,id=fs,path={}", at("fs.sock"))])
            .args(["-device", &format!("vhost-user-fs-pci,chardev=fs,tag={SHARE_TAG},queue-size=256")])
            .args(["-chardev", &format!("socket,id=agent,path={},server=on,wait=off", at("agent.sock"))])
            .args(["-device", "virtio-serial-pci"])
            .args(["-device", &format!("virtserialport,chardev=agent,name={SERIAL_PORT}")])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initramfs)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let image = Path::new(SHARE_MOUNT).join("c/rootfs");
        let mut guest = Self { api: Api { client: nobody(), image }, dir, qemu, virtiofsd };
        let opened = timeout(BOOT, guest.session()).await;
        assert!(opened.is_ok(), "no session: {}", guest.console());
        Some(guest)
    }

    /// The next session on the port.
    async fn session(&mut self) {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
        self.api.client = nobody();
        let mut channel = loop {
            match UnixStream::connect(self.dir.path().join("agent.sock")).await {
                Ok(channel) => break channel,
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        };
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        session::open(&mut channel, number).await.unwrap();
        self.api.client = AgentClient::new(Client::new(Socket::new(channel)));
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("share/c/rootfs")
    }

    fn console(&self) -> String {
        fs::read_to_string(self.dir.path().join("console")).unwrap_or_default()
    }

    async fn stats(&self, id: &str) -> StatsResponse {
        let request = ContainerRef { container_id: id.into(), ..Default::default() };
        self.client.stats(soon(), &request).await.unwrap()
    }
}

impl Deref for Guest {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for process in [&mut self.qemu, &mut self.virtiofsd] {
            let _ = process.kill();
            let _ = process.wait();
        }
        if std::thread::panicking() {
            eprintln!("console: {}", self.console());
        }
    }
}

/// One boot for all of it, since a boot takes seconds.
#[tokio::test]
async fn a_guest_from_boot_to_power_off() {
    need_root!();
    let Some(mut guest) = Guest::boot().await else { return };
    figures(&guest).await;
    files_are_shared(&guest).await;
    memory_is_limited(&guest).await;
    processes_are_limited(&guest).await;
    paths_of_the_share_are_bound(&guest).await;
    a_terminal_is_the_console(&guest).await;
    a_container_may_manage_cgroups(&guest).await;
    the_clock_is_set(&guest).await;
    a_machine_is_made_one_of_its_own(&guest).await;
    a_host_that_comes_back_finds_everything(&mut guest).await;
    the_guest_powers_off(guest).await;
}

async fn figures(guest: &Guest) {
    let info = guest.info().await;
    // Another kernel, though it may be of the same release.
    let streams = guest.run("kernel", &guest.shell("uname -r; cat /proc/sys/kernel/random/boot_id")).await;
    let out = guest.text(streams.stdout_stream).await;
    let (release, boot) = out.trim().split_once('\n').unwrap();
    assert_eq!(release, info.kernel_release);
    assert_ne!(boot, fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim());
    guest.wait("kernel", "").await;
    guest.delete("kernel").await.unwrap();
    assert!(0 < info.init_start_ns && info.init_start_ns < info.agent_ready_ns, "{info:?}");
    let begin = Instant::now();
    let streams = guest.run("speed", &guest.shell("dd if=/dev/zero bs=64k count=160 2>/dev/null")).await;
    assert_eq!(guest.read_all(streams.stdout_stream).await.len(), 10 << 20);
    guest.delete("speed").await.unwrap();
    let mib = 10.0 / begin.elapsed().as_secs_f64();
    eprintln!(
        "init after {} ms, agent ready after {} ms, {mib:.0} MiB/s out of the guest",
        info.init_start_ns / 1_000_000,
        info.agent_ready_ns / 1_000_000
    );
}

async fn files_are_shared(guest: &Guest) {
    fs::write(guest.root().join("srv/question"), "from the host").unwrap();
    let script = "cat /srv/question; echo from the guest >/srv/answer; mount | head -n 1; touch /x";
    let (status, out, err) = guest.output("files", &guest.shell(script)).await;
    assert_eq!(status, 0, "{err}");
    assert!(out.starts_with("from the host") && out.contains("on / type virtiofs"), "{out}");
    assert_eq!(fs::read_to_string(guest.root().join("srv/answer")).unwrap(), "from the guest\n");
}

async fn memory_is_limited(guest: &Guest) {
    let limit: u64 = 16 << 20;
    let spec = guest
        .shell("tail -c 67108864 /dev/zero | wc -c; sleep 100")
        .set("/linux/resources", json!({ "memory": { "limit": limit } }));
    guest.run("oom", &spec).await;
    let deadline = Instant::now() + Duration::from_secs(60);
    while guest.stats("oom").await.memory_oom_kills == 0 {
        assert!(Instant::now() < deadline, "no OOM kill: {:?}", guest.stats("oom").await);
        sleep(Duration::from_millis(50)).await;
    }
    let stats = guest.stats("oom").await;
    assert_eq!(stats.memory_max, limit);
    assert!(stats.memory_current > 0 && stats.memory_current <= limit, "{stats:?}");
    guest.signal("oom", "", 9, false).await.unwrap();
    let exit = guest.client.wait_process(soon(), &process("oom", "")).await.unwrap();
    assert_eq!((exit.exit_status, exit.oom_kills), (137, 1));
    guest.delete("oom").await.unwrap();
    // No news of the last one.
    guest.run("calm", &guest.shell("true")).await;
    let exit = guest.client.wait_process(soon(), &process("calm", "")).await.unwrap();
    assert_eq!((exit.exit_status, exit.oom_kills), (0, 0));
    guest.delete("calm").await.unwrap();
}

async fn processes_are_limited(guest: &Guest) {
    let resources = json!({ "pids": { "limit": 5 }, "cpu": { "shares": 512, "quota": 50000, "period": 100000 } });
    let script = "cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu.weight; \
                  for i in 1 2 3 4 5 6 7 8; do sleep 5 & done; echo all";
    let streams = guest.run("pids", &guest.shell(script).set("/linux/resources", resources)).await;
    let (out, err) = tokio::join!(guest.text(streams.stdout_stream), guest.text(streams.stderr_stream));
    assert_eq!(out, "50000 100000\n20\n");
    assert!(err.contains("can't fork"), "{err}");
    assert_eq!(guest.stats("pids").await.pids_max, 5);
    guest.delete("pids").await.unwrap();
    // Of files, where nobody says how many.
    let spec = guest.shell("ulimit -n; ulimit -Hn").set("/process/rlimits", json!([]));
    assert_eq!(guest.output("files", &spec).await.1, "1048576\n1048576\n");
}

async fn paths_of_the_share_are_bound(guest: &Guest) {
    let host = guest.dir.path().join("share/c/mounts");
    fs::create_dir_all(host.join("dir")).unwrap();
    fs::write(host.join("log"), "").unwrap();
    let source = |name: &str| Path::new(SHARE_MOUNT).join("c/mounts").join(name);
    let mut spec = guest.shell("echo message >/dev/log; touch /dev/dir/x; ls -d /dev/dir; mount | grep -c virtiofs");
    let mounts = spec.json["mounts"].as_array_mut().unwrap();
    mounts.push(json!({ "destination": "/dev/log", "type": "bind", "source": source("log"), "options": ["rbind"] }));
    mounts.push(json!({ "destination": "/dev/dir", "source": source("dir"), "options": ["rbind", "ro"] }));
    let (_, out, err) = guest.output("binds", &spec).await;
    assert_eq!(out, "/dev/dir\n3\n");
    assert!(err.contains("Read-only file system"), "{err}");
    assert_eq!(fs::read_to_string(host.join("log")).unwrap(), "message\n");
    let missing = spec.set("/mounts/7/source", json!(source("nothing")));
    assert!(refusal(guest.create("missing", &missing).await).1.contains("c/mounts/nothing"));
}

async fn a_terminal_is_the_console(guest: &Guest) {
    let spec = guest.shell("tty; echo word >/dev/console; sleep 100").terminal();
    let streams = guest.run("tty", &spec).await;
    assert_eq!(guest.read_until(streams.stdout_stream, "word\r\n").await, "/dev/pts/0\r\nword\r\n");
    let exec = guest.exec("tty", "e", &guest.shell("tty; ls /dev/pts").terminal()).await.unwrap();
    guest.start_process("tty", "e").await.unwrap();
    assert_eq!(guest.text(exec.stdout_stream).await, "/dev/pts/1\r\n0     1     ptmx\r\n");
    guest.delete("tty").await.unwrap();
}

async fn a_container_may_manage_cgroups(guest: &Guest) {
    let script = "cd /sys/fs/cgroup; mkdir -p inner/most; echo 1 >inner/cgroup.procs; \
                  echo +memory >cgroup.subtree_control; cat cgroup.subtree_control; sleep 100";
    let mut spec = guest.shell(script);
    spec.json["mounts"][5]["options"] = json!(["rw"]);
    let streams = guest.run("cgroups", &spec).await;
    guest.read_until(streams.stdout_stream, "memory").await;
    let exec = guest.exec("cgroups", "e", &guest.shell("cat /proc/self/cgroup; sleep 100")).await.unwrap();
    let pid = guest.start_process("cgroups", "e").await.unwrap();
    assert_eq!(guest.read_until(exec.stdout_stream, "\n").await, "0::/inner\n");
    assert!(guest.pids("cgroups").await.contains(&pid));
    guest.delete("cgroups").await.unwrap();
}

async fn the_clock_is_set(guest: &Guest) {
    let tomorrow = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + Duration::from_secs(86400);
    let request = SetClockRequest { wall_clock_ns: tomorrow.as_nanos() as i64, ..Default::default() };
    guest.client.set_clock(soon(), &request).await.unwrap();
    let difference = guest.info().await.wall_clock_ns - request.wall_clock_ns;
    assert!((0..10_000_000_000).contains(&difference), "{difference}");
}

async fn a_machine_is_made_one_of_its_own(guest: &Guest) {
    let look = guest.shell("cat /dev/chsnap/epoch; touch /dev/chsnap/x; sleep 100");
    let streams = guest.run("epoch", &look).await;
    let booted = guest.read_until(streams.stdout_stream, "\n").await;
    assert_eq!(booted.trim().len(), 36, "{booted}");
    assert!(guest.read_until(streams.stderr_stream, "\n").await.contains("Read-only file system"));

    let yesterday = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() - Duration::from_secs(86400);
    let epoch = "2f8a7a3e-1c5b-4d8e-9f00-0123456789ab";
    let request = ResumeRequest {
        entropy: vec![7; 64],
        wall_clock_ns: yesterday.as_nanos() as i64,
        epoch: epoch.into(),
        ..Default::default()
    };
    let asked = Instant::now();
    let answer = guest.client.resume(soon(), &request).await.unwrap();
    let took = asked.elapsed().as_nanos() as i64;
    // What it answers with, and what it goes on with.
    let difference = answer.wall_clock_ns - request.wall_clock_ns;
    assert!((0..=took + 50_000_000).contains(&difference), "{difference}");
    let now = guest.info().await.wall_clock_ns;
    let difference = now - answer.wall_clock_ns;
    assert!((0..=asked.elapsed().as_nanos() as i64 + 50_000_000).contains(&difference), "{difference}");
    // One that runs sees it too.
    let exec = guest.exec("epoch", "e", &guest.shell("cat /dev/chsnap/epoch")).await.unwrap();
    guest.start_process("epoch", "e").await.unwrap();
    assert_eq!(guest.text(exec.stdout_stream).await.trim(), epoch);
    guest.delete("epoch").await.unwrap();

    for (spoilt, text) in [
        (ResumeRequest { entropy: vec![7; 63], ..request.clone() }, "63 bytes of entropy are too few"),
        (ResumeRequest { epoch: "x".into(), ..request.clone() }, "\"x\" is no UUID"),
        (ResumeRequest { wall_clock_ns: 0, ..request.clone() }, "no wall clock"),
        (ResumeRequest { mount_share: true, ..request.clone() }, "the share is mounted already"),
    ] {
        let (_, said) = refusal(guest.client.resume(soon(), &spoilt).await);
        assert!(said.contains(text), "{said}");
    }
}

async fn a_host_that_comes_back_finds_everything(guest: &mut Guest) {
    let streams = guest.run("stay", &Spec::new(&guest.image, &["cat"])).await;
    for round in 0..10 {
        // Somebody waits in the agent while the host goes away; in every second round, in the midst of a message.
        let _ = timeout(Duration::from_millis(20), guest.read(streams.stdout_stream, 1)).await;
        if round % 2 == 1 {
            let _ = timeout(Duration::from_millis(5), guest.write(streams.stdin_stream, &[b'x'; 1 << 20])).await;
            let id = format!("stay{round}");
            guest.session().await;
            // What had been taken of it may come out; the container is started anew.
            let _ = guest.delete("stay").await;
            assert_eq!(guest.output(&id, &guest.shell("echo new")).await.1, "new\n");
            let _ = guest.create("stay", &Spec::new(&guest.image, &["cat"])).await;
        } else {
            guest.session().await;
        }
        assert!(guest.info().await.agent_ready_ns > 0);
    }
    guest.delete("stay").await.unwrap();
}

async fn the_guest_powers_off(mut guest: Guest) {
    // No answer comes, or one that says that the channel broke.
    let _ = timeout(Duration::from_secs(5), guest.client.shutdown(soon(), &Empty::new())).await;
    let deadline = Instant::now() + Duration::from_secs(30);
    let status = loop {
        if let Some(status) = guest.qemu.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "the guest is still on: {}", guest.console());
        sleep(Duration::from_millis(20)).await;
    };
    assert!(status.success(), "{status}");
    assert!(!guest.console().contains("panic"), "{}", guest.console());
}

#[test]
fn it_does_not_take_a_host_for_its_guest() {
    let output = Command::new(env!("CARGO_BIN_EXE_chsnap-agent")).stdin(Stdio::null()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("chsnap-agent: fatal: this is no guest"), "{said}");
}
