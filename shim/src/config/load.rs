//! Reading the file, and naming the line and key of whatever is wrong in it.

use std::{
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::Value;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Config, ConfigError, Deadline, MIN_MEMORY, Place, Size, error::hint};

/// Read where the runtime options name no other file; need not exist.
pub const DEFAULT_PATH: &str = "/etc/chsnap/config.toml";

/// More would leave a host nothing for its pods.
const MAX_BUILDERS: u32 = 64;

impl Config {
    /// The file named by the runtime options, which must exist; else [`DEFAULT_PATH`] if it exists; else the defaults.
    pub fn load(explicit: Option<&Path>) -> Result<Self, ConfigError> {
        let path = explicit.unwrap_or(Path::new(DEFAULT_PATH));
        match fs::read(path) {
            Ok(bytes) => Self::parse(text(&bytes, path)?, path),
            Err(error) if explicit.is_none() && error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    /// Reads `text`; `file` is for the errors.
    pub fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let source = Source { text, file };
        let tree = DeTable::parse(text).map_err(|error| source.syntax(&error))?;
        source.check_keys(&tree)?;
        let config: Self = toml::from_str(text).map_err(|error| {
            let key = error.span().and_then(|span| key_at(tree.get_ref(), span.start)).unwrap_or_default();
            ConfigError::Value { place: source.place(error.span()), key, message: one_line(&error) }
        })?;
        match config.invalid() {
            None => Ok(config),
            Some((key, message)) => {
                Err(ConfigError::Value { place: source.place(span_of(tree.get_ref(), key)), key: key.into(), message })
            }
        }
    }

    /// The first key whose value has the right type and still cannot be.
    fn invalid(&self) -> Option<(&'static str, String)> {
        // One without a slash is looked for in PATH.
        let ctr = Some(&self.snapshot.ctr).filter(|ctr| ctr.components().count() > 1);
        let paths: [(&str, Option<&PathBuf>); 8] = [
            ("vmm.cloud_hypervisor", self.vmm.cloud_hypervisor.as_ref()),
            ("vmm.qemu", self.vmm.qemu.as_ref()),
            ("guest.kernel", Some(&self.guest.kernel)),
            ("guest.initramfs", Some(&self.guest.initramfs)),
            ("share.virtiofsd", self.share.virtiofsd.as_ref()),
            ("state.dir", Some(&self.state.dir)),
            ("snapshot.dir", Some(&self.snapshot.dir)),
            ("snapshot.ctr", ctr),
        ];
        let relative = paths.into_iter().find_map(|(key, path)| {
            let path = path.filter(|path| !path.is_absolute())?;
            Some((key, format!("{path:?} is not an absolute path; the shim's working directory is the container's")))
        });
        let deadlines = [
            ("deadlines.boot", self.deadlines.boot),
            ("deadlines.agent_call", self.deadlines.agent_call),
            ("deadlines.restore", self.deadlines.restore),
            ("deadlines.ready", self.deadlines.ready),
            ("deadlines.hooks", self.deadlines.hooks),
            ("deadlines.stop", self.deadlines.stop),
        ];
        let deadline = deadlines.into_iter().find_map(|(key, value)| {
            let outside = value < Deadline::secs(1) || value > Deadline::secs(3600);
            outside.then(|| (key, format!("{value} is not between 1s and 1h")))
        });
        let invalid = relative.or(deadline).or_else(|| self.invalid_guest()).or_else(|| self.invalid_vmm());
        invalid.or_else(|| {
            let builders = self.snapshot.builders;
            (builders > MAX_BUILDERS).then(|| {
                ("snapshot.builders", format!("{builders} is more than {MAX_BUILDERS}; each takes a guest's memory"))
            })
        })
    }

    fn invalid_guest(&self) -> Option<(&'static str, String)> {
        let guest = &self.guest;
        let max = guest.max_memory;
        if guest.default_vcpus == 0 {
            return Some(("guest.default_vcpus", "0 vCPUs cannot run anything; the least is 1".into()));
        }
        if guest.max_vcpus != 0 && guest.max_vcpus < guest.default_vcpus {
            let message = format!("{} is less than default_vcpus = {}", guest.max_vcpus, guest.default_vcpus);
            return Some(("guest.max_vcpus", message));
        }
        if guest.default_memory < MIN_MEMORY {
            let message = format!("{} is too little for a guest; the least is {MIN_MEMORY}", guest.default_memory);
            return Some(("guest.default_memory", message));
        }
        if max != Size::ZERO && max < guest.default_memory {
            let message = format!("{max} is less than default_memory = {}", guest.default_memory);
            return Some(("guest.max_memory", message));
        }
        guest.cmdline.contains(char::is_control).then(|| {
            (
                "guest.cmdline",
                "holds a control character; write the kernel's words on one line, with blanks between".into(),
            )
        })
    }

    fn invalid_vmm(&self) -> Option<(&'static str, String)> {
        use super::{AcceleratorChoice, VmmChoice};
        (self.vmm.choice == VmmChoice::CloudHypervisor && self.vmm.accelerator == AcceleratorChoice::Tcg)
            .then(|| ("vmm.accelerator", "Cloud Hypervisor has no \"tcg\"; use \"kvm\", or choice = \"qemu\"".into()))
    }
}

/// What TOML is written in.
fn text<'a>(bytes: &'a [u8], file: &Path) -> Result<&'a str, ConfigError> {
    std::str::from_utf8(bytes).map_err(|error| {
        let (good, bad) = bytes.split_at(error.valid_up_to());
        let source = Source { text: std::str::from_utf8(good).unwrap_or_default(), file };
        let message = format!("the byte {:#04x} is not UTF-8", bad.first().copied().unwrap_or_default());
        ConfigError::Syntax { place: source.place(Some(good.len()..bytes.len())), message }
    })
}

