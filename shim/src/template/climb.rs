//! Climbing down the ladder: from the fullest rung to the barest, until one works.

use std::error::Error;

use crate::{
    snapshot::{Outcome, Refusal},
    task::chain,
    vmm::Rung,
};

use super::RungError;

/// What one rung came to.
pub enum Step<T, E> {
    /// It works.
    Works(T),
    /// It does not.
    Refused(RungError),
    /// That cannot be told.
    Broken(E),
}

/// How far one got.
pub struct Climbed<T> {
    /// The rung that works, and what was made on it; none where none does.
    pub on: Option<(Rung, T)>,
    /// Those that do not.
    pub refusals: Vec<Refusal>,
}

/// Tries one rung after the other with `attempt`. Those that `known` tells not to work are not tried again, and those
/// that `moot` has a word about are passed over.
pub async fn climb<T, E>(
    rungs: impl Iterator<Item = Rung>,
    moot: impl Fn(Rung) -> Option<&'static str>,
    known: Option<&Outcome>,
    mut attempt: impl AsyncFnMut(Rung, &[Refusal]) -> Step<T, E>,
) -> Result<Climbed<T>, E> {
    let mut refusals: Vec<Refusal> = Vec::new();
    for rung in rungs {
        if let Some(why) = moot(rung) {
            refusals.push(Refusal::new(rung, format!("passed over: {why}")));
            continue;
        }
        // An outcome without a rung that works knows of no rung below.
        let before = known.filter(|outcome| outcome.rung.is_some_and(|works| rung < works));
        if let Some(refusal) = before.and_then(|outcome| outcome.refusals.iter().find(|r| r.rung == rung)) {
            refusals.push(refusal.clone());
            continue;
        }
        match attempt(rung, &refusals).await {
            Step::Works(made) => return Ok(Climbed { on: Some((rung, made)), refusals }),
            Step::Refused(error) => {
                refusals.push(Refusal { silent: error.is_silence(), ..Refusal::new(rung, chain(&error)) });
            }
            Step::Broken(error) => return Err(error),
        }
    }
    Ok(Climbed { on: None, refusals })
}

/// Tries it, and once more where it failed for a reason that `may_pass`; `attempt` hears what the first one came to.
pub async fn twice<T, E>(
    may_pass: impl Fn(&E) -> bool,
    mut attempt: impl AsyncFnMut(Option<E>) -> Result<T, E>,
) -> Result<T, E> {
    match attempt(None).await {
        Err(error) if may_pass(&error) => attempt(Some(error)).await,
        first => first,
    }
}

