//! A program on a terminal of its own.

use std::{
    fs::File,
    io::{Read, Write},
    path::PathBuf,
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    pty::{Winsize, openpty},
    unistd::ttyname,
};

use crate::{Run, containerd::locked, eventually};

/// The terminal's other end.
#[derive(Debug)]
pub struct Pty {
    master: File,
    slave: File,
    name: PathBuf,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Pty {
    /// A terminal of that size, and the program (`setsid --ctty --wait`) that makes it the controlling one.
    pub fn open(rows: u16, columns: u16) -> Result<Self> {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None)?;
        let name = ttyname(&pair.slave)?;
        let master = File::from(pair.master);
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (mut reader, shared) = (master.try_clone()?, Arc::clone(&seen));
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n) = reader.read(&mut buffer) {
                if n == 0 {
                    break;
                }
                locked(&shared).extend_from_slice(&buffer[..n]);
            }
        });
        Ok(Self { master, slave: File::from(pair.slave), name, seen })
    }

    /// For [`crate::Container::ctr`]: what makes the terminal the program's own.
    pub const WRAPPER: [&'static str; 2] = ["setsid", "--ctty"];

    /// The program's streams, to be given to it.
    pub fn slave(&self) -> Result<File> {
        Ok(self.slave.try_clone()?)
    }

    /// Types.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.master.write_all(bytes)?)
    }

    /// Changes the window's size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let (rows, columns) = (rows.to_string(), columns.to_string());
        Run::new("stty").arg("-F").arg(&self.name).args(["rows", &rows, "cols", &columns]).output()?.success()?;
        Ok(())
    }

    /// What has been shown so far.
    #[must_use]
    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&locked(&self.seen)).into_owned()
    }

    /// Waits until `text` has been shown.
    pub fn wait(&self, text: &str) -> Result<()> {
        let found = eventually(Duration::from_secs(60), || self.seen().contains(text).then_some(()));
        found.with_context(|| format!("{text:?} was never shown, but: {:?}", self.seen()))
    }

    /// What was shown must not contain `text`.
    pub fn never(&self, text: &str) -> Result<()> {
        ensure!(!self.seen().contains(text), "{text:?} was shown: {:?}", self.seen());
        Ok(())
    }
}
