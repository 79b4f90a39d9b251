//! `io.chsnap.*`: what one container wants otherwise than the configuration says. Annotations come from whoever may
//! create a pod, so none of them names a path on the host.

use std::collections::HashMap;

use super::{
    AnnotationError, Expose, MIN_MEMORY, Ready, Shape, Size, SnapshotConfig, SnapshotMode, VmmChoice, VmmConfig,
    error::hint,
};
use crate::vmm::VmmKind;

const PREFIX: &str = "io.chsnap.";

/// The annotations' names.
pub struct Annotations;

impl Annotations {
    /// Number of vCPUs.
    pub const VCPUS: &str = "io.chsnap.vcpus";
    /// Memory of the guest, everything in it included.
    pub const MEMORY: &str = "io.chsnap.memory";
    /// Which VMM.
    pub const VMM: &str = "io.chsnap.vmm";
    /// Ports the host can reach.
    pub const EXPOSE: &str = "io.chsnap.expose";
    /// Whether a snapshot may be used.
    pub const SNAPSHOT: &str = "io.chsnap.snapshot";
    /// When the process has initialised.
    pub const READY: &str = "io.chsnap.ready";

    /// All there are.
    pub const ALL: [&str; 6] = [Self::VCPUS, Self::MEMORY, Self::VMM, Self::EXPOSE, Self::SNAPSHOT, Self::READY];

    /// Reads those that are ours, and refuses what looks like ours and is not.
    pub fn parse(annotations: &HashMap<String, String>) -> Result<Overrides, AnnotationError> {
        let mut ours: Vec<_> = annotations.iter().filter(|(name, _)| name.starts_with(PREFIX)).collect();
        // Of several errors always the same one is reported.
        ours.sort_unstable();
        let mut overrides = Overrides::default();
        for (name, value) in ours {
            let Some(known) = Self::ALL.into_iter().find(|known| known == name) else {
                let hint = hint(name, "there are", Self::ALL.into_iter());
                return Err(AnnotationError::Unknown { name: name.clone(), hint });
            };
            overrides.take(known, value.trim()).map_err(|message| AnnotationError::Value {
                name: known,
                value: value.clone(),
                message,
            })?;
        }
        Ok(overrides)
    }
}

/// Whether a container may start from a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotUse {
    /// Where there is one.
    Auto,
    /// Never.
    Off,
    /// It does not start in any other way.
    Require,
}

/// What the annotations of one container say; `None` where they say nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// `io.chsnap.vcpus`
    pub vcpus: Option<u32>,
    /// `io.chsnap.memory`
    pub memory: Option<Size>,
    /// `io.chsnap.vmm`
    pub vmm: Option<VmmChoice>,
    /// `io.chsnap.expose`
    pub expose: Vec<Expose>,
    /// `io.chsnap.snapshot`
    pub snapshot: Option<SnapshotUse>,
    /// `io.chsnap.ready`
    pub ready: Option<Ready>,
}

impl Overrides {
    /// The VMM's settings with what these annotations say instead.
    pub fn vmm(&self, config: &VmmConfig) -> VmmConfig {
        VmmConfig { choice: self.vmm.unwrap_or(config.choice), ..config.clone() }
    }

    /// Whether the container may start from a snapshot.
    pub fn snapshot(&self, config: &SnapshotConfig) -> SnapshotUse {
        self.snapshot.unwrap_or(match config.mode {
            SnapshotMode::Auto => SnapshotUse::Auto,
            SnapshotMode::Off => SnapshotUse::Off,
        })
    }

