//! The root file system stays on the host.

use std::{
    fs::{self, Metadata},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use chsnap_tests::Env;

crate::cases! {
    Likewise: in_the_snapshot, native_snapshotter, binds, read_only_root;
    Vms: sandboxed;
    Once: bind_options, full_disk, read_once;
}

/// Everything a file system has to be able to do.
const OPERATIONS: &str = "
set -e
mkdir -p /data/sub && cd /data
echo written > plain && chmod 640 plain && chown 1234:5678 plain
ln -s plain soft && ln plain hard
echo moved > before && mv before sub/after
echo gone > gone && rm gone
truncate -s 100M sparse && printf end | dd of=sparse bs=1 seek=50M conv=notrunc 2>/dev/null
mkfifo pipe && mkdir -m 1777 sticky && touch 'name with ünï' && touch -d 2001-02-03T04:05:06Z old
chmod 4755 sub/after
python3 -c \"
import mmap, os
with open('mapped', 'w+b') as f:
    f.truncate(8192)
    with mmap.mmap(f.fileno(), 8192) as m:
        m[4096:4102] = b'mapped'
os.setxattr('plain', 'user.note', b'kept')
assert os.getxattr('plain', 'user.note') == b'kept'
\"
rm /etc/debian_version
echo changed >> /etc/issue
sync
";

fn meta(path: impl AsRef<Path>) -> Result<Metadata> {
    let path = path.as_ref();
    fs::symlink_metadata(path).with_context(|| path.display().to_string())
}

fn in_the_snapshot(env: &Env) -> Result<()> {
    let started = env.container().sh("sleep 1000").start()?;
    started.sh(OPERATIONS)?;
    let upper = started.upper("overlayfs")?;
    let data = upper.join("data");
    let look = || -> Result<()> {
        let plain = meta(data.join("plain"))?;
        ensure!((plain.uid(), plain.gid(), plain.mode() & 0o7777) == (1234, 5678, 0o640), "{plain:?}");
        ensure!(plain.nlink() == 2 && plain.ino() == meta(data.join("hard"))?.ino(), "{plain:?}");
        ensure!(fs::read_to_string(data.join("plain"))? == "written\n");
        ensure!(fs::read_link(data.join("soft"))?.as_os_str() == "plain");
        ensure!(fs::read_to_string(data.join("sub/after"))? == "moved\n" && !data.join("before").exists());
        ensure!(meta(data.join("sub/after"))?.mode() & 0o7777 == 0o4755);
        ensure!(!data.join("gone").exists() && data.join("name with ünï").is_file());
        let sparse = meta(data.join("sparse"))?;
        ensure!(sparse.len() == 100 << 20 && sparse.blocks() * 512 < 1 << 20, "not sparse: {} blocks", sparse.blocks());
        ensure!(meta(data.join("sticky"))?.permissions().mode() & 0o7777 == 0o1777);
        ensure!(meta(data.join("old"))?.mtime() == 981_173_106);
        ensure!(&fs::read(data.join("mapped"))?[4096..4102] == b"mapped");
        let whiteout = meta(upper.join("etc/debian_version"))?;
        ensure!(whiteout.rdev() == 0 && whiteout.mode() & 0o170_000 == 0o020_000, "no whiteout: {whiteout:?}");
        ensure!(fs::read_to_string(upper.join("etc/issue"))?.ends_with("changed\n"));
        Ok(())
    };
    look().context("while it runs")?;
    // Written right before the end, and not synced by anyone.
    started.sh("echo late > /data/late; dd if=/dev/urandom of=/data/big bs=1M count=5 2>/dev/null")?;
    let sum = started.sh("sha256sum < /data/big")?;
    started.kill("SIGKILL")?;
    env.ctr().wait_status(&started.id, "STOPPED")?;
    env.ctr().output(["task", "rm", &started.id])?;
    look().context("after its end")?;
    ensure!(fs::read_to_string(data.join("late"))? == "late\n");
    let host = chsnap_tests::Run::new("sha256sum").stdin(fs::read(data.join("big"))?).text()?;
    ensure!(host == sum, "{host} on the host, {sum} in the container");
    started.remove()
}

fn native_snapshotter(env: &Env) -> Result<()> {
    let started = env.container().flags(["--snapshotter", "native"]).sh("sleep 1000").start()?;
    started.sh("echo native > /made; chown 7:8 /made; rm /etc/issue")?;
    let dir = started.upper("native")?;
    let made = fs::metadata(dir.join("made"))?;
    ensure!((made.uid(), made.gid()) == (7, 8) && !dir.join("etc/issue").exists());
    ensure!(dir.join("usr/bin/python3").exists(), "{} is no whole root", dir.display());
    started.remove()
}

fn binds(env: &Env) -> Result<()> {
    let dir = |name: &str| -> Result<String> {
        let path = env.dir.join(name);
        fs::create_dir_all(&path)?;
        fs::write(path.join("from-host"), format!("{name} of the host\n"))?;
        Ok(path.display().to_string())
    };
    let (rw, ro, shm, file) = (dir("rw")?, dir("ro")?, dir("shm")?, env.dir.join("one-file"));
    fs::write(&file, "one\n")?;
    let mount = |src: &str, dst: &str, options: &str| format!("type=bind,src={src},dst={dst},options={options}");
    let started = env
        .container()
        .flags(["--mount", &mount(&rw, "/new/place", "rbind:rw")])
        .flags(["--mount", &mount(&ro, "/opt", "rbind:ro")])
        .flags(["--mount", &mount(&shm, "/dev/shm/below", "rbind:rw")])
        .flags(["--mount", &mount(&file.display().to_string(), "/etc/one-file", "rbind:ro")])
        .sh("sleep 1000")
        .start()?;
    ensure!(started.sh("cat /new/place/from-host /opt/from-host")? == "rw of the host\nro of the host");
    ensure!(started.sh("cat /dev/shm/below/from-host /etc/one-file")? == "shm of the host\none");
    started.sh("echo guest > /new/place/from-guest; chown 11:12 /new/place/from-guest; echo x > /dev/shm/below/y")?;
    let made = fs::metadata(env.dir.join("rw/from-guest"))?;
    ensure!((made.uid(), made.gid()) == (11, 12), "{made:?}");
    ensure!(fs::read_to_string(env.dir.join("shm/y"))? == "x\n");
    for script in ["echo no > /opt/x", "rm /opt/from-host", "chmod 0 /etc/one-file", "echo no >> /etc/one-file"] {
        let output = started.exec(["sh", "-c", script]).output()?;
        ensure!(output.code != 0 && output.stderr.contains("Read-only file system"), "{}", output.whole());
    }
    // What the host does later is seen, at the latest when the guest's second of caching is over.
    fs::write(env.dir.join("rw/later"), "later\n")?;
    fs::write(env.dir.join("ro/from-host"), "changed\n")?;
    let seen = chsnap_tests::eventually(std::time::Duration::from_secs(10), || {
        let seen = started.sh("cat /new/place/later /opt/from-host").ok()?;
        (seen == "later\nchanged").then_some(())
    });
    ensure!(seen.is_some(), "the host's later writes are not seen");
    // Gone with the container, and nothing of the host's with it.
    started.remove()?;
    ensure!(fs::read_to_string(env.dir.join("rw/from-guest"))? == "guest\n");
    ensure!(fs::read_to_string(env.dir.join("ro/from-host"))? == "changed\n");
    Ok(())
}

/// Where nobody but the guest writes, a program that was read is not read again. It is where the host may have written.
fn read_once(env: &Env) -> Result<()> {
    let again = |started: &chsnap_tests::Started<'_>| -> Result<u64> {
        for _ in 0..2 {
            started.exec(["id"]).output()?.success()?;
        }
        let before = served(env)?;
        started.exec(["id"]).output()?.success()?;
        Ok(served(env)? - before)
    };
    let alone = env.container().sh("sleep 1000").start()?;
    let own = again(&alone)?;
    alone.remove()?;
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:ro", env.dir.display());
    let bound = env.container().flags(["--mount", &mount]).sh("sleep 1000").start()?;
    let shared = again(&bound)?;
    bound.remove()?;
    ensure!(own < 256 << 10, "a container of its own read {own} bytes again");
    ensure!(shared > 1 << 20, "with the host's files only {shared} bytes are read again");
    Ok(())
}

