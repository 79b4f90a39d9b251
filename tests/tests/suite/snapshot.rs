//! Pods that are restored from a base snapshot, and how such a snapshot comes into being.

use std::{
    fs,
    io::{Read, Write},
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Container, Env, Run, Settings, Started, eventually, http, patience};
use serde_json::Value;

use crate::{
    faulty::Faulty,
    share::Tmpfs,
    snapshot_builder::{builder_killed, builders, built_beside, finished, no_more_than_allowed, one_at_a_time},
    snapshot_ladder::{
        ladder_restore, ladder_restore_aggressive, ladder_restore_no_pmu, ladder_save, ladder_save_aggressive,
        ladder_save_no_pmu, ladder_spent,
    },
};

crate::cases! {
    Vms: restored;
    Once: clones, built_beside, off_and_required, not_restored, spoilt, ladder_restore, ladder_restore_no_pmu,
          ladder_restore_aggressive, ladder_save, ladder_save_no_pmu, ladder_save_aggressive, ladder_spent, builder_killed, one_at_a_time,
          no_more_than_allowed, store_full;
}

/// A template boots, is saved, restored, and its digests are taken.
pub const BUILD: Duration = Duration::from_secs(180);

/// Snapshots of the case's own, and pods that use them.
pub fn own(env: &Env) -> Settings {
    env.settings().set("snapshot", "mode", "\"auto\"").path("snapshot", "dir", env.dir.join("snapshots"))
}

pub fn build(env: &Env, settings: &Settings) -> Result<Run> {
    Ok(env.chsnap_with(settings, ["snapshot", "build", "--base"])?.limit(BUILD * patience()))
}

pub fn list(env: &Env, settings: &Settings) -> Result<Vec<Value>> {
    let text = env.chsnap_with(settings, ["snapshot", "ls", "--json"])?.text()?;
    Ok(serde_json::from_str(&text)?)
}

pub fn container<'a>(env: &'a Env, settings: &Settings) -> Container<'a> {
    let settings = settings.clone();
    env.container().settings(|_| settings)
}

/// How a pod was started and why not in a better way, as `chsnap ps` tells it.
pub fn way(env: &Env, started: &Started<'_>) -> Result<(String, String)> {
    let pods: Vec<Value> = serde_json::from_str(&env.chsnap(["ps", "--json"])?.text()?)?;
    let pod = pods.iter().find(|pod| pod["id"] == started.id.as_str()).context("chsnap ps does not show the pod")?;
    let text = |key: &str| pod[key].as_str().unwrap_or_default().to_owned();
    let (way, why_not) = (text("way"), text("why_not"));
    let table = env.chsnap(["ps"])?.text()?;
    let shown = if why_not.is_empty() { format!("  {way}  ") } else { format!("{way} ({why_not})") };
    ensure!(table.contains(&shown), "{table}");
    let metrics = env.chsnap(["ps", "--metrics"])?.text()?;
    let line = metrics.lines().find(|line| line.contains("start_info{") && line.contains(&started.id));
    let line = line.with_context(|| metrics.clone())?;
    let label = why_not.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let end = format!("way=\"{way}\",why_not=\"{label}\"}} 1");
    ensure!(line.ends_with(&end), "{line} does not end with {end}");
    Ok((way, why_not))
}

pub fn is_base(env: &Env, started: &Started<'_>) -> Result<()> {
    let (way, why_not) = way(env, started)?;
    ensure!(way == "base", "{way}: {why_not}");
    Ok(())
}

pub fn is_direct(env: &Env, started: &Started<'_>, because: &str) -> Result<()> {
    let (way, why_not) = way(env, started)?;
    ensure!(way == "direct" && why_not.contains(because), "{way}: {why_not}, and not because of {because:?}");
    Ok(())
}

