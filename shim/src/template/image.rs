//! Building an image snapshot: a guest in which the image's process has initialised, saved and tried.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, chown},
    path::{Path, PathBuf},
};

use chsnap_protocol::FIRST_HOME;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{
    Built, RungError, TemplateError,
    builder::{Running, Workshop},
    climb::{Climbed, Step, climb, once_more, twice},
    is_lasting,
    limit::{ExcessError, within},
    prove::Saved,
    told,
};
use crate::{
    agent::AgentError,
    config::{Config, VmmConfig},
    files,
    origin::{OriginError, Place},
    program::Scout,
    sandbox::{
        Blueprint, NewContainer, Plan, PlanError, StartError, TEMPLATE, add_root,
        machine::{self, Origin},
    },
    share::{Overlay, RootMount, Share},
    snapshot::{BuildError, Held, Inputs, Ladder, Layers, ROOT, Refusal, nameless},
    task::chain,
    vmm::{self, Driver, Rung, VmSpec},
};

/// Beside the root difference, while it is being made: what overlayfs works in, and what the trial writes.
pub(super) const WORK: &str = "work";
pub(super) const TRIAL: &str = "trial";

/// What an image snapshot is made from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ImageOrder {
    /// The container.
    pub blueprint: Blueprint,
    /// The image's layers, the topmost first, where the container's root is made of them.
    pub lowers: Option<Vec<PathBuf>>,
    /// One that was made from the image.
    pub place: Place,
}

