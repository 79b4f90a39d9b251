//! How large a guest becomes: an annotation before the OCI limits before the configured default.

use std::{fs, io};

use nix::unistd::{SysconfVar, sysconf};
use oci_spec::runtime::LinuxResources;

use super::{Annotations, Config, MIN_MEMORY, Overrides, ShapeError, Size};

/// A guest's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// vCPUs.
    pub vcpus: u32,
    /// MiB.
    pub memory_mib: u64,
}

/// The host's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// Online CPUs.
    pub cpus: u32,
    /// All memory, used or not.
    pub memory: Size,
}

impl Host {
    /// Asks the kernel.
    pub fn read() -> Result<Self, ShapeError> {
        let cpus = sysconf(SysconfVar::_NPROCESSORS_ONLN).map_err(io::Error::from).and_then(|cpus| {
            cpus.and_then(|cpus| u32::try_from(cpus).ok()).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        });
        let from = "/proc/meminfo";
        let memory = fs::read_to_string(from)
            .and_then(|text| total_memory(&text).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData)));
        Ok(Self {
            cpus: cpus.map_err(|source| ShapeError::Host { from: "sysconf(_SC_NPROCESSORS_ONLN)", source })?,
            memory: memory.map_err(|source| ShapeError::Host { from, source })?,
        })
    }
}

fn total_memory(meminfo: &str) -> Option<Size> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Size::bytes(kib.checked_mul(1024)?))
}

impl Shape {
    /// The shape of a container's guest on this host.
    pub fn of(config: &Config, overrides: &Overrides, limits: Option<&LinuxResources>) -> Result<Self, ShapeError> {
        Self::on(Host::read()?, config, overrides, limits)
    }

    /// The shape of a container's guest on that host.
    pub fn on(
        host: Host,
        config: &Config,
        overrides: &Overrides,
        limits: Option<&LinuxResources>,
    ) -> Result<Self, ShapeError> {
        Ok(Self {
            vcpus: vcpus(host, config, overrides, limits)?,
            memory_mib: memory(host, config, overrides, limits)?.as_mib(),
        })
    }

    /// The same for a pod of which the sum of its containers' limits is known: a container without one adds nothing to that, so the
    /// guest is not smaller than any other.
    ///
    /// # Errors
    /// As for one container.
    pub fn of_pod(config: &Config, overrides: &Overrides, sum: Option<&LinuxResources>) -> Result<Self, ShapeError> {
        let (host, guest) = (Host::read()?, &config.guest);
        let mut shape = Self::on(host, config, overrides, sum)?;
        if overrides.vcpus.is_none() {
            shape.vcpus = shape.vcpus.max(guest.default_vcpus.min(host.cpus));
        }
        if overrides.memory.is_none() {
            shape.memory_mib = shape.memory_mib.max(guest.default_memory.as_mib());
        }
        Ok(shape)
    }

    /// Whether a further container with these limits finds room in a guest of this shape.
    ///
    /// # Errors
    /// Where its memory alone is more than there is.
    pub fn holds(
        self,
        config: &Config,
        overrides: &Overrides,
        limits: Option<&LinuxResources>,
    ) -> Result<(), ShapeError> {
        // Whoever says how large the guest is has said it.
        let Some(limit) = memory_limit(limits).filter(|_| overrides.memory.is_none()) else { return Ok(()) };
        let overhead = config.guest.memory_overhead;
        let (asked, has) = (with_overhead(limit, overhead), Size::mib(self.memory_mib));
        match asked.as_mib() > self.memory_mib {
            true => Err(ShapeError::Pod { limit, overhead, asked, has }),
            false => Ok(()),
        }
    }
}

fn vcpus(
    host: Host,
    config: &Config,
    overrides: &Overrides,
    limits: Option<&LinuxResources>,
) -> Result<u32, ShapeError> {
    let quota = limits.and_then(|limits| limits.cpu().as_ref()).and_then(|cpu| {
        let quota = cpu.quota().and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0)?;
        // The kernel's own period where none is given.
        let period = cpu.period().filter(|period| *period > 0).unwrap_or(100_000);
        Some((quota, period))
    });
    let (allowed, limited_by) = match config.guest.max_vcpus {
        0 => (host.cpus, "the number of host CPUs"),
        max => (max, "guest.max_vcpus"),
    };
    let (asked, asked_by) = match (overrides.vcpus, quota) {
        (Some(vcpus), _) => (u64::from(vcpus), format!("the annotation {}", Annotations::VCPUS)),
        // A limit is a ceiling, on Kubernetes often above what a node has: with fewer vCPUs it is kept as well.
        (None, Some((quota, period))) => {
            return Ok(u32::try_from(quota.div_ceil(period)).unwrap_or(u32::MAX).min(allowed));
        }
        (None, None) => (u64::from(config.guest.default_vcpus), "guest.default_vcpus".into()),
    };
    u32::try_from(asked).ok().filter(|vcpus| *vcpus <= allowed).ok_or(ShapeError::Vcpus {
        asked,
        asked_by,
        allowed,
        limited_by,
    })
}

