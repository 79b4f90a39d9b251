//! What the guest boots.

use std::{
    fs::{self, File},
    io::{self, Read},
    path::Path,
};

use super::{
    Check,
    elf::{Elf, Machine},
};

const BUILD: &str = "`make build` makes one, `make install` installs it";
/// More is no initramfs for a container's guest.
const MOST: u64 = 1 << 30;
const AGENT: &str = "sbin/chsnap-agent";

/// An ELF vmlinux, or an arm64 Image.
pub(super) fn kernel(path: &Path) -> Check {
    let name = "guest kernel";
    let read = match fs::metadata(path) {
        Ok(data) if !data.is_file() => Err(io::Error::other("not a file")),
        Ok(_) => fs::read(path),
        Err(error) => Err(error),
    };
    let bytes = match read {
        Ok(bytes) => bytes,
        Err(error) => {
            let mend = format!("{BUILD}; or name another in [guest] kernel");
            return Check::missing(name, format!("{}: {error}", path.display()), mend);
        }
    };
    match kernel_form(&bytes, Machine::HOST) {
        Ok(form) => Check::ok(name, format!("{} ({form})", path.display())),
        Err((what, mend)) => Check::missing(name, format!("{} is {what}", path.display()), mend),
    }
}

/// The form, or what it is instead and what to do.
fn kernel_form(bytes: &[u8], host: Machine) -> Result<String, (String, &'static str)> {
    let at = |offset: usize, magic: &[u8]| bytes.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    let other = |machine: Machine| {
        Err((
            format!("a kernel for {}, and this host is {}", machine.name(), host.name()),
            "name one of this architecture in [guest] kernel",
        ))
    };
    if at(56, b"ARM\x64") {
        return if host == Machine::Aarch64 { Ok("arm64 Image".into()) } else { other(Machine::Aarch64) };
    }
    if let Some(elf) = Elf::new(bytes) {
        let machine = elf.machine();
        return match machine {
            _ if machine != host => other(machine),
            Machine::Aarch64 => Err(("an ELF file".into(), "arm64 guests boot the Image, not the vmlinux")),
            _ if !elf.is_executable() => Err(("an ELF file, but no kernel".into(), "name the uncompressed vmlinux")),
            _ if !elf.has_pvh_entry() => {
                Err(("a vmlinux without a PVH entry".into(), "build the kernel with CONFIG_PVH=y"))
            }
            _ => Ok("vmlinux for x86_64".into()),
        };
    }
    if at(0x202, b"HdrS") {
        return Err((
            "a compressed bzImage".into(),
            "name the uncompressed vmlinux; scripts/extract-vmlinux of the kernel's sources unpacks it",
        ));
    }
    if at(0, &[0x1f, 0x8b]) {
        return Err(("compressed with gzip".into(), "unpack it with gunzip and name the result"));
    }
    Err(("no kernel".into(), "name an uncompressed vmlinux (x86_64) or an Image (arm64) in [guest] kernel"))
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
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a file"));
    }
    let mut file = File::open(path)?;
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
            return Elf::new(&start).map(|elf| Some(elf.machine())).ok_or_else(|| invalid("its agent is no program"));
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