/// The image's process could not be saved.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// Its specification.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Its root.
    #[error("cannot make the template's root file system {path:?}")]
    Scratch {
        /// Which directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its layers were removed.
    #[error("a layer of the image was removed, or replaced, while the template was built")]
    Layers,
    /// It wrote more than it may.
    #[error(transparent)]
    Excess(#[from] ExcessError),
    /// The guest.
    #[error("the template's guest does not start")]
    Guest(#[source] StartError),
    /// It ended while it was needed.
    #[error("the template's VM is gone: {0}")]
    Gone(String),
    /// The guest refuses it.
    #[error("the template's container does not start")]
    Start(#[source] AgentError),
    /// It is not ready, or ended.
    #[error("the image's process did not get ready to be saved ({ready})")]
    NotReady {
        /// What was waited for.
        ready: String,
        /// What came instead.
        #[source]
        source: AgentError,
    },
    /// A hook failed, or it does not stand still.
    #[error("the image's process cannot be stopped to be saved")]
    Freeze(#[source] AgentError),
    /// More than a process may.
    #[error("the image's process has {files} files open, by the guest's account: too many")]
    Open {
        /// How many.
        files: usize,
    },
    /// On this rung.
    #[error(transparent)]
    Rung(#[from] RungError),
    /// Nobody can go on with them. No rung has to do with that.
    #[error(
        "virtiofsd ended in the trial restore, as it does where it does not find a file again that the process has open: {0}"
    )]
    Files(String),
}

impl ProcessError {
    fn is_of_channel(&self) -> bool {
        match self {
            Self::Start(source) | Self::Freeze(source) | Self::NotReady { source, .. } => source.is_of_channel(),
            _ => false,
        }
    }
}

/// An image that containerd has named.
#[derive(Debug)]
pub(super) struct Named {
    chain_id: String,
    /// Its layers, the topmost first.
    lowers: Vec<PathBuf>,
}

impl ImageOrder {
    /// Asks containerd which image it is about, and remembers that. To be done first: containers are removed, and their names
    /// given to others, while a base snapshot is built.
    pub(super) async fn name(&self, config: &Config) -> Result<Named, TemplateError> {
        let client = &config.snapshot.ctr;
        let (chain_id, lowers) = match &self.lowers {
            Some(lowers) => (self.place.chain_id_of_layers(client, lowers).await?, lowers.clone()),
            // The directory is then that of the image that was named, whoever's name that was.
            None => {
                let chain_id = self.place.chain_id(client).await?;
                let root = self.place.image_root(client, &chain_id).await?;
                (chain_id, vec![root])
            }
        };
        let gone = |_| TemplateError::from(ProcessError::Layers);
        Layers::load(&config.snapshot.dir).learn(&lowers, &chain_id).map_err(gone)?;
        Ok(Named { chain_id, lowers })
    }
}

impl Workshop<'_> {
    /// Builds the one that `image` is about: on the rung that was found to work, or on a barer one, if what this process
    /// uses cannot be saved or restored there.
    pub(super) async fn image(
        &self,
        image: &ImageOrder,
        named: Result<Named, TemplateError>,
        (from, fuller): (Rung, &[Refusal]),
        scout: &mut Scout,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Built, TemplateError> {
        let Named { chain_id, lowers } = match named {
            Ok(named) => named,
            Err(error) => return Err(self.nameless(image, error, scout).await),
        };
        let attempt = async |rung, refusals: &[Refusal]| {
            let of_base = fuller.iter().map(|refusal| Refusal { of_base: true, ..refusal.clone() });
            let refusals = of_base.chain(refusals.iter().cloned()).collect();
            let error = match self.image_on(rung, refusals, image, &chain_id, &lowers, scout, tell).await {
                Ok(built) => return Step::Works(built),
                Err(TemplateError::Process(ProcessError::Rung(error))) if !is_of_hooks(&error) => error,
                Err(error) => return Step::Broken(error),
            };
            match error.is_for_want_of_room() {
                true => Step::Broken(TemplateError::Room(error)),
                false => Step::Refused(error),
            }
        };
        let Climbed { on, refusals } = climb(from.and_barer(), Rung::moot, None, attempt).await?;
        let refused = || refusals.iter().map(|refusal| format!("{}: {}", refusal.rung, refusal.why));
        on.map(|(_, built)| built).ok_or_else(|| TemplateError::NoRung(refused().collect::<Vec<_>>().join("; ")))
    }

    /// Remembers of a stack of layers, whose image nobody can name, that this is so: else every pod would ask.
    /// A container that is gone says nothing: the next one of its layers may be asked about.
    async fn nameless(&self, image: &ImageOrder, error: TemplateError, scout: &mut Scout) -> TemplateError {
        let Config { vmm, snapshot, .. } = &self.order.config;
        let (true, Some(lowers)) = (is_of_no_image(&error), &image.lowers) else { return error };
        let key = async {
            let process = image.blueprint.process(&nameless(lowers)).ok()?;
            let driver = vmm::select(vmm, scout).await.ok()?;
            Some(self.machine(&*driver).image(vmm.rung.here(), process, scout).await.ok()?.key())
        };
        if let Some(key) = key.await {
            Ladder::load(&snapshot.dir).failed(key, chain(&error));
        }
        error
    }

    #[expect(clippy::too_many_arguments, reason = "all of it is what one attempt is about")]
    async fn image_on(
        &self,
        rung: Rung,
        refusals: Vec<Refusal>,
        image: &ImageOrder,
        chain_id: &str,
        lowers: &[PathBuf],
        scout: &mut Scout,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Built, TemplateError> {
        let config = &self.order.config;
        let process = image.blueprint.process(chain_id).map_err(ProcessError::from)?;
        let vmm = VmmConfig { rung, ..config.vmm.clone() };
        let driver = vmm::select(&vmm, scout).await?;
        let inputs = self.machine(&*driver).image(rung, process, scout).await?;
        let key = inputs.key();
        let mut ladder = Ladder::load(&config.snapshot.dir);
        if let Some(failure) = ladder.failure(&key).filter(|_| self.order.beside) {
            return Err(TemplateError::Lately(failure.why.clone()));
        }
        let building = match self.store.build(inputs.clone()) {
            Ok(building) => building,
            // Whoever waits for it wants one that works.
            Err(BuildError::Exists { .. }) if !self.order.beside => {
                let again = self.image_again(&*driver, inputs, (image, lowers), tell).await?;
                let Some(building) = again else { return Ok(Built::There(key)) };
                building
            }
            Err(BuildError::Exists { key }) => return Ok(Built::There(key)),
            Err(error) => return Err(error.into()),
        };
        tell(&format!("{rung}: starting the template of {}, {}", key.short(), shown(building.inputs())));
        let made = twice(may_pass, async |before| {
            if let Some(before) = before {
                tell(&once_more(rung, &before));
                building.clear()?;
            }
            Ok(self.make_image(image, lowers, rung, &*driver, building.dir(), tell).await?)
        });
        let made = made.await;
        let layers = Layers::load(&config.snapshot.dir);
        let same = || layers.chain_id(lowers) == Some(chain_id);
        let published = match made {
            Ok(()) if !same() => Err(ProcessError::Layers.into()),
            Ok(()) => self.publish(building, &refusals, &*driver, scout).await,
            Err(error) => Err(error),
        };
        match &published {
            Ok(Built::New(key)) => ladder.worked(key),
            Err(error) if is_lasting(error) => ladder.failed(key, chain(error)),
            _ => {}
        }
        published
    }

    async fn make_image(
        &self,
        image: &ImageOrder,
        lowers: &[PathBuf],
        rung: Rung,
        driver: &dyn Driver,
        into: &Path,
        tell: &mut dyn FnMut(&str),
    ) -> Result<(), ProcessError> {
        let limit = self.order.config.snapshot.root_limit.as_bytes();
        let Blueprint { spec, ready, streams, .. } = &image.blueprint;
        let plan = Plan::of(TEMPLATE, spec.clone())?;
        let stdio = (*streams).into();

        let (root, work) = (into.join(ROOT), into.join(WORK));
        directory(&root, lowers.first())?;
        directory(&work, None)?;
        let rootfs = [Overlay::mount(lowers, &root, &work)];
        let new = NewContainer { id: TEMPLATE, rootfs: &rootfs, plan: &plan, stdio };
        let container = Placed::new(self.ground.share(), &rootfs, &new).map_err(guest)?;
        let boot = VmSpec { snapshot_dir: Some(into.to_owned()), ..self.image_spec(rung) };
        let running = self.start(driver, &boot, Origin::Boot).await.map_err(ProcessError::Guest)?;
        let saved = async {
            let agent = running.agent();
            let created = agent.create_container(TEMPLATE, container.spec_json.clone(), new.stdio.clone()).await;
            created.map_err(ProcessError::Start)?;
            agent.start(TEMPLATE, "").await.map_err(ProcessError::Start)?;
            self.save(&running, image, rung, into, tell).await
        };
        let saved = match within(&root, limit, saved).await {
            Err(error) if error.is_of_channel() => {
                Err(machine::ended(running.vm()).await.map_or(error, ProcessError::Gone))
            }
            saved => saved,
        };
        running.end().await;
        drop(container);
        saved?;
        remove(&work)?;

        tell(&format!("{rung}: restoring it by way of trial"));
        let (trial, saved) = (into.join(TRIAL), Saved { from: into, image, lowers });
        self.try_image(driver, rung, &saved, &trial).await?;
        tell(&format!("{rung}: {ready} came, and a clone works"));
        remove(&trial)
    }

    async fn save(
        &self,
        running: &Running,
        image: &ImageOrder,
        rung: Rung,
        into: &Path,
        tell: &mut dyn FnMut(&str),
    ) -> Result<(), ProcessError> {
        let Config { deadlines, .. } = &self.order.config;
        let ready = &image.blueprint.ready;
        tell(&format!("{rung}: waiting for its process to be ready ({ready}), {}", told(running.info())));
        let agent = running.agent();
        let not_ready = |source| ProcessError::NotReady { ready: ready.to_string(), source };
        agent.await_ready(TEMPLATE, ready, deadlines.ready.duration()).await.map_err(not_ready)?;
        let open = agent.freeze(TEMPLATE, deadlines.hooks.duration()).await.map_err(ProcessError::Freeze)?;
        let held = Held::told(open).map_err(|files| ProcessError::Open { files })?;
        held.write(into).map_err(|source| ProcessError::Scratch { path: into.into(), source })?;
        tell(&format!("{rung}: saving it"));
        running.vm().snapshot(into).await.map_err(|error| RungError::Save(error).into())
    }
}

/// A container's root in the share; no longer there when dropped.
pub(super) struct Placed<'a> {
    share: &'a Share,
    spec_json: Vec<u8>,
}

impl<'a> Placed<'a> {
    pub(super) fn new(
        share: Option<&'a Share>,
        rootfs: &[RootMount],
        new: &NewContainer<'_>,
    ) -> Result<Self, StartError> {
        let share = share.ok_or(StartError::NoShare)?;
        let (spec_json, _) = add_root(share, FIRST_HOME, rootfs, new)?;
        Ok(Self { share, spec_json })
    }
}

impl Drop for Placed<'_> {
    fn drop(&mut self) {
        self.share.remove_container(FIRST_HOME);
    }
}

/// Hooks that fail do so on every rung. Not so a machine that ends over them, or an agent.
fn is_of_hooks(error: &RungError) -> bool {
    matches!(error, RungError::Trial(StartError::Adopt(error)) if !error.is_of_channel())
}

/// Whether the rung is not yet to be given up for that.
fn may_pass(error: &TemplateError) -> bool {
    matches!(error, TemplateError::Process(ProcessError::Rung(error)) if error.may_pass() && !is_of_hooks(error))
}

/// Whether containerd has said that there is no image, and not just failed to name one.
pub(super) fn is_of_no_image(error: &TemplateError) -> bool {
    matches!(error, TemplateError::Origin(OriginError::NoImage { .. }))
}

pub(super) fn guest(error: StartError) -> ProcessError {
    ProcessError::Guest(error)
}

fn shown(inputs: &Inputs) -> String {
    let args = inputs.process.as_ref().map(|process| process.args.join(" ")).unwrap_or_default();
    args.chars().map(|c| if c.is_control() { ' ' } else { c }).take(80).collect()
}

/// The top of a container's root is whose that of the image is.
pub(super) fn directory(path: &Path, like: Option<&PathBuf>) -> Result<(), ProcessError> {
    let made = fs::create_dir(path).and_then(|()| match like.map(fs::metadata).transpose()? {
        Some(meta) => {
            fs::set_permissions(path, meta.permissions())?;
            chown(path, Some(meta.uid()), Some(meta.gid()))
        }
        None => Ok(()),
    });
    made.map_err(|source| ProcessError::Scratch { path: path.into(), source })
}

pub(super) fn remove(path: &Path) -> Result<(), ProcessError> {
    files::remove_tree(path).map_err(|source| ProcessError::Scratch { path: path.into(), source })
}
