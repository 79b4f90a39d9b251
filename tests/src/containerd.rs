//! A containerd of the tests' own: own root, state, address and namespace.

use std::{
    collections::BTreeSet,
    fmt, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::{Ctr, Tools, eventually, leak, proc};

/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 1.6, as in Debian 12: version 2 of the task API.
    V1_6,
    /// 2.1: version 3 of the task API.
    V2_1,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1_6 => "1.6",
            Self::V2_1 => "2.1",
        })
    }
}

/// Every run's directory is `<this><process>-<number>`.
const RUN_PREFIX: &str = "/run/chsnap-test-";

static RUNNING: Mutex<Vec<Arc<Containerd>>> = Mutex::new(Vec::new());

/// A running containerd.
#[derive(Debug)]
pub struct Containerd {
    /// Which.
    pub version: Version,
    /// Whose: cases that run at the same time have containerds of their own.
    pub lane: usize,
    /// Sockets, state, fifos and temporary files.
    pub run: PathBuf,
    /// Its content, and the cases' files.
    pub root: PathBuf,
    /// The namespace of all tests.
    pub namespace: String,
    /// Its client.
    pub ctr: Ctr,
    programs: PathBuf,
    process: Mutex<Option<Child>>,
    /// What it had at the end of a case that left nothing.
    pub(crate) had: Mutex<Option<BTreeSet<String>>>,
}

impl Containerd {
    /// The containerd of this version and lane, started and given the image when it is first asked for.
    pub fn of(version: Version, lane: usize) -> Result<Arc<Self>> {
        let mut running = locked(&RUNNING);
        if let Some(found) = running.iter().find(|c| c.version == version && c.lane == lane) {
            return Ok(Arc::clone(found));
        }
        let started = Arc::new(Self::prepare(version, lane, running.len() + 1)?);
        // Listed before it starts, so that it is taken down whatever happens next.
        running.push(Arc::clone(&started));
        drop(running);
        started.start()?;
        started.ctr.run(["image", "import"]).arg(&Tools::get().image).limit(Duration::from_secs(120)).text()?;
        Ok(started)
    }

    fn prepare(version: Version, lane: usize, n: usize) -> Result<Self> {
        let tools = Tools::get();
        let me = std::process::id();
        let run = PathBuf::from(format!("{RUN_PREFIX}{me}-{n}"));
        let root = tools.target.join(format!("tests/{me}-{n}"));
        for dir in [&run.join("s"), &run.join("fifo"), &run.join("tmp"), &root] {
            fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        }
        // For the sweep of a later run.
        fs::write(run.join("root"), root.display().to_string())?;
        let programs = tools.containerd(version);
        let namespace = format!("cht{me}-{n}");
        let ctr = Ctr::new(programs.join("ctr"), run.join("c.sock"), &namespace, &run);
        Ok(Self {
            version,
            lane,
            run,
            root,
            namespace,
            ctr,
            programs,
            process: Mutex::new(None),
            had: Mutex::default(),
        })
    }

    /// Starts the process, at first or again.
    pub fn start(&self) -> Result<()> {
        let config = self.run.join("config.toml");
        fs::write(&config, self.config())?;
        let log = fs::OpenOptions::new().append(true).create(true).open(self.log())?;
        let tools = Tools::get();
        let path = [&tools.bin, &self.programs, &tools.target.join("tools/bin")].map(|p| p.display().to_string());
        let path = format!("{}:{}", path.join(":"), proc::path(&self.run));
        let child = Command::new(self.programs.join("containerd"))
            .arg("--config")
            .arg(&config)
            .env("PATH", path)
            .env("TMPDIR", self.run.join("tmp"))
            .env(proc::MARK, &self.run)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start containerd")?;
        *locked(&self.process) = Some(child);
        let answers = || self.ctr.run(["version"]).limit(Duration::from_secs(10)).text().ok();
        if eventually(Duration::from_secs(20), answers).is_none() {
            bail!("containerd {} did not come up; its log ends with\n{}", self.version, self.log_tail(20));
        }
        Ok(())
    }

