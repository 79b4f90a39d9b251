//! Pods that are restored with their image's process initialised.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Container, Env, Run, Settings, Started, eventually, http, patience};
use serde_json::Value;

use crate::{
    events, image,
    snapshot::{container, list, own, way},
    snapshot_builder::finished,
    snapshot_image_built::{
        as_asked, builder_killed, built_ahead, built_like, held_open, killed_ahead, neither_restored, not_ready,
    },
    snapshot_image_native::copied_root,
};

crate::cases! {
    Vms: initialised;
    Once: first_lines, ready_signs, not_ready, hooks_fail, another_image, written_before, copied_root, built_ahead, built_like,
          builder_killed, killed_ahead, neither_restored, as_asked, held_open;
}

/// Answers what it is, and says when it is ready. Before that it has read what pods have files of their own for, and has drawn from every source of random numbers there is.
const APP: &str = r#"
import http.server, json, os, random, socket, ssl, sys, time, uuid
from snapshot_restore_py import register_before_snapshot, register_after_restore

def kernel(): return open("/proc/sys/kernel/random/uuid").read().strip()
def epoch(): return open("/dev/chsnap/epoch").read().strip()
def hosts(): return open("/etc/hosts").read()
def secret(): return open("/run/secrets/word").read() if os.path.exists("/run/secrets/word") else None

events, hook = [], {}
log = open("/warm.log", "a", buffering=1)
log.write("warm\n")
# An application brings no bytecode with it.
os.mkdir("/warm")
with open("/warm/warmed.py", "w") as file: file.write("value = 1")
sys.path.insert(0, "/warm")
import warmed
template = {"hosts": hosts(), "hostname": socket.gethostname(), "epoch": epoch()}
random.seed(7)
ssl.RAND_bytes(8), os.urandom(8), kernel(), uuid.uuid4()
register_before_snapshot(events.append, "before")
@register_after_restore
def after():
    events.append("after")
    # Whatever is asked for in here was the pod's own before the first line of this process ran again.
    hook.update(hosts=hosts(), secret=secret(), hostname=socket.gethostname(), epoch=epoch(), time=time.time(),
                urandom=os.urandom(8).hex(), kernel=kernel(), who=os.environ.get("WHO"))
    log.write("restored\n")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({
            "random": random.random(), "ssl": ssl.RAND_bytes(8).hex(), "urandom": os.urandom(8).hex(),
            "uuid4": str(uuid.uuid4()), "kernel": kernel(), "epoch": epoch(), "hostname": socket.gethostname(),
            "who": os.environ.get("WHO"), "time": time.time(), "events": events, "pid": os.getpid(),
            "hosts": hosts(), "secret": secret(), "log": open("/warm.log").read(), "hook": hook, "template": template,
        }).encode()
        log.write("served\n")
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass

server = http.server.HTTPServer(("127.0.0.1", 8080), Handler)
print("up", flush=True)
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
server.serve_forever()
"#;
/// Of the container; its guest has a little more.
const MEMORY: u64 = 314_572_800;
const IN_IMAGE: &str = "127.0.0.1 localhost of-the-image\n";

/// With image snapshots, built beside pods.
pub fn imaged(env: &Env) -> Settings {
    own(env)
        .set("snapshot", "builders", "1")
        .set("snapshot", "pod_env", "[\"WHO\"]")
        .path("snapshot", "ctr", env.ctr().program())
        .set("deadlines", "ready", (60 * patience()).to_string())
        .set("deadlines", "hooks", (10 * patience()).to_string())
}

