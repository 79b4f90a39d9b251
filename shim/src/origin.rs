//! From which image a container was made: containerd is asked, through its own client.

use std::{
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use thiserror::Error;
use tokio::{process::Command, time::timeout};

use crate::{
    proc::Identity,
    share::{CloneRoot, Overlay, RootMount},
};

/// containerd answers at once, or has other things to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What a view of an image is called, with the process that made it and the image's chain ID.
const VIEW: &str = "chsnap-view-";

/// A container, and the containerd that has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Of containerd's socket.
    pub address: String,
    /// containerd's.
    pub namespace: String,
    /// Its id.
    pub container: String,
}

/// It cannot be told.
#[derive(Debug, Error)]
pub enum OriginError {
    /// No client.
    #[error("cannot run containerd's client {program:?}, [snapshot] ctr")]
    Program {
        /// Which.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// containerd does not answer.
    #[error("{command} did not answer within {} s", PATIENCE.as_secs())]
    Slow {
        /// What was asked.
        command: String,
    },
    /// It said no.
    #[error("{command} failed ({status}): {said}")]
    Failed {
        /// What was asked.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// Its last line.
        said: String,
    },
    /// It said something else.
    #[error("{command} answered in another form than is known")]
    Form {
        /// What was asked.
        command: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The root is a directory that containerd does not have for it.
    #[error("the container's root {dir:?} is no copy of an image that containerd has made for it")]
    NoCopy {
        /// Which.
        dir: PathBuf,
    },
    /// The name is another's by now.
    #[error("containerd has another container {container:?} by now: its root consists of other layers")]
    Another {
        /// Which.
        container: String,
    },
    /// The root has a parent that is none of an image's.
    #[error("the container's root was not made from an image: its snapshot's parent is {parent:?}")]
    NoImage {
        /// What it is called.
        parent: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    snapshotter: String,
    snapshot_key: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Snapshot {
    #[serde(default)]
    parent: String,
}

impl Place {
    /// The chain ID of the image's layers, by which containerd calls the snapshot below the container's own.
    ///
    /// # Errors
    /// See [`OriginError`].
    pub async fn chain_id(&self, client: &Path) -> Result<String, OriginError> {
        self.parent(client, &self.snapshot(client).await?).await
    }

    async fn parent(&self, client: &Path, of: &Container) -> Result<String, OriginError> {
        let info = ["snapshots", "--snapshotter", &of.snapshotter, "info", &of.snapshot_key];
        let Snapshot { parent } = self.ask(client, &info).await?;
        // Other names may be given to other things.
        match parent.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64) {
            true => Ok(parent),
            false => Err(OriginError::NoImage { parent }),
        }
    }

    /// The same, for a container whose root consists of the directories `lowers`. A name can be given to another container, of
    /// another image: it is made sure that this is still the one that had these.
    ///
    /// # Errors
    /// See [`OriginError`].
    pub async fn chain_id_of_layers(&self, client: &Path, lowers: &[PathBuf]) -> Result<String, OriginError> {
        let of = self.snapshot(client).await?;
        // In this order: who has these layers afterwards had them when the question was answered.
        let chain_id = self.parent(client, &of).await;
        let rootfs = self.mounts(client, &of).await?;
        match Overlay::of(&rootfs) {
            Some(overlay) if overlay.lowers == lowers => chain_id,
            _ => Err(OriginError::Another { container: self.container.clone() }),
        }
    }

    /// The same, for a container whose root is in the directory `dir` as a copy of the image's. It is made sure of that, since
    /// what is in a copy may be thrown away.
    ///
    /// # Errors
    /// See [`OriginError`].
    pub async fn chain_id_of_copy(&self, client: &Path, dir: &Path) -> Result<String, OriginError> {
        let of = self.snapshot(client).await?;
        let (chain_id, rootfs) = (self.parent(client, &of).await?, self.mounts(client, &of).await?);
        match CloneRoot::of(&rootfs) {
            Some(CloneRoot::Copied(its)) if its == dir => Ok(chain_id),
            _ => Err(OriginError::NoCopy { dir: dir.into() }),
        }
    }

    /// The directory with the root of the image that has this chain ID, for containers whose roots are copies of it: what a
    /// view shows, which is given back at once, since an image keeps its directory for as long as it is there.
    ///
    /// # Errors
    /// See [`OriginError`].
    pub async fn image_root(&self, client: &Path, chain_id: &str) -> Result<PathBuf, OriginError> {
        let Container { snapshotter, .. } = self.snapshot(client).await?;
        let view = format!("{VIEW}{}-{}", Identity::own(), chain_id.trim_start_matches("sha256:"));
        let shown = Container { snapshotter, snapshot_key: view.clone() };
        let of = ["snapshots", "--snapshotter", &shown.snapshotter];
        self.remove_views(client, &shown.snapshotter).await;
        self.say(client, &[&of[..], &["view", &view, chain_id]].concat()).await?;
        let mounts = self.mounts(client, &shown).await;
        self.say(client, &[&of[..], &["rm", &view]].concat()).await?;
        let dir = mounts?.pop().map(|mount| PathBuf::from(mount.source)).unwrap_or_default();
        if dir.is_absolute() && dir.is_dir() { Ok(dir) } else { Err(OriginError::NoCopy { dir }) }
    }

    /// Removes the views of processes that were killed before they gave theirs back.
    pub async fn clear_views(&self, client: &Path) {
        // The one snapshotter whose roots are copies.
        self.remove_views(client, "native").await;
    }

    async fn remove_views(&self, client: &Path, snapshotter: &str) {
        let of = ["snapshots", "--snapshotter", snapshotter];
        let list = self.say(client, &[&of[..], &["ls"]].concat()).await.unwrap_or_default();
        let list = String::from_utf8_lossy(&list);
        let names = list.lines().filter_map(|line| line.split_whitespace().next());
        for left in names.filter(|name| is_left(name, VIEW)) {
            let _ = self.say(client, &[&of[..], &["rm", left]].concat()).await;
        }
    }

    async fn snapshot(&self, client: &Path) -> Result<Container, OriginError> {
        self.ask(client, &["containers", "info", &self.container]).await
    }

    async fn ask<T: DeserializeOwned>(&self, client: &Path, args: &[&str]) -> Result<T, OriginError> {
        let text = self.say(client, args).await?;
        serde_json::from_slice(&text).map_err(|source| OriginError::Form { command: shown(client, args), source })
    }

    /// What the client prints.
    pub(crate) async fn say(&self, client: &Path, args: &[&str]) -> Result<Vec<u8>, OriginError> {
        let command = || shown(client, args);
        let mut asked = Command::new(client);
        asked.args(["--address", &self.address, "--namespace", &self.namespace]).args(args);
        // What it has begun with containerd it is to end, whatever signal a terminal sends.
        asked.stdin(Stdio::null()).kill_on_drop(true).process_group(0);
        let output = match timeout(PATIENCE, asked.output()).await {
            Ok(Ok(output)) => output,
            Ok(Err(source)) => return Err(OriginError::Program { program: client.into(), source }),
            Err(_) => return Err(OriginError::Slow { command: command() }),
        };
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let said = text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it said nothing").to_owned();
            return Err(OriginError::Failed { command: command(), status: output.status, said });
        }
        Ok(output.stdout)
    }

    /// The container's specification.
    pub(crate) async fn spec(&self, client: &Path) -> Result<Spec, OriginError> {
        self.ask(client, &["containers", "info", "--spec", &self.container]).await
    }

    /// The mounts of its root.
    pub(crate) async fn rootfs(&self, client: &Path) -> Result<Vec<RootMount>, OriginError> {
        self.mounts(client, &self.snapshot(client).await?).await
    }

    async fn mounts(&self, client: &Path, of: &Container) -> Result<Vec<RootMount>, OriginError> {
        let args = ["snapshots", "--snapshotter", &of.snapshotter, "mounts", "/", &of.snapshot_key];
        let text = String::from_utf8_lossy(&self.say(client, &args).await?).into_owned();
        Ok(text.lines().filter_map(root_mount).collect())
    }
}

/// Whether the process is gone that made something of this name: `prefix`, which process, and perhaps more after a `-`.
pub(crate) fn is_left(name: &str, prefix: &str) -> bool {
    let maker = name.strip_prefix(prefix).and_then(|rest| rest.split('-').next()?.parse::<Identity>().ok());
    maker.is_some_and(|maker| !maker.lives())
}

fn shown(client: &Path, args: &[&str]) -> String {
    format!("{} {}", client.display(), args.join(" "))
}

/// Of a line as one would type it: `mount -t overlay overlay / -o lowerdir=...`.
fn root_mount(line: &str) -> Option<RootMount> {
    match line.split_whitespace().collect::<Vec<_>>()[..] {
        ["mount", "-t", fstype, source, _, "-o", options] => Some(RootMount {
            fstype: fstype.into(),
            source: source.into(),
            options: options.split(',').map(str::to_owned).collect(),
        }),
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    pub const CHAIN_ID: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    /// A client in `dir` of a containerd that has a container `web` whose root has this parent, and these layers.
    pub fn client(dir: &Path, parent: &str, lowers: &[PathBuf]) -> PathBuf {
        let lowers: Vec<_> = lowers.iter().map(|lower| lower.display().to_string()).collect();
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in\n\
             *'containers info web') echo '{{\"Snapshotter\": \"overlayfs\", \"SnapshotKey\": \"web\"}}';;\n\
             *'overlayfs info web') echo '{{\"Parent\": \"{parent}\"}}';;\n\
             *'overlayfs mounts / web') echo mount -t overlay overlay / -o workdir=/w,upperdir=/u,lowerdir={};;\n\
             *) echo not found >&2; exit 1;;\nesac\n",
            lowers.join(":")
        );
        let client = dir.join("ctr");
        fs::write(&client, script).unwrap();
        fs::set_permissions(&client, fs::Permissions::from_mode(0o755)).unwrap();
        client
    }

    pub fn place(container: &str) -> Place {
        Place { address: "/sock".into(), namespace: "default".into(), container: container.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::{testing::*, *};

    #[test]
    fn a_mount_is_read_as_it_would_be_typed() {
        let line = "mount -t overlay overlay / -o index=off,workdir=/s/2/work,upperdir=/s/2/fs,lowerdir=/s/1/fs";
        let mount = root_mount(line).unwrap();
        assert_eq!((mount.fstype.as_str(), mount.source.as_str(), mount.options.len()), ("overlay", "overlay", 4));
        assert!(root_mount("").is_none() && root_mount("umount /").is_none());
    }

    #[tokio::test]
    async fn a_name_that_was_given_to_another_image_s_container_is_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (vec![PathBuf::from("/s/2/fs"), "/s/1/fs".into()], vec![PathBuf::from("/s/3/fs")]);
        let web = client(dir.path(), CHAIN_ID, &one);
        assert_eq!(place("web").chain_id_of_layers(&web, &one).await.unwrap(), CHAIN_ID);
        let error = place("web").chain_id_of_layers(&web, &two).await.unwrap_err();
        assert!(matches!(error, OriginError::Another { .. }), "{error}");
        let error = place("gone").chain_id_of_layers(&web, &one).await.unwrap_err();
        assert!(matches!(error, OriginError::Failed { .. }), "{error}");
        // One without an image says nothing about another of its name, either.
        let web = client(dir.path(), "", &one);
        let error = place("web").chain_id_of_layers(&web, &one).await.unwrap_err();
        assert!(matches!(error, OriginError::NoImage { .. }), "{error}");
        let error = place("web").chain_id_of_layers(&web, &two).await.unwrap_err();
        assert!(matches!(error, OriginError::Another { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_view_is_its_maker_s_own_and_those_of_the_dead_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (log, client) = (dir.path().join("log"), dir.path().join("ctr"));
        let (root, own) = (dir.path().display(), Identity::own());
        let script = format!(
            "#!/bin/sh\nshift 4; echo \"$*\" >>{log:?}\ncase \"$*\" in\n\
             containers*) echo '{{\"Snapshotter\": \"native\", \"SnapshotKey\": \"web\"}}';;\n\
             *' ls') echo KEY PARENT KIND; echo {VIEW}4194999.1-ab sha256:ab View; echo {VIEW}{own}-cd sha256:cd View;;\n\
             *' mounts '*) echo mount -t bind {root} / -o ro,rbind;;\nesac\n"
        );
        std::fs::write(&client, script).unwrap();
        std::fs::set_permissions(&client, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(place("web").image_root(&client, "sha256:ab").await.unwrap(), dir.path());
        let own = format!("{VIEW}{own}-ab");
        let said = std::fs::read_to_string(&log).unwrap();
        let said: Vec<_> =
            said.lines().filter_map(|line| line.strip_prefix("snapshots --snapshotter native ")).collect();
        let expected = [
            "ls".to_owned(),
            format!("rm {VIEW}4194999.1-ab"),
            format!("view {own} sha256:ab"),
            format!("mounts / {own}"),
            format!("rm {own}"),
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn only_what_a_process_that_is_gone_has_made_is_left() {
        let own = Identity::own();
        assert!(!is_left(&format!("x-{own}"), "x-") && !is_left(&format!("x-{own}-ab"), "x-"));
        assert!(is_left("x-4194999.1", "x-") && is_left("x-4194999.1-ab", "x-"));
        // Whoever has its number now did not make it.
        assert!(is_left(&format!("x-{}.1-ab", std::process::id()), "x-"));
        for other in ["web", "x-", "x-x", "y-4194999.1"] {
            assert!(!is_left(other, "x-"), "{other}");
        }
    }
}
