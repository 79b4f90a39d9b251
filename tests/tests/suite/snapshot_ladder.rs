//! Climbing down the ladder, with VMMs that fail where those of some arm64 hosts do.

use std::{
    fs,
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Env, Settings, Tools, eventually};
use serde_json::Value;

use crate::snapshot::{build, builders, container, finished, is_base, is_direct, list, own};

/// What an arm64 host whose KVM refuses a register makes Cloud Hypervisor say.
pub const REFUSED: &str = "Could not set the vCPU state SetSysRegister(Invalid argument (os error 22))";

fn program(path: &Path, text: &str) -> Result<PathBuf> {
    let mut options = fs::File::options();
    let mut file = options.write(true).create(true).truncate(true).mode(0o755).open(path)?;
    file.write_all(text.as_bytes())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(path.to_owned())
}

/// The VMM behind a script that does `instead` where a machine is restored, and the shell's condition `when` holds.
pub fn wrapper(env: &Env, name: &str, when: &str, instead: &str) -> Result<PathBuf> {
    let real = Tools::get().qemu.display().to_string();
    let script = format!(
        "#!/bin/sh\ncase \" $* \" in *\" -incoming \"*) if {when}; then {instead}; fi ;; esac\nexec {real} \"$@\"\n"
    );
    program(&env.dir.join(name), &script)
}

pub fn ladder_restore(env: &Env) -> Result<()> {
    let until = |name: &str, word: &str| {
        wrapper(env, name, &format!("! echo \"$*\" | grep -q {word}"), &format!("echo '{REFUSED}' >&2; exit 1"))
    };
    climbs(env, [until("one", "pmu=off")?, until("two", "sve=off")?, until("all", "nothing-has-this")?], REFUSED)
}

/// Stands between chsnap and QEMU, and answers the order to save the machine itself.
const SAVES_NOT: &str = r#"#!/usr/bin/env python3
import ctypes, json, os, socket, subprocess, sys, threading

real, unless, args = "@REAL@", "@UNLESS@", sys.argv[1:]
at = [i for i, arg in enumerate(args) if arg.startswith("socket,id=qmp,fd=")]
if not at or any(unless in arg for arg in args):
    os.execv(real, [real, *args])
outer = socket.socket(fileno=int(args[at[0]].rsplit("=", 1)[1]))
outer.set_inheritable(False)
inner, theirs = socket.socketpair()
theirs.set_inheritable(True)
args[at[0]] = f"socket,id=qmp,fd={theirs.fileno()}"
die_with_parent = lambda: ctypes.CDLL(None).prctl(1, 9)
qemu = subprocess.Popen([real, *args], close_fds=False, preexec_fn=die_with_parent)
theirs.close()


def orders():
    for line in outer.makefile("rb"):
        order = json.loads(line)
        if order["execute"] == "migrate":
            error = {"class": "GenericError", "desc": "GetAarchCoreRegister(Invalid argument (os error 22))"}
            outer.sendall(json.dumps({"id": order["id"], "error": error}).encode() + b"\n")
        else:
            inner.sendall(line)


def answers():
    while data := inner.recv(65536):
        outer.sendall(data)
    outer.shutdown(socket.SHUT_RDWR)


for task in orders, answers:
    threading.Thread(target=task, daemon=True).start()
sys.exit(qemu.wait())
"#;

pub fn ladder_save(env: &Env) -> Result<()> {
    let real = Tools::get().qemu.display().to_string();
    let unless = |name: &str, word: &str| {
        program(&env.dir.join(name), &SAVES_NOT.replace("@REAL@", &real).replace("@UNLESS@", word))
    };
    let refused = "GetAarchCoreRegister(Invalid argument (os error 22))";
    climbs(env, [unless("one", "pmu=off")?, unless("two", "sve=off")?, unless("all", "nothing-has-this")?], refused)
}

/// With VMMs that work from the second rung, from the third, and on none.
fn climbs(env: &Env, vmms: [PathBuf; 3], refused: &str) -> Result<()> {
    for (vmm, rung) in vmms.iter().zip([Some("no-pmu"), Some("aggressive"), None]) {
        let dir = env.dir.join(vmm.file_name().unwrap_or_default()).with_extension("snapshots");
        let settings = own(env).path("vmm", "qemu", vmm).path("snapshot", "dir", dir);
        // x86_64 has but one rung, as it has neither feature.
        let rung = rung.filter(|_| cfg!(target_arch = "aarch64"));
        let output = build(env, &settings)?.output()?;
        ensure!((output.code == 0) == rung.is_some(), "{}", output.whole());
        ensure!(output.stderr.contains("standard: the t") && output.stderr.contains(refused), "{}", output.whole());
        told(env, &settings, rung, refused)?;
        let started = container(env, &settings).sh("sleep 1000").start()?;
        match rung {
            Some(_) => is_base(env, &started)?,
            None => is_direct(env, &started, refused)?,
        }
        started.remove()?;
        if rung.is_none() {
            hopeless(env, &settings, refused)?;
        }
    }
    Ok(())
}

/// The doctor and the snapshot know the rung, and why it is not a fuller one.
fn told(env: &Env, settings: &Settings, rung: Option<&str>, refused: &str) -> Result<()> {
    let doctor = env.chsnap_with(settings, ["doctor", "--json"])?.output()?;
    let doctor: Value = serde_json::from_str(&doctor.text())?;
    let ladder = &doctor["ladder"];
    ensure!(ladder["rung"].as_str() == rung, "{ladder}");
    let first = &ladder["refusals"][0];
    ensure!(first["rung"] == "standard" && first["why"].as_str().is_some_and(|why| why.contains(refused)), "{ladder}");
    let text = env.chsnap_with(settings, ["doctor"])?.output()?.text();
    ensure!(text.contains(refused), "{text}");
    if cfg!(not(target_arch = "aarch64")) {
        ensure!(ladder["refusals"][2]["why"].as_str().is_some_and(|why| why.starts_with("passed over: ")), "{ladder}");
    }
    let all = list(env, settings)?;
    ensure!(all.len() == usize::from(rung.is_some()), "{all:?}");
    if let Some(rung) = rung {
        ensure!(all[0]["manifest"]["inputs"]["rung"] == rung, "{all:?}");
        ensure!(all[0]["manifest"]["refusals"][0]["rung"] == "standard", "{all:?}");
    }
    Ok(())
}

/// Where no rung works, nothing is built again, until somebody asks for that.
fn hopeless(env: &Env, settings: &Settings, refused: &str) -> Result<()> {
    let settings = settings.clone().set("snapshot", "builders", "1");
    let started = container(env, &settings).sh("sleep 1000").start()?;
    is_direct(env, &started, refused)?;
    ensure!(builders(env).is_empty(), "it is tried again");
    started.remove()?;
    let doctor: Value =
        serde_json::from_str(&env.chsnap_with(&settings, ["doctor", "--json", "--retry"])?.output()?.text())?;
    ensure!(doctor["ladder"].is_null(), "{}", doctor["ladder"]);
    let started = container(env, &settings).sh("sleep 1000").start()?;
    is_direct(env, &started, "there is no base snapshot yet")?;
    eventually(Duration::from_secs(5), || builders(env).first().copied()).context("it is not tried again")?;
    started.remove()?;
    finished(env)
}
