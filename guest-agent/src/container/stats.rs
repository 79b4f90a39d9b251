//! What a container has used, as its cgroup tells it.

use std::fs;

use chsnap_protocol::agent::StatsResponse;

use super::{
    Cgroup,
    oom::{self, EVENTS},
};

impl Cgroup {
    /// What the kernel counted. A controller that is not there counts nothing.
    pub fn stats(&self) -> StatsResponse {
        let text = |file: &str| fs::read_to_string(self.path.join(file)).unwrap_or_default();
        let number = |file: &str| text(file).trim().parse().unwrap_or(0);
        let limit = |file: &str| text(file).trim().parse().unwrap_or(u64::MAX);
        let (cpu, memory, io) = (text("cpu.stat"), text("memory.stat"), text("io.stat"));
        let events = text(EVENTS);
        StatsResponse {
            cpu_usage_usec: field(&cpu, "usage_usec"),
            cpu_user_usec: field(&cpu, "user_usec"),
            cpu_system_usec: field(&cpu, "system_usec"),
            cpu_nr_periods: field(&cpu, "nr_periods"),
            cpu_nr_throttled: field(&cpu, "nr_throttled"),
            cpu_throttled_usec: field(&cpu, "throttled_usec"),
            memory_current: number("memory.current"),
            memory_max: limit("memory.max"),
            memory_anon: field(&memory, "anon"),
            memory_file: field(&memory, "file"),
            memory_kernel_stack: field(&memory, "kernel_stack"),
            memory_slab: field(&memory, "slab"),
            memory_inactive_file: field(&memory, "inactive_file"),
            memory_pgfault: field(&memory, "pgfault"),
            memory_pgmajfault: field(&memory, "pgmajfault"),
            memory_swap_current: number("memory.swap.current"),
            // A kernel without swap has no such file.
            memory_swap_max: if self.path.join("memory.swap.max").exists() { limit("memory.swap.max") } else { 0 },
            memory_events_low: field(&events, "low"),
            memory_events_high: field(&events, "high"),
            memory_events_max: field(&events, "max"),
            memory_events_oom: field(&events, "oom"),
            memory_oom_kills: oom::count(&events),
            pids_current: number("pids.current"),
            pids_max: limit("pids.max"),
            io_rbytes: sum(&io, "rbytes"),
            io_wbytes: sum(&io, "wbytes"),
            io_rios: sum(&io, "rios"),
            io_wios: sum(&io, "wios"),
            ..Default::default()
        }
    }
}

/// The number beside `key` in a file of lines "key number".
pub(super) fn field(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// Of all devices in a file of lines "device key=number key=number".
fn sum(text: &str, key: &str) -> u64 {
    let words = text.lines().flat_map(|line| line.split_whitespace().skip(1));
    let numbers = words.filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')?.parse().ok());
    numbers.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_not_its_namesake() {
        assert_eq!(field("user_usec 2\nusage_usec 1\n", "usage_usec"), 1);
        assert_eq!(field("anon_thp 4\nanon 3\n", "anon"), 3);
    }

    #[test]
    fn what_the_kernel_counts_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let cgroup = Cgroup { path: dir.path().to_owned(), fd: fs::File::open(dir.path()).unwrap().into() };
        // As where a controller is missing.
        let none = StatsResponse { memory_max: u64::MAX, pids_max: u64::MAX, ..Default::default() };
        assert_eq!(cgroup.stats(), none);
        fs::write(dir.path().join("memory.swap.current"), "8192\n").unwrap();
        fs::write(dir.path().join("memory.swap.max"), "max\n").unwrap();
        fs::write(dir.path().join("memory.events"), "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\n").unwrap();
        fs::write(dir.path().join("io.stat"), "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n").unwrap();
        let stats = cgroup.stats();
        assert_eq!((stats.memory_swap_current, stats.memory_swap_max), (8192, u64::MAX));
        let events = [stats.memory_events_low, stats.memory_events_high, stats.memory_events_max];
        assert_eq!((events, stats.memory_events_oom, stats.memory_oom_kills), ([1, 2, 3], 4, 5));
        assert_eq!([stats.io_rbytes, stats.io_wbytes, stats.io_rios, stats.io_wios], [1, 2, 3, 4]);
    }

    #[test]
    fn devices_are_counted_together() {
        let text = "254:0 rbytes=4096 wbytes=512 rios=2 wios=1 dbytes=7 dios=7\n7:0 \n254:16 rbytes=1 wbytes=0 rios=1 wios=0\n";
        assert_eq!(["rbytes", "wbytes", "rios", "wios", "ios"].map(|key| sum(text, key)), [4097, 512, 3, 1, 0]);
        assert_eq!(sum("", "rbytes"), 0);
    }
}
