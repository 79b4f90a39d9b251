//! Whether a guest's wall clock is right. It is set to what the host's was when the request left, so it is late by what that
//! took on its way, of which only the sum with the way back is known.

/// What a restored guest's clock may be wrong by, in nanoseconds.
const TOLERANCE_NS: i64 = 50_000_000;
/// Of setting it again: a busy host may have held up one request, hardly all of them.
pub(super) const TRIES: u32 = 10;

/// What is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Clock {
    /// Not off by more than it may be.
    Right,
    /// Perhaps it is: the request or the answer was long on its way.
    Late,
    /// It is.
    Wrong,
}

impl Clock {
    /// A guest that was asked at `asked` and has said `guest`, by `now`.
    pub fn seen(asked: i64, guest: i64, now: i64) -> Self {
        let (before, after) = (asked.saturating_sub(guest), guest.saturating_sub(now));
        if before > TOLERANCE_NS || after > TOLERANCE_NS {
            Self::Wrong
        } else if now.saturating_sub(guest) > TOLERANCE_NS {
            Self::Late
        } else {
            Self::Right
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_right_if_it_cannot_be_wrong() {
        const MS: i64 = 1_000_000;
        let seen = |guest: i64, now: i64| Clock::seen(1_000 * MS, guest * MS, now * MS);
        assert_eq!(seen(1_010, 1_020), Clock::Right);
        // It took 200 ms, of which the guest says that it has worked for 190.
        assert_eq!(seen(1_190, 1_200), Clock::Right);
        assert_eq!(seen(1_010, 1_100), Clock::Late);
        // As it was when it was saved, or far ahead.
        assert_eq!(seen(0, 1_020), Clock::Wrong);
        assert_eq!(seen(2_000, 1_020), Clock::Wrong);
    }
}
