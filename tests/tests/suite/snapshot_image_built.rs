//! How image snapshots come to be, and why some do not.

use std::{fs, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Env, Run, Running, Settings, Started, eventually, kill, patience};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{
    events,
    faulty::{Faulty, NOT_RESTORED},
    snapshot::{BUILD, build, container, list, way},
    snapshot_builder::{finished, janitors, kill_builder, template_runs},
    snapshot_image::{imaged, is, kinds},
};

/// Why there is no snapshot is told, and pods start all the same.
pub fn not_ready(env: &Env) -> Result<()> {
    let settings = imaged(env).set("snapshot", "root_limit", "\"256KiB\"");
    let ready = "file:///ready";
    for (script, seconds, why) in [
        ("exit 3", 60, "the process ended with status 3 before it was ready"),
        ("sleep 1000", 3, "ms: /ready: No such file or directory"),
        ("exec 3> /gone; rm /gone; : > /ready; while :; do sleep 0.1; done", 60, "open, which was removed"),
        ("yes; : > /ready; sleep 1000", 5, "having written more to its output than is kept"),
        (
            "head -c 1M /dev/zero > /big; : > /ready; while :; do sleep 0.1; done",
            60,
            "bytes to its root file system, and [snapshot] root_limit is 262144",
        ),
    ] {
        let settings = settings.clone().set("deadlines", "ready", (seconds * patience()).to_string());
        let make = || container(env, &settings).sh(script).annotation("io.chsnap.ready", ready);
        let first = make().start()?;
        finished(env)?;
        first.remove()?;
        let second = make().start()?;
        is(env, &second, "base", why)?;
        ensure!(kinds(env, &settings)? == ["base"]);
        second.remove()?;
    }
    // A machine that ends while it is waited for is told of, and not its agent's silence.
    let pod = container(env, &settings).sh("sleep 1001").annotation("io.chsnap.ready", ready).start()?;
    // Only what comes after its name: earlier ones waited, too.
    let since =
        || env.daemon.log_tail(60).rsplit_once("sleep 1001").map(|(_, after)| after.to_owned()).unwrap_or_default();
    let waits = || since().contains("waiting for its process to be ready").then_some(());
    eventually(Duration::from_secs(60), waits).context("no template waits")?;
    kill(template_runs(env)?.pid, Signal::SIGKILL)?;
    finished(env)?;
    let told = "the template's VM is gone: the VMM ended (signal: 9 (SIGKILL))";
    eventually(Duration::from_secs(5), || since().contains(told).then_some(())).with_context(since)?;
    pod.remove()
}

/// A build by hand of an image that this containerd has.
fn build_of(env: &Env, settings: &Settings, image: &str) -> Result<Run> {
    let run = env.chsnap_with(settings, ["snapshot", "build", image])?.limit(BUILD * patience());
    Ok(run.arg("--address").arg(env.daemon.run.join("c.sock")).args(["--namespace", &env.daemon.namespace]))
}

