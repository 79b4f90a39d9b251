//! Who clears away after a builder that is killed, at whatever moment: a process that waits for the builder's end and does
//! nothing else. The shim beside whose pod it builds may have ended by then, and a builder to come may never come.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    StandIn, clear_away,
    launch::{MAX_ORDER, own_program},
};
use crate::{
    config::Config,
    origin::{self, Place},
    proc::{self, Identity},
    sys,
};

/// The only argument of such a process.
pub const JANITOR: &str = "clear-template";
/// The builder has cleared away itself.
const DONE: &[u8] = b"done\n";
/// Between two looks at what is not there to be waited for.
const EVERY: Duration = Duration::from_millis(20);

/// What it has to know, as long as somebody can tell it.
#[derive(Serialize, Deserialize)]
struct Duty {
    builder: String,
    config: Config,
    /// containerd's client, and a containerd.
    containerd: Option<(PathBuf, Place)>,
}

/// One that watches over this process.
#[derive(Debug)]
pub struct Janitor(Child);

impl Janitor {
    /// Has one watch: over what a builder has on this host, and at `containerd`, whose client comes first. To be called before
    /// this process enters namespaces of its own, which would last as long as the other.
    ///
    /// # Errors
    /// Where it cannot be run.
    pub fn watch(config: &Config, containerd: Option<(&Path, &Place)>) -> io::Result<Self> {
        let containerd = containerd.map(|(client, place)| (client.to_owned(), place.clone()));
        let duty = Duty { builder: Identity::own().to_string(), config: config.clone(), containerd };
        let mut command = own_program(JANITOR);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        sys::detach(&mut command, None);
        let mut janitor = Self(command.spawn()?);
        let mut text = serde_json::to_vec(&duty)?;
        text.push(b'\n');
        janitor.say(&text)?;
        Ok(janitor)
    }

    /// There is nothing left to do for it. Where it is not told so, something may be left, and it waits for this process's end.
    pub fn done(mut self) {
        let _ = self.say(DONE);
        self.0.stdin = None;
        let _ = self.0.wait();
    }

    fn say(&mut self, text: &[u8]) -> io::Result<()> {
        self.0.stdin.as_mut().map_or(Ok(()), |stdin| stdin.write_all(text))
    }
}

/// What such a process does.
#[must_use]
pub fn clear() -> ExitCode {
    // Nobody is left to be told why not; what stays is for the next builder, the next pod, or `chsnap snapshot prune`.
    match wait_for_end().map(|duty| duty.is_none_or(|duty| duty.fulfil())) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) | Err(_) => ExitCode::FAILURE,
    }
}

/// Nothing where there is nothing to do.
fn wait_for_end() -> io::Result<Option<Duty>> {
    let mut input = BufReader::new(io::stdin().take(MAX_ORDER));
    let mut line = String::new();
    input.read_line(&mut line)?;
    let duty = serde_json::from_str(&line)?;
    let mut rest = Vec::new();
    input.read_to_end(&mut rest)?;
    Ok((rest != DONE).then_some(duty))
}

impl Duty {
    fn fulfil(self) -> bool {
        let Self { builder, config, containerd } = self;
        // It closes its files a little before it is gone, and its machine ends when it is.
        while builder.parse().is_ok_and(Identity::lives) {
            thread::sleep(EVERY);
        }
        // A client of containerd's that it had asked lives on, and what that makes is to be removed, too.
        let (mark, asked) = (format!("-{builder}"), Instant::now());
        // One that it had started last may not have its arguments yet.
        thread::sleep(EVERY);
        while proc::is_argument(&mark) && asked.elapsed() < origin::PATIENCE {
            thread::sleep(EVERY);
        }
        clear_away(&config);
        let Some((client, place)) = containerd else { return true };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.is_ok_and(|runtime| runtime.block_on(StandIn::clear_away(&client, &place)).is_ok())
    }
}
