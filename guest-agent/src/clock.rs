//! The guest's clocks.

use std::io;

use nix::{
    sys::stat::{SFlag, lstat},
    time::{ClockId, clock_gettime, clock_settime},
};

/// A clock that is less wrong than this is left alone.
const TOLERANCE_NS: u64 = 1_000_000;

fn now(clock: ClockId) -> i64 {
    clock_gettime(clock).map_or(0, |t| t.tv_sec() * 1_000_000_000 + t.tv_nsec())
}

/// Nanoseconds since the epoch.
pub fn wall_ns() -> i64 {
    now(ClockId::CLOCK_REALTIME)
}

/// Nanoseconds since the boot.
pub fn boot_ns() -> u64 {
    u64::try_from(now(ClockId::CLOCK_BOOTTIME)).unwrap_or(0)
}

/// Sets the wall clock where it differs.
///
/// # Errors
/// If the kernel refuses.
pub fn set_wall_ns(ns: i64) -> io::Result<()> {
    if ns.abs_diff(wall_ns()) <= TOLERANCE_NS {
        return Ok(());
    }
    let time = nix::sys::time::TimeSpec::new(ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

/// When /init began, nanoseconds since the boot; 0 where that cannot be told.
///
/// The kernel notes it nowhere that is quick to read, but it has to follow the link /bin/sh to run /init, which
/// nothing does later, and the initial root file system keeps the times of such accesses. Good to a clock tick, and
/// only until the wall clock is set.
pub fn init_start_ns() -> u64 {
    let Ok(link) = lstat("/bin/sh") else { return 0 };
    if SFlag::from_bits_truncate(link.st_mode) & SFlag::S_IFMT != SFlag::S_IFLNK {
        return 0;
    }
    let age = wall_ns() - (link.st_atime * 1_000_000_000 + link.st_atime_nsec);
    u64::try_from(age).ok().and_then(|age| boot_ns().checked_sub(age)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_is_in_the_past() {
        assert!(init_start_ns() <= boot_ns());
    }

    #[test]
    fn a_right_clock_is_left_alone() {
        // Needs no privilege, since nothing is set.
        set_wall_ns(wall_ns()).unwrap();
    }
}
