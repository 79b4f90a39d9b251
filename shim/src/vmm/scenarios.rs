//! What every driver has to do with a real guest.

use std::time::Duration;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::time::{sleep, timeout};

use super::{
    BootError, Driver, Rung, VmSpec, VmmKind,
    testing::{BOOT, Bench, end, is_gone, is_said_to_have, shows},
};
use crate::agent::Agent;

/// A guest that powers off is seen to have wanted that; it saw the share; nothing is left.
pub async fn powers_off(driver: &dyn Driver) {
    let script = "mount -t virtiofs chsnap /mnt; cat /mnt/hello; poweroff -f";
    let Some(bench) = Bench::new(script).await else { return };
    let vm = driver.boot(&bench.spec).await.unwrap();
    let exit = end(&*vm).await;
    assert!(exit.by_guest, "{exit:?}");
    assert_eq!(exit.status, "exit status: 0");
    assert!(exit.console.contains("from the host"), "{}", exit.console);
    assert!(is_gone(vm.pid()));
}

/// The agent answers on the channel, and once more when the first session is over.
pub async fn meets_the_agent(driver: &dyn Driver) {
    let Some(bench) = Bench::with_agent().await else { return };
    let vm = driver.boot(&bench.spec).await.unwrap();
    for number in [1, 2] {
        let session = async {
            let mut channel = vm.channel().await.unwrap();
            chsnap_protocol::session::open(&mut channel, number).await.unwrap();
        };
        timeout(*BOOT, session).await.unwrap_or_else(|_| panic!("no session {number}; console: {}", vm.console()));
    }
    // What the log has of a guest that is silent; this one has just answered.
    let queues = vm.queues().await;
    let told =
        queues.split("; ").filter(|queue| queue.starts_with("virtio-serial ") && queue.contains(" taken ")).count();
    assert!(driver.kind() != VmmKind::Qemu || told >= 4, "of two ports: {queues:?}");
    vm.kill().await;
}

/// No request is lost that comes right after an answer, when the guest is told of both: that the answer was taken, and that
/// there is a request.
pub async fn is_never_silent(driver: &dyn Driver) {
    const REQUESTS: usize = 20_000;
    // Nobody asks whether the agent is there: that would wake it.
    let (never, silence) = (Duration::from_secs(3600), Duration::from_secs(20));
    let Some(bench) = Bench::with_agent().await else { return };
    let vm = driver.boot(&bench.spec).await.unwrap();
    let channel = vm.channel().await.unwrap();
    let (agent, _) = timeout(*BOOT, Agent::open(channel, never)).await.unwrap().unwrap();
    for number in 0..REQUESTS {
        let asked = timeout(silence, agent.pids("none")).await;
        let answer = asked.unwrap_or_else(|_| panic!("request {number} was lost"));
        assert!(answer.unwrap_err().is_not_found());
    }
    vm.kill().await;
}

/// A machine goes on from its snapshot, in two machines at once, each with a share and a channel of its own.
pub async fn is_restored(driver: &dyn Driver) {
    restores(driver, Rung::Standard).await;
}

/// A machine without what a rung masks goes on without it: a restore needs the mask of the boot.
#[cfg(target_arch = "aarch64")]
pub async fn is_restored_masked(driver: &dyn Driver) {
    restores(driver, Rung::NoPmu).await;
    restores(driver, Rung::Aggressive).await;
}

async fn restores(driver: &dyn Driver, rung: Rung) {
    // What is on the console tells a machine that went on from one that began again, and, by the kernel's names, whether it has
    // performance counters and SVE.
    let script = "mount -t virtiofs chsnap /mnt; echo BEGIN; n=0\n\
        while :; do n=$((n+1)); echo \"tick $n of $(cat /mnt/hello)\"\n\
        echo \"has $(ls /sys/bus/event_source/devices | grep -o ^armv8_pmu | uniq) $(grep -o -w -m1 sve /proc/cpuinfo | uniq) only\"\n\
        sleep 0.2; done";
    let Some(mut bench) = Bench::new(script).await else { return };
    bench.spec.rung = rung;
    bench.spec.snapshot_dir = Some(bench.snapshot_dir().to_owned());
    let vm = driver.boot(&bench.spec).await.unwrap();
    shows(&*vm, "tick 3 of from the host").await;
    has_what_the_rung_leaves(&vm.console(), rung);
    vm.snapshot(bench.snapshot_dir()).await.unwrap();
    let last = ticks(&vm.console());
    vm.kill().await;

    let mut clones = Vec::new();
    for name in ["one", "another"] {
        let mut clone = Bench::new("").await.unwrap();
        clone.spec.rung = rung;
        clone.says(name);
        let vm = driver.restore(&clone.spec, bench.snapshot_dir()).await.unwrap();
        clones.push((name, clone, vm));
    }
    for (name, clone, vm) in &clones {
        // A file's content may have been kept in the guest's memory; it is read from the host again when it changed.
        shows(&**vm, &format!("tick {} of ", last + 3)).await;
        let console = vm.console();
        assert!(!console.contains("BEGIN") && !console.contains("tick 1 "), "{name}: {console}");
        has_what_the_rung_leaves(&console, rung);
        vm.kill().await;
        assert!(is_gone(vm.pid()));
        assert!(!clone.spec.run_dir.join("restore").exists());
    }
}

