//! The rungs of the strategy ladder: which CPU features a guest does without.
//!
//! On arm64 hosts whose KVM refuses the registers of a feature, a guest without the feature can still be snapshotted
//! and restored. So a rung is a mask of features, the same whichever VMM applies it.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::arch::Arch;

/// A mask of CPU features.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rung {
    /// Everything the host offers.
    #[default]
    Standard,
    /// Without performance counters (PMUv3).
    NoPmu,
    /// Without performance counters and without scalable vectors (SVE, and SME, which is built on it).
    Aggressive,
}

impl Rung {
    /// From the fullest to the barest.
    pub const LADDER: [Self; 3] = [Self::Standard, Self::NoPmu, Self::Aggressive];

    /// What it comes to on this host's processor.
    pub fn here(self) -> Self {
        self.on(Arch::HOST)
    }

    /// This one and the barer ones, on this host's processor.
    pub fn and_barer(self) -> impl Iterator<Item = Self> {
        let from = self.here();
        Self::LADDER.into_iter().filter(move |rung| *rung >= from)
    }

    /// Why it is left out, where it masks nothing that this host's kind of processor has.
    pub fn moot(self) -> Option<&'static str> {
        self.moot_on(Arch::HOST)
    }

    fn moot_on(self, arch: Arch) -> Option<&'static str> {
        (self.on(arch) != self).then_some("it masks features of arm64 processors, and this host's is none")
    }

    /// No performance counters.
    pub(super) fn without_pmu(self) -> bool {
        self >= Self::NoPmu
    }

    /// No scalable vectors.
    pub(super) fn without_sve(self) -> bool {
        self >= Self::Aggressive
    }

    /// The properties of a CPU that a VMM with options for them is told.
    pub(super) fn properties(self) -> &'static str {
        match self {
            Self::Standard => "",
            Self::NoPmu => ",pmu=off",
            Self::Aggressive => ",pmu=off,sve=off",
        }
    }

    /// The rung that this is on a processor of that kind: x86_64 has neither feature in this sense.
    pub(super) fn on(self, arch: Arch) -> Self {
        match arch {
            Arch::Aarch64 => self,
            Arch::X86_64 => Self::Standard,
        }
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Standard => "standard",
            Self::NoPmu => "no-pmu",
            Self::Aggressive => "aggressive",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rung_masks_more_than_the_one_before() {
        let masks = Rung::LADDER.map(|rung| (rung.without_pmu(), rung.without_sve()));
        assert_eq!(masks, [(false, false), (true, false), (true, true)]);
        assert_eq!(Rung::LADDER.map(|rung| rung.on(Arch::X86_64)), [Rung::Standard; 3]);
        assert!(Rung::LADDER.iter().all(|rung| rung.moot_on(Arch::Aarch64).is_none()));
        assert_eq!(Rung::LADDER.map(|rung| rung.moot_on(Arch::X86_64).is_some()), [false, true, true]);
        assert_eq!(Rung::Standard.and_barer().collect::<Vec<_>>(), Rung::LADDER);
        for rung in Rung::LADDER {
            assert_eq!(serde_json::to_value(rung).unwrap(), rung.to_string());
        }
    }
}
