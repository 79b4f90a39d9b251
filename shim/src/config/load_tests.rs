use std::fs;

use super::*;
use crate::config::{AcceleratorChoice, CacheMode, LogLevel, SnapshotConfig, SnapshotMode, VmmChoice};

fn parse(text: &str) -> Result<Config, String> {
    Config::parse(text, Path::new("/etc/c.toml")).map_err(|error| error.to_string())
}

#[test]
fn every_key_is_taken() {
    let config = parse(
        r#"
        [vmm]
        choice = "qemu"
        accelerator = "tcg"
        cloud_hypervisor = "/a"
        qemu = "/b"
        [guest]
        kernel = "/k"
        initramfs = "/i"
        cmdline = " quiet  loglevel=7 "
        default_vcpus = 2
        default_memory = "1GiB"
        memory_overhead = "32MiB"
        max_vcpus = 3
        max_memory = "2GiB"
        [share]
        virtiofsd = "/v"
        cache = "never"
        [deadlines]
        boot = 90
        agent_call = "1500ms"
        restore = "3s"
        stop = "1m"
        [snapshot]
        mode = "off"
        dir = "/n"
        budget = "2GiB"
        builders = 2
        root_limit = "5MiB"
        pod_env = ["A", "B_*"]
        ctr = "/c"
        [log]
        level = "debug"
        [state]
        dir = "/s"
        "#,
    )
    .unwrap();
    assert_eq!((config.vmm.choice, config.vmm.accelerator), (VmmChoice::Qemu, AcceleratorChoice::Tcg));
    assert_eq!(config.vmm.cloud_hypervisor, Some("/a".into()));
    assert_eq!(config.vmm.qemu, Some("/b".into()));
    assert_eq!(config.guest.cmdline_words(), ["quiet", "loglevel=7"]);
    assert_eq!((config.guest.default_vcpus, config.guest.max_vcpus), (2, 3));
    assert_eq!(config.guest.max_memory, Size::mib(2048));
    assert_eq!(config.share.cache, CacheMode::Never);
    assert_eq!(config.deadlines.boot, Deadline::secs(90));
    assert_eq!(config.deadlines.agent_call.duration().as_millis(), 1500);
    assert_eq!(config.deadlines.restore, Deadline::secs(3));
    let snapshot = SnapshotConfig {
        mode: SnapshotMode::Off,
        dir: "/n".into(),
        budget: Size::mib(2048),
        builders: 2,
        root_limit: Size::mib(5),
        pod_env: vec!["A".into(), "B_*".into()],
        ctr: "/c".into(),
    };
    assert_eq!(config.snapshot, snapshot);
    assert_eq!(config.log.level, LogLevel::Debug);
    // What was written is read back, with nothing at its default.
    let written = toml::to_string(&config).unwrap();
    assert_eq!(parse(&written).unwrap(), config);
}

#[test]
fn the_vmm_alone_is_short_for_its_choice() {
    assert_eq!(parse("vmm = 'qemu'").unwrap().vmm.choice, VmmChoice::Qemu);
    assert_eq!(parse("").unwrap(), Config::default());
}

