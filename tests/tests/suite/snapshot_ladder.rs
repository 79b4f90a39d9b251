//! Climbing down the ladder, with VMMs that fail where those of some arm64 hosts do.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Env, Settings, eventually};
use serde_json::Value;

use crate::{
    faulty::{Faulty, NOT_RESTORED, NOT_SAVED},
    snapshot::{build, container, is_base, is_direct, list, own},
    snapshot_builder::{builders, finished},
};

/// With VMMs that work from the second rung.
pub fn ladder_restore_no_pmu(env: &Env) -> Result<()> {
    climbs(env, "restore", NOT_RESTORED, Some(("pmu", "no-pmu")))
}

pub fn ladder_save_no_pmu(env: &Env) -> Result<()> {
    climbs(env, "save", NOT_SAVED, Some(("pmu", "no-pmu")))
}

/// With VMMs that work from the third.
pub fn ladder_restore_aggressive(env: &Env) -> Result<()> {
    climbs(env, "restore", NOT_RESTORED, Some(("sve", "aggressive")))
}

pub fn ladder_save_aggressive(env: &Env) -> Result<()> {
    climbs(env, "save", NOT_SAVED, Some(("sve", "aggressive")))
}

/// With VMMs that work on none.
pub fn ladder_restore(env: &Env) -> Result<()> {
    climbs(env, "restore", NOT_RESTORED, None)
}

pub fn ladder_save(env: &Env) -> Result<()> {
    climbs(env, "save", NOT_SAVED, None)
}

/// What a VMM no longer restores, for a reason that no key has, is tried again where somebody asks for that, and gives way.
pub fn ladder_spent(env: &Env) -> Result<()> {
    let broken = env.dir.join("broken");
    let faulty = Faulty::restores_nothing_while(&broken);
    let settings = faulty.set(own(env), env, "spent")?;
    let retry = || env.chsnap_with(&settings, ["doctor", "--retry"])?.output();
    build(env, &settings)?.text()?;
    fs::write(&broken, "")?;
    let refused = build(env, &settings)?.output()?;
    ensure!(refused.code != 0 && refused.stderr.contains("which is there, by way of trial"), "{}", refused.whole());
    ensure!(refused.stderr.contains(NOT_RESTORED) && list(env, &settings)?.is_empty(), "{}", refused.whole());
    fs::remove_file(&broken)?;
    build(env, &settings)?.text()?;
    let works = build(env, &settings)?.output()?.success()?;
    ensure!(works.stderr.contains("which is there, by way of trial"), "{}", works.whole());
    // Beside pods only what somebody wants tried again is: a failure that passes is no reason to throw it away.
    let beside = settings.clone().set("snapshot", "builders", "1");
    let start = || container(env, &beside).sh("sleep 1000").start();
    fs::write(&broken, "")?;
    let fails = start()?;
    is_direct(env, &fails, NOT_RESTORED)?;
    ensure!(builders(env).is_empty(), "it is tried, and nobody wants that");
    fails.remove()?;
    retry()?;
    let fails = start()?;
    is_direct(env, &fails, NOT_RESTORED)?;
    eventually(Duration::from_secs(5), || builders(env).first().copied()).context("it is not tried again")?;
    finished(env)?;
    ensure!(list(env, &settings)?.is_empty(), "what fails is still there");
    fails.remove()?;
    fs::remove_file(&broken)?;
    retry()?;
    let first = start()?;
    is_direct(env, &first, "there is no base snapshot yet")?;
    finished(env)?;
    first.remove()?;
    let second = start()?;
    is_base(env, &second)?;
    second.remove()
}

/// Without which feature it works, and which rung that is.
fn climbs(env: &Env, at: &str, refused: &str, works: Option<(&str, &str)>) -> Result<()> {
    let (unless, rung) = works.unzip();
    let faulty = Faulty { at, text: refused, unless, only: None, hangs: None };
    let settings = faulty.set(own(env), env, "faulty")?;
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
    match rung {
        Some(rung) => again(env, &settings, rung, refused),
        None => hopeless(env, &settings, refused),
    }
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

/// What is forgotten is found out again beside the next pod, which is restored from the barer rung meanwhile.
fn again(env: &Env, settings: &Settings, rung: &str, refused: &str) -> Result<()> {
    let settings = settings.clone().set("snapshot", "builders", "1");
    env.chsnap_with(&settings, ["doctor", "--retry"])?.output()?;
    let started = container(env, &settings).sh("sleep 1000").start()?;
    is_base(env, &started)?;
    eventually(Duration::from_secs(5), || builders(env).first().copied()).context("it is not tried again")?;
    finished(env)?;
    started.remove()?;
    told(env, &settings, Some(rung), refused)?;
    let started = container(env, &settings).sh("sleep 1000").start()?;
    is_base(env, &started)?;
    ensure!(builders(env).is_empty(), "it is tried a third time");
    started.remove()
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
