//! `chsnap image import`: what goes in comes out of the archive, and what cannot go in is refused with the reason.
#![allow(clippy::unwrap_used)] // The helpers are test code too.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

const NAME: &str = "docker.io/library/app:1.0";

fn chsnap(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_chsnap")).args(args).stdin(Stdio::null()).output().unwrap()
}

fn sh(script: &str, args: &[&Path]) {
    let output = Command::new("sh").args(["-euc", script, "sh"]).args(args).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Imports into an archive, unpacks it, and gives the layer's tree, the configuration and what was printed.
fn import(source: &Path, extra: &[&str]) -> (TempDir, Value, Value) {
    let work = tempfile::tempdir().unwrap();
    let archive = work.path().join("a.tar");
    let mut args = vec!["image", "import", source.to_str().unwrap(), "--name", NAME, "--json", "--output"];
    args.push(archive.to_str().unwrap());
    args.extend(extra);
    let output = chsnap(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let layout = work.path().join("layout");
    fs::create_dir(&layout).unwrap();
    sh("tar -xf \"$1\" -C \"$2\"", &[&archive, &layout]);
    let json = |path: &Path| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
    let blob = |digest: &Value| {
        let path = layout.join("blobs").join(digest.as_str().unwrap().replace(':', "/"));
        // The name is the content's digest, as an independent tool sees it.
        sh("test \"$(sha256sum <\"$1\" | cut -d' ' -f1)\" = \"$(basename \"$1\")\"", &[&path]);
        path
    };
    assert_eq!(json(&layout.join("oci-layout"))["imageLayoutVersion"], "1.0.0");
    let index = json(&layout.join("index.json"));
    let entry = &index["manifests"][0];
    assert_eq!(entry["annotations"]["io.containerd.image.name"], NAME);
    assert_eq!(entry["annotations"]["org.opencontainers.image.ref.name"], "1.0");
    assert_eq!(entry["digest"], printed["digest"]);
    let manifest = json(&blob(&entry["digest"]));
    let config = json(&blob(&manifest["config"]["digest"]));
    let layer = blob(&manifest["layers"][0]["digest"]);
    assert_eq!(manifest["layers"][0]["size"], fs::metadata(&layer).unwrap().len());
    let root = work.path().join("root");
    fs::create_dir(&root).unwrap();
    let decompress = match manifest["layers"][0]["mediaType"].as_str().unwrap().rsplit_once('+') {
        Some((_, "gzip")) => "gzip -dc",
        Some((_, "zstd")) => "zstd -dqc",
        _ => "cat",
    };
    sh(&format!("{decompress} <\"$1\" >\"$2\""), &[&layer, &work.path().join("plain.tar")]);
    let diff_id = config["rootfs"]["diff_ids"][0].as_str().unwrap().strip_prefix("sha256:").unwrap();
    sh("test \"$(sha256sum <\"$1\" | cut -d' ' -f1)\" = \"$2\"", &[&work.path().join("plain.tar"), Path::new(diff_id)]);
    sh(
        "tar --xattrs --xattrs-include='*' --numeric-owner -xpf \"$1\" -C \"$2\"",
        &[&work.path().join("plain.tar"), &root],
    );
    (work, config, printed)
}

#[derive(Debug, PartialEq, Eq)]
struct Seen {
    kind: char,
    mode: u32,
    owner: (u32, u32),
    device: u64,
    mtime: i64,
    /// The first path with the same inode.
    same_as: Option<PathBuf>,
    content: Vec<u8>,
    attributes: BTreeMap<String, Vec<u8>>,
}

fn tree(root: &Path) -> BTreeMap<PathBuf, Seen> {
    fn walk(root: &Path, inside: &Path, links: &mut HashMap<u64, PathBuf>, seen: &mut BTreeMap<PathBuf, Seen>) {
        let mut names: Vec<_> = fs::read_dir(root.join(inside)).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        for name in names {
            let path = inside.join(name);
            let full = root.join(&path);
            let data = fs::symlink_metadata(&full).unwrap();
            let kind = data.file_type();
            let first = (data.nlink() > 1 && !kind.is_dir())
                .then(|| links.entry(data.ino()).or_insert_with(|| path.clone()).clone());
            let (kind, content) = match kind {
                k if k.is_dir() => ('d', vec![]),
                k if k.is_symlink() => ('l', fs::read_link(&full).unwrap().as_os_str().as_bytes().to_vec()),
                k if k.is_fifo() => ('p', vec![]),
                k if k.is_char_device() => ('c', vec![]),
                k if k.is_block_device() => ('b', vec![]),
                k if k.is_socket() => ('s', vec![]),
                _ => ('f', fs::read(&full).unwrap()),
            };
            let attributes = xattr::list(&full)
                .unwrap()
                .map(|name| (name.to_str().unwrap().to_owned(), xattr::get(&full, &name).unwrap().unwrap()))
                .collect();
            let device = if matches!(kind, 'b' | 'c') { data.rdev() } else { 0 };
            let one = Seen {
                kind,
                mode: data.mode() & 0o7777,
                owner: (data.uid(), data.gid()),
                device,
                mtime: data.mtime(),
                same_as: first,
                content,
                attributes,
            };
            seen.insert(path.clone(), one);
            if kind == 'd' {
                walk(root, &path, links, seen);
            }
        }
    }
    let mut seen = BTreeMap::new();
    walk(root, Path::new(""), &mut HashMap::new(), &mut seen);
    seen
}

/// Something of everything that a root file system can hold.
fn sample() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    sh(
        "cd \"$1\"; mkdir -p etc usr/bin dev tmp \"deep/$(printf 'n%.0s' $(seq 120))\"
        echo root:x:0:0 >etc/passwd; printf '#!/bin/sh\\n' >usr/bin/tool; ln usr/bin/tool usr/bin/alias
        ln -s ../bin/tool usr/link; mknod dev/null c 1 3; mknod dev/loop b 7 1; mkfifo dev/pipe
        head -c 3000000 /dev/urandom >deep/big; : >deep/empty; truncate -s 1M deep/holes
        echo x >\"deep/$(printf 'n%.0s' $(seq 120))/file with blank\"; echo x >\"$(printf 'deep/\\377')\"
        chown 1000:2000 etc/passwd; chown 4000000:4000001 deep/big; chmod 1777 tmp; chmod 4755 usr/bin/tool; chmod 0 deep/empty
        touch -d @1000000000 etc/passwd; touch -h -d @1000000001 usr/link; touch -d @1000000002 usr/bin",
        &[dir.path()],
    );
    xattr::set(at("etc/passwd"), "user.note", b"a\0b").unwrap();
    // cap_net_raw+ep, as setcap writes it.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    xattr::set(at("usr/bin/tool"), "security.capability", &capability).unwrap();
    dir
}

#[test]
fn a_directory_comes_out_as_it_went_in() {
    let dir = sample();
    drop(UnixListener::bind(dir.path().join("dev/socket")).unwrap());
    let (work, config, printed) = import(
        dir.path(),
        &["--env", "A=b=c", "--workdir", "/srv", "--user", "1000:1000", "--", "python3", "-m", "x y"],
    );
    let mut expected = tree(dir.path());
    expected.remove(Path::new("dev/socket")).unwrap();
    assert_eq!(tree(&work.path().join("root")), expected);
    assert_eq!(printed["layer"]["skipped"], 1);
    assert_eq!(printed["layer"]["entries"], expected.len() + 1);
    let run = &config["config"];
    assert_eq!(run["Cmd"], serde_json::json!(["python3", "-m", "x y"]));
    let env = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "A=b=c"];
    assert_eq!(run["Env"], serde_json::json!(env));
    assert_eq!((&run["WorkingDir"], &run["User"]), (&"/srv".into(), &"1000:1000".into()));
    // The same input is the same image.
    let again = import(
        dir.path(),
        &["--env", "A=b=c", "--workdir", "/srv", "--user", "1000:1000", "--cmd", r#"["python3","-m","x y"]"#],
    );
    assert_eq!(again.2["digest"], printed["digest"]);
}

#[test]
fn an_ext4_image_comes_out_as_its_tree_and_leaves_no_mount() {
    let dir = sample();
    let image = tempfile::Builder::new().suffix(".ext4").tempfile().unwrap();
    sh("truncate -s 64M \"$2\"; mkfs.ext4 -qF -d \"$1\" \"$2\"", &[dir.path(), image.path()]);
    let before = fs::read(image.path()).unwrap();
    let (work, ..) = import(image.path(), &["--", "sh"]);
    assert_eq!(tree(&work.path().join("root")), tree(dir.path()));
    assert!(fs::read(image.path()).unwrap() == before, "the image was written to");
    let path = image.path().canonicalize().unwrap();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(path.to_str().unwrap()));
    let loops = Command::new("losetup").args(["-n", "-O", "NAME", "-j"]).arg(&path).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&loops.stdout), "");
}