/// Before the first pod there is what it is restored from, made of the image's name alone.
pub fn built_ahead(env: &Env) -> Result<()> {
    let broken = env.dir.join("broken");
    let faulty = Faulty::restores_nothing_while(&broken);
    let settings = faulty.set(imaged(env).set("snapshot", "builders", "0"), env, "ahead")?;
    let script = "echo up; : > /ready; while :; do sleep 0.1; done";
    let build = |reference: &str, streams: &[&str]| -> Result<Run> {
        let run = build_of(env, &settings, reference)?.args(["--ready", "file:///ready"]);
        Ok(run.args(streams).args(["--", "/bin/sh", "-c", script]))
    };
    let missing = build("localhost/no/such:1", &[])?.output()?;
    ensure!(missing.code != 0 && missing.stderr.contains("localhost/no/such:1"), "{}", missing.whole());
    let key = build(chsnap_tests::IMAGE, &[])?.text()?;
    ensure!(build(chsnap_tests::IMAGE, &[])?.text()? == format!("{key} was there already"));
    let again: Value = serde_json::from_str(&build(chsnap_tests::IMAGE, &["--json"])?.text()?)?;
    ensure!(again == json!({ "key": key, "new": false }), "{again}");
    ensure!(env.ctr().text(["container", "ls", "-q"])?.is_empty(), "a container is left");
    let pod = container(env, &settings).sh(script).annotation("io.chsnap.ready", "file:///ready").start()?;
    is(env, &pod, "image", "")?;
    pod.wait_log("up")?;
    pod.remove()?;
    // That of the other client has a stdin.
    let run = || -> Result<Started<'_>> {
        let pod = container(env, &settings).sh(script).annotation("io.chsnap.ready", "file:///ready");
        let id = pod.id.clone();
        pod.ctr(&["run"], &["-d"], None)?.output()?.success()?;
        Ok(Started::adopt(env, &id))
    };
    let other = run()?;
    is(env, &other, "base", &format!("builders = 0 has none built; {} is of another process.streams", &key[..12]))?;
    other.remove()?;
    build(chsnap_tests::IMAGE, &["--stdin"])?.text()?;
    let same = run()?;
    is(env, &same, "image", "")?;
    same.remove()?;
    // What is there is tried again. One that fails gives way, and another takes its place, if it works.
    fs::write(&broken, "")?;
    let refused = build(chsnap_tests::IMAGE, &[])?.output()?;
    ensure!(refused.stderr.contains("which is there, by way of trial"), "{}", refused.whole());
    ensure!(refused.code != 0 && refused.stderr.contains(NOT_RESTORED), "{}", refused.whole());
    let all = list(env, &settings)?;
    ensure!(!all.iter().any(|one| one["key"] == key.as_str()), "{all:?}");
    let hidden = |entry: &fs::DirEntry| entry.file_name().to_string_lossy().starts_with('.');
    let left: Vec<_> =
        fs::read_dir(env.dir.join("snapshots"))?.flatten().filter(hidden).map(|e| e.file_name()).collect();
    ensure!(left.is_empty(), "{left:?} is left");
    fs::remove_file(&broken)?;
    ensure!(build(chsnap_tests::IMAGE, &[])?.text()? == key);
    let works = build(chsnap_tests::IMAGE, &[])?.output()?.success()?;
    ensure!(works.stderr.contains("which is there, by way of trial"), "{}", works.whole());
    // Without the other kind there is still no better way.
    let base = all.iter().find(|one| one["manifest"]["inputs"]["kind"] == "base").context("no base snapshot")?;
    env.chsnap_with(&settings, ["snapshot", "rm", base["key"].as_str().unwrap_or_default()])?.text()?;
    let pod = container(env, &settings).sh(script).annotation("io.chsnap.ready", "file:///ready").start()?;
    is(env, &pod, "image", "")?;
    pod.remove()
}

/// Killed at whatever moment, a build of an image leaves nothing: not on the host, and not in containerd.
pub fn killed_ahead(env: &Env) -> Result<()> {
    let settings = imaged(env);
    build(env, &settings)?.text()?;
    let script = "sleep 2; : > /ready; sleep 1000";
    let begin = |snapshotter: &str| -> Result<Running> {
        let run = build_of(env, &settings, chsnap_tests::IMAGE)?.args(["--snapshotter", snapshotter]);
        run.args(["--ready", "file:///ready", "--", "/bin/sh", "-c", script]).start()
    };
    let left = || -> Result<Vec<String>> {
        let snapshots = fs::read_dir(env.dir.join("snapshots"))?.flatten().map(|entry| entry.path());
        let builders = env.daemon.pods().join(".builders");
        let files = snapshots.chain([builders]).filter(|path| path.exists() && path.extension().is_none());
        let mut left: Vec<_> = files.map(|path| path.display().to_string()).collect();
        for list in [&["containers", "ls", "-q"][..], &["leases", "ls", "-q"]] {
            left.extend(env.ctr().text(list)?.lines().map(str::to_owned));
        }
        for snapshotter in ["overlayfs", "native"] {
            let all = env.ctr().text(["snapshots", "--snapshotter", snapshotter, "ls"])?;
            left.extend(all.lines().filter(|line| line.contains("chsnap-")).map(str::to_owned));
        }
        left.extend(janitors(env).iter().map(|pid| format!("process {pid}")));
        Ok(left)
    };
    let base = left()?;
    ensure!(base.len() == 1, "{base:?}");
    let moments = [0, 20, 40, 60, 80, 120, 160, 240].map(|ms| Some(Duration::from_millis(ms) * patience()));
    for (number, moment) in moments.into_iter().chain([None, None]).enumerate() {
        let build = begin(["overlayfs", "native"][number % 2])?;
        match moment {
            Some(moment) => thread::sleep(moment),
            None => drop(template_runs(env)?),
        }
        drop(build);
        let cleared = || (left().ok()? == base).then_some(());
        let gone = eventually(Duration::from_secs(10), cleared);
        ensure!(gone.is_some(), "killed after {moment:?}, or with a machine: it leaves {:?}", left()?);
    }
    Ok(())
}

