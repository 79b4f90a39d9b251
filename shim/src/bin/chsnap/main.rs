//! `chsnap`: the operator's command line. What it does is in the library; here are its words.

use std::{error::Error, io, io::Write, process::ExitCode};

use chsnap::{
    task::chain,
    template::{self, JANITOR},
    told,
};
use clap::{Parser, Subcommand};

mod build;
mod doctor;
mod image;
mod ps;
mod snapshot;
mod table;

/// Looks after the microVMs that containerd-shim-chsnap-v2 runs.
#[derive(Parser)]
#[command(name = "chsnap", version, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tell what a container needs on this host, what is missing, and how to mend it; exit with 0 if one could run
    Doctor(doctor::Args),
    /// List the pods that run on this host
    Ps(ps::Args),
    /// Make images
    #[command(subcommand)]
    Image(image::Command),
    /// Look after the snapshots of this host
    #[command(subcommand)]
    Snapshot(Box<snapshot::Command>),
    /// Clear away after a build that was killed
    #[command(name = JANITOR, hide = true)]
    Clear,
}

/// What a command ends with: its exit status, or why it could not do its work.
type Outcome = Result<ExitCode, Box<dyn Error>>;

fn main() -> ExitCode {
    // The error at the end is the one line that must be; what went less well on the way comes before it.
    told::warnings(|line| drop(writeln!(io::stderr(), "chsnap: {line}")));
    let outcome = match Cli::parse().command {
        Command::Doctor(args) => doctor::run(&args),
        Command::Ps(args) => ps::run(&args),
        Command::Image(command) => image::run(command),
        Command::Snapshot(command) => snapshot::run(&command),
        Command::Clear => Ok(template::clear()),
    };
    match outcome {
        Ok(code) => code,
        // Whoever reads our output has seen enough.
        Err(error) if is_broken_pipe(error.as_ref()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody is left to tell if this fails too.
            let _ = writeln!(io::stderr(), "chsnap: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Prints JSON for programs.
fn print_json(value: &impl serde::Serialize) -> Result<(), Box<dyn Error>> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value).map_err(io::Error::from)?;
    writeln!(out)?;
    Ok(())
}