#[test]
fn a_tar_is_passed_through_in_every_compression() {
    let dir = sample();
    let work = tempfile::tempdir().unwrap();
    let plain = work.path().join("plain");
    sh("tar --xattrs --xattrs-include='*' --numeric-owner -C \"$1\" -cf \"$2\" .", &[dir.path(), &plain]);
    // Two gzip members, as parallel compressors write them.
    sh("head -c 100000 \"$1\" | gzip >\"$1.gz\"; tail -c +100001 \"$1\" | gzip >>\"$1.gz\"", &[&plain]);
    let mut forms = vec![plain.clone(), plain.with_extension("gz")];
    if Command::new("zstd").arg("--version").output().is_ok() {
        sh("zstd -q \"$1\" -o \"$1.zst\"", &[&plain]);
        forms.push(plain.with_extension("zst"));
    }
    for form in forms {
        let (out, ..) = import(&form, &["--", "sh"]);
        assert_eq!(tree(&out.path().join("root")), tree(dir.path()), "{form:?}");
    }
}

/// The one line that is printed for a bad input.
fn refused(source: &Path, extra: &[&str]) -> String {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("a.tar");
    let mut args = vec!["image", "import", source.to_str().unwrap(), "--name", NAME];
    if !extra.contains(&"--address") {
        args.extend(["--output", target.to_str().unwrap()]);
    }
    args.extend(extra);
    let output = chsnap(&args);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "half an archive is left");
    let lines: Vec<_> = said.lines().filter(|line| line.starts_with("chsnap: ")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    lines[0].replacen("chsnap: ", "", 1)
}

