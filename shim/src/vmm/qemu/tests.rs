//! Against the real QEMU, with a real guest.

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use chsnap_test_skip::skip;

use super::*;
use crate::vmm::{
    kvm, scenarios,
    testing::{BOOT, Bench, end, tool},
};

fn qemu() -> Option<Qemu> {
    let program = tool("CHSNAP_QEMU", PROGRAM)?;
    // As the suite has it: where KVM is to be tested, it is there.
    let kvm = std::env::var_os("CHSNAP_TEST_ACCELERATOR").is_some_and(|name| name == "kvm");
    Some(Qemu { program, accelerator: if kvm { Accelerator::Kvm } else { Accelerator::Tcg } })
}

#[tokio::test]
async fn the_agent_channel_carries_bytes_both_ways_and_can_be_opened_again() {
    // The port comes when QEMU has announced it, and reads as ended until QEMU has told that somebody is there.
    let init = "
        until [ -c /dev/vport*p1 ]; do sleep 0.1; done
        exec 3<>$(ls /dev/vport*p1)
        until [ \"$word\" = end ]; do read word <&3 && echo \"$word\" >&3 || sleep 0.1; done
        poweroff -f";
    let (Some(qemu), Some(bench)) = (qemu(), Bench::new(init).await) else { return };
    let vm = qemu.boot(&bench.spec).await.unwrap();
    let talk = async {
        let mut channel = vm.channel().await.unwrap();
        let mut echo = [0; 6];
        channel.write_all(b"hello\n").await.unwrap();
        channel.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"hello\n");
        drop(channel);
        let mut channel = vm.channel().await.unwrap();
        channel.write_all(b"end\n").await.unwrap();
        channel.read_exact(&mut echo[..4]).await.unwrap();
    };
    timeout(*BOOT, talk).await.unwrap_or_else(|_| panic!("no echo; console: {}", vm.console()));
    assert!(end(&*vm).await.by_guest);
    assert!(bench.leftovers().is_empty());
}

#[tokio::test]
async fn a_snapshot_is_restored_twice_at_once() {
    let Some(qemu) = qemu() else { return };
    scenarios::is_restored(&qemu).await;
}

/// A rung means something there alone.
#[cfg(target_arch = "aarch64")]
#[tokio::test]
async fn a_masked_machine_is_restored() {
    let Some(qemu) = qemu() else { return };
    scenarios::is_restored_masked(&qemu).await;
}

#[tokio::test]
async fn a_snapshot_that_is_none_is_an_error() {
    let (Some(qemu), Some(bench)) = (qemu(), Bench::new("").await) else { return };
    std::fs::write(bench.snapshot_dir().join(migration::FILE), "no machine").unwrap();
    let error = qemu.restore(&bench.spec, bench.snapshot_dir()).await.err().unwrap();
    assert!(scenarios::chain(&error).contains("load of migration failed"), "{}", scenarios::chain(&error));
    assert!(bench.leftovers().is_empty());
}

#[tokio::test]
async fn the_agent_answers() {
    let Some(qemu) = qemu() else { return };
    scenarios::meets_the_agent(&qemu).await;
}

#[tokio::test]
async fn no_request_is_lost() {
    let Some(qemu) = qemu() else { return };
    scenarios::is_never_silent(&qemu).await;
}

#[tokio::test]
async fn kvm_is_used_where_it_works() {
    let Some(qemu) = qemu() else { return };
    let usable = async { kvm::try_out(kvm::open()?).await };
    if let Err(error) = usable.await {
        skip(error.to_string());
        return;
    }
    scenarios::powers_off(&Qemu { accelerator: Accelerator::Kvm, ..qemu }).await;
}

#[tokio::test]
async fn a_guest_sees_the_share_and_powers_off() {
    let Some(qemu) = qemu() else { return };
    scenarios::powers_off(&qemu).await;
}

#[tokio::test]
async fn a_panic_or_a_reboot_ends_the_machine() {
    let Some(qemu) = qemu() else { return };
    scenarios::panics_and_reboots(&qemu).await;
}

#[tokio::test]
async fn a_guest_that_writes_forever_takes_no_more_memory() {
    let Some(qemu) = qemu() else { return };
    scenarios::babbles(&qemu).await;
}

#[tokio::test]
async fn a_killed_vmm_is_noticed_and_a_dropped_one_is_gone() {
    let Some(qemu) = qemu() else { return };
    scenarios::is_killed(&qemu).await;
}

#[tokio::test]
async fn what_cannot_start_says_why_and_what_to_do() {
    let Some(qemu) = qemu() else { return };
    let cases: [scenarios::Spoilt; 4] = [
        (|spec| spec.cpus = 100_000, "SMP CPUs", "lower the number of vCPUs"),
        (|spec| spec.memory_mib = 1 << 40, "memory", "lower the VM's memory"),
        (|spec| spec.kernel = "/nonexistent/vmlinux".into(), "/nonexistent/vmlinux", ""),
        (|spec| spec.share_socket = "/nonexistent/share".into(), "/nonexistent/share", ""),
    ];
    scenarios::cannot_start(&qemu, &cases).await;
}

#[tokio::test]
async fn a_program_that_is_no_qemu_is_an_error_at_once() {
    let Some(bench) = Bench::new("").await else { return };
    let other = Qemu { program: "/bin/false".into(), accelerator: Accelerator::Tcg };
    let error = timeout(Duration::from_secs(10), other.boot(&bench.spec)).await.unwrap().err().unwrap();
    assert!(matches!(error, BootError::Died { .. }), "{error}");
}