    fn config(&self) -> String {
        // No kubelet speaks to this one, and a system-wide /opt/containerd is not its business.
        format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \
             \"io.containerd.cri.v1.runtime\", \"io.containerd.internal.v1.opt\", \"io.containerd.nri.v1.nri\", \
             \"io.containerd.podsandbox.controller.v1.podsandbox\"]\n\
             [grpc]\naddress = {:?}\n[debug]\nlevel = \"debug\"\n",
            self.root.join("root"),
            self.run.join("state"),
            self.run.join("c.sock"),
        )
    }

    /// Ends the process as an upgrade would; tasks go on.
    pub fn terminate(&self) -> Result<()> {
        let Some(mut child) = locked(&self.process).take() else { return Ok(()) };
        proc::kill(child.id() as i32, Signal::SIGTERM)?;
        if eventually(Duration::from_secs(10), || child.try_wait().ok().flatten()).is_none() {
            child.kill()?;
            child.wait()?;
            bail!("containerd {} did not end on SIGTERM", self.version);
        }
        Ok(())
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        locked(&self.process).as_ref().map(|c| c.id() as i32)
    }

    /// Its log's file.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.root.join("containerd.log")
    }

    /// The last lines of its log that are not about everyday things.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let told: Vec<&str> = text.lines().filter(|l| !l.contains("level=debug") || l.contains("chsnap")).collect();
        told[told.len().saturating_sub(lines)..].join("\n")
    }

    /// What the cgroups of those that build snapshots have in the first of these files that is there: v2's and v1's.
    pub fn bounds_of_builders(&self, names: [&str; 2]) -> Vec<String> {
        let read = |dir: PathBuf| names.iter().find_map(|name| fs::read_to_string(dir.join(name)).ok());
        leak::builders_cgroups(&self.pods()).into_iter().filter_map(read).collect()
    }

    /// Where chsnap keeps its pods.
    #[must_use]
    pub fn pods(&self) -> PathBuf {
        self.run.join("s")
    }

    /// Removes whatever a case has left, so that the next one starts clean.
    pub fn purge(&self) {
        for id in self.list(&["task", "ls", "-q"]).unwrap_or_default() {
            let _ = self.ctr.run(["task", "rm", "-f", &id]).limit(Duration::from_secs(30)).output();
        }
        for id in self.list(&["container", "ls", "-q"]).unwrap_or_default() {
            let _ = self.ctr.output(["container", "rm", &id]);
        }
        for process in proc::marked(&self.run) {
            if Some(process.pid) != self.pid() {
                let _ = proc::kill(process.pid, Signal::SIGKILL);
            }
        }
        leak::unmount(&[self.run.join("s"), self.run.join("state")]);
        for dir in ["s", "fifo", "tmp"] {
            let _ = empty(&self.run.join(dir));
        }
        leak::remove_cgroups(&self.namespace, &self.pods());
    }

    pub(crate) fn list(&self, args: &[&str]) -> Result<Vec<String>> {
        let list = self.ctr.run(args).limit(Duration::from_secs(20)).text()?;
        Ok(list.lines().map(str::to_owned).collect())
    }

    fn stop(&self) {
        if self.pid().is_some() {
            self.purge();
        }
        let _ = self.terminate();
        remove(&self.run, &self.root, Some(&self.namespace));
    }
}

/// Ends every containerd of this process and removes everything it had.
pub fn stop_all() {
    let all = std::mem::take(&mut *locked(&RUNNING));
    for containerd in all {
        containerd.stop();
    }
}

/// Copies the logs of all containerds to the directory that `CHSNAP_TEST_LOGS` names, because they go with
/// [`stop_all`].
pub fn keep_logs() {
    let Some(dir) = std::env::var_os("CHSNAP_TEST_LOGS").map(PathBuf::from) else { return };
    for containerd in locked(&RUNNING).iter() {
        let kept = dir.join(format!("containerd-{}-{}.log", containerd.version, containerd.lane));
        match fs::copy(containerd.log(), &kept) {
            Ok(_) => println!("containerd's log is kept as {}", kept.display()),
            Err(e) => println!("note: containerd's log cannot be kept as {}: {e}", kept.display()),
        }
    }
}

/// Tells which guests answered only after they were asked again: no case fails for that, and somebody should know.
pub fn tell_knocks() {
    for containerd in locked(&RUNNING).iter() {
        let log = fs::read_to_string(containerd.log()).unwrap_or_default();
        for line in
            log.lines().filter(|line| line.contains("whether it is there") || line.contains("the agent is not there"))
        {
            println!("note: {line}");
        }
    }
}

/// Takes down what runs of this suite have left that were killed.
pub fn sweep() {
    for entry in fs::read_dir("/run").into_iter().flatten().flatten() {
        let run = entry.path();
        let name = run.display().to_string();
        let Some(rest) = name.strip_prefix(RUN_PREFIX) else { continue };
        let Some((owner, _)) = rest.split_once('-') else { continue };
        if owner.parse::<u32>().is_ok() && !Path::new("/proc").join(owner).exists() {
            println!("removing what the killed test run {owner} has left");
            let root = fs::read_to_string(run.join("root")).unwrap_or_default();
            remove(&run, Path::new(&root), Some(&format!("cht{rest}")));
        }
    }
}

fn remove(run: &Path, root: &Path, namespace: Option<&str>) {
    let gone = eventually(Duration::from_secs(5), || {
        let left = proc::marked(run);
        for process in &left {
            let _ = proc::kill(process.pid, Signal::SIGKILL);
        }
        left.is_empty().then_some(())
    });
    if gone.is_none() {
        println!("note: processes of {} are still there", run.display());
    }
    leak::unmount(&[run.to_owned(), root.to_owned()]);
    if let Some(namespace) = namespace {
        leak::remove_cgroups(namespace, &run.join("s"));
    }
    for dir in [run, root] {
        // Never an empty or short path: this is recursive.
        if dir.components().count() > 2
            && leak::mounts_below(dir).is_empty()
            && let Err(e) = fs::remove_dir_all(dir)
        {
            println!("note: {} cannot be removed: {e}", dir.display());
        }
    }
}

fn empty(dir: &Path) -> std::io::Result<()> {
    if leak::mounts_below(dir).is_empty() {
        fs::remove_dir_all(dir)?;
        fs::create_dir_all(dir)?;
    }
    Ok(())
}

/// A case that panicked has left nothing half done.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
