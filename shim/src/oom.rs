//! Whom the host's OOM killer takes first: a container's processes are in the VMM, so what is asked for them holds for it.

use std::{fs, io, path::PathBuf};

use crate::proc::children;

/// Sets it for everything that this process has started and that still runs. The first error is told, the rest is tried.
///
/// # Errors
/// Where the kernel refuses: to be spared more than now takes `CAP_SYS_RESOURCE`.
pub fn adjust_children(score: i32) -> io::Result<()> {
    let (mut todo, mut result) = (children(std::process::id()), Ok(()));
    while let Some(pid) = todo.pop() {
        todo.extend(children(pid));
        match fs::write(PathBuf::from(format!("/proc/{pid}/oom_score_adj")), score.to_string()) {
            // It has ended meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => result = result.and(Err(error)),
            Ok(()) => {}
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn children_and_their_children_get_it() {
        let mut child = Command::new("/bin/sh").args(["-c", "sleep 100 & wait"]).spawn().unwrap();
        let of = |pid: u32| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap().trim().to_owned();
        let grandchild = loop {
            if let [grandchild] = children(child.id())[..] {
                break grandchild;
            }
        };
        adjust_children(777).unwrap();
        assert_eq!((of(child.id()), of(grandchild)), ("777".into(), "777".into()));
        assert_ne!(of(std::process::id()), "777");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(grandchild.cast_signed()), nix::sys::signal::Signal::SIGKILL)
            .unwrap();
        child.wait().unwrap();
    }
}
