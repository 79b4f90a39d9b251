//! The micro guest for aarch64: EL1 from its first instruction, MMU off, as VMMs start a kernel.
//!
//! It writes to a device, takes an exception and returns from it, writes a system register and reads it back.
//! Each step is told on a device's address before it is tried.

use std::arch::global_asm;

use kvm_bindings::{
    KVM_ARM_VCPU_PSCI_0_2, KVM_REG_ARM_CORE, KVM_REG_ARM64, KVM_REG_SIZE_U64, kvm_vcpu_init, user_pt_regs,
};
use kvm_ioctls::{Error, Kvm, VcpuFd, VmFd};

use super::sys::{self, Memory};

/// Where the guest's memory lies.
pub const BASE: u64 = 0x8000_0000;
/// What each step is, by the number that announces it.
pub const STEPS: [&str; 3] = ["the first instruction", "an exception", "a system register"];
/// Announces that all steps are done.
pub const DONE: u8 = 0x0d;
/// Announces that a step had the wrong result.
pub const WRONG: u8 = 0xff;

/// The device of the announcements, where no memory is; also in the code below.
const DEVICE: u64 = 0x0900_0000;

global_asm!(
    ".pushsection .rodata.chsnap_probe, \"a\"",
    // The vectors, and with them the code, lie at a multiple of 2048 in the guest's memory.
    ".balign 4",
    ".globl chsnap_probe_begin, chsnap_probe_end",
    "chsnap_probe_begin:",
    "movz x1, #0x0900, lsl #16",
    "mov w4, #0",
    "mov w0, #1",
    "str w0, [x1]",
    "adr x2, chsnap_probe_begin + 0x800",
    "msr vbar_el1, x2",
    "isb",
    "brk #0",
    "cmp w4, #1",
    "b.ne 15f",
    "mov w0, #2",
    "str w0, [x1]",
    "movz x2, #0x1234",
    "msr tpidr_el0, x2",
    "mrs x3, tpidr_el0",
    "cmp x2, x3",
    "b.ne 15f",
    "mov w0, #0x0d",
    "str w0, [x1]",
    "14: wfi",
    "b 14b",
    "15: mov w0, #0xff",
    "str w0, [x1]",
    "b 14b",
    // A synchronous exception from the current level, with its own stack pointer.
    ".org chsnap_probe_begin + 0xa00",
    "add w4, w4, #1",
    "mrs x2, elr_el1",
    "add x2, x2, #4",
    "msr elr_el1, x2",
    "eret",
    "chsnap_probe_end:",
    ".popsection",
);

/// Fills the memory and makes the CPU ready to run it.
pub fn prepare(_: &Kvm, vm: &VmFd, memory: &mut Memory) -> Result<VcpuFd, Error> {
    let code = sys::code();
    memory.0[..code.len()].copy_from_slice(code);
    sys::attach(vm, memory, BASE)?;
    let cpu = vm.create_vcpu(0)?;
    let mut features = kvm_vcpu_init::default();
    vm.get_preferred_target(&mut features)?;
    features.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
    cpu.vcpu_init(&features)?;
    let index = std::mem::offset_of!(user_pt_regs, pc) as u64 / 4;
    let program_counter = KVM_REG_ARM64 | KVM_REG_SIZE_U64 | u64::from(KVM_REG_ARM_CORE) | index;
    cpu.set_one_reg(program_counter, &BASE.to_le_bytes())?;
    Ok(cpu)
}

/// The announcement in an exit of the CPU, if it is one.
pub fn announcement(exit: &kvm_ioctls::VcpuExit<'_>) -> Option<u8> {
    match exit {
        kvm_ioctls::VcpuExit::MmioWrite(DEVICE, [step, ..]) => Some(*step),
        _ => None,
    }
}
