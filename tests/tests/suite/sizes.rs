//! Limits that are no timings.

use std::fs;

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Env, Tools, rss_kib, rss_parts};

crate::cases! {
    Once: agent, shim;
}

fn agent(_: &Env) -> Result<()> {
    let guest = Tools::get().initramfs.parent().context("no directory of the guest")?;
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let built = Tools::get().target.join(triple).join("agent/chsnap-agent");
    let agent = [guest.join("chsnap-agent"), built].into_iter().find(|p| p.is_file());
    let agent = agent.context("no agent beside the initramfs: run hack/build.sh")?;
    let bytes = fs::metadata(&agent)?.len();
    ensure!(bytes <= 2 << 20, "{} has {bytes} bytes", agent.display());
    Ok(())
}

fn shim(env: &Env) -> Result<()> {
    let started = env.container().start()?;
    started.wait_log("listening")?;
    let shim = env.process("containerd-shim-chsnap")?;
    let rss = rss_kib(shim.pid)?;
    // What a debug build carries along is none of the shim's own.
    let limit = if Tools::get().bin.ends_with("release") { 10 << 10 } else { 40 << 10 };
    ensure!(rss < limit, "{rss} KiB: {}", rss_parts(shim.pid));
    started.remove()
}
