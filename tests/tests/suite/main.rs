//! Every case on every containerd and every VMM, with a look for leftovers after each. As many run at the same time as
//! there are CPUs (`--test-threads`), each on containerds of its own.
//!
//! `cargo test -p chsnap-tests -- [filter]`; a case's name is `<vmm>/<containerd>/<topic>::<case>`.
//! Cases take turns in how their pods start: booted, from a base snapshot, or with their process from an image snapshot;
//! `CHSNAP_TEST_FILTERS` takes several filters with blanks between: a case runs if its name contains any of them.
//! `CHSNAP_TEST_WAY=direct`, `base` or `image` has all of them start so.
//! `CHSNAP_TEST_TIMES=file` writes down the seconds that each took.
//! `CHSNAP_TEST_LOGS=directory` keeps the containerds' logs there when a case has failed.
//! `CHSNAP_TEST_REFERENCE=1` runs the cases that hold for runc too on runc, to check the cases themselves; `=events` or
//! the like those of a topic.

use std::{
    fs,
    io::Write,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Instant,
};

use chsnap_tests::{
    Baseline, Containerd, Env, Tools, Version, Vmm, keep_logs, patience, stop_all, sweep, tell_knocks,
    ways::{self, Way},
};
use libtest_mimic::{Arguments, Failed, Trial};

mod cases;
mod errors;
mod errors_asked;
mod errors_host;
mod events;
mod exec;
mod expose;
mod faulty;
mod image;
mod lifecycle;
mod metrics;
mod pod;
mod restart;
mod rung;
mod share;
mod signals;
mod sizes;
mod snapshot;
mod snapshot_builder;
mod snapshot_image;
mod snapshot_image_built;
mod snapshot_image_native;
mod snapshot_ladder;
mod stdio;
mod watch;

use cases::{Case, Scope};

/// More would only wait for each other's image imports and guests.
const MAX_LANES: usize = 4;

static LANES: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Of the thread that runs cases.
    static LANE: usize = LANES.fetch_add(1, Ordering::Relaxed);
}

/// With `--nocapture`, a failure is told when it happens, and not only at the end.
static AT_ONCE: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    AT_ONCE.store(arguments.nocapture, Ordering::Relaxed);
    arguments.test_threads = arguments.test_threads.or_else(|| Some(lanes()));
    let trials = match chosen(trials()) {
        Ok(trials) => trials,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    if !arguments.list {
        Tools::get();
        sweep();
        clean_up_on_signals();
        watch::start();
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    if conclusion.has_failed() {
        keep_logs();
    }
    tell_knocks();
    stop_all();
    conclusion.exit_code()
}

/// The harness's own filter is one, and a process for each would have to build its snapshots anew.
fn chosen(mut trials: Vec<Trial>) -> Result<Vec<Trial>, String> {
    let filters = std::env::var("CHSNAP_TEST_FILTERS").unwrap_or_default();
    let filters: Vec<&str> = filters.split_whitespace().collect();
    // One that is misspelt would pass for cases that worked.
    if let Some(none) = filters.iter().find(|f| !trials.iter().any(|t| t.name().contains(**f))) {
        return Err(format!("CHSNAP_TEST_FILTERS: no case has {none:?} in its name"));
    }
    trials.retain(|t| filters.is_empty() || filters.iter().any(|f| t.name().contains(f)));
    Ok(trials)
}

/// A machine that needs patience has no CPU to spare.
fn lanes() -> usize {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if patience() > 1 { 1 } else { cpus.min(MAX_LANES) }
}

/// An interrupted run takes its containerds down, too.
fn clean_up_on_signals() {
    use signal_hook::{
        consts::{SIGHUP, SIGINT, SIGTERM},
        iterator::Signals,
    };
    let Ok(mut signals) = Signals::new([SIGHUP, SIGINT, SIGTERM]) else { return };
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            eprintln!("signal {signal}: cleaning up");
            keep_logs();
            stop_all();
            std::process::exit(128 + signal);
        }
    });
}