fn app<'a>(env: &'a Env, settings: &Settings, who: &str) -> Result<Container<'a>> {
    let hosts = env.dir.join(format!("hosts-{who}"));
    fs::write(&hosts, format!("127.0.0.1 {who}\n"))?;
    let secret = env.dir.join(format!("secret-{who}"));
    fs::create_dir_all(&secret)?;
    fs::write(secret.join("word"), who)?;
    let mount = |source: &Path, place: &str| format!("type=bind,src={},dst={place},options=rbind:ro", source.display());
    // The first in the root, the second below a mount of the guest's.
    let mounts = [mount(&hosts, "/etc/hosts"), mount(&secret, "/run/secrets")];
    let app = container(env, settings).python(APP).annotation("io.chsnap.ready", "notify");
    let app = app.annotation("io.chsnap.expose", "8080").flags([
        "--env",
        &format!("WHO={who}"),
        "--memory-limit",
        &MEMORY.to_string(),
    ]);
    Ok(app.flags(["--mount", &mounts[0], "--mount", &mounts[1]]))
}

fn asked(pod: &Started<'_>) -> Result<Value> {
    let mut stream = http::unix(&pod.pod_dir().join("8080.sock"))?;
    let (status, body) = http::request(&mut *stream, "GET", "/", &[])?;
    ensure!(status == 200, "{status}");
    Ok(serde_json::from_slice(&body)?)
}

pub fn is(env: &Env, pod: &Started<'_>, expected: &str, because: &str) -> Result<()> {
    let (way, why_not) = way(env, pod)?;
    // There is no better one.
    ensure!(expected != "image" || why_not.is_empty(), "{why_not}");
    ensure!(way == expected && why_not.contains(because), "{way} ({why_not}), not {expected} ({because})");
    Ok(())
}

/// What is in the store, by kind.
pub fn kinds(env: &Env, settings: &Settings) -> Result<Vec<String>> {
    let all = list(env, settings)?;
    let kind = |one: &Value| one["manifest"]["inputs"]["kind"].as_str().unwrap_or_default().to_owned();
    let mut kinds: Vec<_> = all.iter().map(kind).collect();
    kinds.sort();
    Ok(kinds)
}

