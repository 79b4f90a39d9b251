//! The two steps of running a micro guest that have no safe interface: its code, and its memory.

use std::slice;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

/// The guest's memory, from its address 0 (x86_64) or [`super::guest::BASE`] (aarch64).
#[repr(C, align(65536))]
pub struct Memory(pub [u8; Memory::SIZE]);

impl Memory {
    /// Of its size.
    pub const SIZE: usize = 0x1_0000;

    /// Zeros.
    pub fn new() -> Box<Self> {
        Box::new(Self([0; Self::SIZE]))
    }
}

/// Makes `memory` the guest's, at `address`. The virtual machine must be gone before the memory is.
pub fn attach(vm: &VmFd, memory: &mut Memory, address: u64) -> Result<(), kvm_ioctls::Error> {
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: address,
        memory_size: Memory::SIZE as u64,
        userspace_addr: memory.0.as_mut_ptr() as u64,
    };
    // SAFETY: the region is exactly the memory's pages, which are writable, aligned, and outlive the virtual
    // machine by the caller's promise; nothing on this side looks at them while the guest runs.
    unsafe { vm.set_user_memory_region(region) }
}

unsafe extern "C" {
    static chsnap_probe_begin: u8;
    static chsnap_probe_end: u8;
}

/// The guest's code, as assembled in [`super::guest`].
pub fn code() -> &'static [u8] {
    let (begin, end) = (&raw const chsnap_probe_begin, &raw const chsnap_probe_end);
    // SAFETY: both labels are in one read-only section of this program, the first before the second, and all
    // between is initialised.
    unsafe { slice::from_raw_parts(begin, end as usize - begin as usize) }
}
