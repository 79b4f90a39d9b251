//! The guest's clocks.

use std::{fs, io};

use nix::time::{ClockId, clock_gettime, clock_settime};

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

/// When /init began: as it noted itself, in the seconds of /proc/uptime, else since when pid 1 has existed.
pub fn init_start_ns() -> u64 {
    let noted = std::env::var("CHSNAP_INIT_UPTIME").ok().and_then(|text| seconds_to_ns(&text));
    noted.or_else(pid_1_start_ns).unwrap_or(0)
}

fn seconds_to_ns(text: &str) -> Option<u64> {
    let seconds: f64 = text.trim().parse().ok()?;
    (seconds.is_finite() && seconds >= 0.0).then_some((seconds * 1e9) as u64)
}

fn pid_1_start_ns() -> Option<u64> {
    let stat = fs::read_to_string("/proc/1/stat").ok()?;
    // The name, in brackets, may contain anything.
    let ticks: u64 = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
    // USER_HZ is 100 on every architecture the agent is built for.
    ticks.checked_mul(10_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uptime_becomes_nanoseconds() {
        assert_eq!(seconds_to_ns("1.25\n"), Some(1_250_000_000));
        assert_eq!(seconds_to_ns("-1"), None);
        assert_eq!(seconds_to_ns("soon"), None);
        assert!(pid_1_start_ns().is_some());
    }

    #[test]
    fn a_right_clock_is_left_alone() {
        // Needs no privilege, since nothing is set.
        set_wall_ns(wall_ns()).unwrap();
    }
}