#[test]
fn bad_inputs_are_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let check = |path: &Path, expected: &str| {
        let said = refused(path, &[]);
        assert_eq!(said.replace(&format!("{path:?}"), "X"), expected);
    };
    let taken = "; an ext2/3/4 file system image, a directory, or a tar (plain, gzip or zstd) can be imported";
    check(&dir.path().join("none"), "cannot read X: No such file or directory (os error 2)");
    check(Path::new("/dev/null"), "X is neither a file nor a directory");
    check(&file("empty", b""), "X is empty: there is nothing to make an image of");
    check(&file("noise", &[7; 5000]), &format!("X is of no known form{taken}"));
    check(&file("zeros", &[0; 5000]), &format!("X is of no known form{taken}"));
    check(&file("xz", b"\xfd7zXZ\0rest"), &format!("X is compressed with xz, which image layers cannot be{taken}"));
    check(&file("qcow", b"QFI\xfb\0\0\0\x03"), &format!("X is a qcow2 disk image{taken}"));
    check(Path::new("/proc/self/exe"), &format!("X is a program{taken}"));
    let nothing = dir.path().join("nothing");
    fs::create_dir(&nothing).unwrap();
    check(&nothing, "X is empty: there is nothing to make an image of");
    let gz = dir.path().join("no-entries.gz");
    sh("head -c 10240 /dev/zero | gzip >\"$1\"", &[&gz]);
    check(&gz, "X is empty: there is nothing to make an image of");
    fs::write(nothing.join(".wh.x"), "").unwrap();
    let whiteout = "\".wh.x\" in it starts with \".wh.\", which in an image layer means a deletion; rename it";
    check(&nothing, &format!("cannot pack X: {whiteout}"));
}