/// Bytes that virtiofsd has read so far.
fn served(env: &Env) -> Result<u64> {
    let read = |process: chsnap_tests::Process| {
        let text = fs::read_to_string(format!("/proc/{}/io", process.pid)).ok()?;
        text.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse::<u64>().ok())
    };
    let all: Vec<u64> = env.processes("virtiofsd").into_iter().filter_map(read).collect();
    ensure!(!all.is_empty(), "no virtiofsd");
    Ok(all.iter().sum())
}

/// What a FUSE file system of the guest does not know of the host's mounts, and what is mounted below a bind.
fn bind_options(env: &Env) -> Result<()> {
    let dir = env.dir.join("tree");
    let inner = dir.join("inner");
    let _inner = Tmpfs::mount(env, "tree/inner", "1m")?;
    for place in [&dir, &inner] {
        let tool = place.join("tool");
        fs::copy("/bin/true", &tool)?;
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o4755))?;
    }
    let mount = |dst: &str, options: &str| format!("type=bind,src={},dst={dst},options={options}", dir.display());
    let started = env
        .container()
        .flags(["--mount", &mount("/top", "rbind:ro"), "--mount", &mount("/all", "rbind:rro")])
        .flags([
            "--mount",
            &mount("/fixed", "rbind:nosuid:nodev:noexec"),
            "--mount",
            &mount("/dev/shm/fixed", "rbind:noexec"),
        ])
        .sh("sleep 1000")
        .start()?;
    let fails = |script: &str, why: &str| -> Result<()> {
        let output = started.exec(["sh", "-c", script]).output()?;
        ensure!(output.code != 0 && output.stderr.contains(why), "{script}: {}", output.whole());
        Ok(())
    };
    for place in ["/top", "/all", "/all/inner"] {
        fails(&format!("echo no > {place}/x"), "Read-only file system")?;
    }
    started.sh("echo yes > /top/inner/x; echo yes > /fixed/x; /top/tool; /top/inner/tool; /all/tool")?;
    for place in ["/fixed", "/fixed/inner", "/dev/shm/fixed"] {
        fails(&format!("{place}/tool"), "Permission denied")?;
    }
    let options = started.sh("grep -m1 ' /fixed ' /proc/self/mountinfo | cut -d' ' -f6")?;
    for word in ["nosuid", "nodev", "noexec"] {
        ensure!(options.split(',').any(|option| option == word), "{options}");
    }
    started.remove()
}