struct Source<'a> {
    text: &'a str,
    file: &'a Path,
}

impl Source<'_> {
    fn place(&self, span: Option<Range<usize>>) -> Place {
        let mut start = span.map_or(0, |span| span.start).min(self.text.len());
        while !self.text.is_char_boundary(start) {
            start -= 1;
        }
        let before = &self.text[..start];
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Place {
            file: self.file.to_owned(),
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }

    /// The parser names no key that stands twice.
    fn syntax(&self, error: &toml::de::Error) -> ConfigError {
        let (place, message) = (self.place(error.span()), one_line(error));
        let twice = error.span().filter(|_| message.starts_with("duplicate key")).and_then(|span| self.text.get(span));
        match twice {
            Some(key) => ConfigError::Syntax { place, message: format!("duplicate key {key:?}") },
            None => ConfigError::Syntax { place, message },
        }
    }

    /// serde would refuse them too, but only with a list of what it expected.
    fn check_keys(&self, tree: &Spanned<DeTable<'_>>) -> Result<(), ConfigError> {
        // JSON keeps the keys that are unset by default; TOML leaves them out.
        let Ok(Value::Object(sections)) = serde_json::to_value(Config::default()) else { return Ok(()) };
        for (section, table) in tree.get_ref() {
            let name = section.get_ref().as_ref();
            let Some(keys) = sections.get(name) else {
                // A key written above its table's header is a common slip, and the table is known.
                let home = sections.iter().find(|(_, keys)| keys.get(name).is_some());
                let hint = match home {
                    Some((home, _)) => format!("it belongs below [{home}]"),
                    None => hint(name, "the tables are", sections.keys().map(String::as_str)),
                };
                return Err(ConfigError::UnknownKey {
                    place: self.place(Some(section.span())),
                    key: name.into(),
                    hint,
                });
            };
            let Value::Object(keys) = keys else { continue };
            let Some(table) = table.get_ref().as_table() else {
                if name == "vmm" && table.get_ref().is_str() {
                    continue;
                }
                let message = format!("is a table; write its keys below [{name}]");
                return Err(ConfigError::Value { place: self.place(Some(table.span())), key: name.into(), message });
            };
            if let Some(key) = table.keys().find(|key| !keys.contains_key(key.get_ref().as_ref())) {
                let hint = hint(key.get_ref(), &format!("the keys of [{name}] are"), keys.keys().map(String::as_str));
                let place = self.place(Some(key.span()));
                return Err(ConfigError::UnknownKey { place, key: format!("{name}.{}", key.get_ref()), hint });
            }
        }
        Ok(())
    }
}

/// The parser's message without the picture of the line, which the place already names.
fn one_line(error: &toml::de::Error) -> String {
    error.message().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The dotted key whose name or value covers that byte.
fn key_at(table: &DeTable<'_>, at: usize) -> Option<String> {
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref();
        let inside = |span: Range<usize>| span.contains(&at);
        match value.get_ref() {
            DeValue::Table(below) => match key_at(below, at) {
                Some(rest) => Some(format!("{name}.{rest}")),
                None => (inside(key.span()) || inside(value.span())).then(|| name.to_string()),
            },
            _ => (inside(key.span()) || inside(value.span())).then(|| name.to_string()),
        }
    })
}

/// Where the value of a dotted key stands.
fn span_of(table: &DeTable<'_>, key: &str) -> Option<Range<usize>> {
    let (name, rest) = key.split_once('.').map_or((key, None), |(name, rest)| (name, Some(rest)));
    let (_, value) = table.iter().find(|(key, _)| key.get_ref() == name)?;
    match (rest, value.get_ref()) {
        (Some(rest), DeValue::Table(below)) => span_of(below, rest),
        _ => Some(value.span()),
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
