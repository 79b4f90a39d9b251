//! The ways in which a pod's machine can be started, and which of them there are for this one.

use std::{fmt, io, path::PathBuf};

use thiserror::Error;

use super::{NewContainer, PlanError, Request, blueprint::Blueprint};
use crate::{
    config::{SnapshotUse, VmmConfig},
    origin::OriginError,
    program::Scout,
    share::{CloneRoot, VirtiofsdProgram},
    snapshot::{
        FindError, InUse, Inputs, InputsError, Key, Kind, Ladder, Layers, Machine, OpenError, Outcome, Process, ROOT,
        Store, nameless,
    },
    state::Way,
    task::chain,
    vmm::{self, Driver, Rung, SelectError},
};

/// One way to start the machine.
pub(super) enum Candidate {
    /// From a snapshot.
    Restore(Kind, Box<Restore>),
    /// Kernel and all.
    Direct(Box<dyn Driver>),
}

/// A snapshot that fits, and who restores it.
pub(super) struct Restore {
    pub snapshot: InUse,
    pub driver: Box<dyn Driver>,
    pub rung: Rung,
    pub seed: Option<Seed>,
}

/// The container's root, in which an image's process is to go on.
pub(super) struct Seed {
    pub root: CloneRoot,
    /// The directories of its image, the topmost layer first.
    pub image: Vec<PathBuf>,
}

impl Candidate {
    /// What is told of it.
    pub fn way(&self) -> Way {
        match self {
            Self::Restore(Kind::Image, _) => Way::Image,
            Self::Restore(Kind::Base, _) => Way::Base,
            Self::Direct(_) => Way::Direct,
        }
    }

    /// The snapshot, where a part of the container's root stays in it.
    pub fn into_part_of_root(self) -> Option<InUse> {
        match self {
            Self::Restore(Kind::Image, restore) => Some(restore.snapshot),
            _ => None,
        }
    }

    /// Where an image's process is to go on, and with which difference.
    pub fn seed(&self) -> Option<(&Seed, PathBuf)> {
        match self {
            Self::Restore(_, restore) => restore.seed.as_ref().map(|seed| (seed, restore.snapshot.dir().join(ROOT))),
            Self::Direct(_) => None,
        }
    }

    /// The VMM.
    pub fn driver(&self) -> &dyn Driver {
        match self {
            Self::Restore(_, restore) => &*restore.driver,
            Self::Direct(driver) => &**driver,
        }
    }
}

