//! Moves bytes between the agent's streams and local readers and writers, one chunk at a time: the next chunk is
//! asked for only when the last one has been taken, which is the back-pressure.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Agent, AgentError};

/// Enough to make the round trip worth it, little enough that many streams share one channel fairly.
const CHUNK: usize = 64 << 10;

/// Reads `stream` to its end into `sink`, and counts the bytes that `sink` has taken. When it fails, the stream is given
/// up, so that its writer in the guest sees a broken pipe.
///
/// # Errors
/// Of the agent. A broken sink is no error: nobody wants the bytes.
pub async fn read_into(
    agent: &Agent,
    stream: u64,
    sink: &mut (impl AsyncWrite + Unpin),
    count: impl Fn(u64),
) -> Result<(), AgentError> {
    while let Some(data) = agent.read(stream, CHUNK).await? {
        let mut rest = &data[..];
        while !rest.is_empty() {
            match sink.write(rest).await {
                Ok(taken) if taken > 0 => {
                    count(taken as u64);
                    rest = &rest[taken..];
                }
                _ => return agent.close(stream).await,
            }
        }
    }
    // A log file's last bytes are written by another thread.
    let _ = sink.flush().await;
    Ok(())
}

/// Writes `source` to its end into `stream`, then half-closes it.
///
/// # Errors
/// Of the agent. That nobody reads in the guest any more is no error.
pub async fn write_from(agent: &Agent, stream: u64, source: &mut (impl AsyncRead + Unpin)) -> Result<(), AgentError> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match source.read(&mut buffer).await {
            Ok(0) => break,
            Ok(n) => match agent.write(stream, buffer[..n].to_vec()).await {
                Ok(()) => {}
                Err(AgentError::Refused { .. }) => return Ok(()),
                Err(e) => return Err(e),
            },
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    match agent.close_write(stream).await {
        Err(AgentError::Refused { .. }) | Ok(()) => Ok(()),
        Err(e) => Err(e),
    }
}
