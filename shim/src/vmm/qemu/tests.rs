//! Against the real QEMU, and where a kernel is there, with a real guest.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::vmm::testing::{BOOT, Bench, end, is_gone, shows, tool};

fn qemu() -> Option<Qemu> {
    let program = tool("CHSNAP_QEMU", Arch::HOST.program())?;
    Some(Qemu { program, accelerator: Accelerator::Tcg })
}

#[tokio::test]
async fn a_guest_boots_talks_and_powers_off() {
    // The port echoes until the word; then the share is read; then the guest powers off. The port
    // comes when QEMU has announced it, and reads as ended until QEMU has told that somebody is there.
    let init = "
        until [ -c /dev/vport*p1 ]; do sleep 0.1; done
        exec 3<>$(ls /dev/vport*p1)
        until [ \"$word\" = end ]; do read word <&3 && echo \"$word\" >&3 || sleep 0.1; done
        mount -t virtiofs chsnap /mnt; cat /mnt/hello
        poweroff -f";
    let (Some(qemu), Some(bench)) = (qemu(), Bench::new(init).await) else { return };
    let vm = qemu.boot(&bench.spec).await.unwrap();
    let talk = async {
        let mut channel = vm.channel().await.unwrap();
        let mut echo = [0; 6];
        channel.write_all(b"hello\n").await.unwrap();
        channel.read_exact(&mut echo).await.unwrap();
        assert_eq!(&echo, b"hello\n");
        // A second session on the same port.
        drop(channel);
        let mut channel = vm.channel().await.unwrap();
        channel.write_all(b"end\n").await.unwrap();
        channel.read_exact(&mut echo[..4]).await.unwrap();
    };
    timeout(BOOT, talk).await.unwrap_or_else(|_| panic!("no echo; console: {}", vm.console()));
    let exit = end(&*vm).await;
    assert!(exit.by_guest, "{exit:?}");
    assert_eq!(exit.status, "exit status: 0");
    assert!(exit.console.contains("from the host"), "{}", exit.console);
    assert!(is_gone(vm.pid()));
    assert!(bench.leftovers().is_empty());
}

#[tokio::test]
async fn a_panic_ends_the_machine_and_its_text_is_kept() {
    let (Some(qemu), Some(bench)) = (qemu(), Bench::new("exit 7").await) else { return };
    let vm = qemu.boot(&bench.spec).await.unwrap();
    let exit = end(&*vm).await;
    assert!(exit.by_guest, "{exit:?}");
    assert!(exit.console.contains("Attempted to kill init! exitcode=0x00000700"), "{}", exit.console);
}

#[tokio::test]
async fn a_guest_that_writes_forever_takes_no_more_memory() {
    let (Some(qemu), Some(bench)) = (qemu(), Bench::new("while :; do cat /bin/busybox; done").await) else { return };
    let vm = qemu.boot(&bench.spec).await.unwrap();
    shows(&*vm, "ELF").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(vm.console().len() <= 3 * (32 << 10), "{}", vm.console().len());
    vm.kill().await;
    assert!(!vm.exited().borrow().as_ref().unwrap().by_guest);
    assert!(is_gone(vm.pid()));
}

#[tokio::test]
async fn a_killed_vmm_is_noticed_and_is_not_the_guest_s_doing() {
    let (Some(qemu), Some(bench)) = (qemu(), Bench::new("echo UP; sleep 1000").await) else { return };
    let vm = qemu.boot(&bench.spec).await.unwrap();
    let pid = i32::try_from(vm.pid()).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL).unwrap();
    let exit = end(&*vm).await;
    assert_eq!((exit.status.as_str(), exit.by_guest), ("signal: 9 (SIGKILL)", false));
}

#[tokio::test]
async fn dropping_the_machine_or_its_boot_leaves_no_process() {
    let (Some(qemu), Some(bench)) = (qemu(), Bench::new("sleep 1000").await) else { return };
    let vm = qemu.boot(&bench.spec).await.unwrap();
    let (pid, mut exited) = (vm.pid(), vm.exited());
    drop(vm);
    timeout(BOOT, exited.wait_for(Option::is_some)).await.unwrap().unwrap();
    assert!(is_gone(pid));
}

#[tokio::test]
async fn what_cannot_start_says_why_and_what_to_do() {
    // Each with a virtiofsd of its own, which serves one connection and ends.
    type Case = (fn(&mut VmSpec), &'static str, &'static str);
    let cases: [Case; 4] = [
        (|spec| spec.cpus = 100_000, "SMP CPUs", "lower the number of vCPUs"),
        (|spec| spec.memory_mib = 1 << 40, "memory", "lower the VM's memory"),
        (|spec| spec.kernel = "/nonexistent/vmlinux".into(), "/nonexistent/vmlinux", ""),
        (|spec| spec.share_socket = "/nonexistent/share".into(), "/nonexistent/share", ""),
    ];
    for (spoil, what, advice) in cases {
        let (Some(qemu), Some(mut bench)) = (qemu(), Bench::new("").await) else { return };
        spoil(&mut bench.spec);
        let error = qemu.boot(&bench.spec).await.err().unwrap().to_string();
        assert!(error.contains(what) && error.ends_with(advice), "{error}");
    }
}

#[tokio::test]
async fn a_program_that_is_no_qemu_is_an_error_at_once() {
    let Some(bench) = Bench::new("").await else { return };
    let other = Qemu { program: "/bin/false".into(), accelerator: Accelerator::Tcg };
    let error = other.boot(&bench.spec).await.err().unwrap();
    assert!(matches!(error, BootError::Died { .. }), "{error}");
}
