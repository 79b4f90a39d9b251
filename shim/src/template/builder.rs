//! Building a template: start, save, restore by way of trial, publish.

use std::path::Path;

use chsnap_protocol::agent::InfoResponse;

use super::{
    Built, Order, RungError, TemplateError,
    climb::{Climbed, Step, climb, once_more, twice},
    ground::Ground,
    image::{ImageOrder, Named},
    is_lasting, told,
};
use crate::{
    agent::Agent,
    config::{Config, VmmConfig},
    program::{Freshness, Scout},
    sandbox::{
        StartError, caching, guest_files,
        machine::{self, Origin, Patience},
    },
    share::{self, Share, Virtiofsd, VirtiofsdProgram},
    snapshot::{BuildError, Building, Inputs, Kind, Ladder, Machine, Refusal, Store},
    task::chain,
    vmm::{self, Driver, Rung, Vm, VmSpec},
};

/// Builds the base snapshot that `order` asks for; `tell` hears how far it is.
///
/// # Errors
/// See [`TemplateError`]. Nothing runs any more, and nothing is left in the store.
pub async fn build(order: &Order, tell: &mut dyn FnMut(&str)) -> Result<Built, TemplateError> {
    let config = &order.config;
    let store = Store::open(&config.snapshot.dir, config.snapshot.budget.as_bytes())?;
    // While the container is there that it is built beside.
    let named = match &order.image {
        Some(image) => Some((image, image.name(config).await)),
        None => None,
    };
    // Also of a build that is given up half-way nothing is left.
    let ground = Ground::claim(order, tell).await?;
    build_on(&ground, order, named, store, tell).await
}

/// An image snapshot takes a rung that works, and that is known of a base snapshot on it.
async fn build_on(
    ground: &Ground,
    order: &Order,
    image: Option<(&ImageOrder, Result<Named, TemplateError>)>,
    store: Store,
    tell: &mut dyn FnMut(&str),
) -> Result<Built, TemplateError> {
    let mut scout = Scout::new(&order.config, Freshness::Remembered);
    let virtiofsd = share::find_virtiofsd(&order.config.share, &mut scout).await?;
    let mut workshop = Workshop { order, store, ground, virtiofsd, held: Vec::new() };
    let (rung, refusals, base) = workshop.base(&mut scout, tell).await?;
    workshop.held.clear();
    let built = match image {
        None => base,
        Some((image, named)) => workshop.image(image, named, (rung, &refusals), &mut scout, tell).await?,
    };
    match workshop.store.keep_budget() {
        Ok(pruned) => pruned.stayed.iter().for_each(|error| tell(&chain(error))),
        Err(error) => tell(&format!("the store's budget is not kept: {}", chain(&error))),
    }
    Ok(built)
}

pub(super) struct Workshop<'a> {
    pub order: &'a Order,
    pub store: Store,
    pub ground: &'a Ground,
    virtiofsd: VirtiofsdProgram,
    /// The places in the store of rungs that were refused: whoever wants to build the same is to see that it is being
    /// built.
    held: Vec<Building>,
}

