//! The guest is hostile: whatever comes out of the agent channel is an answer or an error, soon, and never a panic.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    panic,
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use chsnap::agent::{Agent, AgentError, Fresh};
use chsnap_protocol::{
    MAX_CHUNK,
    agent::{InfoResponse, ReadStreamResponse, ResumeResponse, StatsResponse, WaitProcessResponse},
    session,
};
use proptest::{collection::vec, prelude::*};
use protobuf::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::timeout,
};
use ttrpc::{Code, Response, Status};

/// Of each call; what never comes is waited for so long.
const PATIENCE: Duration = Duration::from_millis(50);
/// No case may take longer.
const SOON: Duration = Duration::from_secs(5);

/// Panics anywhere, also in tasks whose end nobody looks at.
static PANICS: AtomicU32 = AtomicU32::new(0);

fn block_on<T>(work: impl Future<Output = T>) -> T {
    static COUNT: Once = Once::new();
    COUNT.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            print(info);
        }));
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let before = PANICS.load(Ordering::Relaxed);
    let done = runtime.block_on(async { timeout(SOON, work).await.expect("it hangs") });
    drop(runtime);
    assert_eq!(PANICS.load(Ordering::Relaxed), before, "something panicked");
    done
}

/// A ttrpc frame: length, stream and type in network order, then the payload. The length may be a lie.
fn frame(length: u32, stream: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
    let head = [&length.to_be_bytes()[..], &stream.to_be_bytes(), &[kind, 0]].concat();
    [head, payload.to_vec()].concat()
}

/// The answer to the client's request of this number (they are odd), as ttrpc packs it.
fn answer(request: u32, payload: Vec<u8>) -> Vec<u8> {
    let mut response = Response::new();
    response.set_payload(payload);
    let bytes = response.write_to_bytes().unwrap();
    frame(bytes.len() as u32, request * 2 + 1, 2, &bytes)
}

fn refusal(request: u32, code: Code, message: &str) -> Vec<u8> {
    let mut status = Status::new();
    status.set_code(code);
    status.set_message(message.into());
    let mut response = Response::new();
    response.set_status(status);
    let bytes = response.write_to_bytes().unwrap();
    frame(bytes.len() as u32, request * 2 + 1, 2, &bytes)
}

/// A guest that greets as it should and then sends these, one for each request it sees, and keeps listening.
async fn guest(mut channel: UnixStream, sends: Vec<Vec<u8>>) {
    let mut waste = [0; 4096];
    if session::accept(&mut channel).await.is_err() {
        return;
    }
    for bytes in sends {
        if matches!(channel.read(&mut waste).await, Ok(0) | Err(_)) || channel.write_all(&bytes).await.is_err() {
            return;
        }
    }
    while !matches!(channel.read(&mut waste).await, Ok(0) | Err(_)) {}
}

/// An agent whose guest answers the first request well, and the rest with these.
async fn met(mut sends: Vec<Vec<u8>>) -> Agent {
    sends.insert(0, answer(0, InfoResponse::new().write_to_bytes().unwrap()));
    // On a busy machine a good answer may be late, too, which is another's case.
    for _ in 0..20 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(guest(theirs, sends.clone()));
        if let Ok((agent, _)) = Agent::open(Box::new(ours), PATIENCE).await {
            return agent;
        }
    }
    panic!("a guest that answers well was not heard");
}

#[test]
fn a_guest_that_sleeps_over_a_request_is_woken() {
    block_on(async {
        let info = || InfoResponse::new().write_to_bytes().unwrap();
        // It sees the request for the statistics only when the next one comes.
        let woken = [answer(1, StatsResponse::new().write_to_bytes().unwrap()), answer(2, info())].concat();
        let (ours, theirs) = UnixStream::pair().unwrap();
        tokio::spawn(guest(theirs, vec![answer(0, info()), Vec::new(), woken]));
        let (agent, _) = Agent::open(Box::new(ours), Duration::from_secs(2)).await.unwrap();
        agent.stats("c").await.unwrap();
    });
}

