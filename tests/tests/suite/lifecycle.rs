//! From `ctr run` to `ctr task rm`.

use std::{fs, os::unix::fs::PermissionsExt as _, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use chsnap_tests::{Env, IMAGE, Run, Started, Version, eventually};
use serde_json::{Value, json};

crate::cases! {
    Everywhere: foreground, missing_program, detached, created_then_started, same_name, user;
    Vms: shape, network;
}

/// What a process sees of itself.
const LOOK: &str = "
import json, os, socket, sys
print(json.dumps({
    'args': sys.argv[1:], 'cwd': os.getcwd(), 'uid': os.getuid(), 'gid': os.getgid(), 'pid': os.getpid(),
    'env': {k: os.environ.get(k) for k in ('WORD', 'EMPTY', 'PATH')},
    'host': socket.gethostname(), 'boot': open('/proc/sys/kernel/random/boot_id').read().strip(),
    'proc': os.path.exists('/proc/1/comm'), 'null': os.path.exists('/dev/null'), 'pts': os.path.exists('/dev/pts/ptmx'),
}))
sys.exit(7)
";

fn foreground(env: &Env) -> Result<()> {
    let arguments = ["two words", "", "ünï→✓", "'\"$HOME\\"];
    let container = env.container().flags(["--cwd", "/usr/lib", "--env", "WORD=a b=c", "--env", "EMPTY="]);
    let command = [&["python3", "-c", LOOK][..], &arguments].concat();
    let output = container.command(command).output()?.code(7)?;
    let seen: Value = serde_json::from_slice(&output.stdout).with_context(|| output.whole())?;
    ensure!(seen["args"] == json!(arguments), "{seen}");
    ensure!(seen["cwd"] == "/usr/lib", "{seen}");
    ensure!((&seen["uid"], &seen["gid"], &seen["pid"]) == (&json!(0), &json!(0), &json!(1)), "{seen}");
    ensure!(seen["env"]["WORD"] == "a b=c" && seen["env"]["EMPTY"] == "", "{seen}");
    ensure!(seen["env"]["PATH"].as_str().is_some_and(|p| p.contains("/usr/bin")), "{seen}");
    ensure!(seen["proc"] == true && seen["null"] == true && seen["pts"] == true, "{seen}");
    // A guest's kernel may be of the host's release, but not of its boot.
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure!((seen["boot"] != host.trim()) == env.is_vm(), "host {host}, container {seen}");
    Ok(())
}

fn missing_program(env: &Env) -> Result<()> {
    let output = env.container().command(["/no/such/program"]).output()?;
    ensure!(output.code != 0, "{}", output.whole());
    let said = output.stderr.to_lowercase();
    ensure!(said.contains("/no/such/program") && said.contains("no such file or directory"), "{}", output.whole());
    let output = env.container().command(["nosuchprogram"]).output()?;
    ensure!(output.code != 0 && output.stderr.contains("nosuchprogram"), "{}", output.whole());
    // A file that is there and is no program.
    let output = env.container().command(["/etc/passwd"]).output()?;
    ensure!(output.code != 0 && output.stderr.to_lowercase().contains("permission denied"), "{}", output.whole());
    // Nobody waits for one that is detached, nor takes down what would be left of it.
    let detached = env.container().command(["/no/such/program"]);
    let id = detached.id.clone();
    let output = detached.ctr(&["run"], &["-d"], None)?.output()?;
    ensure!(output.code != 0 && output.stderr.contains("/no/such/program"), "{}", output.whole());
    ensure!(env.ctr().status(&id)?.is_none(), "there is a task, and nothing that runs");
    let gone = eventually(Duration::from_secs(5), || env.processes(env.vmm_name()).is_empty().then_some(()));
    ensure!(gone.is_some(), "{:?}", env.processes(env.vmm_name()));
    env.ctr().text(["container", "rm", &id])?;
    Ok(())
}

/// Whoever enters the network namespace of the task's process, as a CNI plugin does, must not find the host's.
fn network(env: &Env) -> Result<()> {
    let host = fs::read_link("/proc/self/ns/net")?;
    let of = |started: &Started<'_>| -> Result<std::path::PathBuf> {
        let pid = env.ctr().pid(&started.id)?.context("no task")?;
        Ok(fs::read_link(format!("/proc/{pid}/ns/net"))?)
    };
    let alone = env.container().sh("echo up; sleep 1000").start()?;
    ensure!(of(&alone)? != host, "the task's process is in the host's network namespace");
    alone.remove()?;
    let file = env.dir.join("network");
    fs::write(&file, "")?;
    let namespace = file.display().to_string();
    Run::new("unshare").args([&format!("--net={namespace}"), "true"]).output()?.success()?;
    let given = (|| {
        let flags = ["--with-ns".to_owned(), format!("network:{namespace}")];
        let given = env.container().flags(&flags).sh("echo up; sleep 1000").start()?;
        let named = [&format!("--net={namespace}"), "readlink", "/proc/self/ns/net"];
        let (inside, named) = (of(&given)?, Run::new("nsenter").args(named).text()?);
        ensure!(inside.display().to_string() == named.trim(), "it is in {} and not in {named}", inside.display());
        given.remove()?;
        // As CRI has it: the sandbox is given it, and the others that of the sandbox's process, which is none's own here.
        let pause = env.container();
        let id = pause.id.clone();
        let pause = pause.of_pod(&id, "sandbox").flags(flags).command(["/pause"]).start()?;
        let app = env.container().of_pod(&id, "container").flags(["--with-ns", "network:/proc/self/ns/net"]);
        let app = app.sh("echo up; sleep 1000").start()?;
        ensure!(of(&app)? == inside, "the pod's container is not in the pod's network namespace");
        app.remove()?;
        pause.remove()
    })();
    Run::new("umount").arg(&file).output()?.success()?;
    given
}

