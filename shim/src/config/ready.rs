//! `io.chsnap.ready`: how a container tells that its process has initialised.

use std::{
    fmt,
    path::{Component, PathBuf},
};

use serde::{Deserialize, Serialize};

/// The sign of readiness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Ready {
    /// `READY=1` as of `sd_notify`.
    Notify,
    /// An HTTP status from 200 to 399.
    Http {
        /// On the guest's loopback.
        port: u16,
        /// Starts with a slash.
        path: String,
    },
    /// A TCP connection is accepted.
    Tcp {
        /// On the guest's loopback.
        port: u16,
    },
    /// The file exists.
    File {
        /// Absolute, in the container.
        path: PathBuf,
    },
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Notify => f.write_str("notify"),
            Self::Http { port, path } => write!(f, "http://:{port}{path}"),
            Self::Tcp { port } => write!(f, "tcp://:{port}"),
            Self::File { path } => write!(f, "file://{}", path.display()),
        }
    }
}

impl From<Ready> for String {
    fn from(ready: Ready) -> Self {
        ready.to_string()
    }
}

impl std::str::FromStr for Ready {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text)
    }
}

impl TryFrom<String> for Ready {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text)
    }
}

impl Ready {
    /// The error says what is wrong.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if text == "notify" {
            return Ok(Self::Notify);
        }
        let form = || "use notify, http://:8080/path, tcp://:8080 or file:///path".to_owned();
        let (scheme, rest) = text.split_once("://").ok_or_else(form)?;
        match scheme {
            "http" => {
                let (authority, path) = rest.find('/').map_or((rest, "/"), |slash| rest.split_at(slash));
                if path.contains(|c: char| c.is_control() || c == ' ') {
                    return Err("the path holds a blank or a control character; percent-encode it".into());
                }
                Ok(Self::Http { port: port(authority)?, path: path.to_owned() })
            }
            "tcp" => Ok(Self::Tcp { port: port(rest)? }),
            "file" => {
                let path = PathBuf::from(rest);
                let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
                if !path.is_absolute() || !plain || rest.ends_with('/') {
                    return Err("the file needs an absolute path without \"..\", such as file:///run/ready".into());
                }
                Ok(Self::File { path })
            }
            _ => Err(form()),
        }
    }
}

/// The host part stays empty: only the container itself is asked.
fn port(authority: &str) -> Result<u16, String> {
    let digits =
        authority.strip_prefix(':').ok_or("leave the host out: only the container itself is asked (\":8080\")")?;
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{digits:?} is not a port"));
    }
    digits.parse().ok().filter(|port| *port != 0).ok_or_else(|| format!("port {digits:?} is not between 1 and 65535"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_read() {
        assert_eq!(Ready::parse("notify"), Ok(Ready::Notify));
        assert_eq!(
            Ready::parse("http://:8080/healthz?a=b"),
            Ok(Ready::Http { port: 8080, path: "/healthz?a=b".into() })
        );
        assert_eq!(Ready::parse("http://:80"), Ok(Ready::Http { port: 80, path: "/".into() }));
        assert_eq!(Ready::parse("tcp://:1"), Ok(Ready::Tcp { port: 1 }));
        assert_eq!(Ready::parse("file:///run/ready"), Ok(Ready::File { path: "/run/ready".into() }));
        for text in ["notify", "http://:8080/healthz?a=b", "tcp://:1", "file:///run/ready"] {
            assert_eq!(Ready::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for (text, error) in [
            ("", "use notify"),
            ("Notify", "use notify"),
            ("https://:1/", "use notify"),
            ("http://localhost:80/", "leave the host out"),
            ("http://:80/a b", "percent-encode"),
            ("tcp://:0", "not between"),
            ("tcp://:70000", "not between"),
            ("tcp://:", "not between"),
            ("tcp://:+1", "not a port"),
            ("file://run/ready", "absolute path"),
            ("file:///run/../etc", "absolute path"),
            ("file:///", "absolute path"),
        ] {
            let got = Ready::parse(text).unwrap_err();
            assert!(got.contains(error), "{text:?}: {got}");
        }
    }
}
