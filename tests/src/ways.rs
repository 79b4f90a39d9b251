//! The three ways in which ordinary pods start. The cases take turns, so that a whole run covers all of them; with
//! `CHSNAP_TEST_WAY=direct`, `base` or `image` every case has that one. A pod that starts in another way than its case wants
//! is a failure. Snapshots are built when the first pod needs them.
//!
//! An image snapshot is of a process, and every case has another. So what is saved is a launcher: it waits for the restore,
//! and then executes what the case wants, of which it hears in the pod's own environment.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fmt, fs,
    path::PathBuf,
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{Env, IMAGE, Run, containerd::locked, eventually, patience};

/// Pods by their containerd, how they have to be started, and whether they were: other cases may run at the same time on
/// others.
type Expected = BTreeMap<(PathBuf, String), (Way, bool)>;
static EXPECTED: Mutex<Expected> = Mutex::new(BTreeMap::new());
/// The only case whose ordinary pod has a terminal.
const TERMINAL: &str = "terminal";
const BUILD_LIMIT: Duration = Duration::from_secs(120);
/// By containerd, VMM and what they are of.
static BUILT: Mutex<BTreeSet<(PathBuf, String)>> = Mutex::new(BTreeSet::new());

/// What the launcher is to execute, as JSON.
pub const COMMAND: &str = "CASE_COMMAND";
/// How the variable of a case begins that is its pod's alone.
const OWN_WORD: &str = "OWN_WORD=";
/// The variables that no snapshot decides on.
pub(crate) const POD_ENV: &str = r#"["CASE_COMMAND", "OWN_WORD"]"#;
const READY: &str = "notify";
/// As a process that knows of no module would do it, in any language. A program has to find SIGPIPE as it is by default.
const LAUNCHER: &str = r#"
import json, os, signal, socket
hooks = socket.socket(socket.AF_UNIX)
hooks.connect("/dev/chsnap/snapshot.sock")
lines = hooks.makefile("rw")
lines.readline()
socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
lines.readline(); lines.write('{"ok":true}\n'); lines.flush()
env = json.loads(lines.readline())["env"]; lines.write('{"ok":true}\n'); lines.flush()
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
command = json.loads(env["CASE_COMMAND"])
os.execvp(command[0], command)
"#;
/// Programs that are there: one that is not is an error of the start, which a restored launcher cannot make.
const PROGRAMS: [&str; 6] = ["/bin/sh", "sh", "python3", "echo", "cat", "sleep"];

/// What the image runs where no command is given.
const IMAGES_OWN: [&str; 2] = ["python3", "/app/app.py"];

/// A container that is started a second time, on the root of the first, is no clone of a template.
const ONCE_MORE: &str = ", way base (no image snapshot: something has been written to the container's root";

/// How a case's ordinary pods are to be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// They boot.
    Direct,
    /// From a base snapshot.
    Base,
    /// From an image snapshot where it can be, else from a base snapshot.
    Image,
}

/// Whether each case is to run in all ways.
#[must_use]
pub fn all_wanted() -> bool {
    std::env::var("CHSNAP_TEST_WAY").is_ok_and(|way| way == "all")
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Base => "base",
            Self::Image => "image",
        })
    }
}

impl Way {
    /// There are no others.
    pub const ALL: [Self; 3] = [Self::Direct, Self::Base, Self::Image];

    /// Of the case with this number.
    #[must_use]
    pub fn of_turn(turn: usize) -> Self {
        match std::env::var("CHSNAP_TEST_WAY").as_deref() {
            Ok("direct") => Self::Direct,
            Ok("base") => Self::Base,
            Ok("image") => Self::Image,
            // A boot takes as long as ten restores.
            Ok("all" | "") | Err(_) => [Self::Direct, Self::Base, Self::Image, Self::Base, Self::Image][turn % 5],
            Ok(other) => panic!("CHSNAP_TEST_WAY={other}: direct, base, image and all are known"),
        }
    }
}

/// This pod has to be started so.
pub fn expect(env: &Env, id: &str, way: Way) {
    let mut expected = locked(&EXPECTED);
    expected.insert((env.daemon.root.clone(), id.to_owned()), (way, false));
}

/// Flags and command of the launcher instead of these; none where the pod has to be started without it.
pub(crate) fn launched(flags: &[OsString], command: &[OsString]) -> Option<(Vec<OsString>, Vec<OsString>)> {
    // What a snapshot does not know of: ports, what of the host is bound into the root, the pod's own variables, what is
    // written down of it, and where its limits are.
    const ALIKE: [(&str, &str); 5] = [
        ("--annotation", "io.chsnap.expose="),
        ("--mount", "type=bind,"),
        ("--env", OWN_WORD),
        ("--pid-file", ""),
        ("--cgroup", ""),
    ];
    let is_alike = |pair: &[OsString]| match pair {
        [flag, value] => ALIKE.iter().any(|(name, word)| flag == name && value.to_string_lossy().starts_with(word)),
        _ => false,
    };
    let mut words: Vec<_> = command.iter().map(|word| word.to_str()).collect::<Option<_>>()?;
    if words.is_empty() {
        words = IMAGES_OWN.to_vec();
    }
    if !flags.chunks(2).all(is_alike) || !PROGRAMS.contains(words.first()?) {
        return None;
    }
    let variable = format!("{COMMAND}={}", serde_json::to_string(&words).ok()?);
    let annotation = format!("io.chsnap.ready={READY}");
    let more = ["--annotation".to_owned(), annotation, "--env".to_owned(), variable].map(OsString::from);
    Some((flags.iter().cloned().chain(more).collect(), ["python3", "-c", LAUNCHER].map(OsString::from).to_vec()))
}

