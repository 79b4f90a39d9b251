//! `chsnap snapshot`

use std::{
    error::Error,
    path::{Path, PathBuf},
    process::ExitCode,
    time::SystemTime,
};

use chsnap::{
    config::{Config, Size},
    origin::Place,
    snapshot::{Entry, Key, Manifest, Pruned, Store, Tree},
    task::chain,
    template::{self, StandIn},
};
use clap::Subcommand;
use serde::Serialize;

use crate::{
    Outcome,
    build::{self, Build},
    print_json, table,
};

#[derive(Subcommand)]
pub enum Command {
    /// List them, the most recently used first
    Ls(Args),
    /// Show what one was made from and consists of
    Inspect(One),
    /// Build one ahead of the first pod that would use it
    Build(Box<Build>),
    /// Compare the files of one, or of all, with their digests; exit with 0 if all fit
    Verify(Several),
    /// Remove some; one in use stays
    Rm(Several),
    /// Remove those unused for longest until the rest keeps the budget, and what killed processes left
    Prune(Prune),
}

#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Configuration file that names the store [default: /etc/chsnap/config.toml if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct One {
    /// Its key, or how that begins
    key: String,
    #[command(flatten)]
    args: Args,
}

#[derive(clap::Args)]
pub struct Several {
    /// Their keys, or how those begin
    #[arg(required_unless_present = "all")]
    keys: Vec<String>,
    /// All of them
    #[arg(long, conflicts_with = "keys")]
    all: bool,
    #[command(flatten)]
    args: Args,
}

#[derive(clap::Args)]
pub struct Containerd {
    /// containerd's socket
    #[arg(long, env = "CONTAINERD_ADDRESS", default_value = "/run/containerd/containerd.sock")]
    pub address: String,
    /// containerd's namespace
    #[arg(long, env = "CONTAINERD_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// containerd's client [default: snapshot.ctr]
    #[arg(long, value_name = "PATH")]
    ctr: Option<PathBuf>,
}

#[derive(clap::Args)]
pub struct Prune {
    /// Instead of the configuration's budget, such as 2GiB; 0 removes all that are not in use
    #[arg(long, value_name = "SIZE")]
    budget: Option<Size>,
    #[command(flatten)]
    containerd: Containerd,
    #[command(flatten)]
    args: Args,
}

/// One of them, for programs.
#[derive(Serialize)]
struct Row<'a> {
    key: &'a Key,
    bytes: u64,
    used_at: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    manifest: Option<&'a Manifest>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

impl<'a> Row<'a> {
    fn of(entry: &'a Entry) -> Self {
        Self {
            key: &entry.key,
            bytes: entry.bytes,
            used_at: time(entry.used_at),
            manifest: entry.manifest.as_ref().ok(),
            problem: entry.manifest.as_ref().err().map(|error| chain(error)),
        }
    }
}

