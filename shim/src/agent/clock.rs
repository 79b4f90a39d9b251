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
    /// Perhaps it is, by that: the request or the answer was long on its way.
    Late(i64),
    /// It is.
    Wrong(i64),
}

impl Clock {
    /// A guest that was asked at `asked` and has said `guest`, by `now`.
    pub fn seen(asked: i64, guest: i64, now: i64) -> Self {
        // The guest says what it likes.
        let (before, after, late) = (asked.saturating_sub(guest), guest.saturating_sub(now), now.saturating_sub(guest));
        match before.max(after) {
            wrong if wrong > TOLERANCE_NS => Self::Wrong(wrong),
            _ if late > TOLERANCE_NS => Self::Late(late),
            _ => Self::Right,
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
        assert_eq!(seen(1_010, 1_100), Clock::Late(90 * MS));
        // As it was when it was saved, or far ahead.
        assert_eq!(seen(0, 1_020), Clock::Wrong(1_000 * MS));
        assert_eq!(seen(2_000, 1_020), Clock::Wrong(980 * MS));
        assert_eq!(Clock::seen(0, i64::MIN, MS), Clock::Wrong(i64::MAX));
    }
}
