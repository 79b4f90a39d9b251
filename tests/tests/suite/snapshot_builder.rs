//! Those that build templates, beside pods and by hand: within which bounds, how many at once, and what is left of one that is
//! killed.

use std::{fs, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use chsnap_tests::{Env, Output, Process, Tools, eventually, kill, patience};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    faulty::release,
    snapshot::{BUILD, build, container, is_base, is_direct, list, own, way},
};

/// The builders of this containerd's shims.
pub fn builders(env: &Env) -> Vec<i32> {
    ending(env, "containerd-shim", "build-template")
}

/// Those who clear away after builders.
pub fn janitors(env: &Env) -> Vec<i32> {
    ending(env, "chsnap", "clear-template")
}

fn ending(env: &Env, name: &str, argument: &str) -> Vec<i32> {
    let all = env.processes(name).into_iter();
    all.filter(|process| process.args.ends_with(argument)).map(|process| process.pid).collect()
}

/// The machine of a template: it is where it cannot take much.
fn template(env: &Env) -> Option<Process> {
    templates(env).pop()
}

fn templates(env: &Env) -> Vec<Process> {
    let cgroups = |process: &Process| fs::read_to_string(format!("/proc/{}/cgroup", process.pid)).unwrap_or_default();
    let all = env.processes(env.vmm_name()).into_iter();
    all.filter(|process| cgroups(process).contains("/chsnap-builders/")).collect()
}

/// Waits until there is one.
pub fn template_runs(env: &Env) -> Result<Process> {
    eventually(Duration::from_secs(20) * patience(), || template(env)).context("the template's machine is not there")
}

/// Kills who builds, as soon as there is a machine, of which nothing may go on.
pub fn kill_builder(env: &Env) -> Result<()> {
    template_runs(env)?;
    kill(*builders(env).first().context("nobody builds")?, Signal::SIGKILL)?;
    // They end each by itself when they hear of it, the share a little after the machine.
    let left = || {
        let share = env.processes("virtiofsd").into_iter().find(|process| process.args.contains(".builders"));
        (builders(env), template(env).map(|process| process.pid), share.map(|process| process.pid))
    };
    let gone = eventually(Duration::from_secs(5), || (left() == (Vec::new(), None, None)).then_some(()));
    ensure!(gone.is_some(), "of (builders, machine, share) these outlive the builder: {:?}", left());
    Ok(())
}

/// Waits until nobody builds any more.
pub fn finished(env: &Env) -> Result<()> {
    eventually(BUILD * patience(), || builders(env).is_empty().then_some(())).context("the builder does not end")
}

pub fn built_beside(env: &Env) -> Result<()> {
    let settings = release(1, own(env).set("snapshot", "builders", "1"), env)?;
    let first = container(env, &settings).sh("sleep 1000").start()?;
    is_direct(env, &first, "there is no base snapshot yet")?;
    let builder = eventually(Duration::from_secs(5), || builders(env).first().copied()).context("nobody builds")?;
    let stat = fs::read_to_string(format!("/proc/{builder}/stat"))?;
    let nice = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(16)).map(str::to_owned);
    ensure!(nice.as_deref() == Some("10"), "{nice:?}");
    // Its machine is where it cannot take much, and sees no network.
    let vmm = template_runs(env)?;
    for names in [["cpu.max", "cpu.cfs_quota_us"], ["memory.max", "memory.limit_in_bytes"]] {
        let bounds = env.daemon.bounds_of_builders(names);
        let bound =
            |text: &String| text.split_whitespace().next()?.parse::<u64>().ok().filter(|value| *value < 4 << 30);
        ensure!(bounds.len() == 1 && bounds.iter().all(|text| bound(text).is_some()), "{names:?}: {bounds:?}");
    }
    let net = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net"));
    ensure!(net(vmm.pid)? != net(std::process::id() as i32)?, "the template sees the host's network");
    // It has mounts of its own: the pod's end with the pod. And it goes on without the shim that began it.
    first.remove()?;
    finished(env)?;
    let all = list(env, &settings)?;
    ensure!(all.len() == 1 && all[0]["manifest"]["inputs"]["kind"] == "base", "{all:?}");
    let second = container(env, &settings).sh("sleep 1000").start()?;
    is_base(env, &second)?;
    ensure!(builders(env).is_empty(), "another one is being built");
    let doctor: Value = serde_json::from_str(&env.chsnap_with(&settings, ["doctor", "--json"])?.output()?.text())?;
    ensure!(doctor["ladder"]["rung"] == "standard", "{}", doctor["ladder"]);
    second.remove()?;
    // After an upgrade of the VMM the old one is not used, and a new one is built without anybody's doing.
    let settings = release(2, settings, env)?;
    let third = container(env, &settings).sh("sleep 1000").start()?;
    is_direct(env, &third, "there is no base snapshot yet")?;
    third.remove()?;
    finished(env)?;
    let fourth = container(env, &settings).sh("sleep 1000").start()?;
    is_base(env, &fourth)?;
    fourth.remove()?;
    ensure!(list(env, &settings)?.len() == 2);
    // So it is with another kernel or initramfs.
    let spare = env.dir.join("initramfs");
    let mut text = fs::read(&Tools::get().initramfs)?;
    text.extend([0; 512]);
    fs::write(&spare, text)?;
    let settings = settings.set("snapshot", "builders", "0").path("guest", "initramfs", &spare);
    let other = container(env, &settings).sh("sleep 1000").start()?;
    is_direct(env, &other, "[snapshot] builders = 0")?;
    other.remove()
}