/// What became of one.
#[derive(Serialize)]
struct Outcomes {
    key: Key,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

pub fn run(command: &Command) -> Outcome {
    match command {
        Command::Ls(args) => list(args),
        Command::Inspect(one) => inspect(one),
        Command::Build(build) => build::run(build),
        Command::Verify(some) => each(some, "fits", |store, key| store.verify(key).map_err(Into::into)),
        Command::Rm(some) => each(some, "removed", |store, key| store.remove(key).map_err(Into::into)),
        Command::Prune(prune) => self::prune(prune),
    }
}

fn open(args: &Args) -> Result<(Store, Size), Box<dyn Error>> {
    let config = Config::load(args.config.as_deref())?.snapshot;
    Ok((Store::open(&config.dir, config.budget.as_bytes())?, config.budget))
}

fn list(args: &Args) -> Outcome {
    let (store, budget) = open(args)?;
    let entries = store.list()?;
    if args.json {
        print_json(&entries.iter().map(Row::of).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    let heading = ["KEY", "KIND", "VMM", "ACCEL", "RUNG", "VCPUS", "MEMORY", "SIZE", "BUILT", "USED", "PROCESS"];
    let rows: Vec<_> = [heading.map(str::to_owned)].into_iter().chain(entries.iter().map(row)).collect();
    table::print(&rows)?;
    let total = entries.iter().map(|entry| entry.bytes).sum::<u64>();
    println!("{} of {budget} in {} snapshots", mib(total), entries.len());
    Ok(ExitCode::SUCCESS)
}

fn row(entry: &Entry) -> [String; 11] {
    let used = time(entry.used_at);
    let manifest = match &entry.manifest {
        Ok(manifest) => manifest,
        Err(error) => {
            let dash = || "-".to_owned();
            let key = entry.key.short().to_owned();
            return [key, dash(), dash(), dash(), dash(), dash(), dash(), dash(), dash(), used, chain(error)];
        }
    };
    let inputs = &manifest.inputs;
    [
        entry.key.short().to_owned(),
        inputs.kind.to_string(),
        format!("{} {}", inputs.vmm.kind, inputs.vmm.version),
        inputs.vmm.accelerator.to_string(),
        inputs.rung.to_string(),
        inputs.vcpus.to_string(),
        format!("{}MiB", inputs.memory_mib),
        mib(entry.bytes),
        manifest.created_at.clone(),
        used,
        inputs.process.as_ref().map_or_else(|| "-".into(), |process| printable(&process.args.join(" "))),
    ]
}

fn inspect(one: &One) -> Outcome {
    let (store, _) = open(&one.args)?;
    let entries = store.list()?;
    let key = resolve(&entries, &one.key)?;
    let entry = entries.iter().find(|entry| entry.key == key).ok_or("it is gone")?;
    if one.args.json {
        print_json(&Row::of(entry))?;
        return Ok(if entry.manifest.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let manifest = entry.manifest.as_ref().map_err(|error| chain(error))?;
    let inputs = serde_json::to_value(&manifest.inputs)?;
    let mut rows = vec![
        ["key".to_owned(), entry.key.to_string()],
        ["built".to_owned(), format!("{} in {} ms", manifest.created_at, manifest.build_ms)],
        ["used".to_owned(), time(entry.used_at)],
        ["size".to_owned(), mib(entry.bytes)],
    ];
    for (name, value) in inputs.as_object().into_iter().flatten() {
        rows.push([name.clone(), printable(&value.as_str().map_or_else(|| value.to_string(), str::to_owned))]);
    }
    for (name, content) in &manifest.files {
        rows.push([format!("file {name}"), format!("{} bytes, {}", content.size, content.digest)]);
    }
    if let Some(Tree { entries, bytes, digest }) = &manifest.root {
        rows.push(["root difference".to_owned(), format!("{bytes} bytes in {entries} entries, {digest}")]);
    }
    for refusal in &manifest.refusals {
        rows.push([format!("not on {}", refusal.rung), refusal.why.clone()]);
    }
    table::print(&rows)?;
    Ok(ExitCode::SUCCESS)
}

/// What is done with one.
type Deed = fn(&Store, &Key) -> Result<(), Box<dyn Error>>;

/// Does something with each; all are tried, and the exit status tells whether all went well.
fn each(some: &Several, done: &str, what: Deed) -> Outcome {
    let (store, _) = open(&some.args)?;
    let entries = store.list()?;
    let keys = match some.all {
        true => entries.iter().map(|entry| entry.key.clone()).collect(),
        false => some.keys.iter().map(|key| resolve(&entries, key)).collect::<Result<Vec<_>, _>>()?,
    };
    let mut outcomes = Vec::new();
    for key in keys {
        let problem = what(&store, &key).err().map(|error| chain(error.as_ref()));
        if !some.args.json {
            match &problem {
                None => println!("{}: {done}", key.short()),
                Some(problem) => eprintln!("chsnap: {problem}"),
            }
        }
        outcomes.push(Outcomes { key, problem });
    }
    if some.args.json {
        print_json(&outcomes)?;
    }
    let well = outcomes.iter().all(|outcome| outcome.problem.is_none());
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Containerd {
    /// Its client.
    pub fn client(&self, config: &Config) -> PathBuf {
        self.ctr.clone().unwrap_or_else(|| config.snapshot.ctr.clone())
    }

    /// One of its containers, for who asks for none.
    pub fn place(&self) -> Place {
        Place { address: self.address.clone(), namespace: self.namespace.clone(), container: String::new() }
    }

    /// Removes what killed processes left there, if it is there at all.
    fn clear_away(&self, config: &Config) -> Result<(), Box<dyn Error>> {
        if !Path::new(&self.address).exists() {
            return Ok(());
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(runtime.block_on(StandIn::clear_away(&self.client(config), &self.place()))?)
    }
}

fn prune(prune: &Prune) -> Outcome {
    let (store, budget) = open(&prune.args)?;
    let config = Config::load(prune.args.config.as_deref())?;
    template::clear_away(&config);
    if let Err(error) = prune.containerd.clear_away(&config) {
        eprintln!("chsnap: what killed builds left in containerd stays: {}", chain(error.as_ref()));
    }
    let Pruned { evicted, stayed } = store.prune(prune.budget.unwrap_or(budget).as_bytes())?;
    if prune.args.json {
        let rows: Vec<_> =
            evicted.iter().map(|one| serde_json::json!({ "key": one.key, "bytes": one.bytes })).collect();
        print_json(&rows)?;
    } else {
        evicted.iter().for_each(|one| println!("{}: removed, {}", one.key.short(), mib(one.bytes)));
        println!("{} removed in {} snapshots", mib(evicted.iter().map(|one| one.bytes).sum()), evicted.len());
    }
    stayed.iter().for_each(|error| eprintln!("chsnap: {}", chain(error)));
    Ok(if stayed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The only key that begins so.
fn resolve(entries: &[Entry], beginning: &str) -> Result<Key, String> {
    let mut found = entries.iter().map(|entry| &entry.key).filter(|key| key.as_str().starts_with(beginning));
    match (found.next(), found.next()) {
        (Some(key), None) if !beginning.is_empty() => Ok(key.clone()),
        (Some(_), _) => Err(format!("{beginning:?} begins the keys of several snapshots: write more of it")),
        (None, _) => Err(format!("there is no snapshot {beginning:?}: `chsnap snapshot ls` lists them")),
    }
}

/// An image's words: on one line, and not the terminal's to act on.
fn printable(words: &str) -> String {
    words.replace(char::is_control, " ")
}

fn time(at: SystemTime) -> String {
    chsnap::state::rfc3339(at)
}

fn mib(bytes: u64) -> String {
    format!("{:.1}MiB", bytes as f64 / (1 << 20) as f64)
}