#[test]
fn errors_name_file_line_column_and_key() {
    for (text, error) in [
        (
            "[guest]\nkernel = \"/k\"\n  default_vcpu = 2\n",
            "/etc/c.toml:3:3: guest.default_vcpu: unknown key; did you mean \"default_vcpus\"?",
        ),
        ("[geust]\n", "/etc/c.toml:1:2: geust: unknown key; did you mean \"guest\"?"),
        ("# ä\nkernel = '/k'\n", "/etc/c.toml:2:1: kernel: unknown key; it belongs below [guest]"),
        ("[log]\nfile = '/x'\n", "/etc/c.toml:2:1: log.file: unknown key; the keys of [log] are: level"),
        (
            "[guest]\nmax_memory = 'ä'\n",
            "/etc/c.toml:2:14: guest.max_memory: \"ä\" is not a size: write a number with a unit, such as \"512MiB\" or \
             \"2GiB\"",
        ),
        (
            "[guest]\ndefault_memory = 512\n",
            "/etc/c.toml:2:18: guest.default_memory: \"512\" is not a size: write a number with a unit, such as \
             \"512MiB\" or \"2GiB\"",
        ),
        (
            "[guest]\nmemory_overhead = true\n",
            "/etc/c.toml:2:19: guest.memory_overhead: invalid type: boolean `true`, expected a size with a unit, such as \
             \"512MiB\"",
        ),
        (
            "guest.default_memory = '63MiB'",
            "/etc/c.toml:1:24: guest.default_memory: 63MiB is too little for a guest; the least is 64MiB",
        ),
        (
            "[guest]\n\ndefault_vcpus = 0",
            "/etc/c.toml:3:17: guest.default_vcpus: 0 vCPUs cannot run anything; the least is 1",
        ),
        (
            "[guest]\nmax_memory = '256MiB'",
            "/etc/c.toml:2:14: guest.max_memory: 256MiB is less than default_memory = 512MiB",
        ),
        (
            "guest = { default_vcpus = 4, max_vcpus = 2 }",
            "/etc/c.toml:1:42: guest.max_vcpus: 2 is less than default_vcpus = 4",
        ),
        (
            "[guest]\nkernel = 'vmlinux'",
            "/etc/c.toml:2:10: guest.kernel: \"vmlinux\" is not an absolute path; the shim's working directory is the \
             container's",
        ),
        (
            "[snapshot]\nctr = 'bin/ctr'",
            "/etc/c.toml:2:7: snapshot.ctr: \"bin/ctr\" is not an absolute path; the shim's working directory is the \
             container's",
        ),
        (
            "[snapshot]\nbuilders = 65",
            "/etc/c.toml:2:12: snapshot.builders: 65 is more than 64; each takes a guest's memory",
        ),
        ("[deadlines]\nboot = '0s'", "/etc/c.toml:2:8: deadlines.boot: 0s is not between 1s and 1h"),
        (
            "[deadlines]\nstop = -1",
            "/etc/c.toml:2:8: deadlines.stop: \"-1\" is not a duration: write seconds as a number, or a text such as \
             \"500ms\", \"30s\" or \"2m\"",
        ),
        (
            "[vmm]\nchoice = 'xen'",
            "/etc/c.toml:2:10: vmm.choice: unknown variant `xen`, expected one of `auto`, `cloud-hypervisor`, `qemu`",
        ),
        (
            "vmm = 'xen'",
            "/etc/c.toml:1:7: vmm: unknown variant `xen`, expected one of `auto`, `cloud-hypervisor`, `qemu`",
        ),
        ("vmm = 3", "/etc/c.toml:1:7: vmm: is a table; write its keys below [vmm]"),
        (
            "[vmm]\nchoice = 'cloud-hypervisor'\naccelerator = 'tcg'",
            "/etc/c.toml:3:15: vmm.accelerator: Cloud Hypervisor has no \"tcg\"; use \"kvm\", or choice = \"qemu\"",
        ),
        ("guest = 3", "/etc/c.toml:1:9: guest: is a table; write its keys below [guest]"),
    ] {
        assert_eq!(parse(text).unwrap_err(), error);
    }
    let syntax = parse("[guest]\nkernel = \n").unwrap_err();
    assert!(syntax.starts_with("/etc/c.toml:2:"), "{syntax}");
    assert!(syntax.contains("not valid TOML") && !syntax.contains('\n'), "{syntax}");
    for (text, error) in [
        ("[log]\nlevel='info'\nlevel='warn'\n", "/etc/c.toml:3:1: not valid TOML: duplicate key \"level\""),
        ("[log]\n[guest]\n[log]\n", "/etc/c.toml:3:2: not valid TOML: duplicate key \"log\""),
    ] {
        assert_eq!(parse(text).unwrap_err(), error);
    }
}

#[test]
fn an_explicit_file_must_exist_and_be_readable() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    let error = Config::load(Some(&path)).unwrap_err();
    assert!(matches!(&error, ConfigError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound));
    assert_eq!(error.to_string(), format!("cannot read the configuration file {path:?}"));
    fs::write(&path, b"[log]\n# \xc3\xa4\xff\n").unwrap();
    let error = Config::load(Some(&path)).unwrap_err().to_string();
    assert_eq!(error, format!("{}:2:4: not valid TOML: the byte 0xff is not UTF-8", path.display()));
    assert!(matches!(Config::load(Some(dir.path())), Err(ConfigError::Read { .. })));
    fs::write(&path, "[state]\ndir = '/s'").unwrap();
    assert_eq!(Config::load(Some(&path)).unwrap().state.dir, Path::new("/s"));
}

/// `deploy/config.toml` shows every key, commented out, at its default.
#[test]
fn the_shipped_file_documents_every_key_and_its_default() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/config.toml");
    let text = fs::read_to_string(&shipped).unwrap();
    assert_eq!(Config::parse(&text, &shipped).unwrap(), Config::default(), "as shipped");
    // "#key = value" is a setting; "# words" is prose.
    let settings: Vec<&str> =
        text.lines().map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line)).collect();
    let uncommented = settings.join("\n");
    let mut expected = Config::default();
    expected.vmm.cloud_hypervisor = Some("/usr/bin/cloud-hypervisor".into());
    expected.vmm.qemu = Some("/usr/bin/qemu-system-x86_64".into());
    expected.share.virtiofsd = Some("/usr/libexec/virtiofsd".into());
    assert_eq!(Config::parse(&uncommented, &shipped).unwrap(), expected, "with the comment signs taken off");
    let table: toml::Table = uncommented.parse().unwrap();
    let Value::Object(sections) = serde_json::to_value(Config::default()).unwrap() else { panic!("not a table") };
    for (section, keys) in sections {
        for key in keys.as_object().unwrap().keys() {
            assert!(table[&section].get(key).is_some(), "{section}.{key} is not in deploy/config.toml");
        }
    }
}
