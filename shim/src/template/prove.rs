//! Trials of what was saved: before anybody gets to see it, and again later, since a snapshot may stop to work for a reason that
//! its key does not have.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use chsnap_protocol::agent::AdoptRequest;
use nix::sys::signal::Signal;
use tokio::time::timeout;

use super::{
    RungError, TemplateError,
    builder::{Unbuilt, Workshop},
    climb::{once_more, twice},
    image::{ImageOrder, Placed, ProcessError, TRIAL, WORK, directory, guest, remove},
    limit::within,
    tells_of_host,
};
use crate::{
    agent::Agent,
    sandbox::{
        Blueprint, NewContainer, Plan, StartError, TEMPLATE,
        machine::{self, Origin},
    },
    share::Overlay,
    snapshot::{Building, FindError, Footing, Inputs, Key, Kind, ROOT},
    task::chain,
    vmm::{Driver, Rung, VmSpec},
};

/// The container in the restored guest of a trial.
const ADOPTED: &str = "trial";
/// How long its process is watched, once it goes on: what a CPU does not bear ends it at once.
const WATCHED: Duration = Duration::from_millis(300);
/// How what a CPU does not bear ends a process: its number above 128, see signal(7). Other statuses are the process's own affair.
const NOT_BORNE: [Signal; 6] =
    [Signal::SIGILL, Signal::SIGTRAP, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGSEGV, Signal::SIGSYS];

/// An image's process that was saved.
pub(super) struct Saved<'a> {
    /// Where.
    pub from: &'a Path,
    /// Which.
    pub image: &'a ImageOrder,
    /// The image's layers, the topmost first.
    pub lowers: &'a [PathBuf],
}

impl Workshop<'_> {
    /// Restores the base snapshot that is there by way of trial. One that fails gives way, and so does whatever else was saved
    /// on that rung of this host: pods would go on trying that first.
    pub(super) async fn still_works(
        &self,
        driver: &dyn Driver,
        rung: Rung,
        key: &Key,
        tell: &mut dyn FnMut(&str),
    ) -> Result<bool, Unbuilt> {
        let there = match self.store.find(key) {
            Ok(Some(there)) => there,
            // Somebody has removed it since it was seen, or the builder of its successor has it out of the way.
            Ok(None) | Err(FindError::Spoilt { .. }) => return Ok(false),
            Err(error) => return Err(TemplateError::from(error).into()),
        };
        tell(&format!("{rung}: restoring {}, which is there, by way of trial", key.short()));
        let restored = twice(RungError::may_pass, async |before| {
            if let Some(before) = before {
                tell(&once_more(rung, &before));
            }
            self.restore(driver, rung, there.dir()).await
        });
        let error = match restored.await {
            Ok(()) => return Ok(true),
            Err(error) if error.is_for_want_of_room() || error.is_silence() => return Err(error.into()),
            Err(error) => error,
        };
        tell(&format!("{rung}: {}", chain(&error)));
        let on = Footing::of(&there.manifest().inputs, rung);
        drop(there);
        for entry in self.store.list().map_err(TemplateError::List)? {
            let Ok(manifest) = entry.manifest else { continue };
            if manifest.inputs.rung == rung && Footing::of(&manifest.inputs, rung) == on {
                self.store.displace(&entry.key).map_err(TemplateError::Spent)?;
            }
        }
        Ok(false)
    }

    /// Restores what is in that directory, and has the guest answer.
    pub(super) async fn restore(&self, driver: &dyn Driver, rung: Rung, from: &Path) -> Result<(), RungError> {
        let spec = machine::spec(&self.order.config, self.order.shape(), self.ground.dir(), self.ground.cgroups());
        let restored = machine::templates_spec(spec, Kind::Base, rung);
        let trial = self.start(driver, &restored, Origin::Snapshot(Kind::Base, from)).await;
        trial.map_err(RungError::Trial)?.end().await;
        Ok(())
    }

    /// Restores the image snapshot that is there by way of trial: nothing where it works, else a place for another.
    pub(super) async fn image_again(
        &self,
        driver: &dyn Driver,
        inputs: Inputs,
        (image, lowers): (&ImageOrder, &[PathBuf]),
        tell: &mut dyn FnMut(&str),
    ) -> Result<Option<Building>, TemplateError> {
        let (key, rung) = (inputs.key(), inputs.rung);
        let building = self.store.build_again(inputs)?;
        // One that is spoilt would not be there for whoever builds.
        let Some(there) = self.store.find(&key)? else { return Ok(Some(building)) };
        tell(&format!("{rung}: restoring {}, which is there, by way of trial", key.short()));
        let saved = Saved { from: there.dir(), image, lowers };
        let scratch = building.dir().join(TRIAL);
        let may_pass = |error: &ProcessError| matches!(error, ProcessError::Rung(error) if error.may_pass());
        let tried = twice(may_pass, async |before| {
            if let Some(before) = before {
                tell(&once_more(rung, &before));
                remove(&scratch)?;
            }
            self.try_image(driver, rung, &saved, &scratch).await
        });
        let error = match tried.await {
            Ok(()) => return Ok(None),
            Err(ProcessError::Rung(error)) => error,
            Err(error) => return Err(error.into()),
        };
        // Neither says anything about what was saved.
        if error.is_for_want_of_room() {
            return Err(TemplateError::Room(error));
        }
        if error.is_silence() {
            return Err(TemplateError::Silent(error));
        }
        tell(&format!("{rung}: {}", chain(&error)));
        drop(there);
        building.clear()?;
        self.store.displace(&key).map_err(TemplateError::Spent)?;
        Ok(Some(building))
    }

    /// Restores an image's process as for a pod, and has it go on; what it writes goes into `scratch`.
    pub(super) async fn try_image(
        &self,
        driver: &dyn Driver,
        rung: Rung,
        saved: &Saved<'_>,
        scratch: &Path,
    ) -> Result<(), ProcessError> {
        let Blueprint { spec, streams, own_env, .. } = &saved.image.blueprint;
        let plan = Plan::of(TEMPLATE, spec.clone())?;
        let (upper, work) = (scratch.join(ROOT), scratch.join(WORK));
        directory(scratch, None)?;
        directory(&upper, saved.lowers.first())?;
        directory(&work, None)?;
        let lowers: Vec<_> = [saved.from.join(ROOT)].into_iter().chain(saved.lowers.iter().cloned()).collect();
        let rootfs = [Overlay::mount(&lowers, &upper, &work)];
        let new = NewContainer { id: TEMPLATE, rootfs: &rootfs, plan: &plan, stdio: (*streams).into() };
        let container = Placed::new(self.ground.share(), &rootfs, &new).map_err(guest)?;
        let origin = Origin::Snapshot(Kind::Image, saved.from);
        let mut running = self.start(driver, &self.image_spec(rung), origin).await.map_err(trial)?;
        let adoption = AdoptRequest {
            from: TEMPLATE.into(),
            container_id: ADOPTED.into(),
            hostname: plan.spec().hostname().clone().unwrap_or_default(),
            env: own_env.clone(),
            ..Default::default()
        };
        let config = &self.order.config;
        let hooks = config.deadlines.hooks.duration();
        let (agent, vm, virtiofsd) = running.parts();
        let goes_on = machine::while_alive(vm, virtiofsd, goes_on(agent, adoption, hooks));
        let limit = config.snapshot.root_limit.as_bytes();
        let tried = within(&upper, limit, async { goes_on.await.map_err(trial) }).await;
        running.end().await;
        drop(container);
        tried
    }

    /// The machine in which such a process goes on.
    pub(super) fn image_spec(&self, rung: Rung) -> VmSpec {
        let spec = machine::spec(&self.order.config, self.order.shape(), self.ground.dir(), self.ground.cgroups());
        machine::templates_spec(spec, Kind::Image, rung)
    }
}

