//! `ctr task metrics`.

use anyhow::{Context, Result, ensure};
use chsnap_tests::Env;
use serde_json::Value;

crate::cases! {
    Vms: numbers;
}

fn numbers(env: &Env) -> Result<()> {
    let program = "x = bytearray(40_000_000)\nfor i in range(3_000_000): pass\nprint('up', flush=True)\nimport time\ntime.sleep(1000)";
    let started = env.container().python(program).start()?;
    started.wait_log("up")?;
    let all = env.ctr().metrics(&started.id)?;
    let text = all.to_string();
    let number = |path: &str| {
        let found = all.pointer(path).and_then(Value::as_u64);
        found.with_context(|| format!("no {path} in {text}"))
    };
    ensure!(number("/memory/usage")? > 40_000_000, "{text}");
    ensure!(number("/memory/anon")? > 40_000_000, "{text}");
    // 40 MB of anonymous memory, in pages of 4 KiB, or one in 2 MiB.
    ensure!(number("/memory/pgfault")? > 20, "{text}");
    ensure!(number("/cpu/usage_usec")? > 1000, "{text}");
    // Threads count, and a Python that may be saved has one for its hooks.
    ensure!((1..=2).contains(&number("/pids/current")?), "{text}");
    let table = env.ctr().text(["task", "metrics", &started.id])?;
    let row = |name: &str| {
        let mut rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        rows.find(|row| row.first() == Some(&name))?.get(1)?.parse::<u64>().ok()
    };
    for (name, least) in [("memory.usage", 40_000_000), ("cpu.usage_usec", 1000), ("pids.current", 1)] {
        ensure!(row(name).is_some_and(|value| value >= least), "{name} in {table}");
    }
    started.remove()
}
