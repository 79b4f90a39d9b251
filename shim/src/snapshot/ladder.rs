//! On which rung of the ladder snapshots work on this host, as it was found out by trial. Kept until what decides it
//! changes, or somebody asks for another try: a ladder that is climbed in vain costs a boot a rung.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use super::{Inputs, Key, Refusal, VmmBuild};
use crate::{files, state::timestamp, vmm::Rung};

/// Beside the snapshots, as it holds for as long as they do: over a start of the host, too.
const FILE: &str = "ladder.json";
/// A larger file is not ours.
const MAX_BYTES: u64 = 1 << 20;
/// Kept of hosts whose kernel or VMM changes often.
const MAX_ENTRIES: usize = 16;
/// How long a template that could not be built is not tried again beside a pod.
const PATIENCE: Duration = Duration::from_secs(600);

/// What decides on which rung snapshots work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Footing {
    /// `uname -r` and `uname -v` of the host.
    pub host_kernel: String,
    /// The host's CPU, as far as guests see it.
    pub cpu: String,
    /// The VMM.
    pub vmm: VmmBuild,
    /// The rung of guests that boot, from which the ladder is climbed.
    pub from: Rung,
}

/// What was found out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// On what.
    pub on: Footing,
    /// The rung on which a snapshot was restored by way of trial; none where none works.
    pub rung: Option<Rung>,
    /// Those before it, and why not.
    pub refusals: Vec<Refusal>,
    /// RFC 3339, in UTC.
    pub found_at: String,
    /// One of the refusals was none but silence, of a host that had other things to do perhaps: it is believed for a while.
    #[serde(default)]
    pub until: Option<u64>,
}

/// A template that could not be built, for reasons that have nothing to do with rungs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Of the snapshot that it would have become.
    pub key: Key,
    /// The whole chain of the error.
    pub why: String,
    /// Seconds since the epoch.
    at: u64,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Findings {
    outcomes: Vec<Outcome>,
    failures: Vec<Failure>,
}

/// What is known, and where it is kept.
#[derive(Debug)]
pub struct Ladder {
    path: PathBuf,
    findings: Findings,
}

impl Footing {
    /// Of a snapshot with these inputs.
    #[must_use]
    pub fn of(inputs: &Inputs, from: Rung) -> Self {
        let Inputs { host_kernel, cpu, vmm, .. } = inputs.clone();
        Self { host_kernel, cpu, vmm, from }
    }
}

impl Outcome {
    /// Whether it is still believed.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.until.is_none_or(|until| seconds() < until)
    }

    /// Why no snapshot works at all; `None` where one does.
    #[must_use]
    pub fn hopeless(&self) -> Option<String> {
        self.rung.is_none().then(|| {
            let refusals = self.refusals.iter().map(|refusal| format!("{}: {}", refusal.rung, refusal.why));
            refusals.collect::<Vec<_>>().join("; ")
        })
    }
}

impl Ladder {
    /// What is remembered in the snapshots' directory; nothing where that cannot be read.
    #[must_use]
    pub fn load(snapshots: &Path) -> Self {
        let path = snapshots.join(FILE);
        let findings = read(&path).unwrap_or_default();
        Self { path, findings }
    }

    /// Everything that was found out, the latest last.
    #[must_use]
    pub fn outcomes(&self) -> &[Outcome] {
        &self.findings.outcomes
    }

    /// What was found out on that footing, and holds.
    #[must_use]
    pub fn outcome(&self, on: &Footing) -> Option<&Outcome> {
        self.found(on).filter(|outcome| outcome.holds())
    }

    /// What was found out on that footing, be it believed no more.
    #[must_use]
    pub fn found(&self, on: &Footing) -> Option<&Outcome> {
        self.findings.outcomes.iter().find(|outcome| outcome.on == *on)
    }

    /// Why a template was not built, if that is too short ago to try it again.
    #[must_use]
    pub fn failure(&self, key: &Key) -> Option<&Failure> {
        let recent = |failure: &&Failure| seconds().saturating_sub(failure.at) < PATIENCE.as_secs();
        self.findings.failures.iter().find(|failure| failure.key == *key).filter(recent)
    }

    /// Remembers where climbing has ended; for a while only, where one of the refusals was that nothing was answered
    /// in time.
    pub fn learn(&mut self, on: Footing, rung: Option<Rung>, refusals: Vec<Refusal>) {
        let until = refusals.iter().any(|refusal| refusal.silent).then(|| seconds() + PATIENCE.as_secs());
        self.change(|findings| {
            findings.outcomes.retain(|outcome| outcome.on != on);
            findings.outcomes.push(Outcome { on, rung, refusals, found_at: timestamp(), until });
        });
    }

    /// Remembers that a template could not be built.
    pub fn failed(&mut self, key: Key, why: String) {
        self.change(|findings| {
            findings.failures.retain(|failure| failure.key != key);
            findings.failures.push(Failure { key, why, at: seconds() });
        });
    }

    /// Forgets a failure of old: it worked.
    pub fn worked(&mut self, key: &Key) {
        if self.findings.failures.iter().any(|failure| failure.key == *key) {
            self.change(|findings| findings.failures.retain(|failure| failure.key != *key));
        }
    }

