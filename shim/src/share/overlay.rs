//! Roots that a snapshotter put together with overlayfs: what they consist of, and how a layer is put in between.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::RootMount;
use crate::files;

const LOWER: &str = "lowerdir=";
const UPPER: &str = "upperdir=";
const WORK: &str = "workdir=";

/// A container's root of layers and its own directory on top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// The image's layers, the topmost first.
    pub lowers: Vec<PathBuf>,
    /// What the container writes.
    pub upper: PathBuf,
}

impl Overlay {
    /// What `mounts` are, if they are no more than an overlay that can be written to.
    #[must_use]
    pub fn of(mounts: &[RootMount]) -> Option<Self> {
        let [mount] = mounts else { return None };
        let value = |name| mount.options.iter().find_map(|option| option.strip_prefix(name));
        // An escaped name is not taken apart.
        let (lower, upper) = (value(LOWER).filter(|lower| !lower.contains('\\'))?, value(UPPER)?);
        let overlay = Self { lowers: lower.split(':').map(PathBuf::from).collect(), upper: upper.into() };
        let plain = overlay.lowers.iter().all(|lower| lower.is_absolute());
        (mount.fstype == "overlay" && plain && value(WORK).is_some()).then_some(overlay)
    }

    /// The mount that puts `upper` and its `work` directory on top of `lowers`.
    #[must_use]
    pub fn mount(lowers: &[PathBuf], upper: &Path, work: &Path) -> RootMount {
        let lowers: Vec<_> = lowers.iter().map(|lower| lower.display().to_string().replace(':', "\\:")).collect();
        let options = vec![
            format!("{WORK}{}", work.display()),
            format!("{UPPER}{}", upper.display()),
            format!("{LOWER}{}", lowers.join(":")),
        ];
        RootMount { fstype: "overlay".into(), source: "overlay".into(), options }
    }

    /// `mounts`, with `layer` between the image's layers and what the container writes.
    #[must_use]
    pub fn with(mounts: &[RootMount], layer: &Path) -> Vec<RootMount> {
        let layer = layer.display().to_string().replace(':', "\\:");
        let mut mounts = mounts.to_vec();
        for option in mounts.iter_mut().flat_map(|mount| &mut mount.options) {
            if let Some(lower) = option.strip_prefix(LOWER) {
                *option = format!("{LOWER}{layer}:{lower}");
            }
        }
        mounts
    }

    /// Whether nothing was written yet.
    ///
    /// # Errors
    /// Where the directory cannot be read.
    pub fn is_untouched(&self) -> io::Result<bool> {
        Ok(fs::read_dir(&self.upper)?.next().is_none())
    }

    /// Takes back what was written to one that was untouched.
    ///
    /// # Errors
    /// Where something cannot be removed.
    pub fn restore(&self) -> io::Result<()> {
        files::empty(&self.upper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(options: &[&str]) -> RootMount {
        let options = options.iter().map(ToString::to_string).collect();
        RootMount { fstype: "overlay".into(), source: "overlay".into(), options }
    }

    #[test]
    fn only_a_plain_overlay_is_one() {
        let good = mount(&["index=off", "workdir=/s/3/work", "upperdir=/s/3/fs", "lowerdir=/s/2/fs:/s/1/fs"]);
        let overlay = Overlay::of(std::slice::from_ref(&good)).unwrap();
        assert_eq!(overlay.lowers, [Path::new("/s/2/fs"), Path::new("/s/1/fs")]);
        assert_eq!(overlay.upper, Path::new("/s/3/fs"));
        let with = Overlay::with(std::slice::from_ref(&good), Path::new("/var/a:b"));
        assert_eq!(with[0].options[3], r"lowerdir=/var/a\:b:/s/2/fs:/s/1/fs");
        assert_eq!(with[0].options[..3], good.options[..3]);
        let none: [&[RootMount]; 5] = [
            &[],
            &[good.clone(), good.clone()],
            &[mount(&["lowerdir=/s/2/fs:/s/1/fs", "ro"])],
            &[mount(&["workdir=/w", "upperdir=/u", r"lowerdir=/a\:b"])],
            &[RootMount { fstype: "bind".into(), ..good.clone() }],
        ];
        for mounts in none {
            assert_eq!(Overlay::of(mounts), None, "{mounts:?}");
        }
        let made = Overlay::mount(&overlay.lowers, Path::new("/u"), Path::new("/w"));
        assert_eq!(Overlay::of(&[made]).unwrap(), Overlay { upper: "/u".into(), ..overlay });
    }

    #[test]
    fn what_was_written_is_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let overlay = Overlay { lowers: vec![], upper: dir.path().into() };
        assert!(overlay.is_untouched().unwrap());
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("c"), "").unwrap();
        assert!(!overlay.is_untouched().unwrap());
        overlay.restore().unwrap();
        assert!(overlay.is_untouched().unwrap());
    }
}
