//! The kernel that guests boot, told by its content: a VMM's own words for a wrong one differ, or there are none.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use thiserror::Error;

mod elf;

pub(crate) use elf::{Content, Elf, Machine};

/// A file that no VMM here can boot.
#[derive(Debug, Error)]
pub enum KernelError {
    /// It is not there, or not a file.
    #[error(transparent)]
    Unreadable(#[from] io::Error),
    /// It is something else.
    #[error("it is {what}; {mend}")]
    Wrong {
        /// What it is instead.
        what: String,
        /// What to do.
        mend: &'static str,
    },
}

/// Opens what is a regular file; anything else might never answer.
///
/// # Errors
/// Where it cannot be opened, or is none.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a file"));
    }
    File::open(path)
}

/// The form of the kernel at `path`: an ELF vmlinux with a PVH entry, or an arm64 Image.
///
/// # Errors
/// See [`KernelError`].
pub(crate) fn kernel(path: &Path) -> Result<&'static str, KernelError> {
    form(&open(path)?, Machine::HOST)
}

fn form<C: Content + ?Sized>(file: &C, host: Machine) -> Result<&'static str, KernelError> {
    let wrong = |what: &str, mend| Err(KernelError::Wrong { what: what.into(), mend });
    let at = |offset, magic: &[u8]| file.at(offset, magic.len()).is_some_and(|bytes| bytes == magic);
    let other = |machine: Machine| {
        let what = format!("a kernel for {}, and this host is {}", machine.name(), host.name());
        wrong(&what, "name one of this architecture in [guest] kernel")
    };
    if at(56, b"ARM\x64") {
        return if host == Machine::Aarch64 { Ok("arm64 Image") } else { other(Machine::Aarch64) };
    }
    if let Some(elf) = Elf::new(file) {
        return match elf.machine() {
            machine if machine != host => other(machine),
            Machine::Aarch64 => wrong("an ELF file", "arm64 guests boot the Image, not the vmlinux"),
            _ if !elf.is_executable() => wrong("an ELF file, but no kernel", "name the uncompressed vmlinux"),
            _ if !elf.has_pvh_entry() => wrong("a vmlinux without a PVH entry", "build the kernel with CONFIG_PVH=y"),
            _ => Ok("vmlinux for x86_64"),
        };
    }
    if at(0x202, b"HdrS") {
        let mend = "name the uncompressed vmlinux; scripts/extract-vmlinux of the kernel's sources unpacks it";
        return wrong("a compressed bzImage", mend);
    }
    if at(0, &[0x1f, 0x8b]) {
        return wrong("compressed with gzip", "unpack it with gunzip and name the result");
    }
    wrong("no kernel", "name an uncompressed vmlinux (x86_64) or an Image (arm64) in [guest] kernel")
}

#[cfg(test)]
mod tests;
