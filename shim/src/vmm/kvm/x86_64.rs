//! The micro guest for x86_64: long mode from its first instruction, as VMMs start a kernel.
//!
//! It does what a kernel cannot do without, and what a KVM that only emulates instructions fails at: it takes an
//! exception and returns from it, uses a second mapping of a page, writes a model specific register, goes to user
//! mode and comes back. Each step is told on a port before it is tried.

use std::arch::global_asm;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::{Error, Kvm, VcpuFd, VmFd};

use super::sys::{self, Memory};

/// Where the guest's memory lies.
pub const BASE: u64 = 0;
/// What each step is, by the number that announces it.
pub const STEPS: [&str; 5] =
    ["the first instruction", "an exception", "page tables", "a model specific register", "user mode"];
/// Announces that all steps are done.
pub const DONE: u8 = 0x0d;
/// Announces that a step had the wrong result.
pub const WRONG: u8 = 0xff;

/// The port of the announcements; also in the code below.
const PORT: u16 = 0x10;

// Layout of the memory. Page tables: two megabytes, mapped at 0 and once more at 2 MiB.
const PML4: usize = 0x1000;
const PDPT: usize = 0x2000;
const DIRECTORY: usize = 0x3000;
const GDT: usize = 0x4000;
const TSS: usize = 0x4100;
const IDT: usize = 0x5000;
const CODE: usize = 0x6000;
const STACK: usize = 0x8000;
/// Selectors in the GDT: kernel code and data, user data and code, task state.
const KERNEL_CODE: u16 = 0x08;
const KERNEL_DATA: u16 = 0x10;
const TASK: u16 = 0x28;

global_asm!(
    ".pushsection .rodata.chsnap_probe, \"a\"",
    ".globl chsnap_probe_begin, chsnap_probe_end",
    "chsnap_probe_begin:",
    // The header: where the interrupt gates and the first instruction are.
    ".quad 20f - chsnap_probe_begin",
    ".quad 30f - chsnap_probe_begin",
    ".quad 10f - chsnap_probe_begin",
    "10: xor ebx, ebx",
    "mov al, 1",
    "out 0x10, al",
    "int3",
    "cmp ebx, 1",
    "jne 15f",
    "mov al, 2",
    "out 0x10, al",
    "mov edi, 0x209000",
    "mov esi, 0x9000",
    "mov dword ptr [rdi], 0x1234",
    "cmp dword ptr [rsi], 0x1234",
    "jne 15f",
    "mov rax, cr3",
    "mov cr3, rax",
    "mov al, 3",
    "out 0x10, al",
    // EFER, as it is.
    "mov ecx, 0xc0000080",
    "rdmsr",
    "wrmsr",
    "mov al, 4",
    "out 0x10, al",
    // Stack segment, stack, flags, code segment and instruction of the user mode.
    "push 0x1b",
    "push 0xa000",
    "push 2",
    "push 0x23",
    "lea rax, [rip + 40f]",
    "push rax",
    "iretq",
    "15: mov al, 0xff",
    "out 0x10, al",
    "hlt",
    // The exception.
    "20: inc ebx",
    "iretq",
    // The way back from user mode.
    "30: mov al, 0x0d",
    "out 0x10, al",
    "hlt",
    // User mode.
    "40: int 0x80",
    "chsnap_probe_end:",
    ".popsection",
);

/// Fills the memory and makes the CPU ready to run it.
pub fn prepare(kvm: &Kvm, vm: &VmFd, memory: &mut Memory) -> Result<VcpuFd, Error> {
    let code = sys::code();
    let offset = |index: usize| {
        let bytes = code.iter().skip(index * 8).take(8).rev();
        CODE as u64 + bytes.fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    let mut write = |at: usize, value: u64| memory.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    // Present, writable, for user mode too; and in the directory, large.
    write(PML4, PDPT as u64 | 0x7);
    write(PDPT, DIRECTORY as u64 | 0x7);
    write(DIRECTORY, 0x87);
    write(DIRECTORY + 8, 0x87);
    let segments = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    for (index, descriptor) in segments.into_iter().enumerate() {
        write(GDT + index * 8, descriptor);
    }
    // An available 64-bit task state segment; the processor is told of it directly, below.
    write(GDT + usize::from(TASK), 0x0000_8900_0000_0067 | (TSS as u64) << 16);
    // The stack for coming from user mode.
    write(TSS + 4, STACK as u64);
    let gate = |handler: u64, level: u64| handler | u64::from(KERNEL_CODE) << 16 | (0x8e | level << 5) << 40;
    write(IDT + 3 * 16, gate(offset(0), 3));
    write(IDT + 0x80 * 16, gate(offset(1), 3));
    memory.0[CODE..CODE + code.len()].copy_from_slice(code);

    sys::attach(vm, memory, BASE)?;
    // Intel's needs three pages of the guest's addresses where it cannot run real mode itself.
    let _ = vm.set_tss_address(0xfffb_d000);
    let cpu = vm.create_vcpu(0)?;
    cpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut state = cpu.get_sregs()?;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: KERNEL_DATA,
        type_: 0x3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    state.cs = kvm_segment { selector: KERNEL_CODE, type_: 0xb, db: 0, l: 1, ..data };
    (state.ds, state.es, state.fs, state.gs, state.ss) = (data, data, data, data, data);
    state.tr =
        kvm_segment { base: TSS as u64, limit: 0x67, selector: TASK, type_: 0xb, present: 1, ..Default::default() };
    (state.gdt.base, state.gdt.limit) = (GDT as u64, 0x37);
    (state.idt.base, state.idt.limit) = (IDT as u64, 0xfff);
    // Protection, paging and native errors; physical address extension; long mode enabled and active.
    (state.cr0, state.cr3, state.cr4, state.efer) = (0x8000_0031, PML4 as u64, 0x20, 0x500);
    cpu.set_sregs(&state)?;
    // Bit 1 of the flags is always set.
    cpu.set_regs(&kvm_regs { rip: offset(2), rsp: STACK as u64, rflags: 2, ..Default::default() })?;
    Ok(cpu)
}

/// The announcement in an exit of the CPU, if it is one.
pub fn announcement(exit: &kvm_ioctls::VcpuExit<'_>) -> Option<u8> {
    match exit {
        kvm_ioctls::VcpuExit::IoOut(PORT, [step]) => Some(*step),
        _ => None,
    }
}
