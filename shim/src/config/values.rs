//! Sizes and durations as people write them.

use std::{fmt, str::FromStr, time::Duration};

use bytesize::ByteSize;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Visitor};
use thiserror::Error;

/// An amount of memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

/// Not a size.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a size: write a number with a unit, such as \"512MiB\" or \"2GiB\"")]
pub struct SizeError(String);

const MIB: u64 = 1 << 20;

impl Size {
    /// None at all; in a limit: as much as the host has.
    pub const ZERO: Self = Self(0);

    /// That many MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(MIB))
    }

    /// That many bytes.
    pub const fn bytes(n: u64) -> Self {
        Self(n)
    }

    /// In bytes.
    pub const fn as_bytes(self) -> u64 {
        self.0
    }

    /// In MiB, rounded up.
    pub const fn as_mib(self) -> u64 {
        self.0.div_ceil(MIB)
    }

    /// Both together.
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError(text.to_owned());
        let text = text.trim();
        if text == "0" {
            return Ok(Self::ZERO);
        }
        // A bare number would be bytes to one reader and megabytes to another.
        if !text.ends_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(error());
        }
        text.parse::<ByteSize>().map(|size| Self(size.as_u64())).map_err(|_| error())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(MIB << 10, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")];
        match units.into_iter().find(|(unit, _)| self.0 != 0 && self.0.is_multiple_of(*unit)) {
            Some((unit, name)) => write!(f, "{}{name}", self.0 / unit),
            None if self.0 == 0 => f.write_str("0"),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Size;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size with a unit, such as \"512MiB\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Size, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Size, E> {
                number.to_string().parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Text)
    }
}

/// How long to wait before giving up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(Duration);

/// Not a duration.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{0:?} is not a duration: write seconds as a number, or a text such as \"500ms\", \"30s\" or \"2m\"")]
pub struct DeadlineError(String);

impl Deadline {
    /// That many seconds.
    pub const fn secs(n: u64) -> Self {
        Self(Duration::from_secs(n))
    }

    /// As the standard library has it.
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl FromStr for Deadline {
    type Err = DeadlineError;

    fn from_str(text: &str) -> Result<Self, DeadlineError> {
        let trimmed = text.trim();
        humantime::parse_duration(trimmed)
            .ok()
            .or_else(|| trimmed.parse().ok().map(Duration::from_secs))
            .map(Self)
            .ok_or_else(|| DeadlineError(text.to_owned()))
    }
}

impl fmt::Display for Deadline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

impl Serialize for Deadline {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Deadline {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Deadline;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("seconds as a number, or a duration such as \"30s\"")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Deadline, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Deadline, E> {
                let error = || E::custom(DeadlineError(number.to_string()));
                u64::try_from(number).map(Deadline::secs).map_err(|_| error())
            }
        }
        deserializer.deserialize_any(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written_back() {
        for (text, bytes, shown) in [
            ("512MiB", 512 << 20, "512MiB"),
            ("512Mi", 512 << 20, "512MiB"),
            ("1.5 GiB", 1536 << 20, "1536MiB"),
            ("2GiB", 2 << 30, "2GiB"),
            ("1000MB", 1_000_000_000, "1000000000B"),
            ("0", 0, "0"),
        ] {
            let size: Size = text.parse().unwrap();
            assert_eq!(size.as_bytes(), bytes, "{text}");
            assert_eq!(size.to_string(), shown);
            assert_eq!(size.to_string().parse::<Size>().unwrap(), size);
        }
        assert_eq!(Size::bytes(1).as_mib(), 1);
    }

    #[test]
    fn a_size_without_a_unit_is_refused() {
        for text in ["512", "", "MiB", "-1MiB", "12 apples", "1e3MiB", "512 M i B"] {
            let error = text.parse::<Size>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("{text:?} is not a size: ")), "{error}");
        }
    }

    #[test]
    fn deadlines_are_read_and_written_back() {
        for (text, millis) in [("30s", 30_000), ("500ms", 500), ("2m", 120_000), ("1m 30s", 90_000), ("7", 7000)] {
            let deadline: Deadline = text.parse().unwrap();
            assert_eq!(deadline.duration().as_millis(), millis);
            assert_eq!(deadline.to_string().parse::<Deadline>().unwrap(), deadline);
        }
        for text in ["", "-1", "soon", "1 fortnight"] {
            assert!(text.parse::<Deadline>().unwrap_err().to_string().contains("is not a duration"));
        }
    }
}
