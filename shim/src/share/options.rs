//! A mount as containerd describes it: type, source and mount(8) options.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use thiserror::Error;

use crate::text::shortened;

/// One of a container's root mounts.
#[derive(Debug, Clone)]
pub struct RootMount {
    /// File system type, e.g. `overlay` or `bind`.
    pub fstype: String,
    /// Source: a directory, a device, or a name that means nothing (overlay).
    pub source: String,
    /// Options as in mount(8).
    pub options: Vec<String>,
}

/// A mount failed.
#[derive(Debug, Error)]
pub enum MountError {
    /// The source of a bind is not there.
    #[error("{source_path:?} cannot be read")]
    Source {
        /// The source.
        source_path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// mount(2) said no.
    #[error("mount of type {fstype:?} with source {from:?} and options {options:?} failed")]
    Mount {
        /// Type.
        fstype: String,
        /// Source.
        from: String,
        /// Options.
        options: String,
        /// Why.
        #[source]
        source: nix::Error,
    },
    /// Options that do not fit in the page that mount(2) takes, even with relative layer paths.
    #[error("the overlay has too many layers: {bytes} bytes of options, mount(2) takes {limit}")]
    TooLong {
        /// What is needed.
        bytes: usize,
        /// What there is.
        limit: usize,
    },
    /// An option that needs something this shim does not do.
    #[error("mount option {option:?} of {from:?} is not supported: {hint}")]
    Unsupported {
        /// Which.
        option: String,
        /// Of what.
        from: String,
        /// What to do.
        hint: &'static str,
    },
}

const PAGE: usize = 4096;
/// Most of the options that an error shows, characters.
const SHOWN: usize = 512;

/// mount(8)'s words for flags; the second value tells whether the word clears the flag.
const FLAGS: &[(&str, MsFlags, bool)] = &[
    ("ro", MsFlags::MS_RDONLY, false),
    ("rw", MsFlags::MS_RDONLY, true),
    ("nosuid", MsFlags::MS_NOSUID, false),
    ("suid", MsFlags::MS_NOSUID, true),
    ("nodev", MsFlags::MS_NODEV, false),
    ("dev", MsFlags::MS_NODEV, true),
    ("noexec", MsFlags::MS_NOEXEC, false),
    ("exec", MsFlags::MS_NOEXEC, true),
    ("sync", MsFlags::MS_SYNCHRONOUS, false),
    ("async", MsFlags::MS_SYNCHRONOUS, true),
    ("dirsync", MsFlags::MS_DIRSYNC, false),
    ("noatime", MsFlags::MS_NOATIME, false),
    ("atime", MsFlags::MS_NOATIME, true),
    ("nodiratime", MsFlags::MS_NODIRATIME, false),
    ("diratime", MsFlags::MS_NODIRATIME, true),
    ("relatime", MsFlags::MS_RELATIME, false),
    ("norelatime", MsFlags::MS_RELATIME, true),
    ("strictatime", MsFlags::MS_STRICTATIME, false),
    ("nostrictatime", MsFlags::MS_STRICTATIME, true),
    ("bind", MsFlags::MS_BIND, false),
    ("rbind", MsFlags::MS_BIND.union(MsFlags::MS_REC), false),
    ("defaults", MsFlags::empty(), false),
];

/// Words for a bind and everything mounted below it, for which mount(2) has no flags.
const RECURSIVE: &[(&str, MsFlags)] = &[
    ("rro", MsFlags::MS_RDONLY),
    ("rnosuid", MsFlags::MS_NOSUID),
    ("rnodev", MsFlags::MS_NODEV),
    ("rnoexec", MsFlags::MS_NOEXEC),
];

/// Words for propagation, set by a call of their own.
const PROPAGATION: &[(&str, MsFlags)] = &[
    ("private", MsFlags::MS_PRIVATE),
    ("rprivate", MsFlags::MS_PRIVATE.union(MsFlags::MS_REC)),
    ("slave", MsFlags::MS_SLAVE),
    ("rslave", MsFlags::MS_SLAVE.union(MsFlags::MS_REC)),
    ("shared", MsFlags::MS_SHARED),
    ("rshared", MsFlags::MS_SHARED.union(MsFlags::MS_REC)),
    ("unbindable", MsFlags::MS_UNBINDABLE),
    ("runbindable", MsFlags::MS_UNBINDABLE.union(MsFlags::MS_REC)),
];

/// Options, sorted by what mount(2) does with them.
#[derive(Debug)]
pub(super) struct Parsed {
    /// For the mount itself.
    pub flags: MsFlags,
    /// For what is mounted below it as well.
    pub recursive: MsFlags,
    /// Other words, for the file system.
    pub data: Vec<String>,
}

/// Sorts `options`. Propagation words are dropped: the share is a slave of the host, and the guest's own mounts
/// never go back.
pub(super) fn parse<'a>(options: impl IntoIterator<Item = &'a String>) -> Parsed {
    let mut parsed = Parsed { flags: MsFlags::empty(), recursive: MsFlags::empty(), data: Vec::new() };
    for word in options {
        if let Some((_, flag, clears)) = FLAGS.iter().find(|(name, ..)| name == word) {
            parsed.flags.set(*flag, !clears);
        } else if let Some((_, flag)) = RECURSIVE.iter().find(|(name, _)| name == word) {
            parsed.flags |= *flag;
            parsed.recursive |= *flag;
        } else if !PROPAGATION.iter().any(|(name, _)| name == word) {
            parsed.data.push(word.clone());
        }
    }
    parsed
}

