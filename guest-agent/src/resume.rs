//! What makes a restored machine this one and no other. Its memory is the template's: so are its random numbers, its
//! clock and its epoch, until they are replaced here, before anything else runs. A step that fails ends it all.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};
use ttrpc::Code;

use chsnap_protocol::{EPOCH_FILE, MIN_ENTROPY, PUBLIC_DIR, SHARE_MOUNT, SHARE_TAG, agent::ResumeRequest};

use crate::{clock, error::Coded, sys};

/// The kernel makes one for whoever reads it. Not `boot_id`, which stays as it was first read, in every clone.
const NEW_UUID: &str = "/proc/sys/kernel/random/uuid";

/// Why the machine is still what it was restored from.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    #[error("{0} bytes of entropy are too few; the least is {MIN_ENTROPY}")]
    TooLittle(usize),
    #[error("the epoch {0:?} is no UUID")]
    NoUuid(String),
    #[error("there is no wall clock in the request")]
    NoClock,
    #[error("cannot add entropy to the kernel's")]
    Entropy(#[source] io::Error),
    #[error("cannot have the kernel's random numbers seeded anew")]
    Reseed(#[source] io::Error),
    #[error("cannot set the clock")]
    Clock(#[source] io::Error),
    #[error("cannot write the epoch to {path:?}")]
    Epoch { path: PathBuf, source: io::Error },
    #[error("cannot read the guest's mounts")]
    Mounts(#[source] io::Error),
    #[error("the share is mounted already")]
    Mounted,
    #[error("cannot mount the share at {SHARE_MOUNT}")]
    Share(#[source] io::Error),
}

impl Coded for ResumeError {
    fn code(&self) -> Code {
        match self {
            Self::TooLittle(_) | Self::NoUuid(_) | Self::NoClock => Code::INVALID_ARGUMENT,
            Self::Mounted => Code::FAILED_PRECONDITION,
            _ => Code::INTERNAL,
        }
    }
}

/// Does what `request`, which came at `arrived` on the clock of the boot, asks for.
///
/// # Errors
/// See [`ResumeError`]; nothing was done for those that are about the request.
pub fn resume(request: &ResumeRequest, arrived_ns: u64) -> Result<(), ResumeError> {
    check(request)?;
    sys::add_entropy(&request.entropy).map_err(ResumeError::Entropy)?;
    // What is added is mixed in with the next seed, and that may be minutes away.
    sys::reseed().map_err(ResumeError::Reseed)?;
    set_clock(request.wall_clock_ns, arrived_ns)?;
    write_epoch(Path::new(PUBLIC_DIR), &request.epoch)?;
    if request.mount_share { mount_share() } else { Ok(()) }
}

/// Sets the wall clock to what it was on the host when the request was sent, and what has gone by since it came.
///
/// # Errors
/// Where there is none in the request, or the kernel refuses.
pub fn set_clock(wall_clock_ns: i64, arrived_ns: u64) -> Result<(), ResumeError> {
    if wall_clock_ns <= 0 {
        return Err(ResumeError::NoClock);
    }
    let since = i64::try_from(clock::boot_ns().saturating_sub(arrived_ns)).unwrap_or(0);
    clock::set_wall_ns(wall_clock_ns.saturating_add(since)).map_err(ResumeError::Clock)
}

/// Gives a machine that booted an epoch.
///
/// # Errors
/// Where none can be written.
pub fn begin_epoch() -> Result<(), ResumeError> {
    let failed = |source| ResumeError::Epoch { path: NEW_UUID.into(), source };
    write_epoch(Path::new(PUBLIC_DIR), fs::read_to_string(NEW_UUID).map_err(failed)?.trim())
}

fn check(request: &ResumeRequest) -> Result<(), ResumeError> {
    if request.entropy.len() < MIN_ENTROPY {
        return Err(ResumeError::TooLittle(request.entropy.len()));
    }
    if !is_uuid(&request.epoch) {
        return Err(ResumeError::NoUuid(request.epoch.clone()));
    }
    if request.wall_clock_ns <= 0 {
        return Err(ResumeError::NoClock);
    }
    Ok(())
}

/// As the kernel writes them.
fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte),
        })
}