/// Whoever restores it takes it down then.
#[test]
fn a_guest_that_is_not_made_one_of_its_own_is_an_error() {
    let resumed = async |answers| met(answers).await.resume(Fresh::new().unwrap(), false).await;
    block_on(async {
        let refused = resumed(vec![refusal(1, Code::INTERNAL, "no entropy")]).await.unwrap_err();
        assert!(matches!(&refused, AgentError::Refused { message, .. } if message == "no entropy"), "{refused}");
        // Its clock is what it was when it was saved, however often it is set.
        let saved = ResumeResponse { wall_clock_ns: 1, ..Default::default() }.write_to_bytes().unwrap();
        let wrong = resumed((1..20).map(|number| answer(number, saved.clone())).collect()).await.unwrap_err();
        assert!(matches!(wrong, AgentError::Nonsense { call: "SetClock", .. }), "{wrong}");
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn noise_instead_of_a_greeting_is_an_error(noise in vec(vec(any::<u8>(), 0..300), 0..8)) {
        block_on(async {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            tokio::spawn(async move {
                for part in noise {
                    if theirs.write_all(&part).await.is_err() {
                        return;
                    }
                }
            });
            prop_assert!(Agent::open(Box::new(ours), PATIENCE).await.is_err());
            Ok(())
        })?;
    }

    #[test]
    fn noise_instead_of_an_answer_is_an_error(noise in vec(any::<u8>(), 0..2000)) {
        block_on(async {
            let agent = met(vec![noise]).await;
            prop_assert!(agent.pids("c").await.is_err());
            Ok(())
        })?;
    }

    #[test]
    fn frames_of_any_shape_are_borne(
        shapes in vec((any::<u32>(), 0_u32..9, any::<u8>(), vec(any::<u8>(), 0..400), any::<bool>()), 1..6)
    ) {
        block_on(async {
            let frames = shapes.into_iter().map(|(length, stream, kind, payload, honest)| {
                frame(if honest { payload.len() as u32 } else { length }, stream, kind, &payload)
            });
            let agent = met(frames.collect()).await;
            for _ in 0..3 {
                let _ = agent.stats("c").await;
            }
        });
    }

    #[test]
    fn a_chunk_is_what_was_asked_for_or_an_error(length in 0_usize..200_000, eof in any::<bool>(), max in 1_usize..100_000) {
        block_on(async {
            let chunk = ReadStreamResponse { data: vec![7; length], eof, ..Default::default() };
            let agent = met(vec![answer(1, chunk.write_to_bytes().unwrap())]).await;
            let read = agent.read(1, max).await;
            let max = max.min(MAX_CHUNK);
            match (length, eof) {
                (0, true) => prop_assert!(matches!(read, Ok(None))),
                (1.., _) if length <= max => prop_assert_eq!(read.unwrap().unwrap().len(), length),
                _ => prop_assert!(matches!(read, Err(AgentError::Nonsense { .. })), "{:?}", read),
            }
            Ok(())
        })?;
    }

    #[test]
    fn an_exit_status_is_a_byte(status in any::<u32>(), at in any::<i64>(), oom in any::<bool>()) {
        block_on(async {
            let ended =
                WaitProcessResponse { exit_status: status, exited_at_ns: at, oom_kills: u64::from(oom), ..Default::default() };
            let agent = met(vec![answer(1, ended.write_to_bytes().unwrap())]).await;
            prop_assert_eq!(agent.wait("c", "").await.is_ok(), status <= 255);
            Ok(())
        })?;
    }

    #[test]
    fn words_are_cut_and_printable(text in any::<String>(), times in 1_usize..200, code in 1..16) {
        block_on(async {
            let code = <Code as protobuf::Enum>::from_i32(code).unwrap();
            let agent = met(vec![refusal(1, code, &text.repeat(times))]).await;
            let error = agent.delete_container("c").await.unwrap_err().to_string();
            prop_assert!(error.chars().count() < 3000 && !error.chars().any(char::is_control), "{:?}", error);
            Ok(())
        })?;
    }

    #[test]
    fn any_measurement_is_taken(bytes in vec(any::<u8>(), 0..200)) {
        block_on(async {
            let sent = StatsResponse::parse_from_bytes(&bytes).unwrap_or_default();
            let agent = met(vec![answer(1, sent.write_to_bytes().unwrap())]).await;
            prop_assert!(agent.stats("c").await.is_ok());
            Ok(())
        })?;
    }
}
