//! Where the time of a start goes, phase by phase.

use std::time::{Duration, Instant};

/// Named phases in order, with what each took.
#[derive(Debug, Clone)]
pub struct Phases {
    last: Instant,
    done: Vec<(&'static str, Duration)>,
}

impl Phases {
    /// Starts the clock.
    #[must_use]
    pub fn start() -> Self {
        Self { last: Instant::now(), done: Vec::new() }
    }

    /// Ends the phase `name`.
    pub fn mark(&mut self, name: &'static str) {
        let now = Instant::now();
        self.done.push((name, now - self.last));
        self.last = now;
    }

    /// Ends two phases at once, of which the first took `first`, or all there was if that is less.
    pub fn mark_split(&mut self, name: &'static str, first: Duration, rest: &'static str) {
        let now = Instant::now();
        let both = now - self.last;
        let first = first.min(both);
        self.done.push((name, first));
        self.done.push((rest, both - first));
        self.last = now;
    }

    /// Microseconds per phase.
    #[must_use]
    pub fn microseconds(&self) -> Vec<(String, u64)> {
        let us = |took: &Duration| u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.done.iter().map(|(name, took)| ((*name).to_string(), us(took))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_never_exceeds_the_whole() {
        let mut phases = Phases::start();
        phases.mark_split("kernel", Duration::from_secs(3600), "agent");
        let us = phases.microseconds();
        assert_eq!(us.len(), 2);
        assert!(us[0].1 < 1_000_000, "cut to what was measured");
        assert_eq!(us[1].1, 0);
    }
}