/// By rename, so that a reader sees the old one or the new one.
fn write_epoch(dir: &Path, epoch: &str) -> Result<(), ResumeError> {
    let path = dir.join(EPOCH_FILE);
    let new = dir.join(format!(".{EPOCH_FILE}"));
    let write = || {
        fs::create_dir_all(dir)
            .and_then(|()| fs::write(&new, format!("{epoch}\n")))
            .and_then(|()| fs::rename(&new, &path))
    };
    write().map_err(|source| ResumeError::Epoch { path: path.clone(), source })
}

/// As `vm_init.sh` does it in a boot.
fn mount_share() -> Result<(), ResumeError> {
    let table = fs::read_to_string("/proc/self/mountinfo").map_err(ResumeError::Mounts)?;
    if table.lines().any(|line| line.split(' ').nth(4) == Some(SHARE_MOUNT)) {
        return Err(ResumeError::Mounted);
    }
    let flags = MsFlags::MS_NODEV | MsFlags::MS_RELATIME;
    fs::create_dir_all(SHARE_MOUNT)
        .and_then(|()| Ok(mount(Some(SHARE_TAG), SHARE_MOUNT, Some("virtiofs"), flags, None::<&str>)?))
        .map_err(ResumeError::Share)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> ResumeRequest {
        ResumeRequest {
            entropy: vec![7; MIN_ENTROPY],
            wall_clock_ns: 1,
            epoch: "2f8a7a3e-1c5b-4d8e-9f00-0123456789ab".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_request_that_would_leave_something_as_it_was_is_refused() {
        check(&request()).unwrap();
        let short = ResumeRequest { entropy: vec![7; MIN_ENTROPY - 1], ..request() };
        assert!(matches!(check(&short), Err(ResumeError::TooLittle(63))));
        assert!(matches!(check(&ResumeRequest { wall_clock_ns: 0, ..request() }), Err(ResumeError::NoClock)));
        for epoch in ["", "2f8a7a3e-1c5b-4d8e-9f00-0123456789a", "2F8A7A3E-1C5B-4D8E-9F00-0123456789AB", "../../x"] {
            let bad = ResumeRequest { epoch: epoch.into(), ..request() };
            assert!(matches!(check(&bad), Err(ResumeError::NoUuid(_))), "{epoch}");
        }
    }

    /// What comes of a whole request on a thread of its own, to which the kernel refuses `ioctl`; and the clock, which is
    /// this machine's.
    fn resumed_without(ioctl: u64) -> ResumeError {
        use seccompiler::{
            SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
        };
        let is = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, ioctl).unwrap();
        let rules = [(libc::SYS_ioctl, vec![SeccompRule::new(vec![is]).unwrap()]), (libc::SYS_clock_settime, vec![])];
        let refused = SeccompAction::Errno(libc::EPERM as u32);
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(rules.into_iter().collect(), SeccompAction::Allow, refused, arch).unwrap();
        let program: seccompiler::BpfProgram = filter.try_into().unwrap();
        let thread = std::thread::spawn(move || {
            seccompiler::apply_filter(&program).unwrap();
            resume(&request(), clock::boot_ns())
        });
        thread.join().unwrap().unwrap_err()
    }

    /// Two clones often differ without it, too: no two machines run alike for long. It is not to depend on that.
    #[test]
    fn without_random_numbers_of_its_own_a_machine_is_not_resumed() {
        if !nix::unistd::geteuid().is_root() {
            return chsnap_test_skip::skip("only root may add entropy");
        }
        assert!(matches!(resumed_without(0x4008_5203), ResumeError::Entropy(_)), "RNDADDENTROPY was not called first");
        assert!(
            matches!(resumed_without(0x5207), ResumeError::Reseed(_)),
            "RNDRESEEDCRNG was not called before the rest"
        );
        assert!(matches!(resumed_without(0), ResumeError::Clock(_)), "it ends at the clock, which nobody may set here");
    }

    #[test]
    fn an_epoch_replaces_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let public = dir.path().join("public");
        for epoch in ["one", "two"] {
            write_epoch(&public, epoch).unwrap();
            assert_eq!(fs::read_to_string(public.join(EPOCH_FILE)).unwrap(), format!("{epoch}\n"));
        }
        assert_eq!(fs::read_dir(&public).unwrap().count(), 1);
        assert!(matches!(write_epoch(Path::new("/dev/null/x"), "three"), Err(ResumeError::Epoch { .. })));
    }
}
