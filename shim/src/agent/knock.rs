//! An agent that does not answer is asked whether it is there.
//!
//! Between two parties of a virtio device a notification may get lost: on emulated hosts it was seen once in some hundred
//! starts, the guest asleep over a request that lay in its queue. Whatever is sent after it wakes the sleeper, who then
//! finds all there is. So something is sent, and what comes of it tells a lost notification from an agent that hangs.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use log::{info, warn};
use tokio::time::{Instant as TokioInstant, interval_at};

use super::{Agent, AgentError};

/// How many times within a deadline, and how many may be without an answer.
const TIMES: u32 = 4;
/// Not earlier: a busy guest is nothing to be told of.
const SOONEST: Duration = Duration::from_secs(1);

/// Of all the calls of one session: the knocks that have no answer yet.
pub(super) type Unanswered = Arc<AtomicU32>;

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
        if knocks > 0 {
            let what = if answered.is_ok() { "answered" } else { "did not do" };
            warn!("the agent {what} {call} in {waited:.1?}, asked {knocks} times whether it is there");
        }
        answered
    }

    async fn knock(&self, call: &'static str, knocks: &AtomicU32) -> Infallible {
        let pause = (self.deadline / (TIMES + 1)).max(SOONEST);
        let mut ticks = interval_at(TokioInstant::now() + pause, pause);
        loop {
            ticks.tick().await;
            if self.unanswered.fetch_add(1, Ordering::Relaxed) >= TIMES {
                self.unanswered.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            knocks.fetch_add(1, Ordering::Relaxed);
            let (agent, asked) = (self.clone(), Instant::now());
            // A task of its own: its answer tells something when the call's deadline has passed, too.
            tokio::spawn(async move {
                match agent.info().await {
                    Ok(_) => info!("the agent is there, told in {:.1?}, while {call} waits", asked.elapsed()),
                    Err(error) => warn!("the agent is not there while {call} waits: {error}"),
                }
                agent.unanswered.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }
}