/// Why there is no snapshot of a kind to start from.
#[derive(Debug, Error)]
enum NoSnapshot {
    #[error("{0}")]
    Off(&'static str),
    #[error("no image snapshot without the annotation io.chsnap.ready")]
    NotAsked,
    #[error(
        "no image snapshot: the root file system is neither overlayfs nor a copy of the image, to which the container can write"
    )]
    Root,
    #[error("no image snapshot: something has been written to the container's root file system already")]
    Written,
    #[error("no image snapshot: cannot read the container's directory of its root file system")]
    Upper(#[source] io::Error),
    #[error("no image snapshot: the process cannot be described")]
    Plan(#[from] PlanError),
    #[error("no image snapshot: the image of the container's root is not known")]
    Origin(#[from] OriginError),
    #[error("no image snapshot yet: of this image, nothing is known")]
    Unknown,
    #[error(transparent)]
    Inputs(#[from] InputsError),
    #[error(transparent)]
    Select(#[from] SelectError),
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error("the {0} snapshot cannot be used")]
    Unusable(Kind, #[source] FindError),
    #[error("there is no {0} snapshot yet{1}")]
    Missing(Kind, Nearest),
    #[error("there is no {0} snapshot of such a guest; `chsnap snapshot build {1}` builds one{2}")]
    Wanted(Kind, &'static str, Nearest),
    #[error("there is no {0} snapshot, and [snapshot] builders = 0 has none built{1}")]
    NoBuilders(Kind, Nearest),
    #[error("snapshots work on no rung here, `chsnap doctor` tells more: {0}")]
    Hopeless(String),
    #[error("there is no {0} snapshot, and building it failed: {1}")]
    Failed(Kind, String),
}

impl NoSnapshot {
    /// Whether building one mends it: one that is spoilt gives way to it.
    fn is_wanting(&self) -> bool {
        matches!(self, Self::Missing(..) | Self::Unknown | Self::Unusable(_, FindError::Spoilt { .. }))
    }
}

/// The snapshot that is the most like the one that is missing, for the person who wonders why it is not used.
#[derive(Debug, Default)]
struct Nearest(Option<(Key, Vec<String>)>);

impl Nearest {
    /// Among those of the same image, if of any.
    fn to(inputs: &Inputs, store: &Store) -> Self {
        let image = |inputs: &Inputs| inputs.process.as_ref().map(|process| process.chain_id.clone());
        let entries = store.list().unwrap_or_default().into_iter();
        let alike = entries.filter_map(|entry| {
            let other = entry.manifest.ok()?.inputs;
            (other.kind == inputs.kind && image(&other) == image(inputs))
                .then(|| (entry.key, inputs.differences(&other)))
        });
        Self(alike.min_by_key(|(_, differences)| differences.len()))
    }
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some((key, differences)) => write!(f, "; {} is of another {}", key.short(), differences.join(", ")),
            None => Ok(()),
        }
    }
}

/// What to build for pods to come.
#[derive(Debug, Clone)]
pub enum Wanting {
    /// A base snapshot.
    Base,
    /// One of the image, which takes a base snapshot to know the rung.
    Image(Box<Blueprint>),
}

/// The ways there are, best first; the last one is always possible, unless a snapshot is required.
pub(super) struct Ways {
    pub candidates: Vec<Candidate>,
    /// Why there is not a better one than the first of them.
    pub why_not: Vec<String>,
    /// Why there is not a better one below that.
    pub otherwise: Vec<String>,
    /// A template should be built.
    pub wanting: Option<Wanting>,
}

/// Looks for them.
pub(super) async fn find(
    request: &Request<'_>,
    first: &NewContainer<'_>,
    driver: Box<dyn Driver>,
    virtiofsd: &VirtiofsdProgram,
    scout: &mut Scout,
) -> Ways {
    let mut ways = Ways { candidates: Vec::new(), why_not: Vec::new(), otherwise: Vec::new(), wanting: None };
    let wanted = request.overrides.snapshot(&request.config.snapshot);
    match Search::open(request, wanted, &*driver, virtiofsd, scout).await {
        Ok(search) => search.all(first, &mut ways, scout).await,
        Err(why) => ways.why_not.push(chain(&why)),
    }
    if wanted != SnapshotUse::Require {
        ways.candidates.push(Candidate::Direct(driver));
    }
    ways
}

/// Where it is looked.
struct Search<'a> {
    request: &'a Request<'a>,
    wanted: SnapshotUse,
    machine: Machine<'a>,
    store: Store,
    ladder: Ladder,
    outcome: Option<Outcome>,
    hopeless: Option<String>,
}

impl<'a> Search<'a> {
    async fn open(
        request: &'a Request<'a>,
        wanted: SnapshotUse,
        driver: &'a dyn Driver,
        virtiofsd: &'a VirtiofsdProgram,
        scout: &mut Scout,
    ) -> Result<Self, NoSnapshot> {
        let Request { config, overrides, shape, .. } = *request;
        if wanted == SnapshotUse::Off {
            return Err(NoSnapshot::Off(match overrides.snapshot {
                Some(_) => "io.chsnap.snapshot = \"off\"",
                None => "[snapshot] mode = \"off\"",
            }));
        }
        let store = Store::open(&config.snapshot.dir, config.snapshot.budget.as_bytes())?;
        let machine = Machine { config, shape, driver, virtiofsd };
        let ladder = Ladder::load(&config.snapshot.dir);
        let outcome = ladder.outcome(&machine.footing(scout).await?).cloned();
        let hopeless = outcome.as_ref().and_then(Outcome::hopeless);
        Ok(Self { request, wanted, machine, store, ladder, outcome, hopeless })
    }

    async fn all(&self, first: &NewContainer<'_>, ways: &mut Ways, scout: &mut Scout) {
        // Who says when the process is ready, and requires a snapshot, means one of the process.
        let base_will_do = self.wanted != SnapshotUse::Require || self.request.overrides.ready.is_none();
        let mut blueprint = None;
        match self.image(first, &mut blueprint, scout).await {
            Ok(restore) => {
                let wanting = blueprint.filter(|_| self.is_to_be_tried(&restore));
                ways.wanting = wanting.map(|one| Wanting::Image(Box::new(one)));
                ways.candidates.push(Candidate::Restore(Kind::Image, Box::new(restore)));
            }
            // Who requires one without saying when the process is ready means the other kind.
            Err(NoSnapshot::NotAsked) if self.wanted == SnapshotUse::Require => {}
            Err(why) => {
                ways.wanting = blueprint.filter(|_| self.wants(&why)).map(|one| Wanting::Image(Box::new(one)));
                ways.why_not.push(chain(&why));
            }
        }
        match self.restore(Kind::Base, None, scout).await {
            Ok(restore) => {
                if ways.wanting.is_none() && self.is_to_be_tried(&restore) {
                    ways.wanting = Some(Wanting::Base);
                }
                if base_will_do {
                    ways.candidates.push(Candidate::Restore(Kind::Base, Box::new(restore)));
                }
            }
            Err(why) => {
                if self.wants(&why) && ways.wanting.is_none() {
                    ways.wanting = Some(Wanting::Base);
                }
                (if ways.candidates.is_empty() { &mut ways.why_not } else { &mut ways.otherwise }).push(chain(&why));
            }
        }
    }

    /// Tells in `blueprint` of what there could be one.
    async fn image(
        &self,
        first: &NewContainer<'_>,
        blueprint: &mut Option<Blueprint>,
        scout: &mut Scout,
    ) -> Result<Restore, NoSnapshot> {
        let Request { config, overrides, .. } = *self.request;
        let ready = overrides.ready.as_ref().ok_or(NoSnapshot::NotAsked)?;
        let root = CloneRoot::of(first.rootfs).ok_or(NoSnapshot::Root)?;
        let layers = Layers::load(&config.snapshot.dir);
        let known = match &root {
            CloneRoot::Layered(overlay) => {
                layers.chain_id(&overlay.lowers).map(|chain_id| (chain_id.to_owned(), overlay.lowers.clone()))
            }
            CloneRoot::Copied(dir) => {
                let chain_id = self.request.place(first.id).chain_id_of_copy(&config.snapshot.ctr, dir).await?;
                layers.directories(&chain_id, true).map(|image| (chain_id, image))
            }
        };
        let claim = || match root.claim().map_err(NoSnapshot::Upper)? {
            true => Ok(()),
            false => Err(NoSnapshot::Written),
        };
        // A container that requires a snapshot does not start without one, and may be started when there is one.
        let requires = self.wanted == SnapshotUse::Require;
        if !requires {
            claim()?;
        }
        let blueprint = blueprint.insert(Blueprint::of(first.plan, ready, &first.stdio, &config.snapshot.pod_env));
        let Some((chain_id, image)) = known else { return Err(self.nameless(&root, blueprint, scout).await?) };
        let process = blueprint.process(&chain_id)?;
        let restore = self.restore(Kind::Image, Some(&process), scout).await?;
        if requires {
            claim()?;
        }
        Ok(Restore { seed: Some(Seed { root, image }), ..restore })
    }

    /// Of an image that is not known yet.
    async fn nameless(
        &self,
        root: &CloneRoot,
        blueprint: &Blueprint,
        scout: &mut Scout,
    ) -> Result<NoSnapshot, NoSnapshot> {
        if let CloneRoot::Layered(overlay) = root {
            let rung = self.request.config.vmm.rung.here();
            let process = blueprint.process(&nameless(&overlay.lowers))?;
            let key = self.machine.image(rung, process, scout).await?.key();
            if let Some(failure) = self.ladder.failure(&key) {
                return Ok(NoSnapshot::Failed(Kind::Image, failure.why.clone()));
            }
        }
        Ok(self.none_because(Kind::Image, None))
    }

    /// Whether what there is should be tried again, or a fuller rung than this snapshot's: a fuller one works now, or nobody
    /// knows which does, since that was forgotten to be found out again.
    fn is_to_be_tried(&self, restore: &Restore) -> bool {
        let Restore { rung, snapshot, .. } = restore;
        // What the image's own process was refused; the base snapshots' rungs may be others by now.
        let is_tried = |best: &Rung| {
            snapshot.manifest().refusals.iter().any(|refusal| refusal.rung == *best && refusal.is_lasting())
        };
        let tried = match (&self.outcome, snapshot.manifest().inputs.kind) {
            // That is found out with base snapshots.
            (None, kind) => kind == Kind::Base,
            (Some(outcome), _) => outcome.rung.is_some_and(|best| best < *rung && !is_tried(&best)),
        };
        tried && self.may_build()
    }

    async fn restore(&self, kind: Kind, process: Option<&Process>, scout: &mut Scout) -> Result<Restore, NoSnapshot> {
        let Request { config, overrides, .. } = *self.request;
        let (mut failed, mut unusable, mut wanted) = (None, None, None);
        // A rung that was refused may have been taken before that: what is in the store was proven.
        for rung in config.vmm.rung.and_barer().filter(|rung| rung.moot().is_none()) {
            let inputs = match process {
                Some(process) => self.machine.image(rung, process.clone(), scout).await?,
                None => self.machine.base(rung, scout).await?,
            };
            let key = inputs.key();
            match self.look_up(&key).await {
                Ok(Some(snapshot)) => {
                    let vmm = VmmConfig { rung, ..overrides.vmm(&config.vmm) };
                    let driver = vmm::select(&vmm, scout).await?;
                    return Ok(Restore { snapshot, driver, rung, seed: None });
                }
                Ok(None) => {}
                Err(error) => unusable = unusable.or(Some(error)),
            }
            failed = failed.or_else(|| self.ladder.failure(&key).map(|failure| failure.why.clone()));
            wanted.get_or_insert(inputs);
        }
        Err(match (failed, unusable) {
            (Some(why), _) if self.hopeless.is_none() => NoSnapshot::Failed(kind, why),
            (_, Some(error)) => NoSnapshot::Unusable(kind, error),
            _ => self.none_because(kind, wanted.as_ref()),
        })
    }

    /// Beside what else the shim has to do: the digests of one whose files have changed take their time.
    async fn look_up(&self, key: &Key) -> Result<Option<InUse>, FindError> {
        let (store, wanted) = (self.store.clone(), key.clone());
        let found = tokio::task::spawn_blocking(move || store.find(&wanted)).await;
        let failed = |error| FindError::Io { path: key.as_str().into(), source: io::Error::other(error) };
        found.unwrap_or_else(|error| Err(failed(error)))
    }

    fn wants(&self, why: &NoSnapshot) -> bool {
        why.is_wanting() && self.may_build()
    }

    /// Whether to have one built. Not for a pod that does not start without one.
    fn may_build(&self) -> bool {
        let can = self.hopeless.is_none() && self.request.config.snapshot.builders > 0;
        can && self.wanted != SnapshotUse::Require
    }

    /// What stands in the way of building one, if anything does; where the image is not known yet, without inputs.
    fn none_because(&self, kind: Kind, inputs: Option<&Inputs>) -> NoSnapshot {
        if let Some(why) = &self.hopeless {
            return NoSnapshot::Hopeless(why.clone());
        }
        let nearest = inputs.map(|inputs| Nearest::to(inputs, &self.store)).unwrap_or_default();
        // Nothing is built for a pod that does not start.
        if self.wanted == SnapshotUse::Require {
            return NoSnapshot::Wanted(kind, if kind == Kind::Base { "--base" } else { "IMAGE" }, nearest);
        }
        match (self.request.config.snapshot.builders, inputs) {
            (0, _) => NoSnapshot::NoBuilders(kind, nearest),
            (_, None) => NoSnapshot::Unknown,
            (_, Some(_)) => NoSnapshot::Missing(kind, nearest),
        }
    }
}