fn trials() -> Vec<Trial> {
    let complete = || errors::complete().map_err(|e| Failed::from(format!("{e:#}")));
    let mut trials = vec![Trial::test("errors::every_row_has_a_case", complete)];
    let reference = std::env::var("CHSNAP_TEST_REFERENCE").unwrap_or_default();
    let is_reference = |topic: &str| reference == "1" || reference.split_whitespace().any(|one| one == topic);
    for vmm in [Vmm::Qemu, Vmm::CloudHypervisor, Vmm::Runc] {
        let why_not = match vmm {
            Vmm::CloudHypervisor => cases::no_cloud_hypervisor(),
            _ => None,
        };
        let before = trials.len();
        for version in [Version::V2_1, Version::V1_6] {
            for (number, (topic, case)) in all().enumerate() {
                // Another way on the other containerd.
                let way = Way::of_turn(number + usize::from(version == Version::V1_6));
                let here = match case.scope {
                    Scope::Everywhere => true,
                    Scope::Likewise => version == Version::V2_1,
                    Scope::Vms => vmm != Vmm::Runc,
                    Scope::Once => vmm != Vmm::Runc && version == Version::V2_1,
                };
                if !here || (vmm == Vmm::Runc && !is_reference(topic)) {
                    continue;
                }
                let name = format!("{vmm}/{version}/{topic}::{}", case.name);
                let unprovokable = cases::unprovokable(case.name, vmm);
                if let (Some(why), None) = (unprovokable, &why_not) {
                    println!("{vmm}: {topic}::{} is ignored: {why}", case.name);
                }
                let in_all = vmm != Vmm::Runc
                    && version == Version::V2_1
                    && cases::is_of_containers(topic, &case)
                    && ways::all_wanted();
                let named: Vec<_> = match in_all {
                    true => cases::ways(&case).map(|way| (way, format!("{name}__{way}"))).collect(),
                    false => vec![(way, name)],
                };
                for (way, name) in named {
                    let watched = name.clone();
                    let trial = Trial::test(name, move || run(&watched, vmm, version, way, in_all, case));
                    trials.push(trial.with_ignored_flag(why_not.is_some() || unprovokable.is_some()));
                }
            }
        }
        if let Some(why) = why_not {
            println!("{vmm}: {} cases are ignored: {why}", trials.len() - before);
        }
    }
    trials
}

fn all() -> impl Iterator<Item = (&'static str, Case)> {
    let topics: [(&str, Vec<Case>); 16] = [
        ("lifecycle", lifecycle::CASES.to_vec()),
        ("stdio", stdio::CASES.to_vec()),
        ("exec", exec::CASES.to_vec()),
        ("signals", signals::CASES.to_vec()),
        ("events", events::CASES.to_vec()),
        ("metrics", metrics::CASES.to_vec()),
        ("restart", restart::CASES.to_vec()),
        ("pod", pod::CASES.to_vec()),
        ("share", share::CASES.to_vec()),
        ("expose", expose::CASES.to_vec()),
        ("errors", errors::CASES.to_vec()),
        ("image", image::CASES.to_vec()),
        ("sizes", sizes::CASES.to_vec()),
        ("rung", rung::CASES.to_vec()),
        ("snapshot", snapshot::CASES.to_vec()),
        ("snapshot_image", snapshot_image::CASES.to_vec()),
    ];
    topics.into_iter().flat_map(|(topic, cases)| cases.into_iter().map(move |case| (topic, case)))
}

/// `shows_it`: the case is there to show that it works with pods that start in this way.
fn run(name: &str, vmm: Vmm, version: Version, way: Way, shows_it: bool, case: Case) -> Result<(), Failed> {
    let began = Instant::now();
    let daemon = Containerd::of(version, LANE.with(|lane| *lane)).map_err(|e| format!("{e:#}"))?;
    let env = Env::new(daemon.clone(), vmm, way).map_err(|e| format!("{e:#}"))?;
    ways::build(&env, case.name).map_err(|e| format!("{e:#}"))?;
    let watched = watch::Guard::of(name, &daemon);
    let (baseline, mark) = (Baseline::take(&daemon), ways::mark(&env));
    let result = catch_unwind(AssertUnwindSafe(|| case.run(&env)));
    let left = baseline.leftovers(&daemon);
    if !left.is_empty() {
        daemon.purge();
    }
    let mut complaints: Vec<String> = watched.complaint().into_iter().collect();
    match result {
        Ok(Ok(())) => {}
        Ok(Err(e)) => complaints.push(format!("{e:#}")),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            complaints.push(format!("panicked: {}", text.unwrap_or_default()));
        }
    }
    if env.way != Way::Direct
        && let Err(e) = ways::check(&env, mark, shows_it)
    {
        complaints.push(format!("{e:#}"));
    }
    if !left.is_empty() {
        complaints.push(format!("left behind:\n  {}", left.join("\n  ")));
    }
    if let Some(path) = std::env::var_os("CHSNAP_TEST_TIMES") {
        let line = format!("{:7.1} {vmm}/{version}/{} {way:?}\n", began.elapsed().as_secs_f32(), case.name);
        let file = fs::File::options().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).map_err(|e| e.to_string())?;
    }
    if complaints.is_empty() {
        return Ok(());
    }
    complaints.push(format!(
        "its pods were to start in the way {way:?}; containerd's log ends with\n{}",
        daemon.log_tail(15)
    ));
    let text = complaints.join("\n");
    if AT_ONCE.load(Ordering::Relaxed) {
        println!("\n{text}");
    }
    Err(text.into())
}
