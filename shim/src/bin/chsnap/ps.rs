//! `chsnap ps`

use std::{path::PathBuf, process::ExitCode};

use chsnap::{
    config::Config,
    state::{Entry, State, Status},
};

use crate::{Outcome, print_json, table};

#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print how each pod was started in Prometheus's text format, for node_exporter's textfile collector
    #[arg(long, conflicts_with = "json")]
    metrics: bool,
    /// Configuration file that names the state directory [default: /etc/chsnap/config.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub fn run(args: &Args) -> Outcome {
    let config = Config::load(args.config.as_deref())?;
    let entries = State::list(&config.state.dir)?;
    if args.json {
        print_json(&entries)?;
    } else if args.metrics {
        print!("{}", metrics(&entries));
    } else {
        let heading =
            ["NAMESPACE", "ID", "STATUS", "PID", "VMM", "ACCEL", "VCPUS", "MEMORY", "STARTED", "WAY", "EXPOSED"];
        let rows: Vec<_> = [heading.map(str::to_owned)].into_iter().chain(entries.iter().map(row)).collect();
        table::print(&rows)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// One line a pod and measure; `why_not` is empty where the pod was started in the best way.
fn metrics(entries: &[Entry]) -> String {
    let label = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let mut text = String::from(
        "# HELP chsnap_pod_start_info How a pod that runs was started, and why not in a better way.\n\
         # TYPE chsnap_pod_start_info gauge\n",
    );
    let mut seconds = String::from(
        "# HELP chsnap_pod_start_seconds What the shim took from the request to the created container.\n\
         # TYPE chsnap_pod_start_seconds gauge\n",
    );
    for state in entries.iter().filter(|entry| entry.status == Status::Running).map(|entry| &entry.state) {
        let Some(way) = state.way else { continue };
        let pod = format!("namespace=\"{}\",pod=\"{}\",way=\"{way}\"", label(&state.namespace), label(&state.id));
        let why_not = label(state.why_not.as_deref().unwrap_or_default());
        text.push_str(&format!("chsnap_pod_start_info{{{pod},why_not=\"{why_not}\"}} 1\n"));
        let whole: u64 = state.phases_us.iter().map(|(_, us)| us).sum();
        seconds.push_str(&format!("chsnap_pod_start_seconds{{{pod}}} {}\n", whole as f64 / 1e6));
    }
    text + &seconds
}

fn row(entry: &Entry) -> [String; 11] {
    let state = &entry.state;
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let exposed: Vec<String> = state
        .exposed
        .iter()
        .map(|port| match port.listen {
            Some(listen) => format!("{listen}->{}", port.guest_port),
            None => format!("{}->{}", port.socket.display(), port.guest_port),
        })
        .collect();
    let way = state.way.map(|way| match &state.why_not {
        Some(why) => format!("{way} ({why})"),
        None => way.to_string(),
    });
    [
        state.namespace.clone(),
        state.id.clone(),
        match entry.status {
            Status::Running => "running".into(),
            Status::Dead => "dead".into(),
        },
        state.pid.to_string(),
        or_dash(state.vmm.map(|vmm| vmm.to_string())),
        or_dash(state.accelerator.map(|accelerator| accelerator.to_string())),
        state.vcpus.to_string(),
        format!("{}MiB", state.memory_mib),
        state.started_at.clone(),
        or_dash(way),
        or_dash((!exposed.is_empty()).then(|| exposed.join(","))),
    ]
}
