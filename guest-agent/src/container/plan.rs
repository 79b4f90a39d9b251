//! From the specification to the steps of a child.

use std::{
    ffi::CString,
    fs, io,
    os::fd::{AsRawFd, BorrowedFd},
};

use ttrpc::Code;

use super::{
    capabilities, mounts,
    spec::{Linux, Mount, Process, Rlimit, Spec},
};
use crate::{
    error::{Coded, code_of},
    sys::{Op, Pidfd, Plan, Program},
};

/// Searched where the container's environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why a specification cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("the specification is not valid")]
    Json(#[source] serde_json::Error),
    #[error("the {what} {value:?} contains a NUL byte")]
    Nul { what: &'static str, value: String },
    #[error("process.args is empty: there is nothing to run")]
    NoArgs,
    #[error("{what} must be an absolute path, not {path:?}")]
    Relative { what: &'static str, path: String },
    #[error("the mount destination {0:?} is not absolute")]
    MountDestination(String),
    #[error("the guest cannot mount type {kind:?} at {target}")]
    MountType { target: String, kind: String },
    #[error("bind mount of {from} at {target}: only paths of the share can be bound in the guest")]
    Bind { from: String, target: String },
    #[error("the bind mount's source {path}")]
    BindSource { path: String, source: io::Error },
    #[error("the guest has no device {0}; only the default devices are available")]
    Device(String),
    #[error("unknown capability {0:?}")]
    Capability(String),
    #[error("unknown resource limit {0:?}")]
    Rlimit(String),
    #[error("bad sysctl name {0:?}")]
    Sysctl(String),
    #[error("the namespace {0:?} is not available in the guest")]
    Namespace(String),
    #[error("cannot read the guest's mounts")]
    OwnMounts(#[source] io::Error),
}

impl Coded for PlanError {
    fn code(&self) -> Code {
        match self {
            Self::OwnMounts(_) => Code::INTERNAL,
            Self::BindSource { source, .. } => code_of(source),
            Self::MountType { .. } | Self::Device(_) | Self::Namespace(_) => Code::UNIMPLEMENTED,
            _ => Code::INVALID_ARGUMENT,
        }
    }
}

/// For the kernel.
///
/// # Errors
/// If there is a NUL byte inside.
pub fn cstring(what: &'static str, value: &str) -> Result<CString, PlanError> {
    CString::new(value).map_err(|_| PlanError::Nul { what, value: value.to_owned() })
}

/// What the agent gives a process besides its specification.
#[derive(Debug)]
pub struct Setting<'a> {
    /// `None`: a terminal is opened in the container.
    pub stdio: Option<[BorrowedFd<'a>; 3]>,
    pub terminal: bool,
    /// The home directory from the container's user list.
    pub home: String,
    /// The limit, soft and hard, where the specification has none.
    pub open_files: u64,
}

/// The container's own process; waits for its start when all is set up.
///
/// # Errors
/// For what cannot be done, by name.
pub fn init(spec: &Spec, setting: &Setting<'_>, start: BorrowedFd<'_>) -> Result<Plan, PlanError> {
    let program = program(&spec.process, &setting.home)?;
    if !spec.root.path.starts_with('/') {
        return Err(PlanError::Relative { what: "root.path", path: spec.root.path.clone() });
    }
    for namespace in &spec.linux.namespaces {
        if !matches!(namespace.kind.as_str(), "pid" | "mount" | "uts" | "ipc" | "cgroup" | "network") {
            return Err(PlanError::Namespace(namespace.kind.clone()));
        }
    }
    let mut slots = 1;
    let mounts = mounts::steps(&spec.mounts, &spec.linux, setting.terminal, &mut slots)?;

    let mut ops = vec![Op::Unshare(libc::CLONE_NEWCGROUP), Op::PrivateMounts];
    if !spec.hostname.is_empty() {
        ops.push(Op::HostName(cstring("host name", &spec.hostname)?));
    }
    if !spec.domainname.is_empty() {
        ops.push(Op::DomainName(cstring("domain name", &spec.domainname)?));
    }
    // The guest's own /proc shows the namespaces of whoever writes to it.
    for (name, value) in &spec.linux.sysctl {
        ops.push(Op::Write { path: sysctl_path(name)?, data: cstring("sysctl value", value)? });
    }
    ops.push(Op::TakeTree { path: cstring("root.path", &spec.root.path)?, slot: 0 });
    ops.extend(mounts.outside);
    ops.extend(own_mounts()?.into_iter().map(Op::Detach));
    ops.push(Op::EnterRoot { slot: 0 });
    ops.extend(mounts.inside);
    if setting.terminal {
        let console = spec.mounts.iter().any(|m| m.destination.trim_end_matches('/') == "/dev");
        ops.push(Op::Terminal { uid: spec.process.user.uid, console });
    }
    let cwd = &spec.process.cwd;
    ops.extend(mounts::directories(cwd)?.into_iter().map(|op| match op {
        Op::Dir(path) => Op::MakeCwd(path),
        other => other,
    }));
    ops.extend(mounts.last);
    for path in &spec.linux.readonly_paths {
        ops.push(Op::ReadOnly(cstring("read-only path", path)?));
    }
    for path in &spec.linux.masked_paths {
        ops.push(Op::Mask(cstring("masked path", path)?));
    }
    if spec.root.readonly {
        ops.push(Op::ReadOnly(c"/".into()));
    }
    ops.extend(process(&spec.process, setting)?);
    ops.push(Op::Park { start: start.as_raw_fd() });
    Ok(Plan { ops, slots, program: Some(program) })
}

/// A further process in the namespaces of the one behind `pidfd`.
///
/// # Errors
/// For what cannot be done, by name.
pub fn exec(spec: &Process, setting: &Setting<'_>, pidfd: &Pidfd) -> Result<Plan, PlanError> {
    use std::os::fd::AsFd as _;
    let program = program(spec, &setting.home)?;
    let namespaces = libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWCGROUP;
    let mut ops = vec![Op::Join { pidfd: pidfd.as_fd().as_raw_fd(), namespaces }];
    ops.extend(process(spec, setting)?);
    Ok(Plan { ops, slots: 0, program: Some(program) })
}

/// What a container gets that was made for nobody in particular: a name, and what is bound below mounts of the guest's.
///
/// # Errors
/// For what cannot be done, by name.
pub fn adoption(
    hostname: &str,
    domainname: &str,
    mounts: &[Mount],
    linux: &Linux,
    pidfd: &Pidfd,
) -> Result<Plan, PlanError> {
    use std::os::fd::AsFd as _;
    let mut slots = 0;
    let places = mounts.iter().map(|mount| cstring("mount destination", &mount.destination));
    let untouched = places.map(|place| Ok(Op::Untouched(place?))).collect::<Result<Vec<_>, PlanError>>()?;
    let mounts = mounts::steps(mounts, linux, false, &mut slots)?;
    // Its trees are taken where the share is.
    let mut ops = mounts.outside;
    ops.push(Op::Join { pidfd: pidfd.as_fd().as_raw_fd(), namespaces: libc::CLONE_NEWNS | libc::CLONE_NEWUTS });
    ops.push(Op::HostName(cstring("host name", hostname)?));
    if !domainname.is_empty() {
        ops.push(Op::DomainName(cstring("domain name", domainname)?));
    }
    // All of them first: one may lie in another, which is the pod's own.
    ops.extend(untouched);
    ops.extend(mounts.inside);
    Ok(Plan { ops, slots, program: None })
}

/// The steps every process has in common.
fn process(spec: &Process, setting: &Setting<'_>) -> Result<Vec<Op>, PlanError> {
    let mut ops = Vec::new();
    if let Some(stdio) = setting.stdio {
        ops.push(Op::Stdio(stdio.map(|fd| fd.as_raw_fd())));
    }
    ops.push(Op::Session);
    if setting.terminal {
        ops.push(Op::ControllingTerminal);
    }
    for limit in &spec.rlimits {
        ops.push(Op::Limit { resource: resource(limit)?, soft: limit.soft, hard: limit.hard });
    }
    if !spec.rlimits.iter().any(|limit| limit.kind == "RLIMIT_NOFILE") {
        let all = setting.open_files;
        ops.push(Op::Limit { resource: libc::RLIMIT_NOFILE as i32, soft: all, hard: all });
    }
    ops.push(Op::Umask(spec.user.umask.unwrap_or(0o022)));
    let cwd = if spec.cwd.is_empty() { "/" } else { &spec.cwd };
    if !cwd.starts_with('/') {
        return Err(PlanError::Relative { what: "process.cwd", path: cwd.to_owned() });
    }
    // As root, who may enter a directory that the user may not search.
    ops.push(Op::Cwd(cstring("working directory", cwd)?));
    let capabilities = spec.capabilities.as_ref().map(capabilities::sets).transpose()?;
    if let Some(sets) = &capabilities {
        ops.push(Op::Bounding(sets.bounding));
    }
    let user = &spec.user;
    ops.push(Op::User { uid: user.uid, gid: user.gid, groups: user.additional_gids.clone() });
    if let Some(sets) = capabilities {
        ops.push(Op::Capabilities(sets));
    }
    if spec.no_new_privileges {
        ops.push(Op::NoNewPrivileges);
    }
    Ok(ops)
}

/// Where the program may be found, and its arguments and environment.
fn program(spec: &Process, home: &str) -> Result<Program, PlanError> {
    let name = spec.args.first().ok_or(PlanError::NoArgs)?;
    let candidates = if name.contains('/') {
        vec![cstring("argument", name)?]
    } else {
        let path = spec.env.iter().rev().find_map(|v| v.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
        let absolute = path.split(':').filter(|dir| dir.starts_with('/'));
        absolute.map(|dir| cstring("PATH", &format!("{dir}/{name}"))).collect::<Result<_, _>>()?
    };
    let args = spec.args.iter().map(|a| cstring("argument", a)).collect::<Result<_, _>>()?;
    let mut env: Vec<CString> =
        spec.env.iter().map(|v| cstring("environment variable", v)).collect::<Result<_, _>>()?;
    if !spec.env.iter().any(|v| v.strip_prefix("HOME=").is_some_and(|home| !home.is_empty())) {
        env.retain(|v| v.as_bytes() != b"HOME=");
        env.push(cstring("home directory", &format!("HOME={home}"))?);
    }
    Ok(Program { candidates, args, env })
}

fn resource(limit: &Rlimit) -> Result<i32, PlanError> {
    let number = match limit.kind.as_str() {
        "RLIMIT_AS" => libc::RLIMIT_AS,
        "RLIMIT_CORE" => libc::RLIMIT_CORE,
        "RLIMIT_CPU" => libc::RLIMIT_CPU,
        "RLIMIT_DATA" => libc::RLIMIT_DATA,
        "RLIMIT_FSIZE" => libc::RLIMIT_FSIZE,
        "RLIMIT_LOCKS" => libc::RLIMIT_LOCKS,
        "RLIMIT_MEMLOCK" => libc::RLIMIT_MEMLOCK,
        "RLIMIT_MSGQUEUE" => libc::RLIMIT_MSGQUEUE,
        "RLIMIT_NICE" => libc::RLIMIT_NICE,
        "RLIMIT_NOFILE" => libc::RLIMIT_NOFILE,
        "RLIMIT_NPROC" => libc::RLIMIT_NPROC,
        "RLIMIT_RSS" => libc::RLIMIT_RSS,
        "RLIMIT_RTPRIO" => libc::RLIMIT_RTPRIO,
        "RLIMIT_RTTIME" => libc::RLIMIT_RTTIME,
        "RLIMIT_SIGPENDING" => libc::RLIMIT_SIGPENDING,
        "RLIMIT_STACK" => libc::RLIMIT_STACK,
        other => return Err(PlanError::Rlimit(other.to_owned())),
    };
    Ok(number as i32)
}

fn sysctl_path(name: &str) -> Result<CString, PlanError> {
    let parts = name.split(['.', '/']);
    if name.is_empty() || parts.clone().any(str::is_empty) {
        return Err(PlanError::Sysctl(name.to_owned()));
    }
    // With a slash anywhere, dots belong to the names (as in net/ipv4/conf/eth0.100/forwarding).
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    cstring("sysctl", &format!("/proc/sys/{path}"))
}

/// The guest's own mounts, the ones mounted last first. The container is to see none of them.
fn own_mounts() -> Result<Vec<CString>, PlanError> {
    let table = fs::read("/proc/self/mountinfo").map_err(PlanError::OwnMounts)?;
    let targets = table.split(|b| *b == b'\n').filter_map(|line| line.split(|b| *b == b' ').nth(4));
    let mut paths: Vec<_> = targets.filter(|t| *t != b"/").filter_map(|t| CString::new(unescape(t)).ok()).collect();
    paths.reverse();
    Ok(paths)
}

/// The table writes blanks as octal numbers.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                out.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
                rest = after;
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Process {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_program_is_searched_along_the_containers_path() {
        let found = program(&parse(r#"{"args": ["sh"], "env": ["PATH=/a::b:/c"]}"#), "/").unwrap();
        assert_eq!(found.candidates, [c"/a/sh".into(), CString::from(c"/c/sh")]);
        let found = program(&parse(r#"{"args": ["./sh", "x"]}"#), "/").unwrap();
        assert_eq!(found.candidates, [CString::from(c"./sh")]);
    }

    #[test]
    fn home_is_added_only_where_it_is_missing() {
        let env = |json| program(&parse(json), "/home/x").unwrap().env;
        assert_eq!(env(r#"{"args": ["a"], "env": ["HOME=/h"]}"#), [CString::from(c"HOME=/h")]);
        assert_eq!(env(r#"{"args": ["a"], "env": ["HOME="]}"#), [CString::from(c"HOME=/home/x")]);
    }

    #[test]
    fn nothing_to_run_is_an_error() {
        assert!(matches!(program(&parse(r#"{"args": []}"#), "/"), Err(PlanError::NoArgs)));
        assert!(matches!(program(&parse(r#"{"args": ["a\u0000b"]}"#), "/"), Err(PlanError::Nul { .. })));
    }

    #[test]
    fn a_sysctl_stays_below_proc_sys() {
        assert_eq!(sysctl_path("net.core.somaxconn").unwrap().as_c_str(), c"/proc/sys/net/core/somaxconn");
        assert_eq!(sysctl_path("net/ipv4/conf/eth0.1/x").unwrap().as_c_str(), c"/proc/sys/net/ipv4/conf/eth0.1/x");
        for bad in ["", "kernel/../../mounts", "a..b", "/a", "net/.."] {
            assert!(sysctl_path(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn blanks_in_mount_points() {
        assert_eq!(unescape(br"/a\040b\134c"), br"/a b\c");
        assert_eq!(unescape(br"/a\9"), br"/a\9");
    }
}