/// What is told of that.
pub fn once_more(rung: Rung, error: &dyn Error) -> String {
    format!("{rung}: trying that once more: {}", chain(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        snapshot::Footing,
        vmm::{ControlError, SnapshotError},
    };

    /// As Cloud Hypervisor words it on an arm64 host whose KVM refuses a register.
    fn refused() -> RungError {
        let answer = "GetAarchCoreRegister(Invalid argument (os error 22))".to_owned();
        RungError::Save(SnapshotError::Control(ControlError::Refused { command: "vm.snapshot".into(), answer }))
    }

    async fn climbed(working: Option<Rung>, known: Option<&Outcome>) -> (Option<Rung>, Vec<Rung>, Vec<Refusal>) {
        let mut tried = Vec::new();
        let climbed = climb(
            Rung::LADDER.into_iter(),
            |_| None,
            known,
            async |rung, _: &[Refusal]| {
                tried.push(rung);
                if Some(rung) >= working && working.is_some() {
                    Step::Works(())
                } else {
                    Step::<(), ()>::Refused(refused())
                }
            },
        );
        let Climbed { on, refusals } = climbed.await.unwrap();
        (on.map(|(rung, ())| rung), tried, refusals)
    }

    #[tokio::test]
    async fn the_fullest_rung_that_works_is_taken_and_each_refusal_is_kept() {
        use Rung::{Aggressive, NoPmu, Standard};
        for (working, expected) in [
            (Some(Standard), vec![Standard]),
            (Some(NoPmu), vec![Standard, NoPmu]),
            (Some(Aggressive), vec![Standard, NoPmu, Aggressive]),
            (None, vec![Standard, NoPmu, Aggressive]),
        ] {
            let (on, tried, refusals) = climbed(working, None).await;
            assert_eq!((on, &tried), (working, &expected));
            assert_eq!(refusals.len(), expected.len() - usize::from(working.is_some()));
            let text = "the template cannot be saved: the VMM did not save the machine: the VMM refused \"vm.snapshot\": \
                        GetAarchCoreRegister(Invalid argument (os error 22))";
            assert!(refusals.iter().all(|refusal| refusal.why == text), "{refusals:?}");
        }
    }

    #[tokio::test]
    async fn what_may_pass_is_tried_twice_and_then_believed() {
        let tried = async |outcomes: &[Result<(), &'static str>]| {
            let mut left = outcomes.iter();
            let tried = twice(
                |error| *error != "lasting",
                async |before: Option<&str>| {
                    assert_eq!(before.is_some(), left.len() < outcomes.len());
                    *left.next().unwrap()
                },
            );
            (tried.await, left.len())
        };
        assert_eq!(tried(&[Ok(()), Err("more")]).await, (Ok(()), 1));
        assert_eq!(tried(&[Err("once"), Ok(()), Err("more")]).await, (Ok(()), 1));
        assert_eq!(tried(&[Err("once"), Err("again"), Ok(())]).await, (Err("again"), 1));
        assert_eq!(tried(&[Err("lasting"), Ok(())]).await, (Err("lasting"), 1));
    }

    #[tokio::test]
    async fn what_is_known_not_to_work_is_not_tried_again() {
        use Rung::{Aggressive, NoPmu, Standard};
        let (_, _, refusals) = climbed(Some(NoPmu), None).await;
        let inputs = crate::snapshot::tests_inputs();
        let on = Footing::of(&inputs, Standard);
        let known = Outcome { on, rung: Some(NoPmu), refusals, found_at: String::new(), until: None };
        let (on, tried, kept) = climbed(Some(NoPmu), Some(&known)).await;
        assert_eq!((on, tried, kept.len()), (Some(NoPmu), vec![NoPmu], 1));
        // It no longer does.
        let (on, tried, kept) = climbed(Some(Aggressive), Some(&known)).await;
        assert_eq!((on, tried, kept.len()), (Some(Aggressive), vec![NoPmu, Aggressive], 2));
        // One that knows of none is asked only by who wants to try again.
        let hopeless = Outcome { rung: None, ..known };
        assert_eq!(climbed(Some(Standard), Some(&hopeless)).await.1, [Standard]);
    }

    #[tokio::test]
    async fn a_rung_that_means_nothing_is_passed_over_with_the_reason() {
        let moot = |rung| (rung != Rung::Standard).then_some("no such features");
        let attempt = async |_, _: &[Refusal]| Step::<(), ()>::Refused(refused());
        let climbed = climb(Rung::LADDER.into_iter(), moot, None, attempt).await.unwrap();
        let whys: Vec<_> = climbed.refusals.iter().map(|refusal| refusal.why.as_str()).collect();
        assert!(climbed.on.is_none() && whys[0].contains("os error 22"), "{whys:?}");
        assert_eq!(whys[1..], ["passed over: no such features"; 2]);
    }

    #[tokio::test]
    async fn what_has_nothing_to_do_with_rungs_ends_the_climb() {
        let attempt = async |_, _: &[Refusal]| Step::<(), _>::Broken("no room");
        let result = climb(Rung::LADDER.into_iter(), |_| None, None, attempt).await;
        assert_eq!(result.err(), Some("no room"));
    }
}
