//! The container's cgroup in the guest, as containerd's cgroup v2 metrics.

use chsnap_protocol::agent::StatsResponse;
use containerd_shim::util::convert_to_any;
use containerd_shim_protos::{
    cgroups_v2::metrics::{CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat},
    protobuf::well_known_types::any::Any,
};

/// Encodes what the agent measured.
///
/// # Errors
/// Of the encoder.
pub fn metrics(s: &StatsResponse) -> Result<Any, containerd_shim::Error> {
    let mut cpu = CPUStat::new();
    cpu.usage_usec = s.cpu_usage_usec;
    cpu.user_usec = s.cpu_user_usec;
    cpu.system_usec = s.cpu_system_usec;
    cpu.nr_periods = s.cpu_nr_periods;
    cpu.nr_throttled = s.cpu_nr_throttled;
    cpu.throttled_usec = s.cpu_throttled_usec;
    let mut memory = MemoryStat::new();
    memory.usage = s.memory_current;
    memory.usage_limit = s.memory_max;
    memory.anon = s.memory_anon;
    memory.file = s.memory_file;
    memory.kernel_stack = s.memory_kernel_stack;
    memory.slab = s.memory_slab;
    memory.inactive_file = s.memory_inactive_file;
    memory.pgfault = s.memory_pgfault;
    memory.pgmajfault = s.memory_pgmajfault;
    memory.swap_usage = s.memory_swap_current;
    memory.swap_limit = s.memory_swap_max;
    // Of all of the guest's disks together, of which there are none as long as everything comes over virtiofs.
    let mut entry = IOEntry::new();
    entry.rbytes = s.io_rbytes;
    entry.wbytes = s.io_wbytes;
    entry.rios = s.io_rios;
    entry.wios = s.io_wios;
    let mut io = IOStat::new();
    if entry != IOEntry::new() {
        io.usage.push(entry);
    }
    let mut events = MemoryEvents::new();
    events.low = s.memory_events_low;
    events.high = s.memory_events_high;
    events.max = s.memory_events_max;
    events.oom = s.memory_events_oom;
    events.oom_kill = s.memory_oom_kills;
    let mut pids = PidsStat::new();
    pids.current = s.pids_current;
    pids.limit = s.pids_max;
    let mut all = Metrics::new();
    all.cpu = Some(cpu).into();
    all.memory = Some(memory).into();
    all.memory_events = Some(events).into();
    all.pids = Some(pids).into();
    all.io = Some(io).into();
    convert_to_any(Box::new(all))
}
