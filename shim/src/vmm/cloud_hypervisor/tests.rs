//! Against a recorded contract, everywhere; against the real program where it is found; with a real guest where KVM
//! runs one.

use chsnap_test_skip::skip;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinHandle,
};

use super::*;
use crate::vmm::{
    Rung,
    arch::Arch,
    kvm, scenarios,
    testing::{Bench, tool},
};

fn contract() -> Value {
    serde_json::from_str(include_str!("contract.json")).unwrap()
}

/// The contract's machine.
pub fn spec() -> VmSpec {
    VmSpec {
        cpus: 2,
        memory_mib: 512,
        kernel: "/guest/vmlinux".into(),
        initramfs: "/guest/initramfs".into(),
        cmdline: vec!["word".into()],
        share_socket: "/run/pod/share.sock".into(),
        run_dir: "/run/pod".into(),
        cgroups: vec![],
        network: None,
        rung: Rung::Standard,
        snapshot_dir: None,
        deadline: Duration::from_secs(30),
    }
}

fn machine(landlock: bool) -> Value {
    let mut machine = contract()["machine"].clone();
    machine["payload"]["cmdline"] = Arch::HOST.cmdline(Accelerator::Kvm, &["word".into()]).into();
    machine["landlock_enable"] = landlock.into();
    machine["landlock_rules"] = Value::Null;
    machine
}

fn driver(program: impl Into<PathBuf>) -> CloudHypervisor {
    CloudHypervisor { program: program.into(), own_rungs: BTreeSet::new(), memory_restore: MemoryRestore::Copy }
}

/// Has the driver start the machine on a server that expects these requests and gives these recorded answers.
async fn replay(expected: Vec<(&'static str, Option<Value>, &'static str)>) -> Result<(), StartError> {
    replay_on(Order::Boot, expected).await
}

async fn replay_on(
    order: Order<'_>,
    expected: Vec<(&'static str, Option<Value>, &'static str)>,
) -> Result<(), StartError> {
    replay_by(&driver("unused"), order, expected).await
}

async fn replay_by(
    driver: &CloudHypervisor,
    order: Order<'_>,
    expected: Vec<(&'static str, Option<Value>, &'static str)>,
) -> Result<(), StartError> {
    let (api, server) = serve(expected);
    let outcome = driver.start(&api, &spec(), Path::new("/run/pod/vsock"), order).await;
    drop(api);
    server.await.unwrap();
    outcome
}

/// A server that ends when all was asked, and well.
fn serve(expected: Vec<(&'static str, Option<Value>, &'static str)>) -> (Api, JoinHandle<()>) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let server = tokio::spawn(async move {
        for (line, body, answer) in expected {
            let (head, got) = request(&mut theirs).await;
            assert_eq!(head.lines().next().unwrap(), format!("{line} HTTP/1.1"));
            assert_eq!(got, body, "{line}");
            let answer = contract()["answers"][answer].as_str().unwrap().to_owned();
            theirs.write_all(answer.as_bytes()).await.unwrap();
        }
        assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0, "more was asked than expected");
    });
    (Api::new(ours, Duration::from_secs(30)), server)
}

async fn request(stream: &mut UnixStream) -> (String, Option<Value>) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).await.unwrap();
    (head, (!body.is_empty()).then(|| serde_json::from_slice(&body).unwrap()))
}

#[tokio::test]
async fn the_requests_are_those_of_the_contract() {
    let requests = vec![
        ("GET /api/v1/vmm.ping", None, "ping"),
        ("PUT /api/v1/vm.create", Some(machine(true)), "done"),
        ("PUT /api/v1/vm.boot", None, "done"),
    ];
    assert!(replay(requests).await.is_ok());
}

#[tokio::test]
async fn a_kernel_without_landlock_gets_a_machine_without_it() {
    let requests = vec![
        ("GET /api/v1/vmm.ping", None, "ping"),
        ("PUT /api/v1/vm.create", Some(machine(true)), "no_landlock"),
        ("PUT /api/v1/vm.delete", None, "done"),
        ("PUT /api/v1/vm.create", Some(machine(false)), "done"),
        ("PUT /api/v1/vm.boot", None, "done"),
    ];
    assert!(replay(requests).await.is_ok());
}

/// A machine of the command line is asked for until it runs, and nothing is said to it.
#[tokio::test]
async fn a_machine_of_the_command_line_is_waited_for() {
    let info = "GET /api/v1/vm.info";
    let requests = vec![
        ("GET /api/v1/vmm.ping", None, "ping"),
        (info, None, "not_created"),
        (info, None, "created"),
        (info, None, "running"),
    ];
    assert!(replay_on(Order::Wait, requests).await.is_ok());
}

