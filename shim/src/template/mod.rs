//! Templates: guests that are started for nothing but to be saved. One is built on the fullest rung of the ladder on
//! which what was saved can be restored again, which is tried before anybody gets to see it.
//!
//! `builder` builds one, at a place of `ground`'s, `image` one with the image's process in it (`limit` says how much
//! that may write, `ahead` has one built for pods to come), `launch` has that done by a process of its own beside a pod, after which
//! `janitor` clears away if it is killed, `climb` is the ladder, `prove` tries what is there again.

use std::io;

use chsnap_protocol::agent::InfoResponse;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    agent::AgentError,
    config::{Config, Overrides, Shape},
    origin::{OriginError, Place},
    sandbox::{Blueprint, DirError, StartError},
    share::{Overlay, RootMount, VirtiofsdError},
    snapshot::{BuildError, FindError, InputsError, Key, ListError, OpenError},
    task::chain,
    vmm::{BootError, ControlError, SelectError, SnapshotError},
};

mod ahead;
mod builder;
mod climb;
mod ground;
mod image;
#[cfg(test)]
mod image_tests;
mod janitor;
mod launch;
mod limit;
mod prove;

pub use ahead::{Ahead, AheadError, StandIn};
pub use builder::build;
pub use ground::clear_away;
pub use image::{ImageOrder, ProcessError};
pub use janitor::{JANITOR, Janitor, clear};
pub use launch::{COMMAND, isolate, launch, serve};
pub use limit::ExcessError;

/// What is to be built.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// Settings of the host.
    pub config: Config,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory.
    pub memory_mib: u64,
    /// Nobody waits for it: pods go first, and what did not work a moment ago is not tried again.
    pub beside: bool,
    /// Of the image's process, too; else there is to be a base snapshot alone.
    pub image: Option<ImageOrder>,
}

impl Order {
    /// The template of pods like this one, to be built beside it.
    #[must_use]
    pub fn of(config: &Config, overrides: &Overrides, shape: Shape) -> Self {
        let config = Config { vmm: overrides.vmm(&config.vmm), ..config.clone() };
        Self { config, vcpus: shape.vcpus, memory_mib: shape.memory_mib, beside: true, image: None }
    }

    /// And of the process in `blueprint`, for a container at `place` whose root is `rootfs`.
    #[must_use]
    pub fn of_image(self, blueprint: &Blueprint, rootfs: &[RootMount], place: Place) -> Self {
        let lowers = Overlay::of(rootfs).map(|overlay| overlay.lowers);
        Self { image: Some(ImageOrder { blueprint: blueprint.clone(), lowers, place }), ..self }
    }

