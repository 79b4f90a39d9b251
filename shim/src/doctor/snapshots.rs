//! Whether machines can be saved and restored here, as far as that was tried.

use super::{Check, Status};
use crate::{
    config::{Config, Host, Overrides, Shape, SnapshotMode},
    program::{self, Scout},
    share,
    snapshot::{Ladder, Machine, Outcome, Store},
    task::chain,
    vmm,
};

const NAME: &str = "snapshots";

/// What is known of this host's ladder, and what a person has to know of that.
pub(super) async fn check(config: &Config, scout: &mut Scout) -> (Check, Option<Outcome>) {
    let dir = &config.snapshot.dir;
    // Only looked at: the store is made by who uses it.
    if dir.exists()
        && let Err(error) = Store::open(dir, config.snapshot.budget.as_bytes())
    {
        return (Check::warn(NAME, chain(&error), "every pod boots"), None);
    }
    let client = &config.snapshot.ctr;
    let there = if client.is_absolute() {
        program::is_executable(client)
    } else {
        client.to_str().is_some_and(|name| program::in_path(name).is_some())
    };
    let outcome = match outcome(config, scout).await {
        Ok(outcome) => outcome,
        Err(why) => return (Check::warn(NAME, format!("cannot be told: {why}"), "mend what is missing first"), None),
    };
    let check = match judge(config, outcome.as_ref()) {
        // What else is wrong comes first.
        Check { status: Status::Ok, .. } if !there && config.snapshot.mode != SnapshotMode::Off => Check::warn(
            NAME,
            format!("containerd's client {client:?} is not there, so no image snapshots are made"),
            "install it, or name it in [snapshot] ctr",
        ),
        check => check,
    };
    (check, outcome)
}

async fn outcome(config: &Config, scout: &mut Scout) -> Result<Option<Outcome>, String> {
    let driver = vmm::select(&config.vmm, scout).await.map_err(|error| chain(&error))?;
    let virtiofsd = share::find_virtiofsd(&config.share, scout).await.map_err(|error| chain(&error))?;
    let host = Host::read().map_err(|error| chain(&error))?;
    let shape = Shape::on(host, config, &Overrides::default(), None).map_err(|error| chain(&error))?;
    let machine = Machine { config, shape, driver: &*driver, virtiofsd: &virtiofsd };
    let footing = machine.footing(scout).await.map_err(|error| chain(&error))?;
    Ok(Ladder::load(&config.snapshot.dir).outcome(&footing).cloned())
}

fn judge(config: &Config, outcome: Option<&Outcome>) -> Check {
    if config.snapshot.mode == SnapshotMode::Off {
        return Check::ok(NAME, "[snapshot] mode = \"off\": only for pods that ask for them");
    }
    let Some(outcome) = outcome else {
        return Check::ok(NAME, "not tried yet: the first pod has a template built, or `chsnap snapshot build --base`");
    };
    let refusals: Vec<_> =
        outcome.refusals.iter().map(|refusal| format!("{}: {}", refusal.rung, refusal.why)).collect();
    match (outcome.rung, refusals.is_empty()) {
        (Some(rung), true) => Check::ok(NAME, format!("restored on rung {rung}, tried {}", outcome.found_at)),
        (Some(rung), false) => {
            let found = format!("restored on rung {rung}, tried {}; not on {}", outcome.found_at, refusals.join("; "));
            Check::ok(NAME, found)
        }
        (None, _) => Check::warn(
            NAME,
            format!("they work on no rung, tried {}, so every pod boots: {}", outcome.found_at, refusals.join("; ")),
            "they are tried again when the host's kernel, the VMM or the CPU is another, or after `chsnap doctor --retry`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        snapshot::{Footing, Refusal, tests_inputs},
        vmm::Rung,
    };

    #[test]
    fn what_was_found_out_is_told_with_the_reasons() {
        let config = Config::default();
        let of = |rung, refused: &[Rung]| {
            let refusals = refused.iter().map(|rung| Refusal::new(*rung, "os error 22")).collect();
            let on = Footing::of(&tests_inputs(), Rung::Standard);
            judge(&config, Some(&Outcome { on, rung, refusals, found_at: "then".into(), until: None }))
        };
        let works = of(Some(Rung::Standard), &[]);
        assert_eq!((works.status, works.found.as_str()), (Status::Ok, "restored on rung standard, tried then"));
        let masked = of(Some(Rung::NoPmu), &[Rung::Standard]);
        assert!(masked.status == Status::Ok && masked.found.ends_with("not on standard: os error 22"), "{masked:?}");
        let none = of(None, &Rung::LADDER);
        assert!(none.status == Status::Warn && none.found.contains("aggressive: os error 22"), "{none:?}");
        assert!(none.mend.unwrap().contains("chsnap doctor --retry"));
        assert!(judge(&config, None).found.contains("not tried yet"));
    }
}
