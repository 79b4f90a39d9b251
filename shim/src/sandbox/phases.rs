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

    /// Ends two phases at once, of which the second took `second`, or all there was if that is less.
    pub fn mark_two(&mut self, first: &'static str, second: &'static str, took: Duration) {
        let now = Instant::now();
        let both = now - self.last;
        let took = took.min(both);
        self.done.push((first, both - took));
        self.done.push((second, took));
        self.last = now;
    }

    /// All of it so far.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.done.iter().map(|(_, took)| *took).sum()
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
    fn what_a_guest_claims_never_exceeds_the_whole() {
        let mut phases = Phases::start();
        phases.mark_two("kernel", "agent", Duration::from_secs(3600));
        let us = phases.microseconds();
        assert_eq!(us.len(), 2);
        assert_eq!(us[0].1, 0);
        assert!(us[1].1 < 1_000_000, "cut to what was measured");
    }
}
