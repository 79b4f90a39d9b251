use std::io::Write;

use super::*;
use crate::doctor::Status;

/// An ELF header, one program header and one note.
fn elf(machine: u16, kind: u16, note: u32) -> Vec<u8> {
    let mut file = vec![0; 64 + 56];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[16..18].copy_from_slice(&kind.to_le_bytes());
    file[18..20].copy_from_slice(&machine.to_le_bytes());
    file[32] = 64;
    file[54] = 56;
    file[56] = 1;
    file[64] = 4;
    file[64 + 8] = 64 + 56;
    file[64 + 32] = 20;
    file.extend([4u32, 4, note].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(b"Xen\0\0\0\0\x01");
    file
}

#[test]
fn a_kernel_is_told_by_its_content() {
    let image = [vec![0; 56], b"ARM\x64".to_vec()].concat();
    let bz_image = [vec![0; 0x202], b"HdrS".to_vec()].concat();
    let x86 = Machine::X86_64;
    let arm = Machine::Aarch64;
    assert_eq!(kernel_form(&elf(62, 2, 18), x86), Ok("vmlinux for x86_64".into()));
    assert_eq!(kernel_form(&image, arm), Ok("arm64 Image".into()));
    for (bytes, host, what) in [
        (elf(62, 2, 17), x86, "a vmlinux without a PVH entry"),
        (elf(62, 3, 18), x86, "an ELF file, but no kernel"),
        (elf(183, 2, 18), x86, "a kernel for aarch64, and this host is x86_64"),
        (elf(62, 2, 18), arm, "a kernel for x86_64, and this host is aarch64"),
        (elf(183, 2, 18), arm, "an ELF file"),
        (image, x86, "a kernel for aarch64, and this host is x86_64"),
        (bz_image, x86, "a compressed bzImage"),
        (vec![0x1f, 0x8b, 8], arm, "compressed with gzip"),
        (vec![], x86, "no kernel"),
        (b"#!/bin/sh".to_vec(), x86, "no kernel"),
    ] {
        assert_eq!(kernel_form(&bytes, host).unwrap_err().0, what);
    }
    // Tables that lead out of the file.
    for at in [32, 54, 56, 64 + 8, 64 + 32, 120, 124] {
        let mut broken = elf(62, 2, 18);
        broken[at..at + 2].fill(0xff);
        let _ = kernel_form(&broken, x86);
    }
}

/// As cpio(1) writes it.
fn cpio(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, content) in files.iter().copied().chain([("TRAILER!!!", &[][..])]) {
        let mut fields = [0; 13];
        fields[6] = content.len();
        fields[11] = name.len() + 1;
        archive.extend(b"070701");
        fields.iter().for_each(|field| write!(archive, "{field:08x}").unwrap());
        archive.extend(name.bytes().chain([0]));
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive.resize(archive.len().next_multiple_of(512), 0);
    archive
}

#[test]
fn an_initramfs_must_hold_the_agent_for_this_machine() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("initramfs");
    let (own, foreign) = if cfg!(target_arch = "x86_64") { (62, 183) } else { (183, 62) };
    let agent = |machine| cpio(&[("bin/sh", b"12345"), ("./sbin/chsnap-agent", &elf(machine, 3, 0))]);
    let gzip = |bytes: &[u8]| {
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    };
    let both = [cpio(&[("kernel/microcode", b"x")]), agent(own)].concat();
    for (bytes, status, found) in [
        (agent(own), Status::Ok, "(agent for "),
        (gzip(&agent(own)), Status::Ok, "(agent for "),
        (zstd::encode_all(agent(own).as_slice(), 1).unwrap(), Status::Ok, "(agent for "),
        (both, Status::Ok, "(agent for "),
        (agent(foreign), Status::Missing, "and this host is"),
        (cpio(&[("bin/sh", b"")]), Status::Missing, "holds no /sbin/chsnap-agent"),
        (cpio(&[("sbin/chsnap-agent", b"#!/bin/sh")]), Status::Missing, "its agent is no program"),
        (agent(own)[..200].to_vec(), Status::Missing, "failed to fill whole buffer"),
        (b"07070x".repeat(100), Status::Missing, "a broken cpio archive"),
        (vec![], Status::Missing, "neither a cpio archive"),
        (b"BZh9".to_vec(), Status::Missing, "neither a cpio archive"),
    ] {
        fs::write(&path, bytes).unwrap();
        let check = initramfs(&path);
        assert_eq!(check.status, status, "{check:?}");
        assert!(check.found.contains(found), "{check:?}");
    }
    assert_eq!(initramfs(&dir.path().join("none")).status, Status::Missing);
    assert_eq!(kernel(dir.path()).status, Status::Missing);
}
