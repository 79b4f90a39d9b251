//! Cloud Hypervisor's event monitor: JSON objects, each followed by an empty line.

use std::time::Duration;

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    time::{Instant, timeout_at},
};

use crate::vmm::process::Leash;

/// Of one event. They are about 200 bytes.
const MAX_EVENT: usize = 64 << 10;
/// For the kernel to print its last words and reboot, after a panic that a device told of.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What the guest does to its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    Panic,
    /// Cloud Hypervisor would start the machine again in place; to the shim a reboot is the end.
    Reboot,
    PowerOff,
}

/// Listens until the VMM ends, and tells whether the guest asked for it. A guest that reboots is killed.
pub async fn listen(stream: impl AsyncRead + Unpin, leash: Leash) -> bool {
    let mut reader = BufReader::new(stream);
    let mut by_guest = false;
    let mut deadline = None;
    loop {
        let event = match deadline {
            None => next(&mut reader).await,
            Some(deadline) => match timeout_at(deadline, next(&mut reader)).await {
                Ok(event) => event,
                Err(_) => {
                    leash.pull();
                    return true;
                }
            },
        };
        let Some(event) = event else { return by_guest };
        by_guest |= event.is_some();
        match event {
            Some(Event::Reboot) => leash.pull(),
            Some(Event::Panic) => deadline = deadline.or_else(|| Some(Instant::now() + LAST_WORDS)),
            Some(Event::PowerOff) | None => {}
        }
    }
}

/// The next event, if it is of interest; nothing at the stream's end, or where it is none of events.
async fn next(reader: &mut (impl AsyncBufReadExt + Unpin)) -> Option<Option<Event>> {
    let mut text = Vec::new();
    loop {
        let before = text.len();
        let room = MAX_EVENT.saturating_sub(before) as u64;
        let line = reader.take(room).read_until(b'\n', &mut text).await.ok()?;
        if line == 0 || text.last() != Some(&b'\n') {
            return None;
        }
        if line == 1 && before > 0 {
            return Some(Event::parse(&text));
        }
    }
}

impl Event {
    fn parse(text: &[u8]) -> Option<Self> {
        let event: Value = serde_json::from_slice(text).ok()?;
        match (event["source"].as_str()?, event["event"].as_str()?) {
            ("guest", "panic") => Some(Self::Panic),
            ("vm", "rebooting") => Some(Self::Reboot),
            ("vmm", "shutdown") => Some(Self::PowerOff),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(source: &str, event: &str) -> String {
        format!(
            "{{\n  \"timestamp\": {{\n    \"secs\": 0,\n    \"nanos\": 914208\n  }},\n  \"source\": \"{source}\",\n  \
             \"event\": \"{event}\",\n  \"properties\": null\n}}\n\n"
        )
    }

    async fn told(events: &str) -> (bool, bool) {
        let leash = Leash::new();
        let pulled = leash.watch();
        let by_guest = listen(events.as_bytes(), leash.clone()).await;
        (by_guest, pulled.has_changed().unwrap())
    }

    #[tokio::test]
    async fn a_reboot_pulls_the_leash_and_a_power_off_need_not() {
        let boot = event("vmm", "starting") + &event("vm", "booting") + &event("vm", "booted");
        assert_eq!(told(&boot).await, (false, false));
        assert_eq!(told(&(boot.clone() + &event("vm", "rebooting"))).await, (true, true));
        assert_eq!(told(&(boot.clone() + &event("vmm", "shutdown"))).await, (true, false));
        assert_eq!(told(&(boot + &event("guest", "panic"))).await, (true, false));
    }

    #[tokio::test]
    async fn a_panic_without_a_reboot_ends_after_its_last_words() {
        let (mut vmm, ours) = tokio::io::duplex(4096);
        let leash = Leash::new();
        let pulled = leash.watch();
        let listener = tokio::spawn(listen(ours, leash.clone()));
        tokio::io::AsyncWriteExt::write_all(&mut vmm, event("guest", "panic").as_bytes()).await.unwrap();
        assert!(listener.await.unwrap());
        assert!(pulled.has_changed().unwrap());
    }

    #[tokio::test]
    async fn what_is_no_event_ends_the_listening() {
        let endless = "x".repeat(MAX_EVENT + 1) + "\n\n" + &event("vm", "rebooting");
        assert_eq!(told(&endless).await, (false, false));
        assert_eq!(told(&("garbage\n\n".to_owned() + &event("vm", "rebooting"))).await, (true, true));
    }
}