    /// Refuses what these, of a pod's further container, want otherwise than `pod` has it, whose machine runs. In
    /// Kubernetes containers inherit their pod's annotations, so what is the same says nothing new.
    pub fn fit(&self, pod: &Self, shape: Shape, vmm: VmmKind) -> Result<(), AnnotationError> {
        let refused = |name, value: String, has: String| {
            let message = format!(
                "the pod's VM has {has}, and a further container does not change that: set it on the pod (sandbox)"
            );
            Err(AnnotationError::Value { name, value, message })
        };
        if let Some(vcpus) = self.vcpus.filter(|vcpus| *vcpus != shape.vcpus) {
            return refused(Annotations::VCPUS, vcpus.to_string(), shape.vcpus.to_string());
        }
        if let Some(memory) = self.memory.filter(|memory| memory.as_mib() != shape.memory_mib) {
            return refused(Annotations::MEMORY, memory.to_string(), Size::mib(shape.memory_mib).to_string());
        }
        if let Some(choice) = self.vmm.filter(|choice| choice.excludes(vmm)) {
            return refused(Annotations::VMM, choice.to_string(), vmm.to_string());
        }
        if self.expose.iter().any(|expose| !pod.expose.contains(expose)) {
            let list = |all: &[Expose]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
            let has = if pod.expose.is_empty() { "none".into() } else { list(&pod.expose) };
            return refused(Annotations::EXPOSE, list(&self.expose), has);
        }
        Ok(())
    }

    /// These, and of `pod` what they leave open.
    #[must_use]
    pub fn or(self, pod: &Self) -> Self {
        Self {
            vcpus: self.vcpus.or(pod.vcpus),
            memory: self.memory.or(pod.memory),
            vmm: self.vmm.or(pod.vmm),
            expose: if self.expose.is_empty() { pod.expose.clone() } else { self.expose },
            snapshot: self.snapshot.or(pod.snapshot),
            ready: self.ready.or_else(|| pod.ready.clone()),
        }
    }