/// What mount(2) would not take for a bind, and ignores: `readonly` for `ro` would leave it open.
#[must_use]
pub fn unknown_of_bind(options: &[String]) -> Option<&String> {
    let shares = |word: &&String| matches!(word.as_str(), "shared" | "rshared");
    options.iter().find(shares).or_else(|| {
        let unknown = parse(options).data;
        options.iter().find(|word| unknown.contains(word))
    })
}

/// All options that a bind can have here.
pub fn words_of_bind() -> impl Iterator<Item = &'static str> {
    let flags = FLAGS.iter().map(|(word, ..)| *word).chain(RECURSIVE.iter().map(|(word, _)| *word));
    flags.chain(PROPAGATION.iter().map(|(word, _)| *word)).filter(|word| !matches!(*word, "shared" | "rshared"))
}

/// What of a bind's options the share cannot carry to the guest, which has to see to them itself, as words for it.
#[must_use]
pub fn for_guest(options: &[String]) -> Vec<&'static str> {
    let flags = parse(options).flags;
    let words = [(MsFlags::MS_NOSUID, "nosuid"), (MsFlags::MS_NODEV, "nodev"), (MsFlags::MS_NOEXEC, "noexec")];
    words.into_iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, word)| word).collect()
}

/// Whether a bind is closed for writing.
#[must_use]
pub fn is_read_only(options: &[String]) -> bool {
    parse(options).flags.contains(MsFlags::MS_RDONLY)
}

impl RootMount {
    /// Mounts on `target`.
    ///
    /// # Errors
    /// See [`MountError`].
    pub fn mount(&self, target: &Path) -> Result<(), MountError> {
        let Parsed { mut flags, data, .. } = parse(&self.options);
        if let Some(option) = data.iter().find(|o| *o == "loop") {
            return Err(MountError::Unsupported {
                option: option.clone(),
                from: self.source.clone(),
                hint: "use the overlayfs or the native snapshotter",
            });
        }
        if flags.contains(MsFlags::MS_BIND) || self.fstype == "bind" {
            flags |= MsFlags::MS_BIND;
            let source_path = PathBuf::from(&self.source);
            fs::metadata(&source_path).map_err(|source| MountError::Source { source_path, source })?;
        }
        let options = data.join(",");
        if options.len() < PAGE {
            self.call(target, flags, &options)?;
        } else {
            self.call_relative(target, flags, &data)?;
        }
        // mount(2) ignores the other flags of a bind; they take a second call.
        let rest = flags - MsFlags::MS_BIND - MsFlags::MS_REC;
        if flags.contains(MsFlags::MS_BIND) && !rest.is_empty() {
            let remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | rest;
            mount(None::<&str>, target, None::<&str>, remount, None::<&str>).map_err(|e| self.failed(&options, e))?;
        }
        Ok(())
    }

    fn call(&self, target: &Path, flags: MsFlags, options: &str) -> Result<(), MountError> {
        mount(Some(self.source.as_str()), target, Some(self.fstype.as_str()), flags, Some(options))
            .map_err(|e| self.failed(options, e))
    }

