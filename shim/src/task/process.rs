//! One process of a container: the container's own (exec id empty) or an exec.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use chsnap_protocol::agent::CreateProcessResponse;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{Mutex, watch};

use super::stdio::{Local, Paths, Relays};

/// How long output may wait for its reader, once its process is deleted: as long as containerd's runc shim waits.
const STILL: Duration = Duration::from_secs(10);

/// How a process ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Exit {
    /// 0-255, or 128 + signal.
    pub status: u32,
    /// When.
    pub at: Timestamp,
}

impl Exit {
    /// An end at this moment.
    #[must_use]
    pub fn now(status: u32) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self::at_ns(status, i64::try_from(now.as_nanos()).unwrap_or(i64::MAX))
    }

    /// An end at a wall clock time in nanoseconds.
    #[must_use]
    pub fn at_ns(status: u32, ns: i64) -> Self {
        let mut at = Timestamp::new();
        at.seconds = ns.div_euclid(1_000_000_000);
        at.nanos = i32::try_from(ns.rem_euclid(1_000_000_000)).unwrap_or(0);
        Self { status, at }
    }
}

/// Where a process is in its life.
#[derive(Debug, Clone, PartialEq)]
pub enum Life {
    /// Known to the agent.
    Created,
    /// Its program runs.
    Running,
    /// It has ended, or never could start.
    Stopped(Exit),
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its container.
    pub container: String,
    /// Empty for the container's own.
    pub exec: String,
    /// Its streams' local ends.
    pub paths: Paths,
    /// Its streams in the guest.
    pub streams: CreateProcessResponse,
    /// What copies between the two.
    pub relays: Relays,
    /// Held by whoever moves it on from "created": a signal must not overtake a start that is under way.
    pub turn: Mutex<()>,
    /// The local ends until the start.
    local: Mutex<Option<Local>>,
    life: watch::Sender<Life>,
    /// Its end is still to be told to containerd.
    owed: watch::Sender<bool>,
    pid: watch::Sender<u32>,
    guest_pid: watch::Sender<u32>,
    /// OOM kills that containerd has heard of.
    oom_told: AtomicU64,
    /// It is a sandbox container's, and in no machine.
    pauses: bool,
}

impl std::fmt::Debug for Local {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Local")
    }
}

impl Process {
    /// Whether that is more than containerd has heard of; it has, then.
    pub fn owes_oom(&self, kills: u64) -> bool {
        self.oom_told.fetch_max(kills, Ordering::Relaxed) < kills
    }

    /// Of how many it has.
    pub fn oom_told(&self) -> u64 {
        self.oom_told.load(Ordering::Relaxed)
    }

    /// A created process. `pid` is 0 until it is known.
    #[must_use]
    pub fn new(
        container: &str,
        exec: &str,
        paths: Paths,
        streams: CreateProcessResponse,
        local: Local,
        pid: u32,
    ) -> Self {
        Self {
            container: container.into(),
            exec: exec.into(),
            paths,
            streams,
            relays: Relays::default(),
            turn: Mutex::default(),
            local: Mutex::new(Some(local)),
            life: watch::Sender::new(Life::Created),
            owed: watch::Sender::new(false),
            pid: watch::Sender::new(pid),
            guest_pid: watch::Sender::new(0),
            oom_told: AtomicU64::new(0),
            pauses: false,
        }
    }

    /// That of a sandbox container, which only waits.
    #[must_use]
    pub fn pausing(self) -> Self {
        Self { pauses: true, ..self }
    }

    /// It runs nothing, and in no machine.
    #[must_use]
    pub fn pauses(&self) -> bool {
        self.pauses
    }

    /// The local ends, once.
    pub async fn take_local(&self) -> Option<Local> {
        self.local.lock().await.take()
    }

    /// Where it is in its life.
    #[must_use]
    pub fn life(&self) -> Life {
        self.life.borrow().clone()
    }

    /// The number reported to containerd.
    #[must_use]
    pub fn pid(&self) -> u32 {
        *self.pid.borrow()
    }

    /// The number in the guest; 0 before its start.
    #[must_use]
    pub fn guest_pid(&self) -> u32 {
        *self.guest_pid.borrow()
    }

    /// Its program runs, by this number in the guest. False where it has ended meanwhile.
    pub fn running(&self, guest_pid: u32) -> bool {
        self.guest_pid.send_replace(guest_pid);
        if !self.exec.is_empty() {
            self.pid.send_replace(guest_pid);
        }
        let runs = self.life.send_if_modified(|life| {
            let created = *life == Life::Created;
            if created {
                *life = Life::Running;
            }
            created
        });
        self.owed.send_replace(runs);
        runs
    }

    /// Its end has been told.
    pub fn told(&self) {
        self.owed.send_replace(false);
    }

    /// Waits until no end of it is still to be told; a start that is under way decides first.
    pub async fn settled(&self) {
        drop(self.turn.lock().await);
        let _ = self.owed.subscribe().wait_for(|owed| !owed).await;
    }

    /// It has ended. True the first time: an exit is told once.
    pub fn stopped(&self, exit: Exit) -> bool {
        self.life.send_if_modified(|life| match life {
            Life::Stopped(_) => false,
            _ => {
                *life = Life::Stopped(exit);
                true
            }
        })
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut life = self.life.subscribe();
        loop {
            if let Life::Stopped(exit) = &*life.borrow_and_update() {
                return exit.clone();
            }
            if life.changed().await.is_err() {
                return Exit::now(255);
            }
        }
    }

    /// Waits until it is started, or has ended without.
    pub async fn left_created(&self) {
        let _ = self.life.subscribe().wait_for(|life| *life != Life::Created).await;
    }

    /// Gives its streams up, after what is under way has arrived.
    pub async fn close(&self) {
        *self.local.lock().await = None;
        self.relays.finish(STILL).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::time::timeout;

    use super::*;

    async fn created() -> Arc<Process> {
        let paths = Paths::default();
        let local = Local::open(&paths).await.unwrap();
        Arc::new(Process::new("web", "look", paths, CreateProcessResponse::default(), local, 0))
    }

    /// Whether no end of it is awaited.
    async fn is_settled(process: &Process) -> bool {
        timeout(Duration::from_millis(20), process.settled()).await.is_ok()
    }

    #[tokio::test]
    async fn an_end_is_owed_from_the_start_until_it_is_told() {
        let process = created().await;
        assert!(is_settled(&process).await, "one that never ran has no end to tell");
        let turn = process.turn.lock().await;
        assert!(!is_settled(&process).await, "a start that is under way");
        assert!(process.running(7));
        drop(turn);
        assert_eq!((process.pid(), process.guest_pid()), (7, 7));
        assert!(process.stopped(Exit::now(0)));
        assert!(!is_settled(&process).await, "ended, but not told");
        process.told();
        assert!(is_settled(&process).await);
    }

    #[tokio::test]
    async fn what_has_ended_does_not_run() {
        let process = created().await;
        assert!(process.stopped(Exit::now(137)));
        assert!(!process.running(7));
        assert!(is_settled(&process).await, "its end was told, or it never began");
    }
}
