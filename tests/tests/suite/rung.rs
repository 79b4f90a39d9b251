//! What a rung of the strategy ladder hides from the guest, as the guest sees it.

use std::fs;

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Env, Started};

crate::cases! {
    Once: standard, no_pmu, aggressive, unknown;
}

/// Whether there are performance counters, and scalable vectors.
type Features = (bool, bool);

fn standard(env: &Env) -> Result<()> {
    sees(env, "standard", |host| host)
}

fn no_pmu(env: &Env) -> Result<()> {
    sees(env, "no-pmu", |(_, sve)| (false, sve))
}

fn aggressive(env: &Env) -> Result<()> {
    sees(env, "aggressive", |_| (false, false))
}

fn unknown(env: &Env) -> Result<()> {
    let said = env.container().settings(|settings| settings.set("vmm", "rung", "\"bare\"")).output()?.whole();
    ensure!(said.contains("bare") && said.contains("aggressive"), "{said}");
    Ok(())
}

/// x86_64 has neither feature in this sense: there, a rung changes nothing.
fn sees(env: &Env, rung: &str, mask: fn(Features) -> Features) -> Result<()> {
    let rung_key = format!("\"{rung}\"");
    let script = "grep -m1 -E '^(Features|flags)' /proc/cpuinfo; echo; ls /sys/bus/event_source/devices";
    let started = env.container().settings(|settings| settings.set("vmm", "rung", rung_key)).start()?;
    let said = started.sh(script)?;
    let (cpu, sources) = said.split_once("\n\n").context("no list of event sources")?;
    let expected = if cfg!(target_arch = "aarch64") { mask(offered(&started)?) } else { (false, false) };
    let seen = features(cpu, sources.lines());
    ensure!(seen == expected, "(pmu, sve) is {seen:?} and not {expected:?}: {said}");
    started.remove()
}

fn features<'a>(cpu: &str, mut sources: impl Iterator<Item = &'a str>) -> Features {
    (sources.any(|name| name.starts_with("armv8_pmu")), cpu.split_whitespace().any(|word| word == "sve"))
}

/// What a guest without a mask has: with KVM what the host has, else what QEMU emulates. On a host with neither
/// feature nothing is tested, so `CHSNAP_TEST_FEATURES` names those that have to be there, with commas between, and with
/// `no-` before it one that must not.
fn offered(started: &Started<'_>) -> Result<Features> {
    let state: serde_json::Value = serde_json::from_slice(&fs::read(started.pod_dir().join("state.json"))?)?;
    if state["accelerator"] == "tcg" {
        return Ok((true, true));
    }
    let sources = fs::read_dir("/sys/bus/event_source/devices")?;
    let names =
        sources.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<Vec<_>>>()?;
    let host = features(&fs::read_to_string("/proc/cpuinfo")?, names.iter().map(String::as_str));
    let wanted = std::env::var("CHSNAP_TEST_FEATURES").unwrap_or_default();
    for (name, there) in [("pmu", host.0), ("sve", host.1)] {
        ensure!(there || !wanted.split(',').any(|w| w == name), "the host has no {name}, so nothing is hidden here");
        ensure!(!there || !wanted.split(',').any(|w| w.strip_prefix("no-") == Some(name)), "the host has {name}");
    }
    Ok(host)
}
