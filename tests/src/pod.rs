//! Containers under test.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs,
    path::PathBuf,
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use containerd_shim_protos::shim_sync::{Client, TaskClient};

use crate::{Env, Output, Run, Settings, Vmm, containerd::locked, env::number, leak, ways, ways::Way};

/// The demo image.
pub const IMAGE: &str = "localhost/chsnap/python-demo:latest";

/// Booting takes seconds under emulation; a machine that is busy besides takes more.
const START_LIMIT: Duration = Duration::from_secs(90);

/// The names of all containers so far.
pub(crate) static IDS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// A container to be made.
#[derive(Debug)]
pub struct Container<'a> {
    env: &'a Env,
    /// Its name.
    pub id: String,
    flags: Vec<OsString>,
    image: String,
    command: Vec<OsString>,
    settings: Settings,
}

impl<'a> Container<'a> {
    /// Of the demo image, with the case's own settings.
    pub(crate) fn new(env: &'a Env, id: String) -> Self {
        let settings = env.settings();
        Self { env, id, flags: Vec::new(), image: IMAGE.into(), command: Vec::new(), settings }
    }

    /// Adds flags of `ctr run`.
    #[must_use]
    pub fn flags<S: AsRef<OsStr>>(mut self, flags: impl IntoIterator<Item = S>) -> Self {
        self.flags.extend(flags.into_iter().map(|f| f.as_ref().to_owned()));
        self
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(self, name: &str, value: &str) -> Self {
        self.flags(["--annotation", &format!("{name}={value}")])
    }

    /// Into the pod of the container `sandbox`, as CRI implementations say it; `role` is `sandbox` or `container`.
    #[must_use]
    pub fn of_pod(self, sandbox: &str, role: &str) -> Self {
        self.annotation("io.kubernetes.cri.sandbox-id", sandbox).annotation("io.kubernetes.cri.container-type", role)
    }

    /// Another name.
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        self.id = id.into();
        self
    }

    /// Another image; none where it is empty, since a specification (`--config`) says everything.
    #[must_use]
    pub fn image(mut self, image: &str) -> Self {
        self.image = image.into();
        self
    }

    /// What it runs; without it, what the image says.
    #[must_use]
    pub fn command<S: AsRef<OsStr>>(mut self, command: impl IntoIterator<Item = S>) -> Self {
        self.command = command.into_iter().map(|c| c.as_ref().to_owned()).collect();
        self
    }

    /// A shell script instead.
    #[must_use]
    pub fn sh(self, script: &str) -> Self {
        self.command(["/bin/sh", "-c", script])
    }

    /// A Python program instead.
    #[must_use]
    pub fn python(self, program: &str) -> Self {
        self.command(["python3", "-c", program])
    }

    /// Changes the configuration.
    #[must_use]
    pub fn settings(mut self, change: impl FnOnce(Settings) -> Settings) -> Self {
        self.settings = change(self.settings);
        self
    }

    /// Whether the base snapshot of ordinary pods fits this one.
    fn is_ordinary(&self) -> bool {
        const OTHERS: [&str; 7] = [
            "--memory-limit",
            "--cpus",
            "--runtime-config-path",
            "io.chsnap.memory",
            "io.chsnap.vcpus",
            "io.chsnap.vmm",
            "io.chsnap.snapshot",
        ];
        let flags = self.flags.iter().map(|flag| flag.to_string_lossy());
        // How patient the shim is in a pod that runs is no matter of its start.
        let patient = |settings: Settings| settings.set("deadlines", "agent_call", "0").text();
        patient(self.settings.clone()) == patient(self.env.settings())
            && flags.filter(|flag| OTHERS.iter().any(|other| flag.starts_with(other))).count() == 0
    }

    /// Whether it comes into another container's pod, whose VM is called after that.
    fn is_further(&self) -> bool {
        self.flags.iter().any(|flag| flag == "io.kubernetes.cri.container-type=container")
    }

    /// `verb` (`run`, `container create`) with everything that describes the container.
    pub fn ctr(&self, verb: &[&str], flags: &[&str], wrapper: Option<&[&str]>) -> Result<Run> {
        locked(&IDS).insert(self.id.clone());
        let (mut words, mut command) = (self.flags.clone(), self.command.clone());
        if self.env.way != Way::Direct && self.is_ordinary() {
            let may_be_launched = self.env.way == Way::Image && self.image == IMAGE;
            let launched = if may_be_launched { ways::launched(&words, &command) } else { None };
            // A further one starts no VM.
            if !self.is_further() {
                ways::expect(self.env, &self.id, if launched.is_some() { Way::Image } else { Way::Base });
            }
            (words, command) = launched.unwrap_or((words, command));
        }
        let mut run = self.env.ctr().under(wrapper).args(verb).args(flags);
        run = match self.env.vmm {
            Vmm::Runc => run.args(["--runtime", "io.containerd.runc.v2"]),
            _ => {
                let config = self.settings.write(&self.env.dir)?;
                run.args(["--runtime", "io.containerd.chsnap.v2", "--runtime-config-path"]).arg(config)
            }
        };
        if verb == ["run"] {
            run = run.arg("--fifo-dir").arg(self.env.daemon.run.join("fifo"));
        }
        let image = Some(&self.image).filter(|image| !image.is_empty());
        Ok(run.args(words).args(image).arg(&self.id).args(command).limit(START_LIMIT))
    }

