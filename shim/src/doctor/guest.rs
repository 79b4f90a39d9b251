//! What the guest boots.

use std::{
    io::{self, Read},
    path::Path,
};

use super::Check;
use crate::guest::{self, Elf, KernelError, Machine};

const BUILD: &str = "`make build` makes one, `make install` installs it";
/// More is no initramfs for a container's guest.
const MOST: u64 = 1 << 30;
const AGENT: &str = "sbin/chsnap-agent";

/// An ELF vmlinux, or an arm64 Image.
pub(super) fn kernel(path: &Path) -> Check {
    let (name, shown) = ("guest kernel", path.display());
    match guest::kernel(path) {
        Ok(form) => Check::ok(name, format!("{shown} ({form})")),
        Err(KernelError::Wrong { what, mend }) => Check::missing(name, format!("{shown} is {what}"), mend),
        Err(KernelError::Unreadable(error)) => {
            Check::missing(name, format!("{shown}: {error}"), format!("{BUILD}; or name another in [guest] kernel"))
        }
    }
}

/// A cpio archive with the agent in it.
pub(super) fn initramfs(path: &Path) -> Check {
    let name = "guest initramfs";
    let mend = format!("{BUILD}; or name another in [guest] initramfs");
    let shown = path.display();
    match agent_in(path) {
        Ok(Some(machine)) if machine == Machine::HOST => {
            Check::ok(name, format!("{shown} (agent for {})", machine.name()))
        }
        Ok(Some(machine)) => {
            let found = format!("{shown} is for {}, and this host is {}", machine.name(), Machine::HOST.name());
            Check::missing(name, found, mend)
        }
        Ok(None) => Check::missing(name, format!("{shown} holds no /{AGENT}"), mend),
        Err(error) => Check::missing(name, format!("{shown}: {error}"), mend),
    }
}

/// The machine that the agent in it was built for.
fn agent_in(path: &Path) -> io::Result<Option<Machine>> {
    let mut file = guest::open(path)?;
    let mut magic = Vec::new();
    (&mut file).take(6).read_to_end(&mut magic)?;
    let file = magic.as_slice().chain(file);
    if magic.starts_with(&[0x1f, 0x8b]) {
        find_agent(flate2::read::MultiGzDecoder::new(file))
    } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        find_agent(zstd::Decoder::new(file)?)
    } else if magic.starts_with(b"07070") {
        find_agent(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "neither a cpio archive nor one compressed with gzip or zstd"))
    }
}

/// Walks a "newc" archive; several may stand one after another, with zeros between.
fn find_agent(archive: impl Read) -> io::Result<Option<Machine>> {
    let invalid = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    let mut archive = archive.take(MOST);
    let mut header = [0u8; 110];
    loop {
        // Entries and the zeros between archives are aligned to four bytes.
        if !read_or_end(&mut archive, &mut header[..4])? {
            return Ok(None);
        }
        if header[..4] == [0; 4] {
            continue;
        }
        archive.read_exact(&mut header[4..])?;
        if !matches!(&header[..6], b"070701" | b"070702") {
            return Err(invalid("a broken cpio archive"));
        }
        let field = |index: usize| -> io::Result<u64> {
            let digits = str::from_utf8(&header[6 + index * 8..14 + index * 8]).unwrap_or_default();
            u64::from_str_radix(digits, 16).map_err(|_| invalid("a broken cpio archive"))
        };
        let (size, name_len) = (field(6)?, field(11)?);
        if name_len > 4096 {
            return Err(invalid("a broken cpio archive"));
        }
        let mut name = vec![0; (110 + name_len).next_multiple_of(4) as usize - 110];
        archive.read_exact(&mut name)?;
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        let name = name.strip_prefix(b"./").or_else(|| name.strip_prefix(b"/")).unwrap_or(name);
        let mut content = (&mut archive).take(size.next_multiple_of(4));
        if name == AGENT.as_bytes() {
            let mut start = Vec::new();
            content.take(64).read_to_end(&mut start)?;
            return Elf::new(start.as_slice())
                .map(|elf| Some(elf.machine()))
                .ok_or_else(|| invalid("its agent is no program"));
        }
        let skipped = io::copy(&mut content, &mut io::sink())?;
        if skipped < size {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
        }
    }
}

/// False at the very end.
fn read_or_end(from: &mut impl Read, into: &mut [u8]) -> io::Result<bool> {
    let mut got = 0;
    while got < into.len() {
        match from.read(&mut into[got..])? {
            0 if got == 0 => return Ok(false),
            0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            read => got += read,
        }
    }
    Ok(true)
}

#[cfg(test)]
#[path = "guest_tests.rs"]
mod tests;
