//! `agent.proto`, answered.

use std::{future::Future, sync::Arc};

use async_trait::async_trait;
use nix::{
    mount::{MntFlags, umount2},
    sys::{
        reboot::{RebootMode, reboot},
        utsname::uname,
    },
    unistd::sync,
};
use ttrpc::{Code, r#async::TtrpcContext};

use chsnap_protocol::{
    PROTOCOL_VERSION, SHARE_MOUNT,
    agent::{
        AdoptRequest, AwaitReadyRequest, ConnectPortRequest, ContainerRef, CreateContainerRequest, CreateExecRequest,
        CreateProcessResponse, Empty, FreezeRequest, FreezeResponse, InfoRequest, InfoResponse, ListPidsResponse,
        ProcessRef, ReadStreamRequest, ReadStreamResponse, ResizeTerminalRequest, ResumeRequest, ResumeResponse,
        SetClockRequest, SignalProcessRequest, StartProcessResponse, StatsResponse, StreamRef, WaitOomRequest,
        WaitOomResponse, WaitProcessResponse, WriteStreamRequest,
    },
    agent_ttrpc::Agent,
};

use crate::{
    clock,
    container::Containers,
    error::{Coded, invalid, status},
    freeze::Freezer,
    process::{StreamIds, Wanted},
    resume,
};

type Answer<T> = ttrpc::Result<T>;

/// Serves every session; what it knows outlives them.
#[derive(Debug)]
pub struct Service {
    pub containers: Arc<Containers>,
    pub freezer: Arc<Freezer>,
    /// Times since the boot.
    pub init_start_ns: u64,
    pub ready_ns: u64,
}

fn refuse<E: Coded>(error: E) -> ttrpc::Error {
    status(&error)
}

/// Carries a change through even if the session ends in the middle of it.
async fn whole<T, E, F>(change: F) -> Answer<T>
where
    T: Send + 'static,
    E: Coded + Send + 'static,
    F: Future<Output = Result<T, E>> + Send + 'static,
{
    match tokio::spawn(change).await {
        Ok(result) => result.map_err(refuse),
        Err(e) => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, e))),
    }
}

fn created(streams: StreamIds) -> CreateProcessResponse {
    CreateProcessResponse {
        stdin_stream: streams.stdin,
        stdout_stream: streams.stdout,
        stderr_stream: streams.stderr,
        ..Default::default()
    }
}

