//! The floor for the benchmark: the same guest started by hand, with neither containerd nor the shim's service.
//!
//! `bare CONFIG ROOTFS SOCKET PROGRAM [ARG...]` serves ROOTFS with virtiofsd, boots the configured VMM, starts PROGRAM
//! through the agent, forwards the UNIX socket SOCKET to port 8080, prints what each step took as one line of JSON, and
//! ends when its stdin does.

use std::{env, error::Error, path::PathBuf, time::Instant};

use chsnap::{
    agent::Agent,
    config::{Config, Expose},
    program::{Freshness, Scout},
    sandbox::{Division, Exposed, Plan},
    share::{self, Content, RootMount, Share, Virtiofsd},
    vmm::{self, VmSpec},
};
use chsnap_protocol::agent::Stdio;
use tokio::io::AsyncReadExt;

const NAME: &str = "bare";

fn main() -> Result<(), Box<dyn Error>> {
    let began = Instant::now();
    share::enter_private_mounts()?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(began))
}

async fn run(began: Instant) -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [config, rootfs, socket, program @ ..] = &args[..] else {
        return Err("usage: bare CONFIG ROOTFS SOCKET PROGRAM [ARG...]".into());
    };
    let config = Config::load(Some(config.as_ref()))?;
    let dir = PathBuf::from(socket).with_extension("d");
    std::fs::create_dir_all(&dir)?;
    let share = Share::create(&dir)?;
    let plan = Plan::of(NAME, serde_json::from_value(spec(program))?)?;
    let root = [RootMount { fstype: "bind".into(), source: rootfs.clone(), options: vec!["rbind".into()] }];
    let assembly = share.assemble(NAME, &root)?;
    let division = plan.divide(|place, hidden| assembly.resolve(place, hidden))?;
    let spec_json = plan.spec_json(&division)?;
    let Division { binds, staged, mountpoints, .. } = &division;
    assembly.publish(&Content { binds, staged, mountpoints, readonly: false })?;
    let mut scout = Scout::new(&config, Freshness::Remembered);
    let driver = vmm::select(&config.vmm, &mut scout).await?;
    let virtiofsd = share::find_virtiofsd(&config.share, &mut scout).await?;
    let share_socket = dir.join("fs.sock");
    let mut virtiofsd = Virtiofsd::spawn(&virtiofsd, config.share.cache, share.dir(), &share_socket, &[])?;
    let spec = VmSpec {
        cpus: config.guest.default_vcpus,
        memory_mib: config.guest.default_memory.as_mib(),
        kernel: config.guest.kernel.clone(),
        initramfs: config.guest.initramfs.clone(),
        cmdline: config.guest.cmdline_words(),
        share_socket,
        run_dir: dir.clone(),
        cgroups: Vec::new(),
        rung: config.vmm.rung,
        snapshot_dir: None,
        deadline: config.deadlines.boot.duration(),
    };
    let vm = driver.boot(&spec).await?;
    let spawned = began.elapsed();
    let (agent, _) = Agent::open(vm.channel().await?, config.deadlines.agent_call.duration()).await?;
    let agent_up = began.elapsed();
    agent.create_container(NAME, spec_json, Stdio::default()).await?;
    agent.start(NAME, "").await?;
    let started = began.elapsed();
    // `<dir>/8080.sock`, under the name the caller chose.
    let exposed = Exposed::open(&dir, &[Expose { guest_port: 8080, listen: None }], &agent).await?;
    std::fs::rename(dir.join("8080.sock"), socket)?;
    println!(
        "{}",
        serde_json::json!({
            "vmm_pid": vm.pid(),
            "spawn_ms": spawned.as_secs_f64() * 1e3,
            "agent_ms": agent_up.as_secs_f64() * 1e3,
            "started_ms": started.as_secs_f64() * 1e3,
        })
    );
    let mut end = Vec::new();
    tokio::io::stdin().read_to_end(&mut end).await?;
    drop(exposed);
    vm.kill().await;
    virtiofsd.kill().await;
    share.remove_container(NAME);
    drop(share);
    let _ = std::fs::remove_file(socket);
    std::fs::remove_dir(&dir)?;
    Ok(())
}

/// What `ctr` would ask for, in short.
fn spec(program: &[String]) -> serde_json::Value {
    let namespaces: Vec<_> =
        ["pid", "ipc", "uts", "mount", "network"].iter().map(|t| serde_json::json!({ "type": t })).collect();
    serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": program, "cwd": "/", "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
        ],
        "linux": { "namespaces": namespaces },
    })
}
