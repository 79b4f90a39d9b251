//! What lies in the queues of a guest's devices, for when it is silent: a request that its device has not taken and
//! an answer that the guest has not are different troubles. Only queues that QEMU serves itself: to tell of virtiofsd's it
//! would have to stop them, and to wait for virtiofsd.

use serde_json::{Value, json};

use super::qmp::Qmp;

/// More than any device of ours has.
const MAX_QUEUES: u64 = 8;

/// Device by device and queue by queue: how many buffers the guest has offered and how many came back, modulo 65536
/// (virtio 1.2, 2.7), how many of the first QEMU has taken, and at which of the second the guest wants an interrupt.
pub async fn describe(qmp: &Qmp) -> String {
    let Ok(devices) = qmp.execute("x-query-virtio", Value::Null).await else { return String::new() };
    let mut told = Vec::new();
    for device in devices.as_array().into_iter().flatten() {
        let (Some(path), Some(name)) = (device["path"].as_str(), device["name"].as_str()) else { continue };
        if name.starts_with("vhost") {
            continue;
        }
        for number in 0..MAX_QUEUES {
            let asked = json!({ "path": path, "queue": number });
            let Ok(queue) = qmp.execute("x-query-virtio-queue-status", asked).await else { break };
            told.extend(one(qmp, name, number, &queue).await);
        }
    }
    told.join("; ")
}

/// `None` where the guest does not use it.
async fn one(qmp: &Qmp, name: &str, number: u64, queue: &Value) -> Option<String> {
    let size = queue["vring-num"].as_u64()?;
    let (offered, used) = (queue["vring-avail"].as_u64()?, queue["vring-used"].as_u64()?);
    if size == 0 || offered == 0 || used == 0 {
        return None;
    }
    let words = [offered, offered + 2, offered + 4 + 2 * size, used + 2];
    let mut read = [0; 4];
    for (address, into) in words.into_iter().zip(&mut read) {
        *into = word(qmp, address).await?;
    }
    let [flags, offered, event, returned] = read;
    let taken = queue["last-avail-idx"].as_u64()?;
    Some(format!("{name} {number}: offered {offered} taken {taken} returned {returned} wanted {event} flags {flags}"))
}

/// Two bytes of the guest's memory, by way of the monitor for people: the other has no word for it.
async fn word(qmp: &Qmp, address: u64) -> Option<u16> {
    let line = json!({ "command-line": format!("xp /1hx {address:#x}") });
    let said = qmp.execute("human-monitor-command", line).await.ok()?;
    parse(said.as_str()?)
}

fn parse(said: &str) -> Option<u16> {
    u16::from_str_radix(said.trim().rsplit_once(": 0x")?.1, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_word_is_read() {
        assert_eq!(parse("000000004000a002: 0x005f\r\n"), Some(0x5f));
        assert_eq!(parse("Cannot access memory"), None);
    }
}
