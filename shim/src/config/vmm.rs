//! `[vmm]`: which machine monitor runs the guests.

use std::{fmt, path::PathBuf};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

use crate::vmm::{Rung, VmmKind};

/// `[vmm]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmmConfig {
    /// Which VMM.
    pub choice: VmmChoice,
    /// What executes the guest's instructions.
    pub accelerator: AcceleratorChoice,
    /// Cloud Hypervisor's binary; else searched in PATH.
    pub cloud_hypervisor: Option<PathBuf>,
    /// QEMU's system emulator; else searched in PATH under its name for this architecture.
    pub qemu: Option<PathBuf>,
    /// Which CPU features guests do without.
    pub rung: Rung,
    /// How Cloud Hypervisor reads a snapshot's memory.
    pub memory_restore: MemoryRestore,
}

/// When a restored guest's memory is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryRestore {
    /// All of it before the guest runs.
    #[default]
    Copy,
    /// A page when it is first touched (userfaultfd), and the rest in the background.
    OnDemand,
}

/// Which VMM is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmChoice {
    /// Cloud Hypervisor where it is found and KVM runs guests, else QEMU.
    #[default]
    Auto,
    /// Cloud Hypervisor or an error.
    CloudHypervisor,
    /// QEMU or an error.
    Qemu,
}

impl VmmChoice {
    /// The choice of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Auto, Self::CloudHypervisor, Self::Qemu].into_iter().find(|choice| choice.name() == name)
    }

    /// Whether that VMM is another than this choice allows.
    pub fn excludes(self, kind: VmmKind) -> bool {
        match self {
            Self::Auto => false,
            Self::CloudHypervisor => kind != VmmKind::CloudHypervisor,
            Self::Qemu => kind != VmmKind::Qemu,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Qemu => "qemu",
        }
    }
}

impl fmt::Display for VmmChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which accelerator is wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    /// KVM where it really runs guests, else TCG.
    #[default]
    Auto,
    /// KVM or an error.
    Kvm,
    /// TCG; QEMU only.
    Tcg,
}

impl fmt::Display for AcceleratorChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// Takes the table, or the choice alone. By hand because serde's untagged enums forget what was wrong and where.
pub(super) fn choice_or_table<'de, D: Deserializer<'de>>(deserializer: D) -> Result<VmmConfig, D::Error> {
    struct Either;
    impl<'de> Visitor<'de> for Either {
        type Value = VmmConfig;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table, or one of \"auto\", \"cloud-hypervisor\", \"qemu\"")
        }

        fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<VmmConfig, E> {
            let choice = VmmChoice::from_name(name)
                .ok_or_else(|| E::unknown_variant(name, &["auto", "cloud-hypervisor", "qemu"]))?;
            Ok(VmmConfig { choice, ..VmmConfig::default() })
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<VmmConfig, A::Error> {
            VmmConfig::deserialize(MapAccessDeserializer::new(map))
        }
    }
    deserializer.deserialize_any(Either)
}