/// Nothing that the rung masks, and the rest of what the host is said to have.
fn has_what_the_rung_leaves(console: &str, rung: Rung) {
    let line = console.lines().rfind(|line| line.starts_with("has ") && line.ends_with(" only"));
    let words: Vec<_> = line.unwrap_or_else(|| panic!("{console}")).split(' ').collect();
    for (name, word, masked) in [("pmu", "armv8_pmu", rung.without_pmu()), ("sve", "sve", rung.without_sve())] {
        let has = words.contains(&word);
        assert!(if masked { !has } else { has || !is_said_to_have(name) }, "{name} on {rung}: {console}");
    }
}

/// The highest number on the console.
fn ticks(console: &str) -> u32 {
    let numbers = console.lines().filter_map(|line| line.split("tick ").nth(1)?.split(' ').next()?.parse().ok());
    numbers.max().unwrap_or_default()
}

/// A panic and a reboot both end the machine, which does not start again, and the panic's text is kept.
pub async fn panics_and_reboots(driver: &dyn Driver) {
    let Some(bench) = Bench::new("echo BEGIN; exit 7").await else { return };
    let vm = driver.boot(&bench.spec).await.unwrap();
    let exit = end(&*vm).await;
    assert!(exit.by_guest, "{exit:?}");
    assert!(exit.console.contains("Attempted to kill init! exitcode=0x00000700"), "{}", exit.console);

    let Some(bench) = Bench::new("echo BEGIN; reboot -f").await else { return };
    let vm = driver.boot(&bench.spec).await.unwrap();
    let exit = end(&*vm).await;
    assert!(exit.by_guest, "{exit:?}");
    assert_eq!(exit.console.matches("BEGIN").count(), 1, "{}", exit.console);
}

/// The console of a guest that never stops writing takes no more memory.
pub async fn babbles(driver: &dyn Driver) {
    let Some(bench) = Bench::new("while :; do cat /bin/busybox; done").await else { return };
    let vm = driver.boot(&bench.spec).await.unwrap();
    shows(&*vm, "ELF").await;
    sleep(Duration::from_secs(2)).await;
    // A byte that is no text becomes a replacement character of three.
    assert!(vm.console().len() <= 3 * (32 << 10), "{}", vm.console().len());
    vm.kill().await;
    assert!(!vm.exited().borrow().as_ref().unwrap().by_guest);
    assert!(is_gone(vm.pid()));
}

/// A VMM that somebody kills is noticed, and is not the guest's doing. A machine that is dropped is gone.
pub async fn is_killed(driver: &dyn Driver) {
    let Some(bench) = Bench::new("sleep 1000").await else { return };
    let vm = driver.boot(&bench.spec).await.unwrap();
    kill(Pid::from_raw(i32::try_from(vm.pid()).unwrap()), Signal::SIGKILL).unwrap();
    let exit = end(&*vm).await;
    assert_eq!((exit.status.as_str(), exit.by_guest), ("signal: 9 (SIGKILL)", false));

    let Some(bench) = Bench::new("sleep 1000").await else { return };
    let vm = driver.boot(&bench.spec).await.unwrap();
    let (pid, mut exited) = (vm.pid(), vm.exited());
    drop(vm);
    timeout(*BOOT, exited.wait_for(Option::is_some)).await.unwrap().unwrap();
    assert!(is_gone(pid));
}

/// What of a machine is spoilt, a part of the error for it, and the error's end.
pub type Spoilt = (fn(&mut VmSpec), &'static str, &'static str);

/// A machine that cannot start is an error that says why and what to do, and leaves nothing.
pub async fn cannot_start(driver: &dyn Driver, cases: &[Spoilt]) {
    for (spoil, what, advice) in cases {
        // Each with a virtiofsd of its own, which serves one connection and ends.
        let Some(mut bench) = Bench::new("").await else { return };
        spoil(&mut bench.spec);
        let error = driver.boot(&bench.spec).await.err().unwrap();
        let text = chain(&error);
        assert!(text.contains(what) && text.ends_with(advice), "{text}");
    }
}

pub fn chain(error: &BootError) -> String {
    let sources = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
