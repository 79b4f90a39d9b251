//! As much of ELF as tells a kernel from a program, and one machine from another.

use std::{fs::File, os::unix::fs::FileExt};

/// A machine that guests exist for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Machine {
    X86_64,
    Aarch64,
    Other(u16),
}

impl Machine {
    /// This host's.
    pub const HOST: Self = if cfg!(target_arch = "x86_64") {
        Self::X86_64
    } else if cfg!(target_arch = "aarch64") {
        Self::Aarch64
    } else {
        Self::Other(0)
    };

    pub fn name(self) -> String {
        match self {
            Self::X86_64 => "x86_64".into(),
            Self::Aarch64 => "aarch64".into(),
            Self::Other(code) => format!("machine {code}"),
        }
    }
}

const EXECUTABLE: u16 = 2;
const NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: where a VMM enters an x86_64 kernel directly.
const PVH_ENTRY: u32 = 18;
/// A kernel has a few hundred bytes of them.
const MOST_NOTES: usize = 1 << 20;

/// Bytes to be looked into, without reading everything: a vmlinux has tens of megabytes.
pub(crate) trait Content {
    /// Exactly `len` bytes, or none.
    fn at(&self, offset: u64, len: usize) -> Option<Vec<u8>>;
}

impl Content for [u8] {
    fn at(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let start = usize::try_from(offset).ok()?;
        self.get(start..start.checked_add(len)?).map(<[u8]>::to_vec)
    }
}

impl Content for File {
    fn at(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, offset).ok().map(|()| bytes)
    }
}

/// A little-endian 64-bit ELF file.
pub(crate) struct Elf<'a, C: ?Sized>(&'a C);

impl<'a, C: Content + ?Sized> Elf<'a, C> {
    /// None where it is no such file.
    pub fn new(file: &'a C) -> Option<Self> {
        let header = file.at(0, 64)?;
        header.starts_with(b"\x7fELF\x02\x01").then_some(Self(file))
    }

    pub fn machine(&self) -> Machine {
        match self.u16(18) {
            Some(62) => Machine::X86_64,
            Some(183) => Machine::Aarch64,
            other => Machine::Other(other.unwrap_or(0)),
        }
    }

    pub fn is_executable(&self) -> bool {
        self.u16(16) == Some(EXECUTABLE)
    }

    /// Whether a VMM can enter it without a boot loader.
    pub fn has_pvh_entry(&self) -> bool {
        self.notes().is_some_and(|notes| notes.contains(&(b"Xen".to_vec(), PVH_ENTRY)))
    }

    /// Owner and type of every note. None where a table leads out of the file.
    fn notes(&self) -> Option<Vec<(Vec<u8>, u32)>> {
        let mut found = Vec::new();
        let (table, size, count) = (self.u64(32)?, u64::from(self.u16(54)?), u64::from(self.u16(56)?));
        for index in 0..count {
            let header = table.checked_add(index * size)?;
            if self.u32(header)? != NOTE {
                continue;
            }
            let (start, len) = (self.u64(header.checked_add(8)?)?, self.u64(header.checked_add(32)?)?);
            let notes = self.0.at(start, usize::try_from(len).ok().filter(|len| *len <= MOST_NOTES)?)?;
            let mut rest = notes.as_slice();
            while rest.len() >= 12 {
                let word = |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
                let (name_len, data_len, kind) = (word(0) as usize, word(4) as usize, word(8));
                let name = rest.get(12..12usize.checked_add(name_len)?)?;
                found.push((name.strip_suffix(b"\0").unwrap_or(name).to_vec(), kind));
                let next = 12 + name_len.next_multiple_of(4) + data_len.next_multiple_of(4);
                rest = rest.get(next..).unwrap_or_default();
            }
        }
        Some(found)
    }

    fn bytes<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        self.0.at(at, N)?.try_into().ok()
    }

    fn u16(&self, at: u64) -> Option<u16> {
        self.bytes(at).map(u16::from_le_bytes)
    }

    fn u32(&self, at: u64) -> Option<u32> {
        self.bytes(at).map(u32::from_le_bytes)
    }

    fn u64(&self, at: u64) -> Option<u64> {
        self.bytes(at).map(u64::from_le_bytes)
    }
}