/// virtiofsd sees the share and nothing else of the host, and its system calls are judged.
fn sandboxed(env: &Env) -> Result<()> {
    let started = env.container().sh("sleep 1000").start()?;
    let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}"));
    // A parent that waits, and the one that serves.
    let served = env.processes("virtiofsd").into_iter().filter(|process| {
        fs::read_link(format!("/proc/{}/ns/mnt", process.pid)).is_ok_and(|mnt| own("mnt").is_ok_and(|own| mnt != own))
            && fs::read_link(format!("/proc/{}/ns/pid", process.pid))
                .is_ok_and(|pid| own("pid").is_ok_and(|own| pid != own))
    });
    let pid = served.map(|process| process.pid).next_back().context("no virtiofsd has namespaces of its own")?;
    let root =
        fs::read_dir(format!("/proc/{pid}/root"))?.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    ensure!(root.len() == 1, "more than the container's directory: {root:?}");
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    ensure!(status.lines().any(|line| line.replace('\t', " ") == "Seccomp: 2"), "{status}");
    started.remove()
}

fn read_only_root(env: &Env) -> Result<()> {
    let rw = env.dir.join("volume");
    fs::create_dir(&rw)?;
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", rw.display());
    let started = env.container().flags(["--read-only", "--mount", &mount]).sh("sleep 1000").start()?;
    for place in ["/x", "/etc/passwd", "/usr/x"] {
        let output = started.exec(["sh", "-c", &format!("echo no >> {place}")]).output()?;
        ensure!(output.code != 0 && output.stderr.contains("Read-only file system"), "{}", output.whole());
    }
    started.sh("echo yes > /mnt/x; echo yes > /dev/shm/x; echo yes > /run/x")?;
    ensure!(fs::read_to_string(rw.join("x"))? == "yes\n");
    started.remove()
}

/// A host file system without room: the guest sees ENOSPC, and the container can still be removed.
fn full_disk(env: &Env) -> Result<()> {
    let small = Tmpfs::mount(env, "small", "4m")?;
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", small.path.display());
    let started = env.container().flags(["--mount", &mount]).sh("sleep 1000").start()?;
    let output = started.exec(["sh", "-c", "head -c 8000000 /dev/zero > /mnt/fill"]).output()?;
    ensure!(output.code != 0 && output.stderr.contains("No space left on device"), "{}", output.whole());
    ensure!(started.sh("rm /mnt/fill; echo again > /mnt/fill; cat /mnt/fill")? == "again");
    started.remove()
}

/// A small file system; unmounted when dropped.
pub struct Tmpfs {
    /// Where.
    pub path: std::path::PathBuf,
}

impl Tmpfs {
    /// Mounts one below the case's directory.
    pub fn mount(env: &Env, name: &str, size: &str) -> Result<Self> {
        let path = env.dir.join(name);
        fs::create_dir_all(&path)?;
        let options = format!("size={size}");
        let run = chsnap_tests::Run::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&path);
        run.output()?.success()?;
        Ok(Self { path })
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = chsnap_tests::Run::new("umount").arg("-l").arg(&self.path).output();
    }
}
