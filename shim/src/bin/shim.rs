//! `containerd-shim-chsnap-v2`, as containerd runs it: `start`, `delete`, `-info`, `-v`, and the server itself. And, as the
//! shim runs it beside a pod, the builder of a template and who clears away after that.

use std::{env, process::ExitCode};

use chsnap::{
    share,
    task::{
        chain,
        server::{self, Actions, RUNTIME, ServeError},
    },
    template,
};
use containerd_shim::{Flags, StartOpts};

fn main() -> ExitCode {
    let args: Vec<_> = env::args_os().skip(1).collect();
    if args == [template::COMMAND] {
        return template::serve();
    }
    if args == [template::JANITOR] {
        return template::clear();
    }
    let flags = match containerd_shim::parse(&args) {
        Ok(flags) => flags,
        Err(e) => return failed(&e),
    };
    if flags.version {
        println!("{RUNTIME}:\n  Version:  {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let serves = flags.action.is_empty() && !flags.info && !flags.socket.is_empty();
    // A namespace is a thread's: enter it while there is only one.
    if serves && let Err(e) = share::enter_private_mounts() {
        return unserved(&ServeError::Mounts(e));
    }
    // One thread: the shim waits far more than it works, and its children's life hangs on the thread that forked them.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return failed(&e),
    };
    runtime.block_on(async {
        if serves {
            return server::serve(&flags).await.map_or_else(|e| unserved(&e), |()| ExitCode::SUCCESS);
        }
        if flags.action == "start" && !server::offers_v3() {
            return start_v2(flags).await;
        }
        containerd_shim::asynchronous::run::<Actions>(RUNTIME, None).await;
        ExitCode::SUCCESS
    })
}

/// `start` for a containerd that knows only version 2 of the task API: the answer is the bare address.
async fn start_v2(flags: Flags) -> ExitCode {
    let opts = StartOpts {
        id: flags.id,
        publish_binary: flags.publish_binary,
        address: flags.address,
        ttrpc_address: env::var("TTRPC_ADDRESS").unwrap_or_default(),
        namespace: flags.namespace,
        debug: flags.debug,
        ..StartOpts::default()
    };
    match server::start(opts).await {
        Ok(address) => {
            print!("{address}");
            ExitCode::SUCCESS
        }
        Err(e) => failed(&e),
    }
}

/// The server's stdout is what `start` hands on to containerd, and with it to the person; its stderr goes nowhere.
fn unserved(error: &ServeError) -> ExitCode {
    println!("{RUNTIME}: {}", chain(error));
    ExitCode::FAILURE
}

fn failed(error: &dyn std::error::Error) -> ExitCode {
    eprintln!("{RUNTIME}: {}", chain(error));
    ExitCode::FAILURE
}
