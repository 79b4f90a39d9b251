//! What is there already, tried again: a snapshot may stop to work for a reason that its key does not have.

use std::path::Path;

use crate::{
    sandbox::machine::{self, Origin},
    snapshot::{Footing, Key, Kind},
    task::chain,
    vmm::{Driver, Rung},
};

use super::{
    RungError, TemplateError,
    builder::{Unbuilt, Workshop},
};

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
        // What cannot be used, whoever builds its successor has out of the way.
        let Ok(Some(there)) = self.store.find(key) else { return Ok(true) };
        tell(&format!("{rung}: restoring {}, which is there, by way of trial", key.short()));
        let error = match self.restore(driver, rung, there.dir()).await {
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
}
