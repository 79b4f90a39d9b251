//! The runtime options that come with Create: of them, only the configuration concerns this shim.

use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::{
    Message, UnknownValueRef, well_known_types::any::Any, well_known_types::empty::Empty,
};
use thiserror::Error;

use super::error::TaskError;
use crate::config::Config;

/// `runtimeoptions.v1.Options`: what `ctr --runtime-config-path` and CRI's `ConfigPath` arrive as.
const TYPE: &str = "runtimeoptions.v1.Options";
const CONFIG_PATH: u32 = 2;
const CONFIG_BODY: u32 = 3;

/// Where a configuration comes from that was in the options themselves, in errors.
const BODY: &str = "config_body of the runtime options";
/// containerd's own key in an options table, which comes with the rest of it.
const TYPE_KEY: &str = "TypeUrl";

/// Options that cannot be used.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// Not the message it claims to be.
    #[error("{TYPE} cannot be decoded")]
    Decode(#[source] containerd_shim_protos::protobuf::Error),
    /// A field is no text.
    #[error("{field} in {TYPE} is not UTF-8")]
    Utf8 {
        /// Which.
        field: &'static str,
    },
    /// A path that depends on where somebody stood.
    #[error("config_path {0:?} is not absolute")]
    Relative(PathBuf),
}

/// What the options name: a file, or the settings themselves.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    Nothing,
    Path(PathBuf),
    Body(String),
}

/// The configuration: of the file that the options name, of the options themselves, or of the default file.
///
/// # Errors
/// Where the options or the configuration cannot be used.
pub fn config(options: Option<&Any>) -> Result<Config, TaskError> {
    Ok(match named(options)? {
        Named::Nothing => Config::load(None)?,
        Named::Path(path) => Config::load(Some(&path))?,
        Named::Body(text) => Config::parse(&text, Path::new(BODY))?,
    })
}

/// Options of other runtimes are none of ours. A path goes before a body, of which containerd sends only one: the whole
/// options table of its configuration becomes the body where that has no `ConfigPath`.
fn named(options: Option<&Any>) -> Result<Named, OptionsError> {
    let Some(options) = options.filter(|o| o.type_url.ends_with(TYPE)) else { return Ok(Named::Nothing) };
    // A message of three strings is not worth a generated type: read its fields as unknown ones.
    let fields = Empty::parse_from_bytes(&options.value).map_err(OptionsError::Decode)?;
    let (mut path, mut body) = (None, None);
    for (number, value) in fields.special_fields.unknown_fields().iter() {
        let text = |field, bytes| std::str::from_utf8(bytes).map_err(|_| OptionsError::Utf8 { field });
        match (number, value) {
            (CONFIG_PATH, UnknownValueRef::LengthDelimited(bytes)) if !bytes.is_empty() => {
                path = Some(PathBuf::from(text("config_path", bytes)?));
            }
            (CONFIG_BODY, UnknownValueRef::LengthDelimited(bytes)) if !bytes.is_empty() => {
                body = Some(without_type(text("config_body", bytes)?));
            }
            _ => {}
        }
    }
    match (path, body) {
        (Some(path), _) if path.is_relative() => Err(OptionsError::Relative(path)),
        (Some(path), _) => Ok(Named::Path(path)),
        (None, Some(body)) if !body.trim().is_empty() => Ok(Named::Body(body)),
        (None, _) => Ok(Named::Nothing),
    }
}

/// Lines keep their numbers, for the errors.
fn without_type(body: &str) -> String {
    let is_type = |line: &str| line.split_once('=').is_some_and(|(key, _)| key.trim() == TYPE_KEY);
    body.lines().map(|line| if is_type(line) { "" } else { line }).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::{super::error::chain, *};

    fn any(fields: &[(u8, &str)]) -> Any {
        let mut any = Any::new();
        any.type_url = TYPE.into();
        for (number, text) in fields {
            any.value.push(number << 3 | 2);
            any.value.push(u8::try_from(text.len()).unwrap());
            any.value.extend_from_slice(text.as_bytes());
        }
        any
    }

    #[test]
    fn the_path_is_found() {
        let path = Named::Path("/etc/chsnap/other.toml".into());
        let options = any(&[(1, "io.chsnap"), (2, "/etc/chsnap/other.toml")]);
        assert_eq!(named(Some(&options)).unwrap(), path);
        let both = any(&[(2, "/etc/chsnap/other.toml"), (3, "a = 1")]);
        assert_eq!(named(Some(&both)).unwrap(), path);
        assert_eq!(named(None).unwrap(), Named::Nothing);
        let mut runc = any(&[(2, "/x")]);
        runc.type_url = "containerd.runc.v1.Options".into();
        assert_eq!(named(Some(&runc)).unwrap(), Named::Nothing);
    }

    #[test]
    fn settings_in_the_options_are_a_configuration() {
        let options = any(&[(3, "TypeUrl = 'x'\n[guest]\ndefault_memory = '1GiB'\n")]);
        assert_eq!(config(Some(&options)).unwrap().guest.default_memory.to_string(), "1GiB");
        // An options table with nothing in it that concerns anybody.
        assert_eq!(named(Some(&any(&[(3, "TypeUrl = 'x'\n")]))).unwrap(), Named::Nothing);
        let error = config(Some(&any(&[(3, "TypeUrl = 'x'\nmemory = 1\n")]))).unwrap_err();
        let text = chain(&error);
        assert!(text.contains("config_body of the runtime options:2:1: memory: unknown key"), "{text}");
    }

    #[test]
    fn bad_options_are_errors() {
        assert!(matches!(named(Some(&any(&[(2, "x.toml")]))), Err(OptionsError::Relative(_))));
        let mut broken = any(&[]);
        broken.value = vec![0x12, 0xff];
        assert!(matches!(named(Some(&broken)), Err(OptionsError::Decode(_))));
        broken.value = vec![0x1a, 1, 0xff];
        assert!(matches!(named(Some(&broken)), Err(OptionsError::Utf8 { field: "config_body" })));
    }
}
