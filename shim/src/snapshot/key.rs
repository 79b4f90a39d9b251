//! What has to match for a snapshot to be used. A key is the digest of all of it, so that a change of any one input
//! leads to another key, and a snapshot that does not fit is never found.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::digest::hex;
use crate::vmm::{Accelerator, Rung, VmmKind};

/// Raised when what a snapshot consists of changes.
const FORMAT: u32 = 2;
/// Hexadecimal digits.
const LENGTH: usize = 64;

/// The name of a snapshot: 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key(String);

impl Key {
    /// Enough of it for a person.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[..12]
    }

    /// All of it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Key> for String {
    fn from(key: Key) -> Self {
        key.0
    }
}

impl TryFrom<String> for Key {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        match digits && text.len() == LENGTH {
            true => Ok(Self(text)),
            false => Err(format!("{text:?} is no key of a snapshot: {LENGTH} hexadecimal digits are")),
        }
    }
}

impl FromStr for Key {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.to_owned().try_into()
    }
}

/// What a snapshot saves the start of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Kernel and agent; for any image.
    Base,
    /// The image's process, initialised.
    Image,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Base => "base",
            Self::Image => "image",
        })
    }
}

/// Everything that must match. Digests are of contents, never of names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inputs {
    /// What it saves the start of.
    pub kind: Kind,
    /// The image's process; none in a base snapshot.
    pub process: Option<Process>,
    /// vCPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_mib: u64,
    /// Digest of the kernel.
    pub kernel: String,
    /// Digest of the initramfs, with the agent in it.
    pub initramfs: String,
    /// Words that the configuration adds to the kernel's command line.
    pub cmdline: Vec<String>,
    /// Who made it, and on what.
    pub vmm: VmmBuild,
    /// virtiofsd's version, and the digest of its program.
    pub virtiofsd: (String, String),
    /// virtiofsd's cache mode.
    pub cache: String,
    /// The guest's CPU mask.
    pub rung: Rung,
    /// `uname -r` and `uname -v` of the host.
    pub host_kernel: String,
    /// The host's CPU, as far as guests see it.
    pub cpu: String,
    /// The version of chsnap and a digest of its sources, which say how machines are put together.
    pub chsnap: String,
}

/// A build of a VMM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmBuild {
    /// Which.
    pub kind: VmmKind,
    /// What it runs guests on.
    pub accelerator: Accelerator,
    /// What it says.
    pub version: String,
    /// Digest of its program.
    pub program: String,
}

/// What runs in an image snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The chain ID of the image's layers, which is their content; never a tag.
    pub chain_id: String,
    /// The process's arguments.
    pub args: Vec<String>,
    /// Its working directory.
    pub cwd: String,
    /// `uid:gid` and further groups.
    pub user: String,
    /// Its environment, without what differs from pod to pod.
    pub env: BTreeMap<String, String>,
    /// When it is ready.
    pub ready: String,
    /// Its streams.
    pub streams: String,
    /// Digest of the whole specification, without what differs from pod to pod.
    pub rest: String,
}

impl Inputs {
    /// Their key.
    #[must_use]
    pub fn key(&self) -> Key {
        // The order of fields is the structs', that of maps is sorted; nothing in it fails to serialize.
        let text = serde_json::to_vec(&(FORMAT, self)).unwrap_or_default();
        Key(hex(&Sha256::digest(text)))
    }

    /// The names of those that are not the same in `other`.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let leaves = |inputs: &Self| match serde_json::to_value(inputs) {
            Ok(Value::Object(fields)) => fields.into_iter().flat_map(leaves_of).collect::<BTreeMap<_, _>>(),
            _ => BTreeMap::new(),
        };
        let (ours, theirs) = (leaves(self), leaves(other));
        let names: BTreeSet<_> = ours.keys().chain(theirs.keys()).collect();
        names.into_iter().filter(|name| ours.get(*name) != theirs.get(*name)).cloned().collect()
    }
}

