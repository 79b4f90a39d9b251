//! The name of an image.

use std::{fmt, str::FromStr};

use thiserror::Error;

/// `host/path:tag`, taken as it is: `ctr run` finds an image only under the very name it was imported with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference(String);

/// Not a name for an image.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{name:?} cannot name an image: {why}; write it like docker.io/library/app:1.0")]
pub struct ReferenceError {
    name: String,
    why: &'static str,
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(name: &str) -> Result<Self, ReferenceError> {
        match fault(name) {
            None => Ok(Self(name.to_owned())),
            Some(why) => Err(ReferenceError { name: name.to_owned(), why }),
        }
    }
}

fn fault(name: &str) -> Option<&'static str> {
    if name.contains('@') {
        return Some("its digest is not known before it is made");
    }
    if name.len() > 255 {
        return Some("it is longer than 255 characters");
    }
    let Some((host, rest)) = name.split_once('/') else { return Some("the host is missing") };
    let host_name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    if !host.contains(['.', ':']) && host != "localhost" {
        return Some("the host is missing");
    }
    let letters = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
    if host_name.is_empty() || !host_name.chars().all(letters) {
        return Some("the host is not one");
    }
    let Some((path, tag)) = rest.split_once(':') else { return Some("the tag is missing") };
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-');
    let outer = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let component = |part: &str| part.chars().all(inner) && outer(part.chars().next()) && outer(part.chars().last());
    if !path.split('/').all(component) {
        return Some("the path may hold lower-case letters, digits and single '.', '_', '-' between them");
    }
    let tag_starts = tag.chars().next().is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    if !tag_starts || tag.len() > 128 || !tag.chars().all(|c| letters(c) || c == '_') {
        return Some("the tag may hold letters, digits, '_', '.' and '-'");
    }
    None
}

impl Reference {
    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// What stands after the colon.
    pub fn tag(&self) -> &str {
        self.0.rsplit_once(':').map_or("", |(_, tag)| tag)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_names_are_taken_as_they_are() {
        for name in ["docker.io/library/app:1.0", "localhost/app:latest", "example.com:5000/a/b-c/d__e:V_1"] {
            let reference: Reference = name.parse().unwrap();
            assert_eq!(reference.to_string(), name);
            assert!(name.ends_with(&format!(":{}", reference.tag())));
        }
    }

    #[test]
    fn others_are_refused_with_the_reason() {
        for (name, why) in [
            ("", "host is missing"),
            ("app", "host is missing"),
            ("library/app:1", "host is missing"),
            ("docker.io/app", "tag is missing"),
            ("docker.io/App:1", "path may hold"),
            ("docker.io/:1", "path may hold"),
            ("docker.io/-a:1", "path may hold"),
            ("docker.io/a:", "tag may hold"),
            ("docker.io/a:b:c", "tag may hold"),
            ("do_cker.io/a:b", "host is not one"),
            ("docker.io/a@sha256:00", "digest is not known"),
        ] {
            let error = name.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(why) && error.ends_with("write it like docker.io/library/app:1.0"), "{error}");
        }
    }
}
