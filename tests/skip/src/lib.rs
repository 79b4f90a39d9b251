//! For tests that need what a machine may not have. Rust's own harness knows no "skipped" that is found out at run
//! time: such a test counts as passed, and what it says is not shown. So it is written down, and `hack/test.sh` counts.

use std::{env, fs::OpenOptions, io::Write, thread};

/// Where skipped tests are written down, a line each.
pub const LIST: &str = "CHSNAP_TESTS_SKIPPED";
/// Set where everything that the set-up brings must be there.
pub const COMPLETE: &str = "CHSNAP_TESTS_COMPLETE";

/// This test is skipped, for want of something that no set-up can bring, such as KVM.
pub fn skip(reason: impl AsRef<str>) {
    let line = format!("{}: {}\n", thread::current().name().unwrap_or("a test"), reason.as_ref());
    eprint!("SKIPPED: {line}");
    let Some(list) = env::var_os(LIST) else { return };
    if let Err(error) =
        OpenOptions::new().append(true).create(true).open(&list).and_then(|mut file| file.write_all(line.as_bytes()))
    {
        eprintln!("cannot write {}: {error}", list.display());
    }
}

/// This test is skipped, for want of something that the set-up brings.
///
/// # Panics
/// Where the set-up is said to have run.
pub fn skip_without_setup(reason: impl AsRef<str>) {
    assert!(env::var_os(COMPLETE).is_none(), "{}, though the set-up has run", reason.as_ref());
    skip(reason);
}
