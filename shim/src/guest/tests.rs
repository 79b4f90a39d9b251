use super::*;

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
    assert_eq!(form(elf(62, 2, 18).as_slice(), x86).unwrap(), "vmlinux for x86_64");
    assert_eq!(form(image.as_slice(), arm).unwrap(), "arm64 Image");
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
        let error = form(bytes.as_slice(), host).unwrap_err().to_string();
        assert!(error.starts_with(&format!("it is {what}; ")), "{error}");
    }
    // Tables that lead out of the file.
    for at in [32, 54, 56, 64 + 8, 64 + 32, 120, 124] {
        let mut broken = elf(62, 2, 18);
        broken[at..at + 2].fill(0xff);
        let _ = form(broken.as_slice(), x86);
    }
}

#[test]
fn a_file_is_looked_into_like_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kernel");
    for (bytes, is_kernel) in [(elf(62, 2, 18), true), (elf(62, 2, 17), false), (vec![], false)] {
        fs::write(&path, bytes).unwrap();
        let file = open(&path).unwrap();
        assert_eq!(form(&file, Machine::X86_64).is_ok(), is_kernel);
    }
    // Neither of them may be waited for.
    nix::unistd::mkfifo(&dir.path().join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for name in ["none", ".", "fifo"] {
        assert!(matches!(kernel(&dir.path().join(name)), Err(KernelError::Unreadable(_))), "{name}");
    }
}
