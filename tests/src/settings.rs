//! The configuration file of the container under test.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;

/// Tables of keys with TOML values as they are written.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    tables: BTreeMap<String, BTreeMap<String, String>>,
    raw: Option<String>,
}

impl Settings {
    /// Sets a key to a TOML value, written as in the file.
    #[must_use]
    pub fn set(mut self, table: &str, key: &str, value: impl Into<String>) -> Self {
        self.tables.entry(table.into()).or_default().insert(key.into(), value.into());
        self
    }

    /// Sets a key to a path.
    #[must_use]
    pub fn path(self, table: &str, key: &str, path: impl AsRef<Path>) -> Self {
        self.set(table, key, format!("{:?}", path.as_ref()))
    }

    /// This text instead of everything else.
    #[must_use]
    pub fn raw(mut self, text: &str) -> Self {
        self.raw = Some(text.into());
        self
    }

    /// The file's text.
    #[must_use]
    pub fn text(&self) -> String {
        if let Some(raw) = &self.raw {
            return raw.clone();
        }
        let mut text = String::new();
        for (table, keys) in &self.tables {
            text.push_str(&format!("[{table}]\n"));
            for (key, value) in keys {
                text.push_str(&format!("{key} = {value}\n"));
            }
        }
        text
    }

    /// Writes the file.
    pub fn write(&self, dir: &Path) -> Result<PathBuf> {
        let path = dir.join("config.toml");
        fs::write(&path, self.text())?;
        Ok(path)
    }
}
