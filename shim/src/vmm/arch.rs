//! What depends on the processor and not on the VMM.

use super::Accelerator;

/// The guest's architecture: always the host's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arch {
    /// Intel's and AMD's.
    X86_64,
    /// Arm's, 64 bits.
    Aarch64,
}

impl Arch {
    /// This build's.
    pub const HOST: Self = if cfg!(target_arch = "aarch64") { Self::Aarch64 } else { Self::X86_64 };

    /// The kernel command line: where the kernel writes, how it ends, what it may leave out; then the caller's words.
    ///
    /// A panic reboots at once, and a reboot ends the VMM. What is left out is of no use in this guest (self tests, a
    /// spare random source, the check of signatures that the initramfs vouches for) and takes two fifths of an
    /// emulated boot. Without `no_timer_check` a busy host's guest may lose its timer.
    ///
    /// QEMU does not see virtiofsd write into the guest's memory. Where a page that held translated code gets a file's
    /// content, only the guest's own clearing of it makes QEMU forget the translation: `init_on_alloc=1`, which is not
    /// every kernel's default. Without it programs run what was in their pages before.
    pub fn cmdline(self, accelerator: Accelerator, words: &[String]) -> String {
        const COMMON: &str = "quiet panic=-1 cryptomgr.notests initcall_blacklist=load_system_certificate_list,\
            jent_mod_init,bpf_tcp_ca_kfunc_init,bpf_dummy_struct_ops_init,trace_eval_init,init_kprobe_trace";
        let own = match (self, accelerator) {
            (Self::X86_64, Accelerator::Kvm) => "console=ttyS0 reboot=t tsc=reliable no_timer_check",
            // Patching and moving the kernel is dear where every changed instruction is translated again.
            (Self::X86_64, Accelerator::Tcg) => {
                "console=ttyS0 reboot=t tsc=reliable no_timer_check noreplace-smp nokaslr init_on_alloc=1"
            }
            (Self::Aarch64, Accelerator::Kvm) => "console=ttyAMA0",
            (Self::Aarch64, Accelerator::Tcg) => "console=ttyAMA0 nokaslr init_on_alloc=1",
        };
        let words = [own, COMMON].into_iter().chain(words.iter().map(String::as_str));
        words.collect::<Vec<_>>().join(" ")
    }

    /// What tells an emulated guest how fast its clock runs, from the host's `/proc/cpuinfo`.
    ///
    /// QEMU hands on the host's time stamp counter, and the guest's kernel measures it against an emulated timer. On a busy
    /// host that went wrong in 2 of 75 starts, by up to 24 times, and the guest's seconds were that much shorter. The host
    /// knows: its loops per jiffy, of which the BogoMIPS are made, count the same counter (two of them to a loop).
    pub fn clock_word(self, accelerator: Accelerator, cpuinfo: &str) -> Option<String> {
        self.clock_khz(accelerator, cpuinfo).map(|khz| format!("tsc_early_khz={khz}"))
    }

    /// How fast the host's counter runs, where the guest counts with it and is told so. A guest that is restored goes on
    /// counting at the speed that it was told when it booted.
    pub fn clock_khz(self, accelerator: Accelerator, cpuinfo: &str) -> Option<u64> {
        if (self, accelerator) != (Self::X86_64, Accelerator::Tcg) {
            return None;
        }
        let line = cpuinfo.lines().find(|line| line.starts_with("bogomips"))?;
        let (whole, hundredths) = line.split_once(':')?.1.trim().split_once('.')?;
        let khz = whole.parse::<u64>().ok()? * 500 + hundredths.get(..2)?.parse::<u64>().ok()? * 5;
        // A host that does not calibrate by its counter has others.
        (100_000..10_000_000).contains(&khz).then_some(khz)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_s_speed_is_that_of_the_host() {
        let word = |arch: Arch, accelerator, cpuinfo: &str| arch.clock_word(accelerator, cpuinfo);
        let host = "processor\t: 0\ncpu MHz\t\t: 799.998\nbogomips\t: 4890.84\n";
        assert_eq!(word(Arch::X86_64, Accelerator::Tcg, host).as_deref(), Some("tsc_early_khz=2445420"));
        assert_eq!(word(Arch::X86_64, Accelerator::Kvm, host), None, "KVM tells it");
        assert_eq!(word(Arch::Aarch64, Accelerator::Tcg, "BogoMIPS\t: 50.00\n"), None, "its timer tells it");
        for odd in ["", "bogomips\t: fast\n", "bogomips\t: 4890.\n", "bogomips\t: 2.00\n", "bogomips\t: 99999999.00\n"]
        {
            assert_eq!(word(Arch::X86_64, Accelerator::Tcg, odd), None, "{odd}");
        }
    }
}