    fn shape(&self) -> Shape {
        Shape { vcpus: self.vcpus, memory_mib: self.memory_mib }
    }
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Built {
    /// This is there now.
    New(Key),
    /// This was there already.
    There(Key),
}

/// No template was built.
#[derive(Debug, Error)]
pub enum TemplateError {
    /// Enough of them are being built.
    #[error("{0} of them are being built on this host already, and [snapshot] builders allows no more")]
    Busy(u32),
    /// It could take from pods what is theirs.
    #[error(
        "none is built beside pods, since its memory and CPUs cannot be bounded; `chsnap snapshot build` builds one all the same"
    )]
    Unbounded(#[source] std::io::Error),
    /// A place for its sockets.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// No VMM can run here.
    #[error("no VMM can be used; `chsnap doctor` tells more")]
    Select(#[from] SelectError),
    /// virtiofsd cannot be run.
    #[error("no root file system can be served")]
    Virtiofsd(#[from] VirtiofsdError),
    /// What it has to match.
    #[error(transparent)]
    Inputs(#[from] InputsError),
    /// The store.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A place in it.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Its guest.
    #[error("the template's guest does not start")]
    Start(#[source] StartError),
    /// Its image.
    #[error("cannot tell from which image the container was made")]
    Origin(#[from] OriginError),
    /// Its process.
    #[error("no image snapshot")]
    Process(#[from] ProcessError),
    /// A file was replaced.
    #[error("the kernel, the initramfs, or a program was replaced while the template was built: build it again")]
    Changed,
    /// Its machine had to give way, or had no room: that says nothing about the rung.
    #[error("the host had no room for it, or somebody killed it")]
    Room(#[source] RungError),
    /// Its machine did not answer, on a host that may have had other things to do.
    #[error("the one that is there did not answer in time, and is kept")]
    Silent(#[source] RungError),
    /// One that is there cannot be looked at.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The one that is there works no more, and cannot be replaced.
    #[error("a snapshot that is there fails its trial restore, and cannot be removed")]
    Spent(#[source] io::Error),
    /// Which others there are.
    #[error(transparent)]
    List(ListError),
    /// It did not work lately.
    #[error("it failed a short while ago: {0}")]
    Lately(String),
    /// No rung works.
    #[error("snapshots work on no rung of the ladder here: {0}")]
    NoRung(String),
}

/// Why a rung does not work.
#[derive(Debug, Error)]
pub enum RungError {
    /// A masked guest.
    #[error("the template's guest does not start")]
    Start(#[source] StartError),
    /// The VMM.
    #[error("the template cannot be saved")]
    Save(#[source] SnapshotError),
    /// What was saved is worth nothing.
    #[error("the trial restore failed")]
    Trial(#[source] StartError),
}

impl RungError {
    /// Whether it was the host's want of memory, of disk or of anything else it has for a while, or somebody's doing. A rung
    /// is not to be given up for that.
    fn is_for_want_of_room(&self) -> bool {
        // No rung has to do with who serves the files.
        let of_files =
            matches!(self, Self::Start(StartError::VirtiofsdEnded(_)) | Self::Trial(StartError::VirtiofsdEnded(_)));
        of_files || tells_of_host(&chain(self))
    }

    /// Whether there was no answer in time, or none soon enough to set a clock by: the rung may work on a host that has less to
    /// do.
    fn is_silence(&self) -> bool {
        let late = |error: &StartError| {
            matches!(error, StartError::Agent(AgentError::Clock { .. }) | StartError::Resume(AgentError::Clock { .. }))
        };
        matches!(self, Self::Start(error) | Self::Trial(error) if late(error)) || chain(self).contains("did not answer")
    }

    /// Whether it may be another a moment later. A rung is refused for good, so what does not tell of the rung is to be seen
    /// twice. What is not held against it for good needs no second look.
    fn may_pass(&self) -> bool {
        !self.is_for_want_of_room() && !self.is_silence() && !self.is_of_vmm()
    }

    /// Whether the VMM itself has said that the kernel refuses what it was told to do: a register, most likely.
    fn is_of_vmm(&self) -> bool {
        const TELLING: [&str; 2] = ["Invalid argument", "os error 22"];
        let said = match self {
            Self::Save(SnapshotError::Control(ControlError::Refused { answer, .. })) => answer,
            Self::Save(SnapshotError::Died { said, .. }) => said,
            Self::Start(StartError::Boot(error)) | Self::Trial(StartError::Boot(error)) => match error {
                BootError::Died { said, .. } => said,
                BootError::Control { source: ControlError::Refused { answer, .. }, .. } => answer,
                _ => return false,
            },
            _ => return false,
        };
        TELLING.iter().any(|telling| said.contains(telling))
    }
}

/// Whether the host had no room, or somebody ended what had to run.
fn tells_of_host(text: &str) -> bool {
    // The guest's own words are no host's.
    let text = text.split("guest console:").next().unwrap_or_default();
    const TELLING: [&str; 10] = [
        "(SIGKILL)",
        "(SIGTERM)",
        "(SIGINT)",
        "(SIGHUP)",
        // QEMU, which ends well then.
        "terminating on signal",
        "No space left on device",
        "Cannot allocate memory",
        "Disk quota exceeded",
        "Resource temporarily unavailable",
        // Of a process, or in the system.
        "Too many open files",
    ];
    TELLING.iter().any(|telling| text.contains(telling))
}

/// What the guest says of itself, for the record.
fn told(info: &InfoResponse) -> String {
    let release: String = info.kernel_release.chars().filter(|c| !c.is_control()).take(64).collect();
    format!("guest kernel {release}")
}

/// Whether it would be the same a moment later.
fn is_lasting(error: &TemplateError) -> bool {
    match error {
        TemplateError::Start(_) | TemplateError::Room(_) => true,
        TemplateError::Process(error) => !matches!(
            error,
            ProcessError::Layers | ProcessError::Gone(_) | ProcessError::Excess(ExcessError::Look { .. })
        ),
        TemplateError::Build(error) => !matches!(error, BuildError::Busy { .. } | BuildError::Exists { .. }),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_killed_or_had_no_room_is_not_held_against_the_rung() {
        let saved = |answer: &str| {
            let (command, answer) = ("migrate".into(), answer.into());
            RungError::Save(SnapshotError::Control(ControlError::Refused { command, answer }))
        };
        let trial = |how: &str| RungError::Trial(StartError::Died { how: how.into() });
        for error in [
            saved("Unable to write to file: No space left on device"),
            saved("Error creating a thread: Resource temporarily unavailable (os error 11)"),
            saved("Could not open 'memory': Too many open files (os error 24)"),
            saved("Could not open 'memory': Too many open files in system (os error 23)"),
            trial("the VMM ended (signal: 9 (SIGKILL))"),
            trial("the VMM ended (signal: 15 (SIGTERM))"),
            trial("the VMM ended (signal: 2 (SIGINT))"),
            trial("the VMM ended (signal: 1 (SIGHUP))"),
            trial("the guest stopped (exit status: 0); VMM: qemu: terminating on signal 15 from pid 7"),
            RungError::Trial(StartError::VirtiofsdEnded("exit status: 1".into())),
        ] {
            assert!(error.is_for_want_of_room() && !error.may_pass(), "{}", chain(&error));
        }
        let late =
            RungError::Save(SnapshotError::Control(ControlError::Late { command: "stop".into(), seconds: 60.0 }));
        assert!(late.is_silence() && !late.is_for_want_of_room() && !trial("the VMM ended").is_silence());
        let clock = RungError::Trial(StartError::Resume(AgentError::Clock { most_ms: 70 }));
        assert!(clock.is_silence() && !clock.is_for_want_of_room());
        for error in [
            saved("SetSysRegister(Invalid argument (os error 22))"),
            trial("the VMM ended (exit status: 1)"),
            trial("the VMM ended (exit status: 1); guest console: fork: Resource temporarily unavailable"),
        ] {
            assert!(!error.is_for_want_of_room(), "{}", chain(&error));
        }
    }

    #[test]
    fn what_the_vmm_itself_refuses_is_believed_at_once_and_all_else_is_tried_again() {
        let register = "SetSysRegister(Invalid argument (os error 22))".to_owned();
        let refused = |answer: &str| ControlError::Refused { command: "vm.restore".into(), answer: answer.into() };
        let booted = |source| RungError::Trial(StartError::Boot(BootError::Control { program: "vmm".into(), source }));
        let died = |said: String| {
            let (program, status) = ("vmm".into(), "exit status: 1".into());
            RungError::Trial(StartError::Boot(BootError::Died { program, status, said, advice: "" }))
        };
        for error in [
            booted(refused(&register)),
            RungError::Save(SnapshotError::Control(refused(&register))),
            RungError::Save(SnapshotError::Died { status: "exit status: 1".into(), said: register.clone() }),
            died(register.clone()),
        ] {
            assert!(!error.may_pass(), "{}", chain(&error));
        }
        let in_guest = format!("the VMM ended (exit status: 1); guest console: {register}");
        let closed = ControlError::Closed { command: "vm.restore".into() };
        for error in [
            booted(refused("Error connecting to the back-end")),
            booted(closed),
            died("Aborted".into()),
            RungError::Trial(StartError::Died { how: in_guest }),
        ] {
            assert!(error.may_pass(), "{}", chain(&error));
        }
        let late = booted(ControlError::Late { command: "vm.restore".into(), seconds: 60.0 });
        assert!(!late.may_pass(), "it is believed for a while only");
    }
}