#[test]
fn a_broken_archive_is_noticed_before_containerd_sees_it() {
    let dir = sample();
    let work = tempfile::tempdir().unwrap();
    let whole = work.path().join("whole.tar");
    sh("tar -C \"$1\" -cf \"$2\" .; gzip -k \"$2\"", &[dir.path(), &whole]);
    let cut = work.path().join("cut");
    for (source, keep) in [(whole.clone(), 1_000_000), (whole.with_extension("tar.gz"), 1_000_000)] {
        let bytes = fs::read(source).unwrap();
        fs::write(&cut, &bytes[..keep]).unwrap();
        let said = refused(&cut, &[]);
        assert!(said.starts_with(&format!("{cut:?} is not a complete tar archive: ")), "{said}");
    }
    let mut bytes = fs::read(&whole).unwrap();
    // The second header.
    bytes[512] ^= 0xff;
    fs::write(&cut, &bytes).unwrap();
    assert!(refused(&cut, &[]).contains("is not a complete tar archive: "));
    // gzip of something else.
    sh("head -c 100000 /dev/urandom | gzip >\"$1\"", &[&cut]);
    assert!(refused(&cut, &[]).contains("is not a complete tar archive: "));
    // An image archive is no root file system.
    let (out, ..) = import(dir.path(), &["--", "sh"]);
    let said = refused(&out.path().join("a.tar"), &[]);
    assert!(said.ends_with("is an image archive already; import it with `ctr images import`"), "{said}");
}

#[test]
fn an_unclean_or_damaged_file_system_is_refused() {
    let dir = sample();
    let image = tempfile::NamedTempFile::new().unwrap();
    let path = image.path();
    sh("truncate -s 64M \"$2\"; mkfs.ext4 -qF -d \"$1\" \"$2\"", &[dir.path(), path]);
    let clean = fs::read(path).unwrap();
    let mut dirty = clean.clone();
    dirty[1024 + 96] |= 4;
    fs::write(path, &dirty).unwrap();
    assert_eq!(
        refused(path, &[]),
        format!("the file system in {path:?} was not cleanly unmounted; repair it with `e2fsck -f {}`", path.display())
    );
    let mut damaged = clean;
    damaged[1024 + 4..1024 + 90].fill(0xee);
    fs::write(path, &damaged[..1 << 20]).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    let said = refused(path, &[]);
    // The kernel finds the magic number gone, or the checksum wrong.
    let known = format!("{path:?} is of no known form");
    assert!(said.starts_with(&format!("cannot mount {path:?} read-only: ")) || said.starts_with(&known), "{said}");
}

#[test]
fn containerd_and_its_client_are_looked_for_first() {
    let dir = sample();
    let socket = dir.path().join("none.sock");
    let address = socket.to_str().unwrap();
    assert_eq!(
        refused(dir.path(), &["--address", address]),
        format!(
            "cannot reach containerd at {socket:?}; --address names another socket: No such file or directory (os error 2)"
        )
    );
    let _listener = UnixListener::bind(&socket).unwrap();
    assert_eq!(
        refused(dir.path(), &["--address", address, "--ctr", "/nowhere/ctr"]),
        "cannot run \"/nowhere/ctr\"; --ctr names another: No such file or directory (os error 2)"
    );
    // A client that fails in the middle: its words, and not our broken pipe.
    let ctr = dir.path().join("ctr");
    let mut script = File::create(&ctr).unwrap();
    write!(script, "#!/bin/sh\ncase \"$*\" in --version|*\" images ls \"*) exit ;; esac\nhead -c 100 >/dev/null\necho progress >&2\necho 'ctr: no space left on device' >&2\nexit 3\n").unwrap();
    drop(script);
    fs::set_permissions(&ctr, fs::Permissions::from_mode(0o755)).unwrap();
    let said = refused(dir.path(), &["--address", address, "--ctr", ctr.to_str().unwrap()]);
    assert!(said.ends_with("images import -` failed with exit status: 3: no space left on device"), "{said}");
}

#[test]
fn wrong_words_are_usage_errors() {
    for (args, said) in [
        (vec!["--name", "app"], "\"app\" cannot name an image: the host is missing"),
        (vec!["--name", NAME, "--cmd", "python3 app.py"], "write a JSON array of texts"),
        (vec!["--name", NAME, "--cmd", "[]"], "it names no program"),
        (vec!["--name", NAME, "--cmd", "[\"a\"]", "--", "b"], "cannot be used with"),
        (vec!["--name", NAME, "--env", "A"], "write KEY=VALUE"),
        (vec!["--name", NAME, "--workdir", "srv"], "write an absolute path"),
        (vec![], "--name <REF>"),
    ] {
        let output = chsnap(&[vec!["image", "import", "/"], args.clone()].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr.contains(said), "{args:?}: {stderr}");
    }
}
