//! What a file holds, as a number. A machine's memory is a file that is mostly holes: they are not read, and count
//! as the zeros that they are, so that a copy in which they are filled has the same digest.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use sha2::{Digest, Sha256};

use crate::files::next_data;

/// Blocks of nothing but zeros are left out.
const BLOCK: u64 = 64 << 10;

/// SHA-256.
pub fn of_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of the file's length and of each block that is not all zeros, with its place.
pub fn of_file(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut hash = Sha256::new();
    hash.update(length.to_le_bytes());
    let mut block = vec![0; BLOCK as usize];
    let mut at = 0;
    while let Some(data) = next_data(&file, at, length)? {
        at = data - data % BLOCK;
        let size = BLOCK.min(length - at) as usize;
        let block = &mut block[..size];
        file.read_exact_at(block, at)?;
        if block.iter().any(|byte| *byte != 0) {
            hash.update(at.to_le_bytes());
            hash.update(&*block);
        }
        at += BLOCK;
    }
    Ok(hex(&hash.finalize()))
}

/// Of bytes, in lower case.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn file(dir: &Path, name: &str, length: u64, pieces: &[(u64, &[u8])]) -> String {
        let path = dir.join(name);
        let file = File::create(&path).unwrap();
        file.set_len(length).unwrap();
        pieces.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at).unwrap());
        of_file(&path).unwrap()
    }

    #[test]
    fn holes_are_zeros_and_everything_else_counts() {
        let dir = tempfile::tempdir().unwrap();
        let pieces: &[(u64, &[u8])] = &[(5 * BLOCK + 7, b"memory"), (40 * BLOCK, b"more")];
        let sparse = file(dir.path(), "sparse", 64 * BLOCK, pieces);
        let filled = {
            let bytes = fs::read(dir.path().join("sparse")).unwrap();
            fs::write(dir.path().join("filled"), bytes).unwrap();
            of_file(&dir.path().join("filled")).unwrap()
        };
        assert_eq!(sparse, filled);
        let others = [
            file(dir.path(), "longer", 64 * BLOCK + 1, pieces),
            file(dir.path(), "less", 64 * BLOCK, &pieces[..1]),
            file(dir.path(), "moved", 64 * BLOCK, &[(6 * BLOCK + 7, b"memory"), (40 * BLOCK, b"more")]),
            file(dir.path(), "other", 64 * BLOCK, &[(5 * BLOCK + 7, b"Memory"), (40 * BLOCK, b"more")]),
        ];
        assert!(others.iter().all(|other| *other != sparse), "{others:?}");
        assert_eq!(file(dir.path(), "empty", 0, &[]).len(), 64);
    }
}