/// On Kubernetes it is not `ctr` that says what a container is. One that runs, or ran elsewhere, tells.
pub fn built_like(env: &Env) -> Result<()> {
    let settings = imaged(env).set("snapshot", "builders", "0");
    let limit = 209_715_200_u64.to_string();
    let pod = || -> Result<(Started<'_>, Started<'_>)> {
        let ready = || container(env, &settings).annotation("io.chsnap.ready", "file:///ready");
        let pause = ready();
        let id = pause.id.clone();
        let pause = pause.of_pod(&id, "sandbox").annotation("io.kubernetes.cri.sandbox-memory", &limit);
        let pause = pause.command(["/pause"]).start()?;
        let script = "echo up > /dev/shm/up && cat /dev/shm/up && : > /ready; while :; do sleep 0.1; done";
        let app = ready().of_pod(&id, "container").sh(script);
        let app =
            app.flags(["--cap-add", "CAP_NET_ADMIN", "--with-ns", "uts:/proc/1/ns/uts", "--memory-limit", &limit]);
        Ok((pause, app.start()?))
    };
    let build =
        |arguments: &[&str]| -> Result<Run> { Ok(build_of(env, &settings, chsnap_tests::IMAGE)?.args(arguments)) };
    let (pause, app) = pod()?;
    is(env, &pause, "direct", "builders = 0 has none built")?;
    let file = env.dir.join("spec.json");
    let like = file.display().to_string();
    let missing = build(&["--like", &like])?.output()?;
    ensure!(missing.code != 0 && missing.stderr.contains(&format!("specification {like:?}")), "{}", missing.whole());
    // There, shared memory is a bind of the pod's.
    let mut spec: Value = serde_json::from_str(&env.ctr().text(["containers", "info", "--spec", &app.id])?)?;
    let mounts = spec["mounts"].as_array_mut().context("no mounts")?;
    let shm = mounts.iter_mut().find(|mount| mount["destination"] == "/dev/shm").context("no /dev/shm")?;
    *shm = json!({ "destination": "/dev/shm", "type": "bind", "source": env.dir, "options": ["rbind", "ro"] });
    fs::write(&file, spec.to_string())?;
    app.remove()?;
    pause.remove()?;
    build(&["--like", &like])?.text()?;
    let (pause, app) = pod()?;
    is(env, &pause, "image", "")?;
    app.wait_log("up")?;
    ensure!(app.sh("uname -n")? == pause.id);
    // Another starts beside it, in the guest that was restored.
    let second = container(env, &settings).of_pod(&pause.id, "container").sh("echo beside; sleep 1000").start()?;
    second.wait_log("beside")?;
    ensure!(second.sh("cat /dev/chsnap/epoch")? == app.sh("cat /dev/chsnap/epoch")?, "it is in another machine");
    second.remove()?;
    ensure!(app.sh("echo on")? == "on");
    app.remove()?;
    pause.remove()?;
    let spec =
        |user| json!({ "ociVersion": "1.2.0", "process": { "user": user, "cwd": "/", "args": ["x"] } }).to_string();
    fs::write(&file, spec(json!("root")))?;
    let wrong = build(&["--like", &like])?.output()?;
    ensure!(wrong.code != 0 && wrong.stderr.contains("\"root\""), "{}", wrong.whole());
    // Whoever does not say when its process is ready is asked for it.
    fs::write(&file, spec(json!({ "uid": 0, "gid": 0 })))?;
    let unsaid = build(&["--like", &like])?.output()?;
    ensure!(unsaid.code != 0 && unsaid.stderr.contains("add --ready SIGN"), "{}", unsaid.whole());
    Ok(())
}

/// From the image snapshot to the base snapshot to a boot, in the same request, with the reasons in the event.
pub fn neither_restored(env: &Env) -> Result<()> {
    let broken = env.dir.join("broken");
    let faulty = Faulty::restores_nothing_while(&broken);
    let settings = faulty.set(imaged(env), env, "faulty")?;
    let make = || {
        let pod = container(env, &settings).sh(": > /ready; while :; do sleep 0.1; done");
        pod.annotation("io.chsnap.ready", "file:///ready")
    };
    let first = make().start()?;
    finished(env)?;
    first.remove()?;
    let works = make().start()?;
    is(env, &works, "image", "")?;
    works.remove()?;
    fs::write(&broken, "")?;
    let neither = make();
    let mut events = events::follow(env, &neither.id)?;
    let neither = neither.start()?;
    let (way, why_not) = way(env, &neither)?;
    ensure!(way == "direct" && why_not.matches("os error 22").count() == 2, "{way} ({why_not})");
    let created = events("/tasks/start")?;
    ensure!(created[0].content["checkpoint"] == format!("direct: {why_not}"), "{created:?}");
    neither.remove()
}