/// Everything works on one as on one that booted.
fn restored(env: &Env) -> Result<()> {
    let settings = own(env);
    let key = build(env, &settings)?.text()?;
    ensure!(build(env, &settings)?.text()? == format!("{key} was there already"));
    let started = container(env, &settings).annotation("io.chsnap.expose", "8080").python(CLOCK).start()?;
    started.wait_log("up")?;
    is_base(env, &started)?;
    let state: Value = serde_json::from_slice(&fs::read(started.pod_dir().join("state.json"))?)?;
    let phases = state["phases_us"].as_array().context("no phases")?;
    let names: Vec<&str> = phases.iter().filter_map(|phase| phase[0].as_str()).collect();
    ensure!(["restore", "resume"].iter().all(|name| names.contains(name)) && !names.contains(&"kernel"), "{names:?}");
    // Within 50 ms, and what it takes to be asked: one byte there and a few back.
    let mut stream = http::unix(&started.pod_dir().join("8080.sock"))?;
    let before = now();
    stream.write_all(b"?")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    let (guest, after): (f64, f64) = (said.parse()?, now());
    ensure!(before - 0.05 <= guest && guest <= after + 0.05, "the guest's clock: {before} <= {guest} <= {after}");
    ensure!(started.sh("cat /dev/chsnap/epoch")?.len() == 36);
    ensure!(started.exec(["sh", "-c", "exit 7"]).output()?.code == 7);
    ensure!(started.exec(["cat"]).stdin("through\n").text()? == "through");
    started.sh("echo kept > /file; cat /file")?;
    started.remove()?;
    let output = container(env, &settings).sh("read word; echo \"got $word\"; exit 5").run()?.stdin("it\n").output()?;
    ensure!(output.code == 5 && output.text() == "got it\n", "{}", output.whole());
    // With a size of its own, there is none.
    let other = container(env, &settings).annotation("io.chsnap.memory", "320MiB").sh("sleep 1000").start()?;
    is_direct(env, &other, "there is no base snapshot")?;
    other.remove()
}

/// Tells the time to whoever asks.
const CLOCK: &str = "import socket, time
server = socket.create_server(('127.0.0.1', 8080))
print('up', flush=True)
while True:
    with server.accept()[0] as asked:
        asked.recv(1)
        asked.sendall(repr(time.time()).encode())
";

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// What two of the same snapshot may not share.
const SELF: &str = "import os, uuid; print(open('/proc/sys/kernel/random/uuid').read().strip(), \
    open('/proc/sys/kernel/random/boot_id').read().strip(), open('/dev/chsnap/epoch').read().strip(), \
    os.urandom(16).hex(), uuid.uuid4(), flush=True)";