/// Structures by their parts.
fn leaves_of((name, value): (String, Value)) -> Vec<(String, Value)> {
    match value {
        Value::Object(parts) => parts.into_iter().map(|(part, value)| (format!("{name}.{part}"), value)).collect(),
        value => vec![(name, value)],
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn inputs() -> Inputs {
        Inputs {
            kind: Kind::Image,
            process: Some(Process {
                chain_id: "sha256:1".into(),
                args: vec!["python3".into(), "app.py".into()],
                cwd: "/".into(),
                user: "0:0".into(),
                env: BTreeMap::from([("A".into(), "1".into())]),
                ready: "notify".into(),
                streams: "stdout".into(),
                rest: "r".into(),
            }),
            vcpus: 1,
            memory_mib: 512,
            kernel: "k".into(),
            initramfs: "i".into(),
            cmdline: vec![],
            vmm: VmmBuild {
                kind: VmmKind::Qemu,
                accelerator: Accelerator::Tcg,
                version: "10.0.2".into(),
                program: "q".into(),
            },
            virtiofsd: ("1.14.0".into(), "v".into()),
            cache: "auto".into(),
            rung: Rung::Standard,
            host_kernel: "6.1 #1".into(),
            cpu: "model".into(),
            chsnap: "0.1.0".into(),
        }
    }

    #[test]
    fn any_input_changes_the_key_and_nothing_else_does() {
        type Change = fn(&mut Inputs);
        fn process(inputs: &mut Inputs) -> &mut Process {
            inputs.process.as_mut().unwrap()
        }
        let changes: [Change; 25] = [
            |i| i.kind = Kind::Base,
            |i| i.process = None,
            |i| process(i).chain_id = "sha256:2".into(),
            |i| process(i).args = vec!["python3 app.py".into()],
            |i| process(i).cwd = "/app".into(),
            |i| process(i).user = "1:0".into(),
            |i| process(i).env = BTreeMap::from([("A".into(), "2".into())]),
            |i| process(i).ready = "tcp://:80".into(),
            |i| process(i).streams = "terminal".into(),
            |i| process(i).rest = "s".into(),
            |i| i.vcpus = 2,
            |i| i.memory_mib = 513,
            |i| i.kernel = "l".into(),
            |i| i.initramfs = "j".into(),
            |i| i.cmdline = vec!["debug".into()],
            |i| i.vmm.kind = VmmKind::CloudHypervisor,
            |i| i.vmm.accelerator = Accelerator::Kvm,
            |i| i.vmm.version = "10.0.3".into(),
            |i| i.vmm.program = "r".into(),
            |i| i.virtiofsd = ("1.14.0".into(), "w".into()),
            |i| i.cache = "never".into(),
            |i| i.rung = Rung::NoPmu,
            |i| i.host_kernel = "6.1 #2".into(),
            |i| i.cpu = "other".into(),
            |i| i.chsnap = "0.1.1".into(),
        ];
        let mut keys = vec![inputs().key()];
        for change in changes {
            let mut changed = inputs();
            change(&mut changed);
            keys.push(changed.key());
        }
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count);
        assert_eq!(inputs().key(), inputs().key());
        // Every field is named above: one more here makes this fail until its change is, too.
        let fields = serde_json::to_value(inputs()).unwrap();
        let leaves = |value: &serde_json::Value| value.as_object().unwrap().len();
        assert_eq!(leaves(&fields) + leaves(&fields["vmm"]) + leaves(&fields["process"]) - 1, count - 1);
    }

    #[test]
    fn differences_are_told_by_name() {
        let mut other = inputs();
        other.vmm.version = "10.0.3".into();
        other.cpu = "other".into();
        other.process.as_mut().unwrap().env.clear();
        assert_eq!(inputs().differences(&other), ["cpu", "process.env", "vmm.version"]);
        assert_eq!(inputs().differences(&inputs()), [""; 0]);
    }

    #[test]
    fn a_key_is_64_digits() {
        let key = inputs().key();
        assert_eq!(key.as_str().parse::<Key>().unwrap(), key);
        assert_eq!(key.short().len(), 12);
        for text in ["", "../x", &key.as_str().to_uppercase(), &key.as_str()[1..]] {
            assert!(text.parse::<Key>().is_err(), "{text}");
        }
    }
}
