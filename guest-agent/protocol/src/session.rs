//! How a session begins on a channel that may hold leftovers.
//!
//! A virtio-serial port is one endless byte stream: bytes of an earlier session (before a restore, or of a shim
//! that went away) may still lie in it, and there is no connection event that both ends see at the same point.
//! So the shim opens a session with [`GREETING`] and a number of its own choice, and the agent answers with
//! [`REPLY`] and the same number. Each side throws away what comes before: the shim everything until its own
//! number is answered, the agent everything until a greeting. Over vsock, where connections are real, the same
//! exchange costs one round trip and keeps one code path.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Sent by the shim, followed by 8 bytes of its choice.
pub const GREETING: [u8; 8] = *b"\0chsnap\x01";
/// Sent by the agent, followed by the shim's 8 bytes.
pub const REPLY: [u8; 8] = *b"\0chsnap\x02";

/// Bytes a peer may send before the greeting is given up: two ttrpc messages of the largest size.
const MAX_LEFTOVERS: usize = 8 << 20;

/// Opens a session from the shim's side.
///
/// # Errors
/// Of the channel; `UnexpectedEof` if the guest closed it, `InvalidData` if it babbles without ever answering.
pub async fn open<C>(channel: &mut C, number: u64) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let number = number.to_le_bytes();
    let mut hello = [0; 16];
    hello[..8].copy_from_slice(&GREETING);
    hello[8..].copy_from_slice(&number);
    channel.write_all(&hello).await?;
    channel.flush().await?;
    let mut expected = hello;
    expected[..8].copy_from_slice(&REPLY);
    skip_until(channel, |window| *window == expected).await.map(drop)
}

/// Accepts a session from the agent's side.
///
/// # Errors
/// Of the channel; `UnexpectedEof` when the host goes away before it greets.
pub async fn accept<C>(channel: &mut C) -> io::Result<()>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let mut hello = skip_until(channel, |window| window[..8] == GREETING).await?;
    hello[..8].copy_from_slice(&REPLY);
    channel.write_all(&hello).await?;
    channel.flush().await
}

/// Reads single bytes until the last 16 satisfy `found`. Single, since what follows belongs to the session.
async fn skip_until<C>(channel: &mut C, found: impl Fn(&[u8; 16]) -> bool) -> io::Result<[u8; 16]>
where
    C: AsyncRead + Unpin,
{
    let mut window = [0xff; 16];
    for _ in 0..MAX_LEFTOVERS {
        let byte = channel.read_u8().await?;
        window.rotate_left(1);
        window[15] = byte;
        if found(&window) {
            return Ok(window);
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the other end sends data but never the chsnap greeting"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn leftovers_on_both_sides_are_skipped() {
        let (mut shim, mut agent) = tokio::io::duplex(256);
        shim.write_all(b"half a ttrpc message").await.unwrap();
        agent.write_all(b"an answer nobody waits for").await.unwrap();
        // The answer to a greeting that somebody else sent.
        agent.write_all(&REPLY).await.unwrap();
        agent.write_all(&1u64.to_le_bytes()).await.unwrap();
        let (opened, accepted) = tokio::join!(open(&mut shim, 2), accept(&mut agent));
        opened.unwrap();
        accepted.unwrap();
        agent.write_all(b"x").await.unwrap();
        assert_eq!(shim.read_u8().await.unwrap(), b'x');
    }

    #[tokio::test]
    async fn a_closed_channel_is_an_error() {
        let (mut shim, agent) = tokio::io::duplex(256);
        drop(agent);
        assert!(open(&mut shim, 1).await.is_err());
    }

    #[tokio::test]
    async fn endless_noise_is_an_error() {
        let (mut shim, mut agent) = tokio::io::duplex(1 << 16);
        let noise = tokio::spawn(async move {
            let block = vec![0u8; 1 << 16];
            while agent.write_all(&block).await.is_ok() {}
        });
        let error = open(&mut shim, 1).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(shim);
        noise.await.unwrap();
    }
}