fn detached(env: &Env) -> Result<()> {
    let ctr = env.ctr();
    let pid_file = env.dir.join("pid");
    let flags = ["--pid-file".to_string(), pid_file.display().to_string()];
    let started = env.container().flags(flags).sh("echo up; exec sleep 1000").start()?;
    started.wait_log("up")?;
    let id = started.id.as_str();
    ensure!(ctr.status(id)?.as_deref() == Some("RUNNING"));
    let pid = std::fs::read_to_string(&pid_file)?;
    ensure!(ctr.text(["task", "ls"])?.contains(pid.trim()), "the pid file says {pid}");
    ensure!(std::path::Path::new("/proc").join(pid.trim()).exists(), "no process {pid} on the host");
    ensure!(ctr.text(["task", "ps", id])?.contains(pid.trim()));

    let refused = ctr.output(["task", "rm", id])?;
    ensure!(refused.code != 0, "a running task was removed: {}", refused.whole());
    started.kill("SIGKILL")?.success()?;
    ctr.wait_status(id, "STOPPED")?;
    let again = started.kill("SIGTERM")?;
    ensure!(again.code != 0 && again.stderr.contains("process already finished"), "{}", again.whole());
    let removed = ctr.output(["task", "rm", id])?;
    let told = removed.code == 137 || removed.stderr.contains("137");
    ensure!(told, "the exit status is not told: {}", removed.whole());
    ensure!(ctr.status(id)?.is_none());
    ctr.text(["container", "rm", id])?;
    started.forget();
    Ok(())
}

fn created_then_started(env: &Env) -> Result<()> {
    let container = env.container().sh("echo started; sleep 1000");
    let id = container.id.clone();
    let log = format!("file://{}", env.dir.join(format!("{id}.log")).display());
    let started = if env.daemon.version == Version::V1_6 {
        // `ctr container create` of 1.6 takes any --runtime-config-path for a specification.
        container.start()?
    } else {
        container.ctr(&["container", "create"], &[], None)?.text()?;
        let started = Started::adopt(env, &id);
        env.ctr().text(["task", "start", "-d", "--log-uri", &log, &id])?;
        started
    };
    started.wait_log("started")?;
    // The same container runs again, on the same root.
    started.sh("echo kept > /kept")?;
    env.ctr().run(["task", "rm", "-f", &id]).output()?;
    env.ctr().text(["task", "start", "-d", "--log-uri", &log, &id])?;
    ensure!(started.sh("cat /kept")? == "kept");
    started.remove()
}