fn memory(
    host: Host,
    config: &Config,
    overrides: &Overrides,
    limits: Option<&LinuxResources>,
) -> Result<Size, ShapeError> {
    let guest = &config.guest;
    let limit = memory_limit(limits);
    let (asked, asked_by) = match (overrides.memory, limit) {
        (Some(memory), _) => (memory, format!("the annotation {}", Annotations::MEMORY)),
        (None, Some(limit)) => (
            with_overhead(limit, guest.memory_overhead).max(MIN_MEMORY),
            format!("the memory limit of {limit} with guest.memory_overhead = {}", guest.memory_overhead),
        ),
        (None, None) => (guest.default_memory, "guest.default_memory".into()),
    };
    let (allowed, limited_by) = match guest.max_memory {
        Size::ZERO => (host.memory, "the host's memory"),
        max => (max, "guest.max_memory"),
    };
    if asked > allowed {
        return Err(ShapeError::Memory { asked, asked_by, allowed, limited_by });
    }
    Ok(asked)
}

fn memory_limit(limits: Option<&LinuxResources>) -> Option<Size> {
    let limit = limits.and_then(|limits| limits.memory().as_ref()).and_then(|memory| memory.limit());
    limit.and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0).map(Size::bytes)
}

/// So much that a container reaches its own limit before its guest runs out: the kernel keeps a 64th of all memory to
/// describe the pages, besides what it always needs.
fn with_overhead(limit: Size, overhead: Size) -> Size {
    limit.saturating_add(Size::bytes(limit.as_bytes() / 64)).saturating_add(overhead)
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResourcesBuilder};

    use super::*;

    const HOST: Host = Host { cpus: 4, memory: Size::mib(4096) };

    fn limits(quota: i64, period: u64, memory: i64) -> LinuxResources {
        LinuxResourcesBuilder::default()
            .cpu(LinuxCpuBuilder::default().quota(quota).period(period).build().unwrap())
            .memory(LinuxMemoryBuilder::default().limit(memory).build().unwrap())
            .build()
            .unwrap()
    }

    fn shape(overrides: &Overrides, limits: Option<&LinuxResources>) -> Result<(u32, u64), String> {
        Shape::on(HOST, &Config::default(), overrides, limits)
            .map(|shape| (shape.vcpus, shape.memory_mib))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn annotation_before_limits_before_default() {
        let none = Overrides::default();
        assert_eq!(shape(&none, None), Ok((1, 512)));
        assert_eq!(shape(&none, Some(&limits(150_000, 100_000, 256 << 20))), Ok((2, 256 + 4 + 96)));
        assert_eq!(shape(&none, Some(&limits(50_000, 0, (256 << 20) + 1))), Ok((1, 256 + 4 + 96 + 1)));
        // -1 is "no limit".
        assert_eq!(shape(&none, Some(&limits(-1, 100_000, -1))), Ok((1, 512)));
        // A CPU limit above the host's CPUs is kept by all of them.
        assert_eq!(shape(&none, Some(&limits(i64::MAX, 1, -1))), Ok((4, 512)));
        let both = Overrides { vcpus: Some(3), memory: Some(Size::mib(100)), ..none };
        assert_eq!(shape(&both, Some(&limits(150_000, 100_000, 256 << 20))), Ok((3, 100)));
    }

    #[test]
    fn what_cannot_be_met_says_what_there_is() {
        let none = Overrides::default();
        assert_eq!(
            shape(&Overrides { vcpus: Some(5), ..none.clone() }, None).unwrap_err(),
            "the annotation io.chsnap.vcpus asks for 5 vCPUs, but the number of host CPUs allows 4"
        );
        assert_eq!(
            shape(&none, Some(&limits(-1, 1, 4096 << 20))).unwrap_err(),
            "the memory limit of 4GiB with guest.memory_overhead = 96MiB asks for a guest with 4256MiB of memory, but \
             the host's memory allows 4096MiB"
        );
        assert!(shape(&none, Some(&limits(-1, 1, i64::MAX))).is_err());
        let mut config = Config::default();
        config.guest.max_memory = Size::mib(1024);
        let asked = Overrides { memory: Some(Size::mib(2048)), ..none };
        assert_eq!(
            Shape::on(HOST, &config, &asked, None).unwrap_err().to_string(),
            "the annotation io.chsnap.memory asks for a guest with 2048MiB of memory, but guest.max_memory allows 1024MiB"
        );
    }

    #[test]
    fn a_further_container_has_to_find_room() {
        let shape = Shape { vcpus: 1, memory_mib: 512 };
        let (config, none) = (Config::default(), Overrides::default());
        assert!(shape.holds(&config, &none, None).is_ok());
        assert!(shape.holds(&config, &none, Some(&limits(-1, 1, 256 << 20))).is_ok());
        let said = Overrides { memory: Some(Size::mib(512)), ..none.clone() };
        assert!(shape.holds(&config, &said, Some(&limits(-1, 1, 512 << 20))).is_ok());
        assert_eq!(
            shape.holds(&config, &none, Some(&limits(-1, 1, 512 << 20))).unwrap_err().to_string(),
            "the memory limit of 512MiB with guest.memory_overhead = 96MiB asks for 616MiB, but the pod's VM, which runs \
             already, has 512MiB: set io.chsnap.memory on the pod (sandbox) or on its first container"
        );
    }

    #[test]
    fn a_pod_s_sum_of_limits_makes_it_no_smaller() {
        let config = Config::default();
        let of = |overrides: &Overrides, mib: i64| {
            Shape::of_pod(&config, overrides, Some(&limits(-1, 1, mib << 20))).unwrap().memory_mib
        };
        let none = Overrides::default();
        assert_eq!((of(&none, 64), of(&none, 600)), (512, 706));
        assert_eq!(of(&Overrides { memory: Some(Size::mib(128)), ..none }, 600), 128);
    }

    #[test]
    fn this_host_has_a_size() {
        let host = Host::read().unwrap();
        assert!(host.cpus >= 1 && host.memory > Size::mib(64), "{host:?}");
    }
}
