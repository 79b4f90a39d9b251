//! The last bytes of an endless stream, kept in bounded memory and made fit to print.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::io::{AsyncRead, AsyncReadExt};

/// The last `limit` bytes of what a VMM, its guest or virtiofsd wrote. Clones share the bytes.
#[derive(Debug, Clone)]
pub struct Ring(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    bytes: VecDeque<u8>,
    limit: usize,
    /// Older bytes were dropped, so the first line is not whole.
    cut: bool,
}

impl Ring {
    /// Keeps at most `limit` bytes. Memory is taken as bytes come.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Mutex::new(Inner { bytes: VecDeque::new(), limit, cut: false })))
    }

    /// Reads until the stream ends. An error ends it too: what was read so far is all there is to say.
    pub async fn fill_from(&self, mut stream: impl AsyncRead + Unpin) {
        let mut block = [0; 2048];
        while let Ok(count @ 1..) = stream.read(&mut block).await {
            self.push(&block[..count]);
        }
    }

    /// Appends, dropping the oldest bytes.
    pub fn push(&self, data: &[u8]) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let data = &data[data.len().saturating_sub(inner.limit)..];
        let surplus = (inner.bytes.len() + data.len()).saturating_sub(inner.limit);
        if surplus > 0 {
            inner.cut = true;
            inner.bytes.drain(..surplus);
        }
        inner.bytes.extend(data);
    }

    /// The last of them that say something, on one line.
    pub fn last_lines(&self, most: usize) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(most)..].join(" | ")
    }

    /// The whole lines that are kept, printable on a terminal and in a log whatever the guest wrote.
    pub fn text(&self) -> String {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (head, tail) = inner.bytes.as_slices();
        let bytes = [head, tail].concat();
        let whole = match bytes.iter().position(|byte| *byte == b'\n') {
            Some(end) if inner.cut => &bytes[end + 1..],
            _ => &bytes[..],
        };
        printable(&String::from_utf8_lossy(whole))
    }
}

/// Removes terminal control sequences, and whatever else could make a line look like something it is not.
fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        match char {
            '\n' => out.push('\n'),
            '\t' => out.push(' '),
            '\x1b' if chars.next_if_eq(&'[').is_some() => {
                // A control sequence ends with its first byte from @ to ~.
                while let Some(next) = chars.next_if(|next| (' '..='\x7e').contains(next)) {
                    if next >= '@' {
                        break;
                    }
                }
            }
            // Directional and invisible characters can reorder or hide text.
            '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' => {}
            char if char.is_control() => {}
            char => out.push(char),
        }
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn endless_output_stays_bounded_and_keeps_the_end() {
        let ring = Ring::new(1000);
        let mut all = Vec::new();
        for number in 0..100_000 {
            all.extend(format!("line {number}\n").bytes());
        }
        ring.fill_from(&all[..]).await;
        let text = ring.text();
        assert!(text.len() <= 1000, "{}", text.len());
        assert!(text.starts_with("line 99"), "{text}");
        assert!(text.ends_with("line 99999"), "{text}");
        assert!(ring.0.lock().unwrap().bytes.capacity() <= 4096);
    }

    #[test]
    fn a_single_write_larger_than_the_ring_keeps_its_end() {
        let ring = Ring::new(4);
        ring.push(b"ab");
        ring.push(b"0123456789");
        assert_eq!(ring.text(), "6789");
    }

    #[test]
    fn the_last_lines_are_one() {
        let ring = Ring::new(1 << 10);
        assert_eq!(ring.last_lines(2), "");
        ring.push(b"one\n\n two \nthree\n\n");
        assert_eq!(ring.last_lines(2), "two | three");
        assert_eq!(ring.last_lines(9), "one | two | three");
    }

    #[test]
    fn nothing_reaches_the_terminal_that_could_steer_it() {
        let ring = Ring::new(1 << 10);
        ring.push(b"\x1b[31mred\x1b[0m \x07\x1b]0;title\x07\r\n\xff\xe2\x80\xaeevil\x1b[2");
        assert_eq!(ring.text(), "red ]0;title\n\u{fffd}evil");
    }
}
