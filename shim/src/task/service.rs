//! The ttrpc methods: each translates, calls a room, and answers.

use std::{future::Future, sync::Arc};

use async_trait::async_trait;
use containerd_shim::util::convert_to_any;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
        DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
        ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
        StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    events::task::TaskDelete,
    shim::oci::ProcessDetails,
    shim_async::Task,
    ttrpc::r#async::TtrpcContext,
};

use super::{Life, Service, TaskError, pause, stats};

type Answer<T> = ttrpc::Result<T>;

/// The service as ttrpc sees it.
#[derive(Clone)]
pub struct Api(pub Arc<Service>);

/// Does `work` to its end even if nobody waits for it: ttrpc drops a call whose deadline has passed, and half a Delete
/// would leave a VM behind.
async fn to_its_end<T: Send + 'static>(work: impl Future<Output = Result<T, TaskError>> + Send + 'static) -> Answer<T> {
    match tokio::spawn(work).await {
        Ok(answer) => answer.map_err(Into::into),
        Err(e) => Err(ttrpc::Error::Others(format!("the call ended early: {e}"))),
    }
}

#[async_trait]
impl Task for Api {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        let service = Arc::clone(&self.0);
        let asking = service.callers.present();
        to_its_end(async move {
            let id = request.id.clone();
            let created = service.create_container(request).await;
            if service.callers.all_gone(&asking) {
                return Err(service.abandon(id, created).await);
            }
            let container = created?;
            let mut answer = CreateTaskResponse::new();
            answer.pid = container.init.pid();
            Ok(answer)
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        let process = self.0.process(&request.id, &request.exec_id).await?;
        let service = Arc::clone(&self.0);
        let mut answer = StartResponse::new();
        answer.pid = to_its_end(async move { service.start_process(&process).await }).await?;
        Ok(answer)
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        let container = self.0.container(&request.id).await?;
        let process = self.0.process(&request.id, &request.exec_id).await?;
        let mut answer = StateResponse::new();
        answer.id = request.id;
        answer.exec_id = request.exec_id;
        answer.bundle = container.bundle.clone();
        answer.pid = process.pid();
        answer.stdin = process.paths.stdin.clone();
        answer.stdout = process.paths.stdout.clone();
        answer.stderr = process.paths.stderr.clone();
        answer.terminal = process.paths.terminal;
        let status = match process.life() {
            Life::Created => Status::CREATED,
            Life::Running => Status::RUNNING,
            Life::Stopped(exit) => {
                answer.exit_status = exit.status;
                answer.exited_at = Some(exit.at).into();
                Status::STOPPED
            }
        };
        answer.status = status.into();
        Ok(answer)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        let process = self.0.process(&request.id, &request.exec_id).await?;
        let exit = process.wait().await;
        let mut answer = WaitResponse::new();
        answer.exit_status = exit.status;
        answer.exited_at = Some(exit.at).into();
        Ok(answer)
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        let process = self.0.process(&request.id, &request.exec_id).await?;
        let service = Arc::clone(&self.0);
        to_its_end(async move { service.kill_process(&process, request.signal, request.all).await }).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        let service = Arc::clone(&self.0);
        to_its_end(async move { service.add_exec(request).await }).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        let container = self.0.container(&request.id).await?;
        let service = Arc::clone(&self.0);
        to_its_end(async move {
            let process = if request.exec_id.is_empty() {
                service.delete_container(&container).await?;
                container.init.clone()
            } else {
                service.delete_exec(&container, &request.exec_id).await?
            };
            // What is deleted has ended, if only by that.
            let exit = process.wait().await;
            if request.exec_id.is_empty() {
                let mut event = TaskDelete::new();
                event.container_id = container.id.clone();
                event.pid = process.pid();
                event.exit_status = exit.status;
                event.exited_at = Some(exit.at.clone()).into();
                service.events.publish(event).await;
            }
            let mut answer = DeleteResponse::new();
            answer.pid = process.pid();
            answer.exit_status = exit.status;
            answer.exited_at = Some(exit.at).into();
            Ok(answer)
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        let container = self.0.container(&request.id).await?;
        if container.init.pauses() {
            let mut answer = PidsResponse::new();
            answer.processes = pause::pids(&container.init);
            return Ok(answer);
        }
        let own = container.init.guest_pid();
        let guest = match container.init.life() {
            // It waits in the guest, which does not tell its number before it runs.
            Life::Created => vec![own],
            Life::Running => self.0.machine().await?.agent().pids(&request.id).await.map_err(TaskError::from)?,
            _ => Vec::new(),
        };
        let execs: Vec<_> = container.execs.lock().await.values().cloned().collect();
        let mut answer = PidsResponse::new();
        for pid in guest {
            let mut info = ProcessInfo::new();
            info.pid = pid;
            if pid == own {
                // By the VMM's number, as in State; the rest by the guest's.
                info.pid = container.init.pid();
            } else if let Some(exec) = execs.iter().find(|e| e.guest_pid() == pid && e.life() == Life::Running) {
                let mut details = ProcessDetails::new();
                details.exec_id = exec.exec.clone();
                info.info = Some(convert_to_any(Box::new(details)).map_err(TaskError::Encode)?).into();
            }
            answer.processes.push(info);
        }
        Ok(answer)
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        let process = self.0.process(&request.id, &request.exec_id).await?;
        if process.paths.terminal && !process.pauses() && !matches!(process.life(), Life::Stopped(_)) {
            let sandbox = self.0.machine().await?;
            let (w, h) = (request.width, request.height);
            sandbox.agent().resize(&request.id, &request.exec_id, w, h).await.map_err(TaskError::from)?;
        }
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        let process = self.0.process(&request.id, &request.exec_id).await?;
        if request.stdin {
            process.relays.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let measured = match self.0.container(&request.id).await?.init.pauses() {
            true => Default::default(),
            false => self.0.machine().await?.agent().stats(&request.id).await.map_err(TaskError::from)?,
        };
        let mut answer = StatsResponse::new();
        answer.stats = Some(stats::metrics(&measured).map_err(TaskError::Encode)?).into();
        Ok(answer)
    }

    async fn pause(&self, _: &TtrpcContext, _: PauseRequest) -> Answer<Empty> {
        Err(TaskError::Unsupported("paused: send its processes SIGSTOP instead").into())
    }

    async fn resume(&self, _: &TtrpcContext, _: ResumeRequest) -> Answer<Empty> {
        Err(TaskError::Unsupported("paused, so there is nothing to resume").into())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Answer<Empty> {
        Err(TaskError::Unsupported("checkpointed").into())
    }

    async fn update(&self, _: &TtrpcContext, _: UpdateTaskRequest) -> Answer<Empty> {
        Err(TaskError::Unsupported("given other limits while it runs: create it anew with them").into())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Answer<ConnectResponse> {
        let mut answer = ConnectResponse::new();
        answer.shim_pid = std::process::id();
        if let Ok(container) = self.0.container(&request.id).await {
            answer.task_pid = container.init.pid();
        }
        answer.version = env!("CARGO_PKG_VERSION").into();
        Ok(answer)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Answer<Empty> {
        // The last events are sent on the way out, see Service::stop(): containerd waits for this answer, perhaps before
        // it takes events again.
        if self.0.containers.lock().await.is_empty() {
            self.0.exit.signal();
        }
        Ok(Empty::new())
    }
}
