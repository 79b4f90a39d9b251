//! The floor for the benchmark: the same guest started by hand, with neither containerd nor the shim's service.
//!
//! `bare CONFIG ROOTFS SOCKET PROGRAM [ARG...]` serves ROOTFS with virtiofsd, boots the configured VMM, starts PROGRAM
//! through the agent, forwards the UNIX socket SOCKET to port 8080, prints what each step took as one line of JSON, and
//! ends when its stdin does. `bare --restore SNAPSHOT CONFIG ROOTFS SOCKET` restores the image snapshot in that directory
//! instead, over ROOTFS.

use std::{env, error::Error, path::PathBuf, time::Instant};

use chsnap::{
    agent::{Agent, Fresh},
    config::{CacheMode, Config, Expose},
    program::{Freshness, Scout},
    sandbox::{Division, Exposed, Plan},
    share::{self, Content, Overlay, RootMount, Share, Virtiofsd},
    snapshot::ROOT,
    vmm::{self, VmSpec},
};
use chsnap_protocol::{
    FIRST_HOME,
    agent::{AdoptRequest, Stdio},
};
use tokio::io::AsyncReadExt;

const NAME: &str = "bare";

fn main() -> Result<(), Box<dyn Error>> {
    let began = Instant::now();
    share::enter_private_mounts()?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(began))
}

async fn run(began: Instant) -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let (snapshot, args) = match &args[..] {
        [flag, snapshot, rest @ ..] if flag == "--restore" => (Some(PathBuf::from(snapshot)), rest),
        all => (None, all),
    };
    let [config, rootfs, socket, program @ ..] = args else {
        return Err("usage: bare [--restore SNAPSHOT] CONFIG ROOTFS SOCKET [PROGRAM [ARG...]]".into());
    };
    let config = Config::load(Some(config.as_ref()))?;
    let dir = PathBuf::from(socket).with_extension("d");
    let share = Share::create(&dir)?;
    let plan = Plan::of(NAME, serde_json::from_value(spec(program))?)?;
    let root = match &snapshot {
        None => RootMount { fstype: "bind".into(), source: rootfs.clone(), options: vec!["rbind".into()] },
        Some(snapshot) => {
            let (upper, work) = (dir.join("upper"), dir.join("work"));
            std::fs::create_dir(&upper)?;
            std::fs::create_dir(&work)?;
            Overlay::mount(&[snapshot.join(ROOT), rootfs.into()], &upper, &work)
        }
    };
    let assembly = share.assemble(NAME, FIRST_HOME, &[root])?;
    let division = plan.divide(FIRST_HOME, |place, hidden| assembly.resolve(place, hidden))?;
    let spec_json = plan.spec_json(&division)?;
    let Division { binds, staged, mountpoints, .. } = &division;
    assembly.publish(&Content { binds, staged, mountpoints, readonly: false })?;
    let mut scout = Scout::new(&config, Freshness::Remembered);
    let driver = vmm::select(&config.vmm, &mut scout).await?;
    let virtiofsd = share::find_virtiofsd(&config.share, &mut scout).await?;
    let share_socket = dir.join("fs.sock");
    // As the shim has it for a container that is alone with its root.
    let cache = if config.share.cache == CacheMode::Auto { CacheMode::Always } else { config.share.cache };
    let mut virtiofsd = Virtiofsd::spawn(&virtiofsd, cache, share.dir(), &share_socket, &[])?;
    let spec = VmSpec {
        cpus: config.guest.default_vcpus,
        memory_mib: config.guest.default_memory.as_mib(),
        kernel: config.guest.kernel.clone(),
        initramfs: config.guest.initramfs.clone(),
        cmdline: config.guest.cmdline_words(),
        share_socket,
        run_dir: dir.clone(),
        cgroups: Vec::new(),
        network: None,
        rung: config.vmm.rung,
        snapshot_dir: None,
        deadline: config.deadlines.boot.duration(),
    };
    let vm = match &snapshot {
        None => driver.boot(&spec).await?,
        Some(snapshot) => driver.restore(&spec, snapshot).await?,
    };
    let spawned = began.elapsed();
    let (agent, _) = Agent::open(vm.channel().await?, config.deadlines.agent_call.duration()).await?;
    let agent_up = began.elapsed();
    if snapshot.is_some() {
        agent.resume(Fresh::new()?, false).await?;
        let (from, container_id) = ("template".into(), NAME.into());
        let adoption = AdoptRequest { from, container_id, hostname: NAME.into(), ..Default::default() };
        agent.adopt(adoption, config.deadlines.hooks.duration()).await?;
    } else {
        agent.set_clock().await?;
        agent.create_container(NAME, spec_json, Stdio::default()).await?;
    }
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
    share.remove_container(FIRST_HOME);
    drop(share);
    let _ = std::fs::remove_file(socket);
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

/// What `ctr` would ask for, in short.
fn spec(program: &[String]) -> serde_json::Value {
    let namespaces: Vec<_> =
        ["pid", "ipc", "uts", "mount", "network"].iter().map(|t| serde_json::json!({ "type": t })).collect();
    serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "args": if program.is_empty() { vec!["none".to_owned()] } else { program.to_vec() }, "cwd": "/", "user": {"uid": 0, "gid": 0},
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