    fn take(&mut self, name: &str, value: &str) -> Result<(), String> {
        match name {
            Annotations::VCPUS => {
                let vcpus = value.parse().ok().filter(|vcpus| *vcpus >= 1);
                self.vcpus = Some(vcpus.ok_or("give a whole number of vCPUs, 1 or more")?);
            }
            Annotations::MEMORY => {
                let memory: Size = value.parse().map_err(|error: super::values::SizeError| error.to_string())?;
                if memory < MIN_MEMORY {
                    return Err(format!("too little for a guest; the least is {MIN_MEMORY}"));
                }
                self.memory = Some(memory);
            }
            Annotations::VMM => {
                self.vmm = Some(VmmChoice::from_name(value).ok_or("use auto, cloud-hypervisor or qemu")?);
            }
            Annotations::EXPOSE => self.expose = Expose::parse_list(value)?,
            Annotations::SNAPSHOT => {
                self.snapshot = Some(match value {
                    "auto" => SnapshotUse::Auto,
                    "off" => SnapshotUse::Off,
                    "require" => SnapshotUse::Require,
                    _ => return Err("use auto, off or require".into()),
                });
            }
            Annotations::READY => self.ready = Some(Ready::parse(value)?),
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<Overrides, AnnotationError> {
        Annotations::parse(&pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect())
    }

    #[test]
    fn each_annotation_is_taken_and_foreign_ones_are_left() {
        let overrides = parse(&[
            ("io.kubernetes.cri.sandbox-id", "x"),
            ("io.chsnap.vcpus", "2"),
            ("io.chsnap.memory", "768Mi"),
            ("io.chsnap.vmm", "qemu"),
            ("io.chsnap.expose", "8080"),
            ("io.chsnap.snapshot", "off"),
            ("io.chsnap.ready", "tcp://:8080"),
        ])
        .unwrap();
        let expected = Overrides {
            vcpus: Some(2),
            memory: Some(Size::mib(768)),
            vmm: Some(VmmChoice::Qemu),
            expose: vec![Expose { guest_port: 8080, listen: None }],
            snapshot: Some(SnapshotUse::Off),
            ready: Some(Ready::Tcp { port: 8080 }),
        };
        assert_eq!(overrides, expected);
        assert_eq!(parse(&[]).unwrap(), Overrides::default());
    }

    #[test]
    fn what_a_container_says_of_snapshots_counts_more_than_the_configuration() {
        let config = |mode| SnapshotConfig { mode, ..SnapshotConfig::default() };
        for mode in [SnapshotMode::Auto, SnapshotMode::Off] {
            for (word, meant) in
                [("auto", SnapshotUse::Auto), ("off", SnapshotUse::Off), ("require", SnapshotUse::Require)]
            {
                assert_eq!(parse(&[("io.chsnap.snapshot", word)]).unwrap().snapshot(&config(mode)), meant);
            }
        }
        assert_eq!(Overrides::default().snapshot(&config(SnapshotMode::Auto)), SnapshotUse::Auto);
        assert_eq!(Overrides::default().snapshot(&config(SnapshotMode::Off)), SnapshotUse::Off);
    }

    #[test]
    fn a_further_container_may_repeat_its_pod_s_annotations_and_no_others() {
        let pod = parse(&[("io.chsnap.vcpus", "2"), ("io.chsnap.expose", "8080, 127.0.0.1:18080:80")]).unwrap();
        let shape = Shape { vcpus: 2, memory_mib: 512 };
        let fit = |name, value| {
            let result = parse(&[(name, value)]).unwrap().fit(&pod, shape, VmmKind::Qemu);
            result.map_err(|error| error.to_string())
        };
        let all = [
            ("io.chsnap.vcpus", "2", "4", "2"),
            ("io.chsnap.memory", "512MiB", "1GiB", "512MiB"),
            ("io.chsnap.memory", "524288KiB", "256MiB", "512MiB"),
            ("io.chsnap.vmm", "auto", "cloud-hypervisor", "qemu"),
            ("io.chsnap.vmm", "qemu", "cloud-hypervisor", "qemu"),
            ("io.chsnap.expose", "127.0.0.1:18080:80,8080", "8080,9090", "8080,127.0.0.1:18080:80"),
        ];
        for (name, same, other, has) in all {
            assert_eq!(fit(name, same), Ok(()), "{name}");
            let expected = format!(
                "annotation {name} = \"{other}\": the pod's VM has {has}, and a further container does not change that: set \
                 it on the pod (sandbox)"
            );
            assert_eq!(fit(name, other), Err(expected));
        }
        assert_eq!(Overrides::default().fit(&pod, shape, VmmKind::Qemu), Ok(()));
        let error = pod.fit(&Overrides::default(), shape, VmmKind::Qemu).unwrap_err().to_string();
        assert!(error.contains("the pod's VM has none"), "{error}");
    }

    #[test]
    fn errors_name_annotation_value_and_what_is_allowed() {
        for (name, value, error) in [
            ("io.chsnap.vcpu", "2", "annotation io.chsnap.vcpu: unknown; did you mean \"io.chsnap.vcpus\"?"),
            (
                "io.chsnap.initramfs",
                "/x",
                "annotation io.chsnap.initramfs: unknown; there are: io.chsnap.vcpus, io.chsnap.memory, io.chsnap.vmm, \
                 io.chsnap.expose, io.chsnap.snapshot, io.chsnap.ready",
            ),
            ("io.chsnap.vcpus", "0", "annotation io.chsnap.vcpus = \"0\": give a whole number of vCPUs, 1 or more"),
            ("io.chsnap.vcpus", "1.5", "annotation io.chsnap.vcpus = \"1.5\": give a whole number of vCPUs, 1 or more"),
            (
                "io.chsnap.memory",
                "512",
                "annotation io.chsnap.memory = \"512\": \"512\" is not a size: write a number with a unit, such as \
                 \"512MiB\" or \"2GiB\"",
            ),
            (
                "io.chsnap.memory",
                "8MiB",
                "annotation io.chsnap.memory = \"8MiB\": too little for a guest; the least is 64MiB",
            ),
            ("io.chsnap.vmm", "xen", "annotation io.chsnap.vmm = \"xen\": use auto, cloud-hypervisor or qemu"),
            ("io.chsnap.expose", "0", "annotation io.chsnap.expose = \"0\": \"0\": port 0 is not between 1 and 65535"),
            ("io.chsnap.snapshot", "yes", "annotation io.chsnap.snapshot = \"yes\": use auto, off or require"),
        ] {
            assert_eq!(parse(&[(name, value)]).unwrap_err().to_string(), error);
        }
    }
}
