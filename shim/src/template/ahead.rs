//! Building ahead of the first pod: a container is made of the image and never started, since containerd's client knows what
//! one looks like.

use std::path::{Path, PathBuf};

use chsnap_protocol::agent::Stdio;
use oci_spec::runtime::Spec;
use thiserror::Error;

use super::Order;
use crate::{
    config::{Config, Overrides, Ready, Shape},
    origin::{OriginError, Place, is_left},
    proc::Identity,
    sandbox::{Blueprint, Plan, PlanError},
    share::CloneRoot,
};

/// What such containers are called, with the process that made one.
const NAME: &str = "chsnap-build-";

/// Which container that would be.
#[derive(Debug, Clone)]
pub struct Ahead {
    /// containerd's client.
    pub client: PathBuf,
    /// containerd's socket.
    pub address: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Not containerd's own choice.
    pub snapshotter: Option<String>,
    /// Its reference.
    pub image: String,
    /// Beside the image's.
    pub env: Vec<String>,
    /// Instead of the image's.
    pub args: Vec<String>,
    /// When its process is ready.
    pub ready: Ready,
    /// It reads a stdin.
    pub stdin: bool,
    /// It has a terminal.
    pub terminal: bool,
    /// What its pods have instead of what the client would give them.
    pub like: Option<Spec>,
}

/// It cannot be told what would run.
#[derive(Debug, Error)]
pub enum AheadError {
    /// containerd.
    #[error("cannot make a container of {image:?} to see what it would run")]
    Container {
        /// The image.
        image: String,
        /// Why not.
        #[source]
        source: OriginError,
    },
    /// Its specification.
    #[error("the container cannot run in a microVM")]
    Plan(#[from] PlanError),
    /// Its root.
    #[error("image snapshots need the overlayfs or the native snapshotter: choose one with --snapshotter")]
    Snapshotter,
}

/// A container that nobody starts. To be removed with [`StandIn::remove`].
#[derive(Debug)]
pub struct StandIn {
    place: Place,
    client: PathBuf,
}

impl StandIn {
    /// Makes one, after removing those of processes that are gone.
    ///
    /// # Errors
    /// Where containerd does not.
    pub async fn make(ahead: &Ahead) -> Result<Self, AheadError> {
        let failed = |source| AheadError::Container { image: ahead.image.clone(), source };
        let place = Place {
            address: ahead.address.clone(),
            namespace: ahead.namespace.clone(),
            container: format!("{NAME}{}", Identity::own()),
        };
        Self::clear_away(&ahead.client, &place).await.map_err(failed)?;
        let mut args = vec!["containers", "create"];
        if ahead.terminal {
            args.push("--tty");
        }
        args.extend(["--runtime", crate::task::server::RUNTIME]);
        if let Some(snapshotter) = &ahead.snapshotter {
            args.extend(["--snapshotter", snapshotter]);
        }
        for variable in &ahead.env {
            args.extend(["--env", variable]);
        }
        // The client of containerd 1.6 looks for its flags among the words, too; and takes this for the value of a flag without one.
        args.extend(["--", ahead.image.as_str(), &place.container]);
        args.extend(ahead.args.iter().map(String::as_str));
        place.say(&ahead.client, &args).await.map_err(failed)?;
        Ok(Self { place, client: ahead.client.clone() })
    }

    /// Removes those of processes that are gone; `place` is any at the containerd in question.
    ///
    /// # Errors
    /// Where containerd does not tell which there are.
    pub async fn clear_away(client: &Path, place: &Place) -> Result<(), OriginError> {
        let list = place.say(client, &["containers", "ls", "-q"]).await?;
        for id in String::from_utf8_lossy(&list).lines().filter(|id| is_left(id, NAME)) {
            let _ = place.say(client, &["containers", "rm", id]).await;
        }
        place.clear_views(client).await;
        Ok(())
    }

    /// What is to be built for pods like it.
    ///
    /// # Errors
    /// See [`AheadError`].
    pub async fn order(
        &self,
        ahead: &Ahead,
        config: &Config,
        overrides: &Overrides,
        shape: Shape,
    ) -> Result<Order, AheadError> {
        let failed = |source| AheadError::Container { image: ahead.image.clone(), source };
        let spec = match &ahead.like {
            Some(spec) => spec.clone(),
            None => self.place.spec(&self.client).await.map_err(failed)?,
        };
        let rootfs = self.place.rootfs(&self.client).await.map_err(failed)?;
        CloneRoot::of(&rootfs).ok_or(AheadError::Snapshotter)?;
        let plan = Plan::of(&self.place.container, spec)?.with_ready(Some(&ahead.ready));
        let terminal = ahead.terminal || plan.terminal;
        let stdio = Stdio { stdin: ahead.stdin, terminal, ..Stdio::default() };
        let blueprint = Blueprint::of(&plan, &ahead.ready, &stdio, &config.snapshot.pod_env);
        let config = Config {
            snapshot: crate::config::SnapshotConfig { ctr: self.client.clone(), ..config.snapshot.clone() },
            ..config.clone()
        };
        let order = Order { beside: false, ..Order::of(&config, overrides, shape) };
        Ok(order.of_image(&blueprint, &rootfs, self.place.clone()))
    }

    /// Removes it, and its snapshot at containerd.
    ///
    /// # Errors
    /// Where containerd does not.
    pub async fn remove(self) -> Result<(), OriginError> {
        self.place.say(&self.client, &["containers", "rm", &self.place.container]).await.map(drop)
    }
}