    /// `ctr run --rm` in the foreground.
    pub fn run(self) -> Result<Run> {
        self.ctr(&["run"], &["--rm"], None)
    }

    /// Runs it in the foreground to its end.
    pub fn output(self) -> Result<Output> {
        self.run()?.output()
    }

    /// `ctr run -d`; its output goes to a file.
    pub fn start(self) -> Result<Started<'a>> {
        let log = self.env.dir.join(format!("{}.log", self.id));
        let run = self.ctr(&["run"], &["-d", "--log-uri", &format!("file://{}", log.display())], None)?;
        // From here on, there may be something to remove.
        let started = Started { env: self.env, id: self.id.clone(), log, removed: false };
        run.output()?.success()?;
        if !self.is_further() {
            ways::started(self.env, &self.id);
        }
        Ok(started)
    }
}

/// A container that runs, or has run; removed when dropped.
#[derive(Debug)]
pub struct Started<'a> {
    env: &'a Env,
    /// Its name.
    pub id: String,
    log: PathBuf,
    removed: bool,
}

impl<'a> Started<'a> {
    /// Takes care of a container that was made in another way.
    #[must_use]
    pub fn adopt(env: &'a Env, id: &str) -> Self {
        Self { env, id: id.into(), log: env.dir.join(format!("{id}.log")), removed: false }
    }

    /// `ctr task exec` with flags.
    pub fn exec_with<S: AsRef<OsStr>>(&self, flags: &[&str], command: impl IntoIterator<Item = S>) -> Run {
        let exec = format!("e{}", number());
        let fifos = self.env.daemon.run.join("fifo");
        let run = self.env.ctr().run(["task", "exec"]).arg("--fifo-dir").arg(fifos);
        let run = if flags.contains(&"--exec-id") { run } else { run.args(["--exec-id", &exec]) };
        run.args(flags).arg(&self.id).args(command)
    }

    /// `ctr task exec`.
    pub fn exec<S: AsRef<OsStr>>(&self, command: impl IntoIterator<Item = S>) -> Run {
        self.exec_with(&[], command)
    }

    /// Runs a shell script inside, which must succeed; answers its output, trimmed.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.exec(["/bin/sh", "-c", script]).text()
    }

    /// Runs a Python program inside, which must succeed; answers its output, trimmed.
    pub fn python(&self, program: &str) -> Result<String> {
        self.exec(["python3", "-c", program]).text()
    }

    /// Sends a signal with `ctr task kill`.
    pub fn kill(&self, signal: &str) -> Result<Output> {
        self.env.ctr().output(["task", "kill", "-s", signal, &self.id])
    }

    /// What it printed so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has printed `text`.
    pub fn wait_log(&self, text: &str) -> Result<()> {
        let found = crate::eventually(Duration::from_secs(30), || self.log().contains(text).then_some(()));
        found.with_context(|| format!("{} never printed {text:?}, but: {}", self.id, self.log()))
    }

    /// Its shim, spoken to as containerd does, for what `ctr` has no word for.
    pub fn shim(&self) -> Result<TaskClient> {
        let socket = leak::shim_socket(&self.env.daemon, &self.id);
        Ok(TaskClient::new(Client::connect(&format!("unix://{}", socket.display()))?))
    }

    /// The pod's directory on the host.
    #[must_use]
    pub fn pod_dir(&self) -> PathBuf {
        self.env.daemon.pods().join(&self.env.daemon.namespace).join(&self.id)
    }

    /// The directory on the host into which the container's writes go.
    pub fn upper(&self, snapshotter: &str) -> Result<PathBuf> {
        let args = ["snapshot", "--snapshotter", snapshotter, "mounts", "/mnt", &self.id];
        let mount = self.env.ctr().text(args)?;
        let upper = mount.split([' ', ',']).find_map(|o| o.strip_prefix("upperdir="));
        let native = mount.split(' ').skip_while(|w| *w != "bind").nth(1);
        upper.or(native).map(PathBuf::from).with_context(|| format!("no directory in: {mount}"))
    }

    /// Ends and removes it: `ctr task rm -f`, `ctr container rm`.
    pub fn remove(mut self) -> Result<()> {
        self.take_down()
    }

    /// It has been removed in another way.
    pub fn forget(mut self) {
        self.removed = true;
    }

    fn take_down(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.removed, true) {
            return Ok(());
        }
        let ctr = self.env.ctr();
        let task = ctr.run(["task", "rm", "-f", &self.id]).limit(Duration::from_secs(30)).output()?;
        let container = ctr.output(["container", "rm", &self.id])?;
        if container.code != 0 {
            bail!("{}\n{}", task.whole(), container.whole());
        }
        Ok(())
    }
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        let _ = self.take_down();
    }
}
