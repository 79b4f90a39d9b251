use std::{fs, io::Write};

use super::*;
use crate::doctor::Status;

/// The start of a program.
fn elf(machine: u16) -> Vec<u8> {
    let mut file = vec![0; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[18..20].copy_from_slice(&machine.to_le_bytes());
    file
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
    let agent = |machine| cpio(&[("bin/sh", b"12345"), ("./sbin/chsnap-agent", &elf(machine))]);
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
