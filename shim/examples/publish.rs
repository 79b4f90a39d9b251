//! Publishes snapshots and removes them again for as long as it lives, for those who cut the power meanwhile
//! (`hack/node/powercut.sh`): `publish STORE FIRST`.
//!
//! A line `published KEY` is written behind each that is there from then on, and `removing KEY` ahead of each that may
//! be gone from then on. The keys of another FIRST are others. They hold no machine that could be restored; what is on
//! the disk when, and under which names, is what a machine's would be.

use std::{
    collections::VecDeque,
    env,
    error::Error,
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{FileExt, PermissionsExt, symlink},
    path::Path,
};

use chsnap::snapshot::{ROOT, Store};
use inputs::inputs;

#[path = "../tests/inputs/mod.rs"]
mod inputs;

/// So many are there at a time.
const KEPT: usize = 4;
const BUDGET: u64 = 1 << 40;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [store, first] = &args[..] else { return Err("usage: publish STORE FIRST".into()) };
    let (store, first) = (Store::open(store.as_ref(), BUDGET)?, first.parse::<u32>()?);
    let mut there = VecDeque::new();
    for number in first.. {
        let building = store.build(inputs(number))?;
        fill(building.dir(), number)?;
        let key = building.publish(vec![], BUDGET)?;
        say(&format!("published {key}"))?;
        there.push_back(key);
        if there.len() > KEPT
            && let Some(oldest) = there.pop_front()
        {
            say(&format!("removing {oldest}"))?;
            store.remove(&oldest)?;
        }
    }
    Ok(())
}

fn say(what: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{what}")?;
    out.flush()
}

/// A memory with holes, and a root with what a process leaves there.
fn fill(dir: &Path, number: u32) -> io::Result<()> {
    let memory = File::create(dir.join("memory"))?;
    memory.set_len(64 << 20)?;
    for place in 0..u64::from(number % 16) {
        memory.write_all_at(&vec![0xa5; 256 << 10], place * (4 << 20))?;
    }
    fs::write(dir.join("state"), vec![7; 20_000])?;
    let root = dir.join(ROOT);
    fs::create_dir_all(root.join("usr/lib/__pycache__"))?;
    for file in 0..8 {
        fs::write(root.join(format!("usr/lib/__pycache__/{file}.pyc")), vec![file; 3000])?;
    }
    fs::write(root.join("secret"), "0")?;
    fs::set_permissions(root.join("secret"), fs::Permissions::from_mode(0o600))?;
    symlink("secret", root.join("link"))
}
