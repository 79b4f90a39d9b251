use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn packed(root: &Path) -> Result<Vec<u8>, TreeError> {
    let mut bytes = Vec::new();
    pack(root, None, &mut bytes, Path::new("/nowhere")).map(|_| bytes)
}

fn names(bytes: &[u8]) -> Vec<String> {
    let mut archive = tar::Archive::new(bytes);
    archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string()).collect()
}

#[test]
fn the_same_tree_gives_the_same_bytes_in_order() {
    let root = tempfile::tempdir().unwrap();
    for name in ["b", "a", "c/z", "c/y"] {
        let path = root.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, name).unwrap();
    }
    let first = packed(root.path()).unwrap();
    assert_eq!(names(&first), ["./", "a", "b", "c/", "c/y", "c/z"]);
    assert_eq!(packed(root.path()).unwrap(), first);
}

#[test]
fn long_names_and_targets_survive() {
    let root = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(200));
    fs::create_dir(root.path().join("d".repeat(120))).unwrap();
    fs::write(root.path().join(&long), "x").unwrap();
    fs::hard_link(root.path().join(&long), root.path().join("z")).unwrap();
    symlink("t".repeat(300), root.path().join("s")).unwrap();
    let bytes = packed(root.path()).unwrap();
    assert_eq!(names(&bytes), ["./".into(), format!("{}/", "d".repeat(120)), long.clone(), "s".into(), "z".into()]);
    let mut archive = tar::Archive::new(bytes.as_slice());
    let links: Vec<_> = archive
        .entries()
        .unwrap()
        .filter_map(|entry| Some(entry.unwrap().link_name().unwrap()?.display().to_string()))
        .collect();
    assert_eq!(links, ["t".repeat(300), long]);
}

#[test]
fn a_file_that_shrinks_is_an_error_and_not_a_wrong_archive() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("f");
    fs::write(&path, "12345").unwrap();
    let mut content = Content { file: File::open(&path).unwrap(), left: 10, failed: None };
    assert_eq!(io::copy(&mut content, &mut io::sink()).unwrap(), 5);
    assert_eq!(content.left, 5);
}

#[test]
fn a_whiteout_name_is_refused() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir(root.path().join("d")).unwrap();
    fs::write(root.path().join("d/.wh.x"), "").unwrap();
    assert_eq!(
        packed(root.path()).unwrap_err().to_string(),
        "\"d/.wh.x\" in it starts with \".wh.\", which in an image layer means a deletion; rename it"
    );
}

#[test]
fn an_unwritable_spool_is_told_from_an_unreadable_file() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("f");
    fs::write(&path, "12345").unwrap();
    let error = pack(root.path(), None, Full, Path::new("/var/tmp")).unwrap_err();
    assert!(matches!(&error, TreeError::Spool { dir, .. } if dir == Path::new("/var/tmp")), "{error}");
    // A directory's own mode does not matter to root, so the unreadable file is one that is a link by now.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let entry = Entry::new(Path::new("f"), &fs::metadata(&path).unwrap());
    fs::remove_file(&path).unwrap();
    symlink("/etc/passwd", &path).unwrap();
    let mut walk = Walk {
        root: root.path(),
        omit: None,
        spool: Path::new("/nowhere"),
        device: 0,
        links: HashMap::new(),
        packed: Packed::default(),
        tar: tar::Builder::new(Vec::new()),
    };
    let error = walk.regular(entry, Path::new("f"), &path).unwrap_err();
    assert!(matches!(&error, TreeError::Read { source, .. } if source.raw_os_error() == Some(libc::ELOOP)), "{error}");
}