/// virtiofsd opens by their paths what the process had open, and ends where it cannot.
fn trial(error: StartError) -> ProcessError {
    match error {
        StartError::VirtiofsdEnded(how) if !tells_of_host(&how) => ProcessError::Files(how),
        error => RungError::Trial(error).into(),
    }
}

async fn goes_on(agent: &Agent, adoption: AdoptRequest, hooks: Duration) -> Result<(), StartError> {
    agent.adopt(adoption, hooks).await.map_err(StartError::Adopt)?;
    agent.start(ADOPTED, "").await.map_err(StartError::Container)?;
    match timeout(WATCHED, agent.wait(ADOPTED, "")).await {
        Ok(Ok(end)) if is_not_borne(end.exit_status) => Err(StartError::Ended(end.exit_status)),
        Ok(ended) => ended.map(drop).map_err(StartError::Agent),
        Err(_) => Ok(()),
    }
}

fn is_not_borne(exit_status: u32) -> bool {
    NOT_BORNE.iter().any(|signal| exit_status == 128 + *signal as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtiofsd_that_ends_in_the_trial_of_a_process_tells_of_its_files() {
        let ended = |how: &str| trial(StartError::VirtiofsdEnded(how.into()));
        let refused = TemplateError::Process(ended("exit status: 1; cannot open /app/log"));
        let text = chain(&refused);
        assert!(text.contains("cannot open /app/log") && text.contains("has open"), "{text}");
        assert!(!text.contains("had no room") && super::super::is_lasting(&refused), "{text}");
        for how in ["signal: 9 (SIGKILL)", "exit status: 1; No space left on device"] {
            assert!(matches!(ended(how), ProcessError::Rung(error) if error.is_for_want_of_room()), "{how}");
        }
        let died = trial(StartError::Died { how: "exit status: 1".into() });
        assert!(matches!(died, ProcessError::Rung(RungError::Trial(_))));
    }

    #[test]
    fn only_what_a_cpu_does_not_bear_is_held_against_a_rung() {
        assert!([132, 135, 136, 139].into_iter().all(is_not_borne));
        // An error, a want of memory, a pipe that nobody reads, a program's -1.
        assert!(![0, 1, 128, 137, 141, 143, 255].into_iter().any(is_not_borne));
    }
}