fn initialised(env: &Env) -> Result<()> {
    let settings = imaged(env);
    let first = app(env, &settings, "first")?.start()?;
    first.wait_log("up")?;
    is(env, &first, "direct", "no image snapshot yet")?;
    let booted = asked(&first)?;
    ensure!(booted["events"] == serde_json::json!([]) && booted["who"] == "first", "{booted}");
    ensure!(booted["hosts"] == "127.0.0.1 first\n" && booted["secret"] == "first", "{booted}");
    let layers = digest_of_layers(env, &first)?;
    finished(env)?;
    ensure!(kinds(env, &settings)? == ["base", "image"], "{:?}\n{}", list(env, &settings)?, env.daemon.log_tail(60));
    first.remove()?;

    let pods = ["one", "other"].map(|who| app(env, &settings, who).map(|pod| (who, pod)));
    let pods = pods.into_iter().collect::<Result<Vec<_>>>()?;
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map(|since| since.as_secs_f64());
    let started = &now()?;
    // At the same time, they are sure to be alike.
    let pods = thread::scope(|scope| {
        let threads: Vec<_> =
            pods.into_iter().map(|(who, pod)| scope.spawn(move || pod.start().map(|pod| (who, pod)))).collect();
        let joined = threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow::anyhow!("panicked"))?);
        joined.collect::<Result<Vec<_>>>()
    })?;
    let mut said = Vec::new();
    for (who, pod) in &pods {
        is(env, pod, "image", "")?;
        let before = now()?;
        let answer = asked(pod)?;
        let after = now()?;
        // The template's process had the image's file, and what it has read it remembers.
        let (hook, template) = (&answer["hook"], &answer["template"]);
        ensure!(template["hosts"] == IN_IMAGE, "{answer}");
        for what in ["hosts", "secret", "hostname", "epoch", "who"] {
            ensure!(hook[what] == answer[what], "{what} was not yet the pod's own in the hook: {answer}");
        }
        ensure!(template["epoch"] != answer["epoch"] && template["hostname"] != answer["hostname"], "{answer}");
        let in_hook = hook["time"].as_f64().unwrap_or_default();
        ensure!(*started - 0.05 <= in_hook && in_hook <= before + 0.05, "{started} <= {in_hook} <= {before}");
        ensure!(answer["secret"] == *who, "{answer}");
        let metrics = env.ctr().metrics(&pod.id)?;
        ensure!(metrics["memory"]["usage_limit"] == MEMORY, "its limit: {metrics}");
        ensure!(answer["events"] == serde_json::json!(["before", "after"]), "{answer}");
        ensure!(answer["who"] == *who && answer["hostname"] == pod.id.as_str(), "{answer}");
        ensure!(answer["hosts"] == format!("127.0.0.1 {who}\n"), "{answer}");
        ensure!(answer["log"] == "warm\nrestored\n", "what was written before is there, once: {answer}");
        let guest = answer["time"].as_f64().unwrap_or_default();
        ensure!(before - 0.05 <= guest && guest <= after + 0.05, "its clock: {before} <= {guest} <= {after}");
        said.push(answer);
    }
    for what in ["random", "ssl", "urandom", "uuid4", "kernel", "epoch", "hostname"] {
        ensure!(said[0][what] != said[1][what], "both have the same {what}: {said:?}");
    }
    for what in ["urandom", "kernel", "epoch", "hostname"] {
        ensure!(said[0]["hook"][what] != said[1]["hook"][what], "both had the same {what} in their hooks: {said:?}");
    }
    for (_, pod) in &pods {
        // What the process said before it was saved is the beginning of what each says.
        pod.wait_log("up")?;
        ensure!(pod.sh("cat /warm.log")? == "warm\nrestored\nserved", "{}", pod.sh("cat /warm.log")?);
        let bytecode = pod.sh("cd /warm/__pycache__ && ls")?;
        ensure!(bytecode.starts_with("warmed.") && bytecode.ends_with(".pyc"), "{bytecode}");
        ensure!(pod.sh("cat /proc/sys/kernel/hostname")? == pod.id);
        ensure!(pod.exec(["sh", "-c", "exit 7"]).output()?.code == 7);
        ensure!(env.ctr().text(["task", "ps", &pod.id])?.lines().count() == 2);
    }
    for (_, pod) in pods {
        pod.kill("SIGKILL")?.success()?;
        env.ctr().wait_status(&pod.id, "STOPPED")?;
        pod.remove()?;
    }
    // Neither template nor image has changed.
    env.chsnap_with(&settings, ["snapshot", "verify", "--all"])?.text()?;
    let again = app(env, &settings, "again")?;
    let mut events = events::follow(env, &again.id)?;
    let again = again.start()?;
    is(env, &again, "image", "")?;
    let created = events("/tasks/start")?;
    ensure!(created[0].content["checkpoint"] == "image", "the event does not name the way: {created:?}");
    ensure!(asked(&again)?["log"] == "warm\nrestored\n");
    ensure!(digest_of_layers(env, &again)? == layers, "the image has changed");
    again.remove()
}

/// Of everything in the directories of a container's image: names, kinds, owners, modes, contents.
fn digest_of_layers(env: &Env, pod: &Started<'_>) -> Result<String> {
    let mounts = env.ctr().text(["snapshots", "mounts", "/", &pod.id])?;
    let lowers = mounts.split([' ', ',']).find_map(|word| word.strip_prefix("lowerdir=")).context("no layers")?;
    digest(lowers.split(':'))
}

