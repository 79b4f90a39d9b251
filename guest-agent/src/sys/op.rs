//! The steps of a child, prepared before the clone.

use std::{
    ffi::{CStr, CString},
    fmt,
    os::fd::RawFd,
};

/// What a child does, in order. The last step is running the program.
#[derive(Debug)]
pub struct Plan {
    /// In the order they are carried out.
    pub ops: Vec<Op>,
    /// How many slots the steps use for mounts that are attached later.
    pub slots: usize,
    /// None: the child ends when the steps are done.
    pub program: Option<Program>,
}

impl Plan {
    /// The descriptors that the steps use.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.ops.iter().flat_map(|op| match op {
            Op::Join { pidfd, .. } => vec![*pidfd],
            Op::Stdio(fds) => fds.to_vec(),
            Op::Park { start } => vec![*start],
            _ => Vec::new(),
        })
    }
}

/// The program and what it gets.
#[derive(Debug)]
pub struct Program {
    /// Tried one after the other, as a shell does along PATH.
    pub candidates: Vec<CString>,
    pub args: Vec<CString>,
    pub env: Vec<CString>,
}

/// Capability sets as bit masks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CapabilitySets {
    pub bounding: u64,
    pub effective: u64,
    pub inheritable: u64,
    pub permitted: u64,
    pub ambient: u64,
}

/// One step.
#[derive(Debug)]
pub enum Op {
    /// Joins the namespaces of the process behind the pidfd.
    Join {
        pidfd: RawFd,
        namespaces: i32,
    },
    Unshare(i32),
    /// Nothing that is mounted from here on is seen outside.
    PrivateMounts,
    HostName(CString),
    DomainName(CString),
    Write {
        path: CString,
        data: CString,
    },
    /// Puts a detached copy of the tree at `path` in `slot`.
    TakeTree {
        path: CString,
        slot: usize,
    },
    /// Lets go of a mount of the guest itself. Allowed to fail.
    Detach(CString),
    /// Makes the tree in `slot` the root.
    EnterRoot {
        slot: usize,
    },
    /// Mounts the tree in `slot`, all of it with these attributes, of [`MOUNT_ATTRIBUTES`].
    Attach {
        slot: usize,
        target: CString,
        attributes: u64,
    },
    /// Fails where a directory has something in it, or a file: what is mounted over it would hide that.
    Untouched(CString),
    /// A directory that may exist already.
    Dir(CString),
    /// An empty file that may exist already.
    File(CString),
    Mount {
        source: CString,
        target: CString,
        kind: CString,
        flags: libc::c_ulong,
        data: CString,
    },
    Node {
        path: CString,
        mode: u32,
        device: u64,
    },
    Symlink {
        target: CString,
        path: CString,
    },
    /// Hides a file under /dev/null, a directory under an empty tmpfs; a path that is missing stays so.
    Mask(CString),
    /// A path that is missing stays so.
    ReadOnly(CString),
    /// Opens a terminal in the container's devpts, makes it stdio and `/dev/console`.
    Terminal {
        uid: u32,
        console: bool,
    },
    Stdio([RawFd; 3]),
    Session,
    /// Makes stdin the controlling terminal.
    ControllingTerminal,
    Limit {
        resource: i32,
        soft: u64,
        hard: u64,
    },
    Umask(u32),
    /// The working directory is made where it is missing. Allowed to fail, for entering it will tell.
    MakeCwd(CString),
    Cwd(CString),
    Bounding(u64),
    /// User and groups, keeping capabilities for [`Op::Capabilities`].
    User {
        uid: u32,
        gid: u32,
        groups: Vec<u32>,
    },
    Capabilities(CapabilitySets),
    NoNewPrivileges,
    /// Says "ready" and waits for the start.
    Park {
        start: RawFd,
    },
}

fn text(s: &CStr) -> String {
    format!("{:?}", s.to_string_lossy())
}

/// What the step was about, for the error of its failure.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Join { .. } => write!(f, "join the container's namespaces"),
            Self::Unshare(_) => write!(f, "make the cgroup namespace"),
            Self::PrivateMounts => write!(f, "make mounts private"),
            Self::HostName(name) => write!(f, "set the host name {}", text(name)),
            Self::DomainName(name) => write!(f, "set the domain name {}", text(name)),
            Self::Write { path, data } => write!(f, "write {} to {}", text(data), text(path)),
            Self::TakeTree { path, .. } => write!(f, "open the tree {}", text(path)),
            Self::Detach(path) => write!(f, "detach {}", text(path)),
            Self::EnterRoot { .. } => write!(f, "enter the container's root"),
            Self::Attach { target, .. } => write!(f, "bind at {}", text(target)),
            Self::Untouched(path) => {
                write!(f, "mount over {}, to which the process has written before it was saved", text(path))
            }
            Self::Dir(path) => write!(f, "make the directory {}", text(path)),
            Self::File(path) => write!(f, "make the file {}", text(path)),
            Self::Mount { target, kind, data, flags, .. } => {
                write!(
                    f,
                    "mount {} at {} (flags {flags:#x}, data {})",
                    kind.to_string_lossy(),
                    text(target),
                    text(data)
                )
            }
            Self::Node { path, .. } => write!(f, "make the device {}", text(path)),
            Self::Symlink { path, .. } => write!(f, "make the symbolic link {}", text(path)),
            Self::Mask(path) => write!(f, "mask {}", text(path)),
            Self::ReadOnly(path) => write!(f, "make {} read-only", text(path)),
            Self::Terminal { .. } => write!(f, "open a terminal in the container (is a devpts mounted at /dev/pts?)"),
            Self::Stdio(_) => write!(f, "set up stdio"),
            Self::Session => write!(f, "start a session"),
            Self::ControllingTerminal => write!(f, "take the controlling terminal"),
            Self::Limit { resource, soft, hard } => write!(f, "set resource limit {resource} to {soft}:{hard}"),
            Self::Umask(mask) => write!(f, "set the umask {mask:o}"),
            Self::MakeCwd(path) => write!(f, "make the working directory {}", text(path)),
            Self::Cwd(path) => write!(f, "enter the working directory {}", text(path)),
            Self::Bounding(_) => write!(f, "drop capabilities from the bounding set"),
            Self::User { uid, gid, .. } => write!(f, "become user {uid}:{gid}"),
            Self::Capabilities(_) => write!(f, "set the capabilities"),
            Self::NoNewPrivileges => write!(f, "set no_new_privs"),
            Self::Park { .. } => write!(f, "wait for the start"),
        }
    }
}
