//! An agent that does not answer is asked whether it is there.
//!
//! Between two parties of a virtio device a notification may get lost: on emulated hosts it was seen once in some hundred
//! starts, the guest asleep over a request that lay in its queue. Whatever is sent after it wakes the sleeper, who then
//! finds all there is. So something is sent, and what comes of it tells a lost notification from an agent that hangs.

use std::{
    convert::Infallible,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use log::warn;
use tokio::time::{sleep, timeout};

use super::{Agent, AgentError};

/// How many times, at most, within a deadline.
const TIMES: u32 = 4;

impl Agent {
    /// Waits for the answer to `call` for as long as the deadline allows, and knocks meanwhile.
    pub(super) async fn knocking<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<T, AgentError>>,
    ) -> Result<T, AgentError> {
        let (began, knocks) = (Instant::now(), AtomicU32::new(0));
        let answered = tokio::select! {
            biased;
            answered = self.within_deadline(call, answer) => answered,
            never = self.knock(call, &knocks) => match never {},
        };
        let (knocks, waited) = (knocks.into_inner(), began.elapsed());
        if knocks > 0 && answered.is_ok() {
            warn!("the agent answered {call} after {waited:.1?}, having been asked {knocks} times whether it is there");
        }
        answered
    }

    async fn knock(&self, call: &'static str, knocks: &AtomicU32) -> Infallible {
        let pause = self.deadline / (TIMES + 1);
        loop {
            sleep(pause).await;
            knocks.fetch_add(1, Ordering::Relaxed);
            let asked = Instant::now();
            // Before `call` is: only an answer that was on its way overtakes this one.
            let there = timeout(pause, self.info()).await;
            warn!("the agent has not answered {call}; is it there? {}", told(&there, asked.elapsed()));
        }
    }
}

fn told<T, E>(there: &Result<Result<T, AgentError>, E>, took: Duration) -> String {
    match there {
        Ok(Ok(_)) => format!("yes, told in {took:.1?}"),
        Ok(Err(error)) => format!("{error}"),
        Err(_) => format!("nothing came for {took:.1?}"),
    }
}