fn clones(env: &Env) -> Result<()> {
    let settings = own(env);
    build(env, &settings)?.text()?;
    let program = format!("{SELF}; import time; time.sleep(1000)");
    // One after the other they would differ by what the guest has seen; at the same time they are sure to be alike.
    let make = || container(env, &settings).python(&program);
    let (one, other) = (make(), make());
    let started = thread::scope(|scope| {
        let threads = [one, other].map(|clone| scope.spawn(move || clone.start()));
        threads.map(|thread| thread.join().map_err(|_| anyhow::anyhow!("panicked")))
    });
    let mut said = Vec::new();
    let mut clones = Vec::new();
    for clone in started {
        let clone = clone??;
        clone.wait_log("\n")?;
        is_base(env, &clone)?;
        said.push(clone.log().split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        clones.push(clone);
    }
    ensure!(said.iter().all(|words| words.len() == 5), "{said:?}");
    let alike: Vec<_> = said[0].iter().zip(&said[1]).filter(|(one, other)| one == other).collect();
    ensure!(alike.is_empty(), "both have {alike:?}: {said:?}");
    // Each keeps what it is.
    let boot_id = clones[0].sh("cat /proc/sys/kernel/random/boot_id")?;
    ensure!(boot_id == said[0][1], "{boot_id} {said:?}");
    clones.into_iter().try_for_each(Started::remove)
}

fn off_and_required(env: &Env) -> Result<()> {
    let settings = own(env);
    let require = |settings: &Settings| container(env, settings).annotation("io.chsnap.snapshot", "require");
    let refused = require(&settings).command(["true"]).output()?;
    let text = "io.chsnap.snapshot = \"require\", but no snapshot could be used: there is no base snapshot";
    ensure!(refused.code != 0 && refused.stderr.contains(text), "{}", refused.whole());
    // Nor is one built beside a pod that wants none.
    let would = settings.clone().set("snapshot", "builders", "1");
    for (settings, mode) in [(would.clone().set("snapshot", "mode", "\"off\""), "auto"), (would, "off")] {
        let pod = container(env, &settings);
        let pod = if mode == "off" { pod.annotation("io.chsnap.snapshot", mode) } else { pod };
        let pod = pod.sh("sleep 1000").start()?;
        let built = eventually(Duration::from_secs(2), || (!builders(env).is_empty()).then_some(()));
        ensure!(built.is_none() && list(env, &settings)?.is_empty(), "one is built: {:?}", list(env, &settings)?);
        pod.remove()?;
    }
    build(env, &settings)?.text()?;
    // Although the configuration has them off.
    let off = settings.clone().set("snapshot", "mode", "\"off\"");
    let started = require(&off).sh("sleep 1000").start()?;
    is_base(env, &started)?;
    started.remove()?;
    let started = container(env, &off).sh("sleep 1000").start()?;
    is_direct(env, &started, "[snapshot] mode = \"off\"")?;
    started.remove()?;
    let started = container(env, &settings).annotation("io.chsnap.snapshot", "off").sh("sleep 1000").start()?;
    is_direct(env, &started, "io.chsnap.snapshot = \"off\"")?;
    started.remove()
}

/// A restore that fails, or takes too long, is followed by a boot in the same request.
fn not_restored(env: &Env) -> Result<()> {
    let (broken, slow) = (env.dir.join("broken"), env.dir.join("slow"));
    let faulty = Faulty { hangs: Some(&slow), ..Faulty::restores_nothing_while(&broken) };
    let seconds = 5 * patience();
    let late_after = format!("within {seconds} s");
    let settings = faulty.set(own(env), env, "faulty")?.set("deadlines", "restore", seconds.to_string());
    build(env, &settings)?.text()?;
    let works = container(env, &settings).sh("sleep 1000").start()?;
    is_base(env, &works)?;
    works.remove()?;
    fs::write(&broken, "")?;
    let fails = container(env, &settings).sh("sleep 1000").start()?;
    is_direct(env, &fails, "os error 22")?;
    ensure!(env.daemon.log_tail(200).contains("os error 22"), "not in the log");
    ensure!(fails.sh("echo works")? == "works");
    fails.remove()?;
    fs::write(&slow, "")?;
    let late = container(env, &settings).sh("sleep 1000").start()?;
    is_direct(env, &late, &late_after)?;
    late.remove()?;
    let required = container(env, &settings).annotation("io.chsnap.snapshot", "require").command(["true"]).output()?;
    ensure!(required.code != 0 && required.stderr.contains(&late_after), "{}", required.whole());
    Ok(())
}

/// What was saved and is not what it was any more is not restored; who finds that has it built anew.
fn spoilt(env: &Env) -> Result<()> {
    let settings = own(env).set("snapshot", "builders", "1");
    let key = build(env, &settings)?.text()?;
    let machine = fs::read_dir(env.dir.join("snapshots").join(&key))?.flatten().map(|entry| entry.path());
    let machine = machine.max_by_key(|path| fs::metadata(path).map_or(0, |meta| meta.len())).context("no files")?;
    let file = fs::OpenOptions::new().write(true).open(&machine)?;
    std::os::unix::fs::FileExt::write_all_at(&file, b"spoilt", 1 << 20)?;
    let verified = env.chsnap_with(&settings, ["snapshot", "verify", &key])?.output()?;
    ensure!(verified.code != 0 && verified.stderr.contains("has changed"), "{}", verified.whole());
    let required = container(env, &settings).annotation("io.chsnap.snapshot", "require").command(["true"]).output()?;
    ensure!(required.code != 0 && required.stderr.contains("has changed"), "{}", required.whole());
    ensure!(builders(env).is_empty(), "one is built for who did not start");
    let started = container(env, &settings).sh("sleep 1000").start()?;
    is_direct(env, &started, "has changed")?;
    finished(env)?;
    started.remove()?;
    env.chsnap_with(&settings, ["snapshot", "verify", &key])?.text()?;
    let started = container(env, &settings).sh("sleep 1000").start()?;
    is_base(env, &started)?;
    started.remove()
}

/// A snapshot for which there is no room is said to lack that, leaves nothing, and is held against no rung; pods boot.
fn store_full(env: &Env) -> Result<()> {
    let small = Tmpfs::mount(env, "small", "16m")?;
    let dir = small.path.join("snapshots");
    let settings = own(env).path("snapshot", "dir", &dir).set("snapshot", "builders", "1");
    let left = || Ok::<_, anyhow::Error>(fs::read_dir(&dir)?.flatten().map(|e| e.file_name()).collect::<Vec<_>>());
    let refused = build(env, &settings)?.output()?;
    ensure!(refused.code != 0 && refused.stderr.contains("No space left on device"), "{}", refused.whole());
    ensure!(left()?.is_empty(), "{:?} is left", left()?);
    let pod = container(env, &settings).sh("sleep 1000").start()?;
    is_direct(env, &pod, "there is no base snapshot yet")?;
    finished(env)?;
    ensure!(env.daemon.log_tail(200).contains("No space left on device"), "not in the log");
    ensure!(left()?.iter().all(|name| name == "ladder.json"), "{:?} is left", left()?);
    pod.remove()?;
    let doctor: Value = serde_json::from_str(&env.chsnap_with(&settings, ["doctor", "--json"])?.output()?.text())?;
    ensure!(doctor["ladder"]["rung"].is_null(), "{}", doctor["ladder"]);
    Ok(())
}