fn same_name(env: &Env) -> Result<()> {
    let started = env.container().id("twin").sh("sleep 1000").start()?;
    let second = env.container().id("twin").sh("true").ctr(&["run"], &["-d"], None)?.output()?;
    ensure!(second.code != 0 && second.stderr.contains("already exists"), "{}", second.whole());
    ensure!(started.sh("echo still here")? == "still here");
    started.remove()?;
    // The name is free again at once.
    let third = env.container().id("twin").command(["echo", "third"]).output()?.success()?;
    ensure!(third.text() == "third\n");
    Ok(())
}

fn user(env: &Env) -> Result<()> {
    let started = env.container().sh("sleep 1000").start()?;
    for (user, expected) in [("65534:65534", "65534 65534"), ("nobody", "65534 65534"), ("1:0", "1 0")] {
        let seen = started.exec_with(&["--user", user], ["sh", "-c", "echo $(id -u) $(id -g)"]).text()?;
        ensure!(seen == expected, "{user}: {seen}");
    }
    let denied = started.exec_with(&["--user", "nobody"], ["cat", "/etc/shadow"]).output()?;
    ensure!(denied.code == 1, "{}", denied.whole());
    let caps = started.sh("grep CapEff /proc/self/status")?;
    ensure!(caps.ends_with("a80425fb"), "not the capabilities that ctr gives: {caps}");
    ensure!(started.exec_with(&["--cwd", "/tmp"], ["pwd"]).text()? == "/tmp");
    started.remove()?;
    if env.daemon.version == Version::V1_6 {
        // Whose client has no flag for a container's user.
        return Ok(());
    }
    // A capability that the user has (CAP_DAC_OVERRIDE) opens the way to its program, too.
    let private = env.dir.join("private");
    fs::create_dir(&private)?;
    fs::copy("/bin/true", private.join("program"))?;
    fs::set_permissions(&private, fs::Permissions::from_mode(0o700))?;
    let mount = format!("type=bind,src={},dst=/private,options=rbind:ro", private.display());
    env.container().flags(["--user", "1000", "--mount", &mount]).command(["/private/program"]).output()?.success()?;
    Ok(())
}

/// Limits become the machine's size.
fn shape(env: &Env) -> Result<()> {
    let script = "nproc; sed -n 's/^Mem\\(Total\\|Available\\): *\\([0-9]*\\) kB/\\2/p' /proc/meminfo";
    // CPUs, all of the memory in MiB, and what is left of it for processes.
    let size = |output: chsnap_tests::Output| -> Result<(u64, u64, u64)> {
        let text = output.success()?.text();
        let numbers = text.lines().map(|l| Ok(l.trim().parse::<u64>()?)).collect::<Result<Vec<_>>>()?;
        let [cpus, total, available] = numbers[..] else { bail!("{IMAGE}: {text}") };
        Ok((cpus, total >> 10, available >> 10))
    };
    // The kernel keeps a part for itself.
    let fits = |seen: u64, given: u64| seen < given && seen + given / 4 > given;
    let limit = (192 << 20).to_string();
    let limited = env.container().flags(["--memory-limit", &limit, "--cpus", "1.5"]).sh(script).output()?;
    let (cpus, memory, available) = size(limited)?;
    ensure!(cpus == 2 && fits(memory, 192 + 96), "limits gave {cpus} CPUs, {memory} MiB");
    ensure!(
        available > 192,
        "before a container reaches its 192 MiB the guest is out of memory: {available} MiB are left"
    );
    let container = env.container().annotation("io.chsnap.memory", "320MiB").annotation("io.chsnap.vcpus", "1");
    let (cpus, memory, _) = size(container.sh(script).output()?)?;
    ensure!(cpus == 1 && fits(memory, 320), "annotations gave {cpus} CPUs, {memory} MiB");
    Ok(())
}
