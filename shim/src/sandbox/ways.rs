//! The ways in which a pod's machine can be started, and which of them there are for this one.

use thiserror::Error;

use super::Request;
use crate::{
    config::{SnapshotUse, VmmConfig},
    program::Scout,
    share::VirtiofsdProgram,
    snapshot::{FindError, InUse, InputsError, Ladder, Machine, OpenError, Store},
    state::Way,
    task::chain,
    vmm::{self, Driver, Rung, SelectError},
};

/// One way to start the machine.
pub(super) enum Candidate {
    /// From the base snapshot.
    Base(Box<Base>),
    /// Kernel and all.
    Direct(Box<dyn Driver>),
}

/// A base snapshot that fits, and who restores it.
pub(super) struct Base {
    pub snapshot: InUse,
    pub driver: Box<dyn Driver>,
    pub rung: Rung,
}

impl Candidate {
    /// What is told of it.
    pub fn way(&self) -> Way {
        match self {
            Self::Base(_) => Way::Base,
            Self::Direct(_) => Way::Direct,
        }
    }

    /// The VMM.
    pub fn driver(&self) -> &dyn Driver {
        match self {
            Self::Base(base) => &*base.driver,
            Self::Direct(driver) => &**driver,
        }
    }
}

/// Why there is no base snapshot to start from.
#[derive(Debug, Error)]
pub(super) enum NoBase {
    #[error("{0}")]
    Off(&'static str),
    #[error(transparent)]
    Inputs(#[from] InputsError),
    #[error(transparent)]
    Select(#[from] SelectError),
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error("the base snapshot cannot be used")]
    Unusable(#[from] FindError),
    #[error("there is no base snapshot yet")]
    Missing,
    #[error("there is no base snapshot of such a guest; `chsnap snapshot build --base` builds one")]
    Wanted,
    #[error("there is no base snapshot, and [snapshot] builders = 0 has none built")]
    NoBuilders,
    #[error("base snapshots work on no rung here, `chsnap doctor` tells more: {0}")]
    Hopeless(String),
    #[error("there is no base snapshot, and building it failed: {0}")]
    Failed(String),
}

/// The ways there are, best first; the last one is always possible, unless a snapshot is required.
pub(super) struct Ways {
    pub candidates: Vec<Candidate>,
    /// Why there is not a better one among them.
    pub why_not: Vec<String>,
    /// A template should be built.
    pub wanting: bool,
}

/// Looks for what there is.
pub(super) async fn find(
    request: &Request<'_>,
    driver: Box<dyn Driver>,
    virtiofsd: &VirtiofsdProgram,
    scout: &mut Scout,
) -> Ways {
    let mut ways = Ways { candidates: Vec::new(), why_not: Vec::new(), wanting: false };
    let wanted = request.overrides.snapshot(&request.config.snapshot);
    match base(request, wanted, &*driver, virtiofsd, scout).await {
        Ok(base) => ways.candidates.push(Candidate::Base(Box::new(base))),
        Err(why) => {
            ways.wanting = matches!(why, NoBase::Missing);
            ways.why_not.push(chain(&why));
        }
    }
    if wanted != SnapshotUse::Require {
        ways.candidates.push(Candidate::Direct(driver));
    }
    ways
}

async fn base(
    request: &Request<'_>,
    wanted: SnapshotUse,
    driver: &dyn Driver,
    virtiofsd: &VirtiofsdProgram,
    scout: &mut Scout,
) -> Result<Base, NoBase> {
    let Request { config, overrides, shape, .. } = *request;
    if wanted == SnapshotUse::Off {
        return Err(NoBase::Off(match overrides.snapshot {
            Some(_) => "io.chsnap.snapshot = \"off\"",
            None => "[snapshot] mode = \"off\"",
        }));
    }
    let store = Store::open(&config.snapshot.dir, config.snapshot.budget.as_bytes())?;
    let machine = Machine { config, shape, driver, virtiofsd };
    let ladder = Ladder::load(&config.state.dir);
    let footing = machine.footing(scout).await?;
    let outcome = ladder.outcome(&footing);
    let mut failed = None;
    // A rung that was refused may have been taken before that: what is in the store was proven.
    for rung in config.vmm.rung.and_barer().filter(|rung| rung.moot().is_none()) {
        let key = machine.base(rung, scout).await?.key();
        if let Some(snapshot) = store.find(&key)? {
            let vmm = VmmConfig { rung, ..overrides.vmm(&config.vmm) };
            let driver = vmm::select(&vmm, scout).await?;
            return Ok(Base { snapshot, driver, rung });
        }
        failed = failed.or_else(|| ladder.failure(&key).map(|failure| failure.why.clone()));
    }
    if let Some(why) = outcome.and_then(|outcome| outcome.hopeless()) {
        return Err(NoBase::Hopeless(why));
    }
    Err(match failed {
        Some(why) => NoBase::Failed(why),
        // Nothing is built for a pod that does not start.
        None if wanted == SnapshotUse::Require => NoBase::Wanted,
        None if config.snapshot.builders == 0 => NoBase::NoBuilders,
        None => NoBase::Missing,
    })
}