#[tokio::test]
async fn a_machine_is_saved_while_its_cpus_stand_still() {
    let requests = vec![
        ("PUT /api/v1/vm.pause", None, "done"),
        ("PUT /api/v1/vm.snapshot", Some(contract()["vm.snapshot"].clone()), "done"),
    ];
    let (api, server) = serve(requests);
    snapshot::save(&api, Path::new("/store/snapshot")).await.unwrap();
    drop(api);
    server.await.unwrap();
}

#[tokio::test]
async fn a_machine_is_restored_as_it_was_asked_for() {
    for (memory_restore, mode) in [(MemoryRestore::Copy, "Copy"), (MemoryRestore::OnDemand, "OnDemand")] {
        let mut body = contract()["vm.restore"].clone();
        body["memory_restore_mode"] = mode.into();
        let requests = vec![("GET /api/v1/vmm.ping", None, "ping"), ("PUT /api/v1/vm.restore", Some(body), "done")];
        let driver = CloudHypervisor { memory_restore, ..driver("unused") };
        assert!(replay_by(&driver, Order::Restore(Path::new("/store/snapshot")), requests).await.is_ok());
        assert!(contract()["memory_restore_modes"].as_array().unwrap().contains(&mode.into()));
    }
}

/// Of programs that know both, one, or none of the options, and of one that takes everything.
#[tokio::test]
async fn a_program_is_asked_which_options_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let cases: [(&str, &[Rung]); 4] = [
        ("", &[Rung::NoPmu, Rung::Aggressive]),
        ("case $2 in *sve*) echo unknown option: sve >&2; exit 1;; esac", &[Rung::NoPmu]),
        ("case $2 in *pmu*) echo unknown option: pmu >&2; exit 1;; esac", &[]),
        ("echo $4; exit 0", &[]),
    ];
    for (script, expected) in cases {
        let program = dir.path().join("vmm");
        let refusal = "echo \"unable to convert ${4#size=} for size\" >&2; exit 1";
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n{refusal}\n")).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let known = own_rungs(&program, Duration::from_secs(30)).await.unwrap();
        assert_eq!(known, expected.iter().copied().collect(), "{script}");
    }
}

/// Upstream's v53 has no such option: the error would be to believe that it had.
#[tokio::test]
async fn the_real_program_has_the_options_that_its_help_tells() {
    let Some(driver) = program() else { return };
    let help = std::process::Command::new(&driver.program).arg("--help").output().unwrap();
    let told = String::from_utf8_lossy(&help.stdout).contains("pmu=");
    let known = own_rungs(&driver.program, Duration::from_secs(30)).await.unwrap();
    assert_eq!(known.contains(&Rung::NoPmu), told);
}

/// The command line makes the machine that the API makes.
#[tokio::test]
async fn the_real_program_takes_the_machine_on_its_command_line() {
    let (Some(mut driver), Some(bench)) = (program(), Bench::new("sleep 1000").await) else { return };
    // The standard rung adds no option, so that every build takes it.
    driver.own_rungs = [Rung::Standard].into();
    let vm = driver.boot(&bench.spec).await.unwrap();
    vm.kill().await;
}

#[tokio::test]
async fn a_refusal_s_reasons_are_in_the_error() {
    let requests = vec![
        ("GET /api/v1/vmm.ping", None, "ping"),
        ("PUT /api/v1/vm.create", Some(machine(true)), "done"),
        ("PUT /api/v1/vm.boot", None, "no_kernel"),
    ];
    let Err(StartError::Control(error)) = replay(requests).await else { panic!() };
    let expected = "the VMM refused \"vm.boot\": 500: Error from API: The VM could not boot: Cannot open kernel file: \
        No such file or directory (os error 2)";
    assert_eq!(error.to_string(), expected);
}

/// A name that the API does not know would be ignored silently.
#[test]
fn every_field_is_known_to_the_api() {
    let known = |section: &str, value: &Value| {
        let fields = contract()["fields"][section].as_array().unwrap().clone();
        for name in value.as_object().unwrap().keys() {
            assert!(fields.contains(&name.as_str().into()), "{section}.{name}");
        }
    };
    for request in ["vm.snapshot", "vm.restore"] {
        known(request, &contract()[request]);
    }
    let machine = machine(true);
    known("", &machine);
    for (section, value) in machine.as_object().unwrap() {
        match value {
            Value::Object(_) => known(section, value),
            Value::Array(items) => items.iter().for_each(|item| known(section, item)),
            _ => {}
        }
    }
}

