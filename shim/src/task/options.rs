//! The runtime options that come with Create: of them, only the path of the configuration concerns this shim.

use std::path::PathBuf;

use containerd_shim_protos::protobuf::{
    Message, UnknownValueRef, well_known_types::any::Any, well_known_types::empty::Empty,
};
use thiserror::Error;

/// `runtimeoptions.v1.Options`: what `ctr --runtime-config-path` and CRI's `ConfigPath` arrive as.
const TYPE: &str = "runtimeoptions.v1.Options";
const CONFIG_PATH: u32 = 2;
const CONFIG_BODY: u32 = 3;

/// Options that cannot be used.
#[derive(Debug, Error)]
pub enum OptionsError {
    /// Not the message it claims to be.
    #[error("{TYPE} cannot be decoded")]
    Decode(#[source] containerd_shim_protos::protobuf::Error),
    /// The path is no text.
    #[error("config_path in {TYPE} is not UTF-8")]
    Utf8,
    /// Settings inside the message.
    #[error("{TYPE} carries a config_body; this shim reads a file: give ConfigPath")]
    Body,
    /// A path that depends on where somebody stood.
    #[error("config_path {0:?} is not absolute")]
    Relative(PathBuf),
}

/// The configuration's path, where the options name one. Options of other runtimes are none of ours.
///
/// # Errors
/// See [`OptionsError`].
pub fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>, OptionsError> {
    let Some(options) = options.filter(|o| o.type_url.ends_with(TYPE)) else { return Ok(None) };
    // A message of three strings is not worth a generated type: read its fields as unknown ones.
    let fields = Empty::parse_from_bytes(&options.value).map_err(OptionsError::Decode)?;
    let mut path = None;
    for (number, value) in fields.special_fields.unknown_fields().iter() {
        match (number, value) {
            (CONFIG_PATH, UnknownValueRef::LengthDelimited(bytes)) if !bytes.is_empty() => {
                let text = std::str::from_utf8(bytes).map_err(|_| OptionsError::Utf8)?;
                path = Some(PathBuf::from(text));
            }
            (CONFIG_BODY, UnknownValueRef::LengthDelimited(bytes)) if !bytes.is_empty() => {
                return Err(OptionsError::Body);
            }
            _ => {}
        }
    }
    match path {
        Some(path) if path.is_relative() => Err(OptionsError::Relative(path)),
        path => Ok(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let options = any(&[(1, "io.chsnap"), (2, "/etc/chsnap/other.toml")]);
        assert_eq!(config_path(Some(&options)).unwrap().unwrap().to_str(), Some("/etc/chsnap/other.toml"));
        assert!(config_path(None).unwrap().is_none());
        let mut runc = any(&[(2, "/x")]);
        runc.type_url = "containerd.runc.v1.Options".into();
        assert!(config_path(Some(&runc)).unwrap().is_none());
    }

    #[test]
    fn bad_options_are_errors() {
        assert!(matches!(config_path(Some(&any(&[(2, "x.toml")]))), Err(OptionsError::Relative(_))));
        assert!(matches!(config_path(Some(&any(&[(3, "a = 1")]))), Err(OptionsError::Body)));
        let mut broken = any(&[]);
        broken.value = vec![0x12, 0xff];
        assert!(matches!(config_path(Some(&broken)), Err(OptionsError::Decode(_))));
    }
}
