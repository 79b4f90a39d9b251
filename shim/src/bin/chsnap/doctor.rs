//! `chsnap doctor`

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use chsnap::doctor::{Check, Report, Status, examine, retry};

use crate::{Outcome, print_json};

#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Configuration file [default: /etc/chsnap/config.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Forget on which rung of the ladder snapshots work, so that the next template is tried on each
    #[arg(long)]
    retry: bool,
}

pub fn run(args: &Args) -> Outcome {
    if args.retry {
        retry(args.config.as_deref())?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(examine(args.config.as_deref()));
    if args.json {
        print_json(&report)?;
    } else {
        print(&report)?;
    }
    Ok(if report.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &Report) -> io::Result<()> {
    let width = report.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut out = io::stdout().lock();
    for Check { name, status, found, mend } in &report.checks {
        let status = match status {
            Status::Ok => "ok",
            Status::Warn => "warn",
            Status::Missing => "missing",
        };
        writeln!(out, "{status:7}  {name:width$}  {found}")?;
        if let Some(mend) = mend {
            writeln!(out, "{:7}  {:width$}  -> {mend}", "", "")?;
        }
    }
    match (&report.driver, report.ok) {
        (Some(driver), true) => writeln!(out, "\nA container would run on {} with {}.", driver.vmm, driver.accelerator),
        (Some(driver), false) => {
            writeln!(out, "\nNo container can run; {} with {} would be taken.", driver.vmm, driver.accelerator)
        }
        (None, _) => writeln!(out, "\nNo container can run."),
    }
}