impl Workshop<'_> {
    /// The rung that works, and why no fuller one.
    async fn base(
        &mut self,
        scout: &mut Scout,
        tell: &mut dyn FnMut(&str),
    ) -> Result<(Rung, Vec<Refusal>, Built), TemplateError> {
        let Config { vmm, guest, snapshot, .. } = &self.order.config;
        let driver = vmm::select(vmm, scout).await?;
        guest_files(guest).map_err(TemplateError::Start)?;
        let footing = self.machine(&*driver).footing(scout).await?;
        let mut ladder = Ladder::load(&snapshot.dir);
        // Whoever waits for it wants it tried.
        let known = ladder.outcome(&footing).filter(|_| self.order.beside).cloned();
        if let Some(why) = known.as_ref().and_then(|outcome| outcome.hopeless()) {
            return Err(TemplateError::NoRung(why));
        }
        let rungs = footing.from.and_barer();
        // Nobody has seen it work here, or somebody wants that seen again.
        let proven = ladder.outcome(&footing).and_then(|outcome| outcome.rung);
        let wanted = !self.order.beside && self.order.image.is_none();
        let attempt = async |rung, refusals: &[Refusal]| {
            self.attempt(rung, wanted || proven != Some(rung), refusals, scout, tell).await
        };
        let Climbed { on, refusals } = climb(rungs, Rung::moot, known.as_ref(), attempt).await?;
        let Some((rung, built)) = on else {
            ladder.learn(footing, None, refusals);
            let why = ladder.outcomes().last().and_then(|outcome| outcome.hopeless());
            return Err(TemplateError::NoRung(why.unwrap_or_default()));
        };
        if let Built::New(key) = &built {
            ladder.worked(key);
        }
        // One that was there was proven, perhaps before the host's last start.
        if known.is_none_or(|known| known.rung != Some(rung)) {
            ladder.learn(footing, Some(rung), refusals.clone());
        }
        Ok((rung, refusals, built))
    }

    pub fn machine<'m>(&'m self, driver: &'m dyn Driver) -> Machine<'m> {
        Machine { config: &self.order.config, shape: self.order.shape(), driver, virtiofsd: &self.virtiofsd }
    }

    async fn attempt(
        &mut self,
        rung: Rung,
        unproven: bool,
        refusals: &[Refusal],
        scout: &mut Scout,
        tell: &mut dyn FnMut(&str),
    ) -> Step<Built, TemplateError> {
        match self.on_rung(rung, unproven, refusals, scout, tell).await {
            Ok(built) => Step::Works(built),
            Err(Unbuilt::Rung(error)) => {
                tell(&format!("{rung}: {}", chain(&error)));
                Step::Refused(error)
            }
            Err(Unbuilt::Else(error)) => Step::Broken(error),
        }
    }

    async fn on_rung(
        &mut self,
        rung: Rung,
        unproven: bool,
        refusals: &[Refusal],
        scout: &mut Scout,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Built, Unbuilt> {
        let config = &self.order.config;
        let vmm = VmmConfig { rung, ..config.vmm.clone() };
        let driver = vmm::select(&vmm, scout).await.map_err(TemplateError::from)?;
        let inputs = self.machine(&*driver).base(rung, scout).await.map_err(TemplateError::from)?;
        let key = inputs.key();
        let mut ladder = Ladder::load(&config.snapshot.dir);
        if let Some(failure) = ladder.failure(&key).filter(|_| self.order.beside) {
            return Err(TemplateError::Lately(failure.why.clone()).into());
        }
        let building = match self.store.build(inputs.clone()) {
            Err(BuildError::Exists { .. }) if unproven => match self.still_works(&*driver, rung, &key, tell).await {
                Ok(true) => return Ok(Built::There(key)),
                Ok(false) => self.store.build(inputs),
                Err(Unbuilt::Rung(error)) if error.is_for_want_of_room() => {
                    let error = TemplateError::Room(error);
                    ladder.failed(key, chain(&error));
                    return Err(error.into());
                }
                Err(error) => return Err(error),
            },
            building => building,
        };
        let building = match building {
            Ok(building) => building,
            Err(BuildError::Exists { key }) => return Ok(Built::There(key)),
            Err(error) => return Err(TemplateError::from(error).into()),
        };
        tell(&format!("{rung}: starting the template of {}", key.short()));
        let made = twice(Unbuilt::may_pass, async |before| {
            if let Some(Unbuilt::Rung(before)) = before {
                tell(&once_more(rung, &before));
                building.clear().map_err(TemplateError::from)?;
            }
            self.make(&*driver, rung, building.dir(), tell).await
        });
        let made = made.await;
        let published = match made {
            Ok(()) => self.publish(building, refusals, &*driver, scout).await,
            Err(Unbuilt::Rung(error)) if error.is_for_want_of_room() => Err(TemplateError::Room(error)),
            Err(Unbuilt::Rung(error)) => {
                building.clear().map_err(TemplateError::from)?;
                self.held.push(building);
                return Err(error.into());
            }
            Err(Unbuilt::Else(error)) => Err(error),
        };
        published.map_err(|error| {
            if is_lasting(&error) {
                ladder.failed(key, chain(&error));
            }
            error.into()
        })
    }

    /// A file that was replaced since its digest was taken may be in the template, or may not.
    pub async fn publish(
        &self,
        building: Building,
        refusals: &[Refusal],
        driver: &dyn Driver,
        scout: &mut Scout,
    ) -> Result<Built, TemplateError> {
        let Inputs { rung, process, .. } = building.inputs().clone();
        let machine = self.machine(driver);
        let now = match process {
            Some(process) => machine.image(rung, process, scout).await?,
            None => machine.base(rung, scout).await?,
        };
        if now != *building.inputs() {
            return Err(TemplateError::Changed);
        }
        let root_limit = self.order.config.snapshot.root_limit.as_bytes();
        Ok(Built::New(building.publish(refusals.to_vec(), root_limit)?))
    }

    /// Starts a guest, saves it into `into`, and restores it from there.
    async fn make(
        &self,
        driver: &dyn Driver,
        rung: Rung,
        into: &Path,
        tell: &mut dyn FnMut(&str),
    ) -> Result<(), Unbuilt> {
        let config = &self.order.config;
        let spec = machine::spec(config, self.order.shape(), self.ground.dir(), self.ground.cgroups());
        let template =
            VmSpec { snapshot_dir: Some(into.to_owned()), ..machine::templates_spec(spec, Kind::Base, rung) };
        let running = match self.start(driver, &template, Origin::Boot).await {
            Ok(running) => running,
            // On the rung on which pods boot, that says nothing about rungs.
            Err(error) if rung == config.vmm.rung.here() => return Err(TemplateError::Start(error).into()),
            Err(error) => return Err(RungError::Start(error).into()),
        };
        tell(&format!("{rung}: saving it, {}", told(&running.info)));
        let saved = running.vm.snapshot(into).await;
        running.end().await;
        saved.map_err(RungError::Save)?;
        tell(&format!("{rung}: restoring it by way of trial"));
        Ok(self.restore(driver, rung, into).await?)
    }

    /// A machine whose agent answers; where it fails, nothing of it runs. What is restored may take as long as a boot:
    /// the trial is about whether it works, on a host that may have other things to do.
    pub async fn start(&self, driver: &dyn Driver, spec: &VmSpec, origin: Origin<'_>) -> Result<Running, StartError> {
        let Config { share, deadlines, .. } = &self.order.config;
        let dir = self.ground.share().map_or(self.ground.dir(), Share::dir);
        let cache = caching::of_template(share.cache);
        let mut virtiofsd = Virtiofsd::spawn(&self.virtiofsd, cache, dir, &spec.share_socket, &spec.cgroups)?;
        let vm = match machine::start(driver, spec, origin, &mut virtiofsd).await {
            Ok(vm) => vm,
            Err(error) => {
                virtiofsd.kill().await;
                return Err(error);
            }
        };
        let call = deadlines.agent_call.duration();
        match machine::meet_agent(&*vm, &mut virtiofsd, Patience::boot(deadlines), call, origin).await {
            // The session stays open until the machine is saved: then the agent waits, and does nothing else.
            Ok((agent, info)) => Ok(Running { vm, virtiofsd, info, agent }),
            Err(error) => {
                vm.kill().await;
                virtiofsd.kill().await;
                Err(error)
            }
        }
    }
}

/// A guest that is up, and everything of it.
pub(super) struct Running {
    vm: Box<dyn Vm>,
    virtiofsd: Virtiofsd,
    info: InfoResponse,
    agent: Agent,
}

impl Running {
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    pub fn info(&self) -> &InfoResponse {
        &self.info
    }

    pub fn vm(&self) -> &dyn Vm {
        &*self.vm
    }

    pub fn parts(&mut self) -> (&Agent, &dyn Vm, &mut Virtiofsd) {
        (&self.agent, &*self.vm, &mut self.virtiofsd)
    }

    pub async fn end(mut self) {
        self.vm.kill().await;
        self.virtiofsd.kill().await;
    }
}

/// Why there is no template on one rung.
pub(super) enum Unbuilt {
    /// The rung does not work.
    Rung(RungError),
    /// It has nothing to do with the rung.
    Else(TemplateError),
}

impl Unbuilt {
    fn may_pass(&self) -> bool {
        matches!(self, Self::Rung(error) if error.may_pass())
    }
}

impl From<RungError> for Unbuilt {
    fn from(error: RungError) -> Self {
        Self::Rung(error)
    }
}

impl From<TemplateError> for Unbuilt {
    fn from(error: TemplateError) -> Self {
        Self::Else(error)
    }
}