    /// Many layers: relative to the directory they share, their paths are short enough for more of them. The working
    /// directory belongs to a thread of its own, so the shim's does not move.
    fn call_relative(&self, target: &Path, flags: MsFlags, data: &[String]) -> Result<(), MountError> {
        let (base, options) = relative_layers(data);
        if options.len() >= PAGE {
            return Err(MountError::TooLong { bytes: options.len(), limit: PAGE - 1 });
        }
        thread::scope(|scope| {
            let mounting = scope.spawn(|| {
                unshare(CloneFlags::CLONE_FS).map_err(|e| self.failed(&options, e))?;
                nix::unistd::chdir(&base).map_err(|e| self.failed(&options, e))?;
                self.call(target, flags, &options)
            });
            mounting.join().unwrap_or_else(|_| Err(self.failed(&options, nix::Error::EIO)))
        })
    }

    fn failed(&self, options: &str, source: nix::Error) -> MountError {
        // Up to a page of layers; which of them it is, the kernel does not say.
        let options = shortened(options, SHOWN);
        MountError::Mount { fstype: self.fstype.clone(), from: self.source.clone(), options, source }
    }
}

/// Splits off the directory that all lower layers share; the options name them relative to it.
fn relative_layers(data: &[String]) -> (PathBuf, String) {
    let layers: Vec<&str> =
        data.iter().filter_map(|o| o.strip_prefix("lowerdir=")).flat_map(|l| l.split(':')).collect();
    let mut base = layers.first().map_or("/", |l| l).to_string();
    while !layers.iter().all(|l| l.strip_prefix(&base).is_some_and(|rest| rest.starts_with('/'))) {
        base.truncate(base.rfind('/').unwrap_or(0));
        if base.is_empty() {
            break;
        }
    }
    let cut = base.len() + 1;
    let short: Vec<String> = data
        .iter()
        .map(|option| match option.strip_prefix("lowerdir=") {
            Some(l) => format!("lowerdir={}", l.split(':').map(|p| &p[cut..]).collect::<Vec<_>>().join(":")),
            None => option.clone(),
        })
        .collect();
    (if base.is_empty() { "/".into() } else { base.into() }, short.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn options_are_sorted() {
        let parsed = parse(&strings(&["rbind", "ro", "rprivate", "size=64k", "nosuid", "suid"]));
        assert_eq!(parsed.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY);
        assert_eq!(parsed.data, ["size=64k"]);
        let parsed = parse(&strings(&["rbind", "rro", "noexec"]));
        assert_eq!(parsed.recursive, MsFlags::MS_RDONLY);
        assert_eq!(parsed.flags, MsFlags::MS_BIND | MsFlags::MS_REC | MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC);
    }

    #[test]
    fn what_a_bind_does_not_have_is_named() {
        let unknown = |words: &[&str]| unknown_of_bind(&strings(words)).cloned();
        assert_eq!(unknown(&["rbind", "rprivate", "rro", "nosuid", "relatime", "nostrictatime"]), None);
        assert_eq!(unknown(&["rbind", "readonly"]).as_deref(), Some("readonly"));
        assert_eq!(unknown(&["bind", "rshared"]).as_deref(), Some("rshared"));
    }

    #[test]
    fn the_guest_sees_to_what_the_share_does_not_carry() {
        assert_eq!(for_guest(&strings(&["rbind", "ro", "nosuid", "rnoexec", "suid"])), ["noexec"]);
        assert!(is_read_only(&strings(&["rro"])) && !is_read_only(&strings(&["ro", "rw"])));
    }

    #[test]
    fn layers_become_relative() {
        let (base, options) = relative_layers(&strings(&[
            "workdir=/s/9/work",
            "upperdir=/s/9/fs",
            "lowerdir=/s/snapshots/12/fs:/s/snapshots/3/fs",
        ]));
        assert_eq!(base, Path::new("/s/snapshots"));
        assert_eq!(options, "workdir=/s/9/work,upperdir=/s/9/fs,lowerdir=12/fs:3/fs");
    }

    #[test]
    fn a_single_layer_and_layers_that_share_nothing() {
        let (base, options) = relative_layers(&strings(&["lowerdir=/a/b:/c/d"]));
        assert_eq!((base.to_str().unwrap(), options.as_str()), ("/", "lowerdir=a/b:c/d"));
        let (base, options) = relative_layers(&strings(&["lowerdir=/a/b"]));
        assert_eq!((base.to_str().unwrap(), options.as_str()), ("/a", "lowerdir=b"));
    }

    #[test]
    fn a_missing_source_is_named() {
        let m = RootMount { fstype: "bind".into(), source: "/no/such".into(), options: strings(&["rbind"]) };
        let error = m.mount(Path::new("/tmp")).unwrap_err();
        assert_eq!(error.to_string(), "\"/no/such\" cannot be read");
    }
}
