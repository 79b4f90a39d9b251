//! Looks after cases that do not end: whoever waits for a whole run is told what it waits for, and a case that hangs
//! costs its own limit, not everything that came after it.

use std::{
    collections::BTreeMap,
    fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use chsnap_tests::{Containerd, keep_logs, marked, patience, stop_all};

/// Longer than any case takes. The snapshots that are built for it have limits of their own.
const LIMIT: Duration = Duration::from_secs(300);
/// For what was killed with a case's containers to tell the case.
const GRACE: Duration = Duration::from_secs(60);
/// A case is told to be slow, again and again, at this pace.
const TOLD_EVERY: Duration = Duration::from_secs(60);

struct Watched {
    daemon: Arc<Containerd>,
    began: Instant,
    told: Instant,
    /// When it had not ended in time.
    cut_off: Option<Instant>,
}

static CASES: Mutex<BTreeMap<String, Watched>> = Mutex::new(BTreeMap::new());

fn cases() -> MutexGuard<'static, BTreeMap<String, Watched>> {
    CASES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs for as long as it is there.
pub struct Guard(String);

impl Guard {
    /// From now on, the case with this name is looked after.
    pub fn of(name: &str, daemon: &Arc<Containerd>) -> Self {
        let (daemon, began) = (Arc::clone(daemon), Instant::now());
        cases().insert(name.to_owned(), Watched { daemon, began, told: began, cut_off: None });
        Self(name.to_owned())
    }

    /// What there is to complain of.
    pub fn complaint(&self) -> Option<String> {
        let cut_off = cases().get(&self.0).is_some_and(|case| case.cut_off.is_some());
        cut_off.then(|| format!("it did not end within {:?}, so what it had running was killed", limit()))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        cases().remove(&self.0);
    }
}

fn limit() -> Duration {
    LIMIT * patience()
}

/// Looks after the cases, from a thread of its own.
pub fn start() {
    thread::spawn(|| {
        loop {
            thread::sleep(Duration::from_secs(5));
            look();
        }
    });
}

fn look() {
    let mut late = Vec::new();
    for (name, case) in cases().iter_mut() {
        let took = case.began.elapsed();
        if case.told.elapsed() >= TOLD_EVERY {
            case.told = Instant::now();
            println!("note: {name} has been running for {} s", took.as_secs());
        }
        match case.cut_off {
            None if took > limit() => {
                case.cut_off = Some(Instant::now());
                late.push((name.clone(), Arc::clone(&case.daemon)));
            }
            Some(since) if since.elapsed() > GRACE * patience() => {
                println!("{name} does not end, whatever is killed; this run is over\n{}", threads());
                give_up();
            }
            _ => {}
        }
    }
    // Without the lock: other cases go on meanwhile.
    for (name, daemon) in late {
        println!("{name} has not ended within {:?}; what it has running is killed:\n{}", limit(), processes(&daemon));
        daemon.purge();
    }
}

/// With the lock, so that nothing starts any more.
fn give_up() -> ! {
    keep_logs();
    stop_all();
    std::process::exit(1)
}

/// What its containerd has running, and what each of them waits for.
fn processes(daemon: &Containerd) -> String {
    let of = |name: &str, pid| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let lines = marked(&daemon.run).into_iter().map(|process| {
        let stat = of("stat", process.pid);
        let state = stat.rsplit(") ").next().and_then(|rest| rest.split(' ').next()).unwrap_or("?").to_owned();
        let args: String = process.args.chars().take(160).collect();
        format!("  {} {state} {}: {args}", process.pid, of("wchan", process.pid))
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// What this process's own threads wait for.
fn threads() -> String {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lines = tasks.map(|task| {
        let of = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
        format!("  {} {}: {}", task.file_name().display(), of("comm").trim(), of("wchan"))
    });
    lines.collect::<Vec<_>>().join("\n")
}
