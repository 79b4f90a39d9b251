//! VMMs that fail where those of some hosts do: a program that stands between chsnap and the real one, on its command
//! line and on its control socket.

use std::{fs, os::unix::fs::PermissionsExt, path::Path};

use anyhow::{Context, Result};
use chsnap_tests::{Env, Settings, Tools, Vmm};
use serde_json::json;

use crate::errors::{script_at, vmm_key};

/// What an arm64 host whose KVM refuses a register makes Cloud Hypervisor say when it restores.
pub const NOT_RESTORED: &str = "Could not set the vCPU state SetSysRegister(Invalid argument (os error 22))";
/// When it saves.
pub const NOT_SAVED: &str = "GetAarchCoreRegister(Invalid argument (os error 22))";

const PROGRAM: &str = include_str!("faulty_vmm.py");

/// A VMM that fails.
#[derive(Debug, Clone, Copy)]
pub struct Faulty<'a> {
    /// What it fails to do: `save` or `restore`; with QEMU also `version`, which is to hand on the protocol's.
    pub at: &'a str,
    /// What it says then.
    pub text: &'a str,
    /// Not with machines that lack this: `pmu` or `sve`.
    pub unless: Option<&'a str>,
    /// Only while there is this file.
    pub only: Option<&'a Path>,
    /// It says nothing, and does not end, while there is this file.
    pub hangs: Option<&'a Path>,
}

/// The VMM's program.
fn real(env: &Env) -> Result<&'static Path> {
    let tools = Tools::get();
    let real = match env.vmm {
        Vmm::CloudHypervisor => tools.cloud_hypervisor.as_deref(),
        Vmm::Qemu | Vmm::Runc => Some(tools.qemu.as_path()),
    };
    real.context("no such VMM")
}

/// Settings with a VMM that differs from its other releases in bytes alone, and replaces them where they are.
pub fn release(number: u32, settings: Settings, env: &Env) -> Result<Settings> {
    let path = env.dir.join("released-vmm");
    let new = path.with_extension("new");
    script_at(&new, &format!("# release {number}\nexec {:?} \"$@\"", real(env)?))?;
    fs::rename(&new, &path)?;
    Ok(settings.path("vmm", vmm_key(env), path))
}

impl<'a> Faulty<'a> {
    /// One that restores nothing while there is this file.
    pub fn restores_nothing_while(broken: &'a Path) -> Self {
        Self { at: "restore", text: NOT_RESTORED, unless: None, only: Some(broken), hangs: None }
    }

    /// Settings with it as the VMM; its name has to be its own.
    pub fn set(&self, settings: Settings, env: &Env, name: &str) -> Result<Settings> {
        let key = vmm_key(env);
        let path = env.dir.join(name);
        let Self { at, text, unless, only, hangs } = self;
        // Its own to each case, as no two hosts have the same VMM: what is found out of one is remembered.
        let how = json!({
            "case": path, "vmm": key, "real": real(env)?, "at": at, "text": text, "unless": unless, "while": only,
            "hangs_while": hangs,
        });
        fs::write(&path, PROGRAM.replace("@HOW@", &how.to_string()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(settings.path("vmm", key, path))
    }
}
