//! Whether machines can be saved and restored here, as far as that was tried.

use std::time::{Duration, UNIX_EPOCH};

use super::{Check, Status};
use crate::{
    config::{Config, Host, Overrides, Shape, SnapshotMode},
    program::{self, Scout},
    share,
    snapshot::{Ladder, Machine, Outcome, Store},
    state::rfc3339,
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
    let found = match found(config, scout).await {
        Ok(found) => found,
        Err(why) => return (Check::warn(NAME, format!("cannot be told: {why}"), "mend what is missing first"), None),
    };
    let check = match judge(config, found.as_ref()) {
        // What else is wrong comes first.
        Check { status: Status::Ok, .. } if !there && config.snapshot.mode != SnapshotMode::Off => Check::warn(
            NAME,
            format!("containerd's client {client:?} is not there, so no image snapshots are made"),
            "install it, or name it in [snapshot] ctr",
        ),
        check => check,
    };
    (check, found.filter(Outcome::holds))
}

/// What was found out here, be it believed no more.
async fn found(config: &Config, scout: &mut Scout) -> Result<Option<Outcome>, String> {
    let driver = vmm::select(&config.vmm, scout).await.map_err(|error| chain(&error))?;
    let virtiofsd = share::find_virtiofsd(&config.share, scout).await.map_err(|error| chain(&error))?;
    let host = Host::read().map_err(|error| chain(&error))?;
    let shape = Shape::on(host, config, &Overrides::default(), None).map_err(|error| chain(&error))?;
    let machine = Machine { config, shape, driver: &*driver, virtiofsd: &virtiofsd };
    let footing = machine.footing(scout).await.map_err(|error| chain(&error))?;
    Ok(Ladder::load(&config.snapshot.dir).found(&footing).cloned())
}

fn judge(config: &Config, outcome: Option<&Outcome>) -> Check {
    if config.snapshot.mode == SnapshotMode::Off {
        return Check::ok(NAME, "[snapshot] mode = \"off\": only for pods that ask for them");
    }
    // Without builders, nothing is tried beside pods.
    let built = |pod| match config.snapshot.builders {
        0 => "with [snapshot] builders = 0, only `chsnap snapshot build` has a template built".to_owned(),
        _ => format!("the {pod} pod has a template built, or `chsnap snapshot build --base`"),
    };
    let Some(outcome) = outcome else { return Check::ok(NAME, format!("not tried yet: {}", built("first"))) };
    let refusals: Vec<_> =
        outcome.refusals.iter().map(|refusal| format!("{}: {}", refusal.rung, refusal.why)).collect();
    let (refusals, at) = (refusals.join("; "), &outcome.found_at);
    if !outcome.holds() {
        let found = match outcome.rung {
            Some(rung) => format!("restored on rung {rung}, tried {at}; not on {refusals}"),
            None => format!("they worked on no rung, tried {at}: {refusals}"),
        };
        return Check::ok(NAME, format!("{found}. That is believed no more: {}", built("next")));
    }
    match (outcome.rung, refusals.is_empty()) {
        (Some(rung), true) => Check::ok(NAME, format!("restored on rung {rung}, tried {at}")),
        (Some(rung), false) => {
            Check::ok(NAME, format!("restored on rung {rung}, tried {at}; not on {refusals}{}", again(outcome)))
        }
        (None, _) => Check::warn(
            NAME,
            format!("they work on no rung, tried {at}, so every pod boots: {refusals}{}", again(outcome)),
            mend(config, outcome),
        ),
    }
}

/// Until when a refusal is believed that was none but silence.
fn again(outcome: &Outcome) -> String {
    let until = outcome.until.map(|until| rfc3339(UNIX_EPOCH + Duration::from_secs(until)));
    until.map(|until| format!(" (there was no answer in time, which is believed until {until})")).unwrap_or_default()
}

/// What has the ladder climbed again that was climbed in vain.
fn mend(config: &Config, outcome: &Outcome) -> String {
    let when = match outcome.until {
        Some(_) => "after that time, ",
        None => "",
    };
    let changed = "when the host's kernel, the VMM or the CPU is another, or after `chsnap doctor --retry`";
    match config.snapshot.builders {
        0 => "with [snapshot] builders = 0, only `chsnap snapshot build --base` tries them again".into(),
        _ => format!("the next pod has them tried again {when}{changed}; `chsnap snapshot build --base` does at once"),
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
    }

    #[test]
    fn what_has_it_tried_again_is_told_as_it_is() {
        let mut config = Config::default();
        let outcome = |rung, until| {
            let refusals = vec![Refusal::new(Rung::Standard, "no answer")];
            let on = Footing::of(&tests_inputs(), Rung::Standard);
            Outcome { on, rung, refusals, found_at: "then".into(), until }
        };
        // The year 2100, and a second after the epoch.
        let (lasting, silent, spent) =
            (outcome(None, None), outcome(None, Some(4_102_444_800)), outcome(None, Some(1)));
        let beside = |check: &Check| {
            let text = format!("{} {}", check.found, check.mend.as_deref().unwrap_or_default());
            (text.contains("pod has"), text.contains("builders = 0"), text)
        };
        for builders in [1, 0] {
            config.snapshot.builders = builders;
            for known in [None, Some(&lasting), Some(&silent), Some(&spent)] {
                let (by_pods, by_hand, text) = beside(&judge(&config, known));
                assert_eq!((by_pods, by_hand), (builders > 0, builders == 0), "{text}");
                assert!(text.contains("chsnap snapshot build"), "{text}");
            }
            assert!(judge(&config, None).found.contains("not tried yet"));
            let spent = judge(&config, Some(&spent));
            assert!(spent.status == Status::Ok && spent.found.contains("believed no more"), "{spent:?}");
            let silent = judge(&config, Some(&silent));
            assert!(silent.status == Status::Warn && silent.found.contains("until 2100-01-01T00:00:00"), "{silent:?}");
            assert!(!judge(&config, Some(&lasting)).found.contains("until"));
        }
        config.snapshot.builders = 1;
        let mend = |outcome| judge(&config, Some(outcome)).mend.unwrap();
        assert!(mend(&silent).contains("after that time") && !mend(&lasting).contains("after that time"));
        let works = outcome(Some(Rung::NoPmu), Some(1));
        assert!(judge(&config, Some(&works)).found.starts_with("restored on rung no-pmu, tried then; not on standard"));
    }
}
