//! Sends the task's events to containerd, in order, also across a restart of containerd.
//!
//! containerd-shim's own publisher puts an event that failed back at the queue's end, so an exit could overtake a
//! start; here a failed event is tried again before the next one, for a bounded time.

use std::time::Duration;

use containerd_shim::{
    event::Event,
    util::{convert_to_any, timestamp},
};
use containerd_shim_protos::{
    protobuf::MessageDyn,
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
};
use tokio::{
    sync::{Mutex, mpsc},
    task::JoinHandle,
    time::{sleep, timeout},
};
use ttrpc::context;

/// How often and after which pause an event is tried again: about half a minute, a restart of containerd.
const PAUSES_MS: [u64; 9] = [50, 100, 200, 500, 1000, 2000, 5000, 10_000, 10_000];
const CALL: Duration = Duration::from_secs(5);

/// The sending end.
#[derive(Debug)]
pub struct Events {
    namespace: String,
    queue: Mutex<Option<mpsc::UnboundedSender<Envelope>>>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl Events {
    /// Sends to containerd's ttrpc socket at `address`.
    #[must_use]
    pub fn new(namespace: &str, address: &str) -> Self {
        let (queue, mut work) = mpsc::unbounded_channel::<Envelope>();
        let address = if address.contains("://") { address.to_string() } else { format!("unix://{address}") };
        let worker = tokio::spawn(async move {
            let mut client = None;
            while let Some(envelope) = work.recv().await {
                forward(&mut client, &address, envelope).await;
            }
        });
        Self { namespace: namespace.into(), queue: Mutex::new(Some(queue)), worker: Mutex::new(Some(worker)) }
    }

    /// Queues an event. The order of calls is the order of arrival.
    pub async fn publish<E: Event + MessageDyn>(&self, event: E) {
        let topic = event.topic();
        let mut envelope = Envelope::new();
        envelope.set_namespace(self.namespace.clone());
        envelope.set_topic(topic);
        match (timestamp(), convert_to_any(Box::new(event))) {
            (Ok(time), Ok(any)) => {
                envelope.set_timestamp(time);
                envelope.set_event(any);
            }
            (Err(e), _) | (_, Err(e)) => {
                log::error!("event {} cannot be encoded: {e}", envelope.topic);
                return;
            }
        }
        if let Some(queue) = self.queue.lock().await.as_ref() {
            // The worker ends only after the queue was closed.
            let _ = queue.send(envelope);
        }
    }

    /// Waits until everything queued was sent or given up, at most `bound`.
    pub async fn flush(&self, bound: Duration) {
        *self.queue.lock().await = None;
        if let Some(mut worker) = self.worker.lock().await.take()
            && timeout(bound, &mut worker).await.is_err()
        {
            log::warn!("containerd did not take the last events within {bound:?}");
            worker.abort();
        }
    }
}

async fn forward(client: &mut Option<EventsClient>, address: &str, envelope: Envelope) {
    let topic = envelope.topic.clone();
    let mut request = ForwardRequest::new();
    request.set_envelope(envelope);
    for pause in PAUSES_MS {
        if client.is_none() {
            match Client::connect(address).await {
                Ok(connected) => *client = Some(EventsClient::new(connected)),
                Err(e) => log::debug!("containerd's event socket: {e}"),
            }
        }
        if let Some(connected) = client.as_ref() {
            match connected.forward(context::with_duration(CALL), &request).await {
                Ok(_) => return,
                Err(ttrpc::Error::RpcStatus(status)) => {
                    log::error!("containerd refused the event {topic}: {}", status.message);
                    return;
                }
                Err(e) => {
                    log::debug!("event {topic}: {e}");
                    *client = None;
                }
            }
        }
        sleep(Duration::from_millis(pause)).await;
    }
    log::error!("event {topic} was not delivered");
}
