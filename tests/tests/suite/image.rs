//! The operator's commands: `chsnap image import`, `ps` and `doctor`.

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use chsnap_tests::{Env, Run, Tools};
use serde_json::Value;

crate::cases! {
    Vms: ps;
    Once: directory, ext4, tar, doctor;
}

/// Makes an image of `rootfs`.
pub fn import(env: &Env, rootfs: &Path, name: &str) -> Result<()> {
    let ctr = Tools::get().containerd(env.daemon.version).join("ctr");
    let import = Run::new(Tools::get().bin.join("chsnap")).args(["image", "import", "--name", name]);
    let import = import.arg("--ctr").arg(ctr).arg("--address").arg(env.daemon.run.join("c.sock"));
    let import = import.args(["--namespace", &env.daemon.namespace, "--env", "GREETING=hello from an import"]);
    import.arg(rootfs).args(["--", "/bin/busybox", "sh", "-c", "echo $GREETING; cat /etc/marker"]).text()?;
    Ok(())
}

/// Imports `rootfs`, runs the image, and removes it.
fn import_and_run(env: &Env, rootfs: &Path) -> Result<()> {
    let name = "localhost/chsnap/imported:latest";
    import(env, rootfs, name)?;
    let output = env.container().image(name).output();
    env.ctr().text(["image", "rm", "--sync", name])?;
    let output = output?.success()?;
    ensure!(output.text() == "hello from an import\nmarked\n", "{}", output.whole());
    Ok(())
}

/// A root that busybox alone fills.
pub fn root(env: &Env) -> Result<std::path::PathBuf> {
    let root = env.dir.join("root");
    for dir in ["bin", "etc", "proc", "sys", "dev", "run", "tmp"] {
        fs::create_dir_all(root.join(dir))?;
    }
    let guest = Tools::get().initramfs.parent().context("no directory of the guest")?;
    fs::copy(guest.join("busybox"), root.join("bin/busybox"))?;
    fs::write(root.join("etc/marker"), "marked\n")?;
    Ok(root)
}

fn directory(env: &Env) -> Result<()> {
    import_and_run(env, &root(env)?)
}

fn ext4(env: &Env) -> Result<()> {
    let image = env.dir.join("rootfs.ext4");
    let mke2fs = Run::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(root(env)?).arg(&image).arg("16M");
    mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output()?.success()?;
    import_and_run(env, &image)
}

fn tar(env: &Env) -> Result<()> {
    let archive = env.dir.join("rootfs.tar.gz");
    Run::new("tar").arg("-czf").arg(&archive).arg("-C").arg(root(env)?).arg(".").output()?.success()?;
    import_and_run(env, &archive)
}

fn ps(env: &Env) -> Result<()> {
    let list = |env: &Env| -> Result<Value> { Ok(serde_json::from_str(&env.chsnap(["ps", "--json"])?.text()?)?) };
    ensure!(list(env)? == Value::Array(Vec::new()), "{}", list(env)?);
    let container = env.container().annotation("io.chsnap.expose", "8080").annotation("io.chsnap.memory", "300MiB");
    let started = container.sh("sleep 1000").start()?;
    let all = list(env)?;
    let pod = all.get(0).context("no pod")?;
    ensure!(all.as_array().is_some_and(|a| a.len() == 1), "{all}");
    ensure!(pod["id"] == started.id.as_str() && pod["namespace"] == env.daemon.namespace.as_str(), "{pod}");
    ensure!(pod["status"] == "running" && pod["vmm"] == env.vmm.to_string().as_str(), "{pod}");
    ensure!(pod["memory_mib"] == 300 && pod["guest_kernel"] == started.sh("uname -r")?.as_str(), "{pod}");
    ensure!(pod["exposed"][0]["guest_port"] == 8080, "{pod}");
    let shim = env.process("containerd-shim-chsnap")?.pid;
    let vmm = env.process(env.vmm_name())?.pid;
    ensure!(pod["pid"] == shim && pod["vmm_pid"] == vmm, "shim {shim}, VMM {vmm}: {pod}");
    let text = env.chsnap(["ps"])?.text()?;
    ensure!(text.lines().count() == 2 && text.contains(&started.id), "{text}");
    started.remove()
}

fn doctor(env: &Env) -> Result<()> {
    let report = env.chsnap(["doctor", "--json"])?.output()?.success()?;
    let json: Value = serde_json::from_slice(&report.stdout).with_context(|| report.whole())?;
    ensure!(json["ok"] == true && json["driver"]["vmm"] == env.vmm.to_string().as_str(), "{json}");
    let text = env.chsnap(["doctor"])?.text()?;
    ensure!(text.contains(&format!("A container would run on {}", env.vmm)), "{text}");
    // What is missing is named, and the status says that nothing could run.
    let config = env.settings().path("guest", "kernel", "/no/such/vmlinux").write(&env.dir)?;
    let broken = Run::new(Tools::get().bin.join("chsnap")).args(["doctor", "--config"]).arg(config).output()?;
    ensure!(broken.code == 1 && broken.text().contains("/no/such/vmlinux"), "{}", broken.whole());
    Ok(())
}