#[async_trait]
impl Agent for Service {
    async fn info(&self, _: &TtrpcContext, request: InfoRequest) -> Answer<InfoResponse> {
        if request.protocol_version != PROTOCOL_VERSION {
            let text = format!(
                "the agent speaks protocol version {PROTOCOL_VERSION}, the shim {}; install shim and guest of one \
                 release",
                request.protocol_version
            );
            return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::FAILED_PRECONDITION, text)));
        }
        let kernel = uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
        Ok(InfoResponse {
            protocol_version: PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: kernel,
            init_start_ns: self.init_start_ns,
            agent_ready_ns: self.ready_ns,
            wall_clock_ns: clock::wall_ns(),
            ..Default::default()
        })
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<ResumeResponse> {
        resume::resume(&request, clock::boot_ns()).map_err(refuse)?;
        // What the request's way took is missing in it, which only the host can judge.
        Ok(ResumeResponse { wall_clock_ns: clock::wall_ns(), ..Default::default() })
    }

    async fn set_clock(&self, _: &TtrpcContext, request: SetClockRequest) -> Answer<ResumeResponse> {
        resume::set_clock(request.wall_clock_ns, clock::boot_ns()).map_err(refuse)?;
        Ok(ResumeResponse { wall_clock_ns: clock::wall_ns(), ..Default::default() })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Answer<CreateProcessResponse> {
        let containers = self.containers.clone();
        let wanted = Wanted::from(request.stdio.get_or_default());
        whole(async move { containers.create(&request.container_id, &request.spec_json, wanted).await })
            .await
            .map(created)
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ContainerRef) -> Answer<Empty> {
        let containers = self.containers.clone();
        whole(async move { containers.delete(&request.container_id).await }).await?;
        Ok(Empty::new())
    }

    async fn create_exec(&self, _: &TtrpcContext, request: CreateExecRequest) -> Answer<CreateProcessResponse> {
        let wanted = Wanted::from(request.stdio.get_or_default());
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        self.containers.create_exec(id, exec_id, &request.process_json, wanted).map(created).map_err(refuse)
    }

    async fn start_process(&self, _: &TtrpcContext, request: ProcessRef) -> Answer<StartProcessResponse> {
        let containers = self.containers.clone();
        let pid = whole(async move { containers.start(&request.container_id, &request.exec_id).await }).await?;
        Ok(StartProcessResponse { pid, ..Default::default() })
    }

    async fn wait_process(&self, _: &TtrpcContext, request: ProcessRef) -> Answer<WaitProcessResponse> {
        let process = self.containers.process(&request.container_id, &request.exec_id).map_err(refuse)?;
        let exit = process.wait().await.map_err(refuse)?;
        Ok(WaitProcessResponse {
            exit_status: exit.status,
            exited_at_ns: exit.at_ns,
            oom_kills: exit.oom_kills,
            ..Default::default()
        })
    }

    async fn wait_oom(&self, _: &TtrpcContext, request: WaitOomRequest) -> Answer<WaitOomResponse> {
        let process = self.containers.process(&request.container_id, "").map_err(refuse)?;
        let kills = process.wait_oom(request.known).await;
        Ok(WaitOomResponse { kills, ..Default::default() })
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> Answer<Empty> {
        let process = request.process.get_or_default();
        let (id, exec_id) = (&process.container_id, &process.exec_id);
        self.containers.signal(id, exec_id, request.signal, request.all).map_err(refuse)?;
        Ok(Empty::new())
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessRef) -> Answer<Empty> {
        self.containers.delete_process(&request.container_id, &request.exec_id).map_err(refuse)?;
        Ok(Empty::new())
    }

    async fn list_pids(&self, _: &TtrpcContext, request: ContainerRef) -> Answer<ListPidsResponse> {
        let pids = self.containers.pids(&request.container_id).map_err(refuse)?;
        Ok(ListPidsResponse { pids, ..Default::default() })
    }

    async fn resize_terminal(&self, _: &TtrpcContext, request: ResizeTerminalRequest) -> Answer<Empty> {
        let process = request.process.get_or_default();
        let process = self.containers.process(&process.container_id, &process.exec_id).map_err(refuse)?;
        process.resize(request.width, request.height).map_err(refuse)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRef) -> Answer<StatsResponse> {
        self.containers.stats(&request.container_id).map_err(refuse)
    }

    async fn read_stream(&self, _: &TtrpcContext, request: ReadStreamRequest) -> Answer<ReadStreamResponse> {
        let data = self.containers.streams.read(request.stream, request.max as usize).await.map_err(refuse)?;
        let eof = data.is_empty();
        Ok(ReadStreamResponse { data, eof, ..Default::default() })
    }

    async fn write_stream(&self, _: &TtrpcContext, request: WriteStreamRequest) -> Answer<Empty> {
        self.containers.streams.write(request.stream, &request.data).await.map_err(refuse)?;
        Ok(Empty::new())
    }

    async fn close_stream_write(&self, _: &TtrpcContext, request: StreamRef) -> Answer<Empty> {
        self.containers.streams.close_write(request.stream).await.map_err(refuse)?;
        Ok(Empty::new())
    }

    async fn close_stream(&self, _: &TtrpcContext, request: StreamRef) -> Answer<Empty> {
        self.containers.streams.close(request.stream);
        Ok(Empty::new())
    }

    async fn connect_port(&self, _: &TtrpcContext, request: ConnectPortRequest) -> Answer<StreamRef> {
        let port = u16::try_from(request.port).ok().filter(|port| *port != 0);
        let port = port.ok_or_else(|| invalid(format!("{} is not a TCP port", request.port)))?;
        let stream = self.containers.streams.connect(port).await.map_err(refuse)?;
        Ok(StreamRef { stream, ..Default::default() })
    }

    async fn await_ready(&self, _: &TtrpcContext, request: AwaitReadyRequest) -> Answer<Empty> {
        self.freezer.await_ready(&self.containers, &request).await.map_err(refuse)?;
        Ok(Empty::new())
    }

    async fn freeze(&self, _: &TtrpcContext, request: FreezeRequest) -> Answer<FreezeResponse> {
        let (freezer, containers) = (self.freezer.clone(), self.containers.clone());
        let open = whole(async move { freezer.freeze(&containers, &request).await }).await?;
        let open = open.iter().map(|path| path.to_string_lossy().into_owned()).collect();
        Ok(FreezeResponse { open, ..Default::default() })
    }

    async fn adopt(&self, _: &TtrpcContext, request: AdoptRequest) -> Answer<CreateProcessResponse> {
        let (freezer, containers) = (self.freezer.clone(), self.containers.clone());
        whole(async move { freezer.adopt(&containers, &request).await }).await.map(created)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Answer<Empty> {
        sync();
        // Containers may hold it; the sync has written everything that matters.
        let _ = umount2(SHARE_MOUNT, MntFlags::MNT_DETACH);
        match reboot(RebootMode::RB_POWER_OFF) {
            Ok(never) => match never {},
            Err(e) => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                Code::INTERNAL,
                format!("cannot power the guest off: {}", std::io::Error::from(e)),
            ))),
        }
    }
}