/// The real program, if it and a KVM that opens are there: it answers, and knows the machine as it was described,
/// even where KVM then runs no guest.
#[tokio::test]
async fn the_real_program_takes_the_machine_as_described() {
    let (Some(driver), Some(bench)) = (program(), Bench::new("sleep 1000").await) else { return };
    let (api, api_fd) = api_socket(&bench.spec.run_dir.join("api.sock"), bench.spec.deadline).unwrap();
    let args = vec!["--api-socket".into(), format!("fd={}", child::fd_number(&api_fd)).into()];
    let launch =
        Launch { program: &driver.program, args, fds: vec![api_fd], cgroups: &[], network: None, filter: None };
    let process = Process::start(launch, Leash::new(), |_| async { false }).unwrap();
    let vsock = bench.spec.run_dir.join(VSOCK);
    if let Err(StartError::Control(error)) = driver.start(&api, &bench.spec, &vsock, Order::Boot).await {
        panic!("{error}; {:?}", process.ended().await);
    }
    let info = api.get("vm.info").await.unwrap();
    assert_eq!(info["state"], "Running");
    let mut asked = machine(true);
    asked["cpus"] = serde_json::json!({ "boot_vcpus": 1, "max_vcpus": 1 });
    asked["memory"]["size"] = (bench.spec.memory_mib << 20).into();
    asked["payload"]["kernel"] = bench.spec.kernel.to_str().into();
    asked["payload"]["initramfs"] = bench.spec.initramfs.to_str().into();
    asked["payload"]["cmdline"] = Arch::HOST.cmdline(Accelerator::Kvm, &[]).into();
    asked["fs"][0]["socket"] = bench.spec.share_socket.to_str().into();
    asked["vsock"]["socket"] = vsock.to_str().into();
    assert_within(&asked, &info["config"], "config");
    process.kill().await;
}

/// Everything in `part` is in `whole`, which may know more.
fn assert_within(part: &Value, whole: &Value, at: &str) {
    match part {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| assert_within(value, &whole[name], name)),
        Value::Array(items) => items.iter().zip(whole.as_array().unwrap()).for_each(|(a, b)| assert_within(a, b, at)),
        _ => assert_eq!(part, whole, "{at}"),
    }
}

#[tokio::test]
async fn what_cannot_start_says_why_and_what_to_do() {
    let Some(driver) = program() else { return };
    let cases: [scenarios::Spoilt; 3] = [
        (|spec| spec.cpus = 100_000, "Too many CPUs", ""),
        (|spec| spec.memory_mib = 1 << 30, "memory", "lower the VM's memory"),
        (|spec| spec.kernel = "/nonexistent/vmlinux".into(), "Cannot open kernel file", ""),
    ];
    scenarios::cannot_start(&driver, &cases).await;
}

#[tokio::test]
async fn a_killed_vmm_is_noticed_and_a_dropped_one_is_gone() {
    let Some(driver) = program() else { return };
    scenarios::is_killed(&driver).await;
}

#[tokio::test]
async fn a_program_that_is_no_cloud_hypervisor_is_an_error_at_once() {
    let Some(bench) = Bench::new("").await else { return };
    let error = driver("/bin/false").boot(&bench.spec).await.err().unwrap();
    assert!(matches!(error, BootError::Died { .. }), "{error}");
}

#[tokio::test]
async fn the_agent_answers() {
    let Some(driver) = with_kvm().await else { return };
    scenarios::meets_the_agent(&driver).await;
}

#[tokio::test]
async fn no_request_is_lost() {
    let Some(driver) = with_kvm().await else { return };
    scenarios::is_never_silent(&driver).await;
}

#[tokio::test]
async fn a_guest_sees_the_share_and_powers_off() {
    let Some(driver) = with_kvm().await else { return };
    scenarios::powers_off(&driver).await;
}

#[tokio::test]
async fn a_panic_or_a_reboot_ends_the_machine() {
    let Some(driver) = with_kvm().await else { return };
    scenarios::panics_and_reboots(&driver).await;
}

#[tokio::test]
async fn a_snapshot_is_restored_twice_at_once() {
    let Some(driver) = with_kvm().await else { return };
    scenarios::is_restored(&driver).await;
}

/// A rung means something there alone.
#[cfg(target_arch = "aarch64")]
#[tokio::test]
async fn a_masked_machine_is_restored() {
    let Some(driver) = with_kvm().await else { return };
    scenarios::is_restored_masked(&driver).await;
}

#[tokio::test]
async fn a_guest_that_writes_forever_takes_no_more_memory() {
    let Some(driver) = with_kvm().await else { return };
    scenarios::babbles(&driver).await;
}

fn program() -> Option<CloudHypervisor> {
    let program = tool("CHSNAP_CLOUD_HYPERVISOR", PROGRAM)?;
    if let Err(error) = kvm::open() {
        skip(error.to_string());
        return None;
    }
    Some(driver(program))
}

async fn with_kvm() -> Option<CloudHypervisor> {
    let driver = program()?;
    match kvm::try_out(kvm::open().unwrap()).await {
        Ok(()) => Some(driver),
        Err(error) => {
            skip(error.to_string());
            None
        }
    }
}
