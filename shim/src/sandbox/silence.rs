//! What can be told of a machine whose agent does not answer. A guest that hangs, a virtiofsd that does, and a host that
//! has no time for either look the same from the outside; what their threads wait for tells them apart.

use std::{fs, path::Path, time::Duration};

use log::warn;
use tokio::time::timeout;

use super::machine::last_words;
use crate::{proc, share::Virtiofsd, vmm::Vm};

/// How long a VMM may take to tell what is in the queues of its guest's devices.
const QUEUES: Duration = Duration::from_secs(2);

/// Writes it to the log: the error is for who asked for the pod, this for who looks after the host.
pub(super) async fn report(id: &str, vm: &dyn Vm, virtiofsd: &Virtiofsd) {
    warn!("{id}: the threads of the silent guest's VMM: {}", threads(vm.pid()));
    warn!("{id}: the threads of its virtiofsd: {}", virtiofsd.pid().map(threads).unwrap_or_default());
    // A VMM that hangs does not tell.
    match timeout(QUEUES, vm.queues()).await {
        Ok(queues) if !queues.is_empty() => warn!("{id}: its queues: {queues}"),
        _ => {}
    }
    if let Some(words) = last_words(&vm.console()) {
        warn!("{id}: its console ended with: {words}");
    }
}

/// The threads of a process and of its children, of which virtiofsd's sandbox has one.
fn threads(pid: u32) -> String {
    let own = proc::threads(pid).filter_map(|dir| thread(&dir));
    own.chain(proc::children(pid).into_iter().map(threads)).collect::<Vec<_>>().join(", ")
}

/// Name, state and the kernel function it sleeps in (proc(5)); how long it ran, and how long it could have and there was
/// no CPU (sched-stats.rst).
fn thread(dir: &Path) -> Option<String> {
    let stat = fs::read_to_string(dir.join("stat")).ok()?;
    let (named, rest) = stat.rsplit_once(')')?;
    let (name, state) = (named.split_once('(')?.1, rest.split_whitespace().next()?);
    let place = fs::read_to_string(dir.join("wchan")).unwrap_or_default();
    let times = fs::read_to_string(dir.join("schedstat")).unwrap_or_default();
    let mut times = times.split_whitespace().filter_map(|ns| ns.parse().ok()).map(Duration::from_nanos);
    let (ran, waited) = (times.next().unwrap_or_default(), times.next().unwrap_or_default());
    Some(format!("{name} {state} {place} ran {ran:.1?} waited {waited:.1?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleeping_thread_and_a_child_are_told() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("sleep");
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let sleeper = std::thread::Builder::new().name("a (strange) one".into()).spawn(move || stopped.recv());
        let told = (0..1000).find_map(|_| {
            let told = threads(std::process::id());
            let all = told.contains("a (strange) one S ") && told.contains("sleep S ");
            std::thread::sleep(Duration::from_millis(1));
            all.then_some(told)
        });
        drop(stop);
        child.kill().and_then(|()| child.wait()).expect("sleep's end");
        let _ = sleeper.expect("a thread").join();
        let told = told.expect("thread and child");
        assert!(told.contains(" ran ") && told.contains(" waited "), "{told}");
        assert_eq!(threads(u32::MAX), "");
    }
}