/// Builds the snapshots that a case's ordinary pods need, once for each containerd and VMM. Done before it: a case may well
/// look at what else goes on.
pub fn build(env: &Env, case: &str) -> Result<()> {
    // containerd's client gives a container its own stdin, unless its output goes to a file.
    let streams: &[&[&str]] = match (env.way, case) {
        (Way::Direct, _) => return Ok(()),
        (Way::Base, _) => &[],
        (Way::Image, TERMINAL) => &[&[], &["--stdin"], &["--stdin", "--tty"]],
        (Way::Image, _) => &[&[], &["--stdin"]],
    };
    let mut built = locked(&BUILT);
    let mut once = |what: String, run: Result<Run>| {
        let place = (env.daemon.root.join(env.vmm.to_string()), what);
        if built.contains(&place) {
            return Ok(());
        }
        run?.limit(BUILD_LIMIT * patience()).text().with_context(|| format!("there is no snapshot ({})", place.1))?;
        built.insert(place);
        Ok::<_, anyhow::Error>(())
    };
    once("base".into(), env.chsnap(["snapshot", "build", "--base"]))?;
    for streams in streams {
        let build = env.chsnap(["snapshot", "build", IMAGE, "--ready", READY])?.args(*streams);
        let build = build.arg("--address").arg(env.daemon.run.join("c.sock"));
        let build = build.args(["--namespace", &env.daemon.namespace, "--", "python3", "-c", LAUNCHER]);
        once(format!("image {}", streams.concat()), Ok(build))?;
    }
    Ok(())
}

/// How far the log is.
#[must_use]
pub fn mark(env: &Env) -> usize {
    fs::read(env.daemon.log()).map_or(0, |log| log.len())
}

/// It has started.
pub(crate) fn started(env: &Env, id: &str) {
    if let Some((_, started)) = locked(&EXPECTED).get_mut(&(env.daemon.root.clone(), id.to_owned())) {
        *started = true;
    }
}

/// Compares how the pods were started since `mark` with how they had to be, and whether any was to start in the case's own
/// way: one without would pass for a case that works in that way.
pub fn check(env: &Env, mark: usize, there_has_to_be_one: bool) -> Result<()> {
    let mut all = locked(&EXPECTED);
    let (ours, theirs) =
        std::mem::take(&mut *all).into_iter().partition::<Expected, _>(|((root, _), _)| *root == env.daemon.root);
    *all = theirs;
    drop(all);
    let is_of = |line: &str, id: &str| line.contains(&format!("VM of {id} started in "));
    let is_other = |line: &&str| {
        let mut expected = ours.iter().map(|((_, id), (way, _))| (id, way));
        expected.any(|(id, way)| {
            is_of(line, id)
                && !line.contains(&format!(", way {way} "))
                && !(*way == Way::Image && line.contains(ONCE_MORE))
        })
    };
    let log = || {
        let log = fs::read(env.daemon.log()).unwrap_or_default();
        String::from_utf8_lossy(log.get(mark..).unwrap_or_default()).into_owned()
    };
    // What the shim says comes to containerd's log a little later.
    let started: Vec<_> = ours.iter().filter(|(_, (_, started))| *started).map(|((_, id), _)| id).collect();
    let told = || log().lines().any(|line| started.iter().any(|id| is_of(line, id))).then_some(());
    if !started.is_empty() && eventually(Duration::from_secs(2), told).is_none() {
        bail!("nothing is said of how {started:?} started");
    }
    let one = || {
        let is_so = |line: &str, id: &str| is_of(line, id) && line.contains(&format!(", way {} ", env.way));
        log().lines().any(|line| ours.keys().any(|(_, id)| is_so(line, id))).then_some(())
    };
    if there_has_to_be_one && eventually(Duration::from_secs(2), one).is_none() {
        bail!("no pod of it has started in the way {}: take it off that way, in `cases.rs`", env.way);
    }
    let mut others = Vec::new();
    eventually(Duration::from_millis(300), || {
        others = log().lines().filter(is_other).map(str::to_owned).collect();
        (!others.is_empty()).then_some(())
    });
    if others.is_empty() {
        return Ok(());
    }
    bail!("not started as they had to be:\n  {}", others.join("\n  "))
}
