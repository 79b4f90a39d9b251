//! The builder's process. It is the shim's own program once more, since that is where the shim is, whatever else is
//! installed; and a process of its own, since the pod beside which it was begun may end at any time.

use std::{
    env,
    ffi::OsStr,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::{self, ExitCode, Stdio},
};

use nix::sched::{CloneFlags, unshare};
use thiserror::Error;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, Command},
};

use super::{Built, Janitor, Order, build};
use crate::{share, sys, task::chain, told};

/// The only argument of such a process.
pub const COMMAND: &str = "build-template";
/// Begins those of its lines that are for every level of log.
const WARNING: &str = "warning: ";
/// An order is a configuration; a larger one is none.
pub(super) const MAX_ORDER: u64 = 1 << 20;

/// The builder cannot do its work.
#[derive(Debug, Error)]
enum ServeError {
    /// It was started by hand.
    #[error("cannot read from stdin what is to be built: `chsnap snapshot build` is meant for people")]
    Order(#[source] io::Error),
    /// Without these rights.
    #[error("cannot enter namespaces of its own")]
    Namespaces(#[source] nix::Error),
    /// Of the process.
    #[error("cannot set the process up")]
    Process(#[source] io::Error),
    /// It could be killed.
    #[error("cannot run who clears away after it")]
    Janitor(#[source] io::Error),
}

/// Has a template built, for which nobody waits. What comes of it is logged, if this process is still there then.
pub async fn launch(order: Order) {
    match spawn(&order).await {
        Ok(child) => drop(tokio::spawn(listen(child))),
        Err(error) => log::warn!("no template is built: cannot run the builder: {error}"),
    }
}

async fn spawn(order: &Order) -> io::Result<Child> {
    let order = serde_json::to_vec(order)?;
    let mut command = own_program(COMMAND);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    sys::detach(&mut command, share::home());
    let mut command = Command::from(command);
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&order).await?;
    }
    Ok(child)
}

/// The program of this process, although its file may have been replaced; called as this one was.
pub(super) fn own_program(argument: &str) -> process::Command {
    let mut command = process::Command::new("/proc/self/exe");
    let name = env::args_os().next();
    command.arg0(name.as_deref().unwrap_or(OsStr::new(argument))).arg(argument).current_dir("/");
    command
}

/// Until it ends, or we do: then init inherits it.
async fn listen(mut child: Child) {
    if let Some(stdout) = child.stdout.take() {
        let mut lines = BufReader::new(stdout).lines();
        while let Ok(Some(line)) = lines.next_line().await {
            match line.strip_prefix(WARNING) {
                Some(warning) => log::warn!("template: {warning}"),
                None => log::info!("template: {line}"),
            }
        }
    }
    let _ = child.wait().await;
}

/// What such a process does. To be called while it has one thread.
#[must_use]
pub fn serve() -> ExitCode {
    match try_serve() {
        Ok(code) => code,
        Err(error) => {
            say(&chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn try_serve() -> Result<ExitCode, ServeError> {
    told::warnings(|line| say(&format!("{WARNING}{line}")));
    let mut order = Vec::new();
    io::stdin().take(MAX_ORDER).read_to_end(&mut order).map_err(ServeError::Order)?;
    let order: Order = serde_json::from_slice(&order).map_err(|error| ServeError::Order(error.into()))?;
    let place = order.image.as_ref().map(|image| (&*order.config.snapshot.ctr, &image.place));
    let janitor = Janitor::watch(&order.config, place).map_err(ServeError::Janitor)?;
    sys::stand_back().map_err(ServeError::Process)?;
    isolate().map_err(ServeError::Namespaces)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServeError::Process)?;
    Ok(match runtime.block_on(build(&order, &mut |line| say(line))) {
        Ok(Built::New(key)) => {
            janitor.done();
            say(&format!("the snapshot {} is there", key.short()));
            ExitCode::SUCCESS
        }
        Ok(Built::There(key)) => {
            janitor.done();
            say(&format!("the snapshot {} was there already", key.short()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(&format!("not built: {}", chain(&error)));
            ExitCode::FAILURE
        }
    })
}

/// Mounts that end with this process, and no network. To be called while there is one thread.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn isolate() -> nix::Result<()> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    share::enter_private_mounts()
}

/// Whoever listened may have gone.
fn say(line: &str) {
    let _ = writeln!(io::stdout(), "{line}");
}