    /// Forgets everything, so that it is tried again.
    ///
    /// # Errors
    /// Where the file cannot be removed.
    pub fn forget(snapshots: &Path) -> io::Result<()> {
        // A builder that has read it would write it again.
        let forgotten = files::lock_dir(snapshots).and_then(|_lock| fs::remove_file(snapshots.join(FILE)));
        match forgotten {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// On what is in the file by now: another builder may have written it.
    fn change(&mut self, change: impl FnOnce(&mut Findings)) {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        // Without a lock, what another builder writes at the same moment may be lost, and found out again.
        let _lock = fs::create_dir_all(dir).and_then(|()| files::lock_dir(dir)).ok();
        self.findings = read(&self.path).unwrap_or_default();
        change(&mut self.findings);
        let Findings { outcomes, failures } = &mut self.findings;
        outcomes.drain(..outcomes.len().saturating_sub(MAX_ENTRIES));
        failures.drain(..failures.len().saturating_sub(MAX_ENTRIES));
        let store = || files::replace(&self.path, &serde_json::to_vec_pretty(&self.findings)?);
        if let Err(error) = store() {
            log::warn!("cannot remember in {:?} how snapshots work here: {error}", self.path);
        }
    }
}

fn read(path: &Path) -> Option<Findings> {
    let meta = fs::symlink_metadata(path).ok()?;
    let ours = meta.is_file() && meta.len() <= MAX_BYTES;
    serde_json::from_slice(&ours.then(|| fs::read(path).ok())??).ok()
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{snapshot::key::tests::inputs, vmm::Accelerator};

    fn footing() -> Footing {
        Footing::of(&inputs(), Rung::Standard)
    }

    #[test]
    fn an_outcome_holds_until_what_decides_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let refusals = vec![Refusal::new(Rung::Standard, "os error 22")];
        Ladder::load(dir.path()).learn(footing(), Some(Rung::NoPmu), refusals.clone());
        let known = Ladder::load(dir.path());
        let outcome = known.outcome(&footing()).unwrap();
        assert_eq!((outcome.rung, &outcome.refusals, outcome.hopeless()), (Some(Rung::NoPmu), &refusals, None));
        type Change = fn(&mut Footing);
        let changes: [Change; 5] = [
            |on| on.host_kernel = "6.2".into(),
            |on| on.cpu = "other".into(),
            |on| on.vmm.program = "other".into(),
            |on| on.vmm.accelerator = Accelerator::Kvm,
            |on| on.from = Rung::NoPmu,
        ];
        for change in changes {
            let mut other = footing();
            change(&mut other);
            assert!(known.outcome(&other).is_none(), "{other:?}");
        }
        // A later one replaces it.
        Ladder::load(dir.path()).learn(footing(), None, refusals);
        let known = Ladder::load(dir.path());
        assert_eq!(known.outcomes().len(), 1);
        assert_eq!(known.outcomes()[0].hopeless().unwrap(), "standard: os error 22");
        Ladder::forget(dir.path()).unwrap();
        Ladder::forget(dir.path()).unwrap();
        Ladder::forget(&dir.path().join("none")).unwrap();
        assert!(Ladder::load(dir.path()).outcomes().is_empty());
    }

    #[test]
    fn what_is_to_be_forgotten_is_not_written_again_by_a_builder_that_has_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut ladder = Ladder::load(dir.path());
        ladder.learn(footing(), None, vec![]);
        std::thread::scope(|scope| {
            let mut forgetting = None;
            ladder.change(|_| {
                forgetting = Some(scope.spawn(|| Ladder::forget(dir.path()).unwrap()));
                std::thread::sleep(Duration::from_millis(200));
            });
            forgetting.unwrap().join().unwrap();
        });
        assert!(Ladder::load(dir.path()).outcomes().is_empty());
    }

    #[test]
    fn an_outcome_that_holds_no_longer_is_told_apart_from_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut ladder = Ladder::load(dir.path());
        assert!(ladder.found(&footing()).is_none());
        ladder.learn(footing(), None, vec![Refusal { silent: true, ..Refusal::new(Rung::Standard, "no answer") }]);
        assert!(ladder.outcome(&footing()).is_some_and(Outcome::holds));
        ladder.change(|findings| findings.outcomes[0].until = Some(seconds()));
        assert!(ladder.outcome(&footing()).is_none() && ladder.found(&footing()).is_some_and(|found| !found.holds()));
    }

    #[test]
    fn a_failure_is_remembered_for_a_while() {
        let dir = tempfile::tempdir().unwrap();
        let key = inputs().key();
        let mut ladder = Ladder::load(dir.path());
        ladder.failed(key.clone(), "no room".into());
        assert_eq!(Ladder::load(dir.path()).failure(&key).unwrap().why, "no room");
        ladder.change(|findings| findings.failures[0].at -= PATIENCE.as_secs());
        assert!(Ladder::load(dir.path()).failure(&key).is_none());
        ladder.failed(key.clone(), "no room".into());
        ladder.worked(&key);
        assert!(Ladder::load(dir.path()).failure(&key).is_none());
    }

    #[test]
    fn garbage_is_ignored_and_the_file_stays_small() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "{\"outcomes\": 3}").unwrap();
        let mut ladder = Ladder::load(dir.path());
        assert!(ladder.outcomes().is_empty());
        for number in 0..2 * MAX_ENTRIES {
            ladder.learn(Footing { cpu: number.to_string(), ..footing() }, None, vec![]);
        }
        assert_eq!(Ladder::load(dir.path()).outcomes().len(), MAX_ENTRIES);
        assert_eq!(ladder.outcomes().last().unwrap().on.cpu, (2 * MAX_ENTRIES - 1).to_string());
    }
}