/// Of a builder that is killed while the image's process gets ready nothing runs on, and what it left is cleared away.
pub fn builder_killed(env: &Env) -> Result<()> {
    let settings = imaged(env);
    build(env, &settings)?.text()?;
    let make = || {
        let pod = container(env, &settings).sh("sleep 3; : > /ready; while :; do sleep 0.1; done");
        pod.annotation("io.chsnap.ready", "file:///ready")
    };
    let first = make().start()?;
    kill_builder(env)?;
    ensure!(kinds(env, &settings)? == ["base"]);
    first.remove()?;
    let second = make().start()?;
    is(env, &second, "base", "no image snapshot yet")?;
    finished(env)?;
    ensure!(kinds(env, &settings)? == ["base", "image"], "{}", env.daemon.log_tail(30));
    second.remove()?;
    let third = make().start()?;
    is(env, &third, "image", "")?;
    third.remove()
}

/// What a process has open it would have at the same place after a restore, where a pod may have a file of its own.
pub fn held_open(env: &Env) -> Result<()> {
    const HOLDS: &str = "import mmap, os, time
with open('/etc/hosts') as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
for place in '/srv/cache', '/run/kept':
    os.makedirs(place, exist_ok=True)
    with open(place + '/model', 'w') as file:
        file.write('warm')
open('/ready', 'w').close()
time.sleep(1000)";
    let settings = imaged(env);
    let hosts = env.dir.join("hosts");
    fs::write(&hosts, "127.0.0.1 of-the-pod\n")?;
    let mount = format!("type=bind,src={},dst=/etc/hosts,options=rbind:ro", hosts.display());
    let make = || container(env, &settings).python(HOLDS).annotation("io.chsnap.ready", "file:///ready");
    let first = make().start()?;
    finished(env)?;
    first.remove()?;
    let own = make().flags(["--mount", &mount]).start()?;
    is(
        env,
        &own,
        "base",
        "the saved process holds \"/etc/hosts\", open or in memory, and this container has files of its own there",
    )?;
    ensure!(own.sh("cat /etc/hosts")? == "127.0.0.1 of-the-pod");
    own.remove()?;
    // Nor over what it has written: in the root, where the host sees it, and in a file system of the guest's.
    let volume = env.dir.join("volume");
    fs::create_dir_all(&volume)?;
    for (place, why) in [
        (
            "/srv/cache",
            "the saved process has written to \"/srv/cache\", where this container has something of its own",
        ),
        ("/run/kept", "the saved process holds \"/run/kept/model\", open or in memory"),
    ] {
        let mount = format!("type=bind,src={},dst={place},options=rbind:rw", volume.display());
        let own = make().flags(["--mount", &mount]).start()?;
        is(env, &own, "base", why)?;
        // As in one that was never saved.
        let written = eventually(Duration::from_secs(30) * patience(), || volume.join("model").exists().then_some(()));
        written.context("the process has not written into the volume")?;
        own.remove()?;
        fs::remove_file(volume.join("model"))?;
    }
    let same = make().start()?;
    is(env, &same, "image", "")?;
    same.remove()
}

/// User, directory, environment and limit of a restored container are those asked for; and a limit that is met is told.
pub fn as_asked(env: &Env) -> Result<()> {
    let settings = imaged(env);
    let limit = (64 << 20).to_string();
    let make = || {
        let pod = container(env, &settings)
            .sh("echo $(id -u) $(id -g) $(pwd) $ONE > /tmp/ready; while :; do sleep 0.1; done");
        let pod = pod.flags(["--user", "1000:1000", "--cwd", "/var", "--env", "ONE=two", "--memory-limit", &limit]);
        pod.annotation("io.chsnap.ready", "file:///tmp/ready")
    };
    let first = make().start()?;
    finished(env)?;
    first.remove()?;
    let second = make();
    let mut events = events::follow(env, &second.id)?;
    let second = second.start()?;
    is(env, &second, "image", "")?;
    // Of the process that was saved, and of one that is started beside it.
    let saved = second.sh("cat /tmp/ready; stat -c %u /proc/1; readlink /proc/1/cwd")?;
    ensure!(saved == "1000 1000 /var two\n1000\n/var", "{saved}");
    let exec = second.sh("echo $(id -u) $(id -g) $(pwd) $ONE; touch /etc/mine 2>/dev/null || echo not root")?;
    ensure!(exec == "1000 1000 /var two\nnot root", "{exec}");
    second.exec(["tail", "/dev/zero"]).output()?.code(137)?;
    events("/tasks/oom")?;
    // Another user is another process.
    let other = make().flags(["--user", "1001:1001"]).start()?;
    is(env, &other, "base", "process.user")?;
    finished(env)?;
    other.remove()?;
    second.remove()
}