pub fn digest<'a>(dirs: impl Iterator<Item = &'a str>) -> Result<String> {
    let dirs = dirs.flat_map(|dir| ["--directory", dir, "."]);
    // Without the times that reading changes.
    let tar = "tar --create --sort=name --xattrs --pax-option=delete=atime,delete=ctime --numeric-owner --file=-";
    let script = format!(r#"set -o pipefail; {tar} "$@" | sha256sum"#);
    Run::new("bash").args(["-c", &script, "digest"]).args(dirs).limit(Duration::from_secs(120)).text()
}

/// A process that knows of no hooks finds the pod's own names and files in the first lines that it runs again, also in a guest
/// that believes what it has read once.
fn first_lines(env: &Env) -> Result<()> {
    const LINES: &str = "while :; do
        echo epoch $(cat /dev/chsnap/epoch); echo name $(cat /proc/sys/kernel/hostname)
        echo hosts $(cat /etc/hosts); echo round; : > /ready
    done >> /lines";
    let settings = imaged(env).set("share", "cache", "\"always\"");
    let make = || container(env, &settings).sh(LINES).annotation("io.chsnap.ready", "file:///ready");
    let first = make().start()?;
    finished(env)?;
    // By size and time the guest cannot tell them apart.
    let (hosts, time) = (env.dir.join("hosts"), first.sh("stat -c %.9Y /etc/hosts")?);
    first.remove()?;
    fs::write(&hosts, IN_IMAGE.replace("image", "other"))?;
    Run::new("touch").args(["-d", &format!("@{time}")]).arg(&hosts).text()?;
    let mount = format!("type=bind,src={},dst=/etc/hosts,options=rbind:ro", hosts.display());
    let saved = list(env, &settings)?.into_iter().find(|one| one["manifest"]["inputs"]["kind"] == "image");
    let key = saved.context("there is no image snapshot")?["key"].as_str().unwrap_or_default().to_owned();
    let templates = fs::read_to_string(env.dir.join("snapshots").join(key).join("root/lines"))?;
    let pod = make().flags(["--mount", &mount]).start()?;
    is(env, &pod, "image", "")?;
    let again = format!("tail -n +{} /lines", templates.lines().count() + 1);
    let lines = eventually(Duration::from_secs(30) * patience(), || {
        pod.sh(&again).ok().filter(|lines| lines.matches("round").count() > 2)
    });
    let lines = lines.context("the process does not go on")?;
    // The line under way may have been read before.
    let later: Vec<_> = lines.lines().skip(1).collect();
    let own = [format!("name {}", pod.id), "hosts 127.0.0.1 localhost of-the-other".into()];
    for (what, own) in [("name ", &own[0]), ("hosts ", &own[1])] {
        ensure!(later.iter().filter(|line| line.starts_with(what)).all(|line| line == own), "{lines}");
    }
    let epochs = |text: &[&str]| -> BTreeSet<String> {
        text.iter().filter(|line| line.starts_with("epoch ")).map(|line| (*line).to_owned()).collect()
    };
    let (before, after) = (epochs(&templates.lines().collect::<Vec<_>>()), epochs(&later));
    ensure!(after.len() == 1 && before.is_disjoint(&after), "{before:?}, {lines}");
    ensure!(templates.contains("hosts 127.0.0.1 localhost of-the-image"), "{templates}");
    pod.remove()
}

/// Every sign of readiness is understood, by processes that know nothing of hooks.
fn ready_signs(env: &Env) -> Result<()> {
    let settings = imaged(env);
    let server = "cd /tmp && sleep 0.5 && : > index.html && exec python3 -m http.server --bind 127.0.0.1 8080";
    let file = "sleep 0.5; mkdir -p /run/app; : > /run/app/ready; while :; do sleep 0.1; done";
    for (sign, script) in
        [("http://:8080/index.html", server), ("tcp://:8080", server), ("file:///run/app/ready", file)]
    {
        let make = || container(env, &settings).sh(script).annotation("io.chsnap.ready", sign);
        let first = make().start()?;
        finished(env)?;
        first.remove()?;
        let second = make().annotation("io.chsnap.expose", "8080").start()?;
        is(env, &second, "image", "").with_context(|| format!("{sign}\n{}", env.daemon.log_tail(40)))?;
        if script == server {
            let mut stream = http::unix(&second.pod_dir().join("8080.sock"))?;
            ensure!(http::request(&mut *stream, "GET", "/", &[])?.0 == 200);
        }
        second.kill("SIGKILL")?.success()?;
        env.ctr().wait_status(&second.id, "STOPPED")?;
        second.remove()?;
    }
    Ok(())
}

/// Hooks that fail before a snapshot prevent it, and after a restore, this restore. So do those that take too long.
fn hooks_fail(env: &Env) -> Result<()> {
    let seconds = 3 * patience();
    let settings = imaged(env).set("deadlines", "hooks", seconds.to_string());
    let hooked = |hook: &str| {
        let program = format!(
            "import os, socket, time, snapshot_restore_py as s\ndef fails(): raise ValueError('no database')\n\
             def fails_as_pod():\n    who = os.environ['WHO']\n    if who == 'bad': fails()\n    \
             if who == 'slow': time.sleep(1000)\n{hook}\n\
             socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])\n\
             while True: time.sleep(0.1)"
        );
        container(env, &settings).python(&program).annotation("io.chsnap.ready", "notify")
    };
    let first = hooked("s.register_before_snapshot(fails)").start()?;
    finished(env)?;
    first.remove()?;
    let second = hooked("s.register_before_snapshot(fails)").start()?;
    is(env, &second, "base", "ValueError: no database")?;
    ensure!(kinds(env, &settings)? == ["base"]);
    second.remove()?;

    let hook = "s.register_after_restore(fails_as_pod)\nopen('/written', 'w').write('x')";
    // A hook may count on what the pod's environment has: the trial has that of the first.
    let first = hooked(hook).flags(["--env", "WHO=first"]).start()?;
    finished(env)?;
    first.remove()?;
    let good = hooked(hook).flags(["--env", "WHO=good"]).start()?;
    is(env, &good, "image", "")?;
    good.remove()?;
    let bad = hooked(hook).flags(["--env", "WHO=bad"]).start()?;
    is(env, &bad, "base", "ValueError: no database")?;
    bad.remove()?;
    let slow = hooked(hook).flags(["--env", "WHO=slow"]).start()?;
    is(env, &slow, "base", &format!("did not end within {} ms", seconds * 1000))?;
    slow.remove()?;
    let required = hooked(hook).flags(["--env", "WHO=bad"]).annotation("io.chsnap.snapshot", "require").start();
    let text = required.err().map(|error| error.to_string()).unwrap_or_default();
    ensure!(text.contains("ValueError: no database"), "{text}");
    Ok(())
}

/// A name that is given to other contents never leads to the old snapshot.
fn another_image(env: &Env) -> Result<()> {
    let settings = imaged(env);
    let name = "localhost/chsnap/versions:latest";
    let make = || {
        let script = "cat /etc/marker; : > /ready; while :; do sleep 0.1; done";
        let pod = container(env, &settings).image(name).command(["/bin/busybox", "sh", "-c", script]);
        pod.annotation("io.chsnap.ready", "file:///ready")
    };
    let root = image::root(env)?;
    for (version, before) in [("one", "direct"), ("two", "base")] {
        fs::write(root.join("etc/marker"), format!("{version}\n"))?;
        image::import(env, &root, name)?;
        let first = make().start()?;
        first.wait_log(version)?;
        is(env, &first, before, "no image snapshot yet")?;
        finished(env)?;
        first.remove()?;
        let restored = make().start()?;
        is(env, &restored, "image", "")?;
        restored.wait_log(version)?;
        restored.remove()?;
    }
    env.ctr().text(["image", "rm", "--sync", name])?;
    Ok(())
}

/// A container that has written to its root, and is started once more, has another root than the snapshot's process.
fn written_before(env: &Env) -> Result<()> {
    let settings = imaged(env);
    let script = ": > /ready; while :; do echo > /now; sleep 0.1; done";
    let make = || container(env, &settings).sh(script).annotation("io.chsnap.ready", "file:///ready");
    let first = make().start()?;
    finished(env)?;
    first.remove()?;
    let pod = make().start()?;
    is(env, &pod, "image", "")?;
    pod.sh("echo mine > /mine; ls /ready")?;
    pod.kill("SIGKILL")?.success()?;
    env.ctr().wait_status(&pod.id, "STOPPED")?;
    env.ctr().output(["task", "rm", &pod.id])?;
    // ctr passes on the same file as before, which other calls have written since.
    settings.write(&env.dir)?;
    env.ctr().text(["task", "start", "-d", &pod.id])?;
    is(env, &pod, "base", "has been written to the container's root file system already")?;
    ensure!(pod.sh("cat /mine")? == "mine");
    pod.remove()
}