/// A builder that is killed, or given up, leaves nothing.
pub fn builder_killed(env: &Env) -> Result<()> {
    let settings = own(env).set("snapshot", "builders", "1");
    let builders_dir = env.daemon.pods().join(".builders");
    let pod = container(env, &settings).sh("sleep 1000").start()?;
    kill_builder(env)?;
    let is_left = |entry: &fs::DirEntry| entry.file_name() != "ladder.json";
    let left = || Ok::<_, anyhow::Error>(fs::read_dir(env.dir.join("snapshots"))?.flatten().filter(is_left).count());
    let gone = eventually(Duration::from_secs(5), || left().is_ok_and(|left| left == 0).then_some(()));
    ensure!(gone.is_some() && !builders_dir.exists(), "its remains are still there");
    // One that a person has begun and gives up takes down what it has begun itself.
    let by_hand = build(env, &settings)?.start()?;
    template_runs(env)?;
    kill(i32::try_from(by_hand.child.id())?, Signal::SIGTERM)?;
    let given_up = by_hand.output()?;
    ensure!(given_up.code != 0 && given_up.stderr.contains("interrupted by SIGTERM"), "{}", given_up.whole());
    ensure!(left()? == 0 && !builders_dir.exists(), "its remains are still there");
    pod.remove()?;
    // After one that is killed, somebody else does, who is there for nothing but that.
    let by_hand = build(env, &settings)?.start()?;
    template_runs(env)?;
    drop(by_hand);
    let cleared = || (left().ok() == Some(0) && !builders_dir.exists() && janitors(env).is_empty()).then_some(());
    eventually(Duration::from_secs(5), cleared).context("what was killed is not cleared away after")?;
    // And where they are killed, too, the next pod that starts.
    let by_hand = build(env, &settings)?.start()?;
    template_runs(env)?;
    janitors(env).into_iter().try_for_each(|janitor| kill(janitor, Signal::SIGKILL))?;
    drop(by_hand);
    ensure!(left()? == 1 && builders_dir.join("0").exists(), "it cleared away itself, killed");
    let next = container(env, &settings.clone().set("snapshot", "builders", "0")).sh("sleep 1000").start()?;
    eventually(Duration::from_secs(5), cleared).context("its remains are still there")?;
    next.remove()?;
    build(env, &settings)?.text()?;
    ensure!(list(env, &settings)?.len() == 1);
    ensure!(left()? == 1, "there is something beside it");
    Ok(())
}

/// Of pods that start together, one has the template built.
pub fn one_at_a_time(env: &Env) -> Result<()> {
    let settings = own(env).set("snapshot", "builders", "2");
    let one = container(env, &settings).sh("sleep 1000").start()?;
    // A builder that has only begun may come second.
    template_runs(env)?;
    let by_hand: Output = build(env, &settings)?.output()?;
    if by_hand.code == 0 {
        bail!("built twice: {}", by_hand.whole());
    }
    ensure!(by_hand.stderr.contains("is being built by another process"), "{}", by_hand.whole());
    let other = container(env, &settings).sh("sleep 1000").start()?;
    let _ = way(env, &other)?;
    finished(env)?;
    ensure!(list(env, &settings)?.len() == 1);
    one.remove()?;
    other.remove()
}

/// Of pods of two kinds that start together, one has its template built at a time, where no more are allowed.
pub fn no_more_than_allowed(env: &Env) -> Result<()> {
    let settings = own(env).set("snapshot", "builders", "1");
    let one = container(env, &settings).sh("sleep 1000").start()?;
    template_runs(env)?;
    let busy = || env.daemon.log_tail(2000).matches("1 of them are being built on this host already").count();
    let before = busy();
    let other = container(env, &settings).annotation("io.chsnap.memory", "320MiB").sh("sleep 1000").start()?;
    let most = eventually(BUILD, || {
        let at_once = templates(env);
        (at_once.len() > 1 || builders(env).is_empty()).then_some(at_once.len())
    });
    ensure!(most.is_some_and(|most| most <= 1), "{most:?} templates at once");
    ensure!(busy() > before || list(env, &settings)?.len() == 2, "{}", env.daemon.log_tail(30));
    one.remove()?;
    other.remove()
}
