//! `chsnap snapshot build`

use std::{
    error::Error,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use chsnap::{
    config::{Annotations, Config, Overrides, Ready, Shape, Size},
    task::{Role, chain, role},
    template::{self, Ahead, Built, Janitor, Order, StandIn},
};
use oci_spec::runtime::Spec;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    Outcome, print_json,
    snapshot::{Args, Containerd},
};

#[derive(clap::Args)]
pub struct Build {
    /// Of a guest with nothing but kernel and agent, for any image
    #[arg(long, required_unless_present = "image", conflicts_with = "image")]
    base: bool,
    /// The image whose process is to be saved, as `ctr run` would start it
    image: Option<String>,
    /// When the process is ready, as in the annotation io.chsnap.ready of its pods
    #[arg(long, value_name = "SIGN", requires = "image", required_unless_present_any = ["base", "like"])]
    ready: Option<Ready>,
    /// Environment variable of its pods, beside the image's; may be repeated
    #[arg(long, value_name = "KEY=VALUE", requires = "image")]
    env: Vec<String>,
    /// Its pods have a stdin: those of `ctr run` do, with -d, too; in Kubernetes, those that ask for one
    #[arg(long, requires = "image")]
    stdin: bool,
    /// Its pods have a terminal
    #[arg(long, requires = "image")]
    tty: bool,
    /// Its pods are like the container with this OCI specification instead of one of `ctr run`, as Kubernetes' are:
    /// `crictl inspect ID | jq .info.runtimeSpec` writes a running one's
    #[arg(long, value_name = "FILE", requires = "image", conflicts_with_all = ["env", "tty", "words"])]
    like: Option<PathBuf>,
    /// Snapshotter of its pods [default: containerd's own]
    #[arg(long, requires = "image")]
    snapshotter: Option<String>,
    #[command(flatten)]
    containerd: Containerd,
    /// What its pods run instead of what the image says, word by word
    #[arg(last = true, requires = "image")]
    words: Vec<String>,
    /// Memory of the guest, such as 1GiB [default: guest.default_memory, with --like that of a pod of this container alone]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// vCPUs of the guest [default: guest.default_vcpus, with --like as for its memory]
    #[arg(long, value_name = "N")]
    vcpus: Option<u32>,
    #[command(flatten)]
    args: Args,
}

impl Build {
    /// What the pods' annotations say, unless something else is said here.
    fn overrides(&self, like: Option<&Spec>) -> Result<Overrides, Box<dyn Error>> {
        let annotations = like.and_then(|spec| spec.annotations().clone()).unwrap_or_default();
        let said = Annotations::parse(&annotations)?;
        Ok(Overrides {
            memory: self.memory.or(said.memory),
            vcpus: self.vcpus.or(said.vcpus),
            ready: self.ready.clone().or_else(|| said.ready.clone()),
            ..said
        })
    }
}

fn read(path: &Path) -> Result<Spec, Box<dyn Error>> {
    Spec::load(path).map_err(|error| format!("cannot read the OCI specification {path:?}: {}", chain(&error)).into())
}

/// As large as the shim makes such a pod's guest.
fn shape(config: &Config, overrides: &Overrides, like: Option<&Spec>) -> Result<Shape, Box<dyn Error>> {
    let limits = like.and_then(|spec| spec.linux().as_ref()?.resources().as_ref());
    let annotations = like.and_then(|spec| spec.annotations().as_ref());
    Ok(match annotations.and_then(role) {
        None => Shape::of(config, overrides, limits)?,
        Some(Role::Container) => Shape::of_pod(config, overrides, limits)?,
        Some(Role::Sandbox) => {
            return Err(
                "--like names the specification of a pod's sandbox container: that of its application is told by \
                        `crictl inspect`, not inspectp"
                    .into(),
            );
        }
    })
}

/// In the foreground: progress on stderr, the key on stdout.
pub fn run(build: &Build) -> Outcome {
    let config = Config::load(build.args.config.as_deref())?;
    let like = build.like.as_deref().map(read).transpose()?;
    let overrides = build.overrides(like.as_ref())?;
    let shape = shape(&config, &overrides, like.as_ref())?;
    let (client, place) = (build.containerd.client(&config), build.containerd.place());
    let janitor = Janitor::watch(&config, build.image.as_ref().map(|_| (&*client, &place)))
        .map_err(|error| format!("cannot run who clears away after a build that is killed: {error}"))?;
    template::isolate().map_err(|error| format!("cannot enter namespaces of its own, run this as root: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let began = Instant::now();
    let mut tell = |line: &str| eprintln!("chsnap: {:5.1} s  {line}", began.elapsed().as_secs_f32());
    let built = runtime.block_on(async {
        // From here on: a container that is being made is made, and then removed.
        let signals = Signals::listen()?;
        let order = Order { beside: false, ..Order::of(&config, &overrides, shape) };
        let Some(image) = &build.image else {
            return tokio::select! {
                built = template::build(&order, &mut tell) => Ok(built?),
                error = signals.interrupted() => Err(error),
            };
        };
        let ready = overrides.ready.clone().ok_or(
            "it is not said when the process is ready: add --ready SIGN, or give its pods the annotation io.chsnap.ready",
        )?;
        let ahead = Ahead {
            client,
            address: place.address.clone(),
            namespace: place.namespace.clone(),
            snapshotter: build.snapshotter.clone(),
            image: image.clone(),
            env: build.env.clone(),
            args: build.words.clone(),
            ready,
            stdin: build.stdin,
            terminal: build.tty,
            like,
        };
        let container = StandIn::make(&ahead).await?;
        let built = tokio::select! {
            built = async {
                let order = container.order(&ahead, &config, &overrides, shape).await?;
                Ok::<_, Box<dyn Error>>(template::build(&order, &mut tell).await?)
            } => built,
            error = signals.interrupted() => Err(error),
        };
        container.remove().await?;
        built
    });
    let built = built?;
    janitor.done();
    let (key, new) = match built {
        Built::New(key) => (key, true),
        Built::There(key) => (key, false),
    };
    if build.args.json {
        print_json(&serde_json::json!({ "key": key, "new": new }))?;
    } else {
        println!("{key}{}", if new { "" } else { " was there already" });
    }
    Ok(ExitCode::SUCCESS)
}

/// Those that end a program at a terminal, and else.
struct Signals([(&'static str, Signal); 3]);

impl Signals {
    fn listen() -> io::Result<Self> {
        let listen = |name, kind| Ok::<_, io::Error>((name, signal(kind)?));
        Ok(Self([
            listen("SIGINT", SignalKind::interrupt())?,
            listen("SIGTERM", SignalKind::terminate())?,
            listen("SIGHUP", SignalKind::hangup())?,
        ]))
    }

    /// Whatever was begun is taken down then.
    async fn interrupted(self) -> Box<dyn Error> {
        let [(interrupt, mut one), (terminate, mut two), (hangup, mut three)] = self.0;
        let name = tokio::select! {
            _ = one.recv() => interrupt,
            _ = two.recv() => terminate,
            _ = three.recv() => hangup,
        };
        format!("interrupted by {name}, nothing was built").into()
    }
}
