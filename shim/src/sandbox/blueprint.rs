//! A container as its image's process has it in common with all others of the same: what a template is made from.

use std::collections::BTreeMap;

use chsnap_protocol::agent::Stdio;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Plan, PlanError, services::Services};
use crate::{
    config::Ready,
    snapshot::{Process, digest_of_bytes},
};

/// In a template, for the kernel's name of it: no pod's.
const HOSTNAME: &str = "template";

/// What a template is made from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Blueprint {
    /// Without anything of one pod alone.
    pub spec: Spec,
    /// When its process has initialised.
    pub ready: Ready,
    /// Its streams.
    pub streams: Streams,
    /// What the trial's hooks are handed, as those of the first pod would be: nothing of it is saved.
    pub own_env: Vec<String>,
}

/// Which streams a process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Streams {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    terminal: bool,
}

impl From<&Stdio> for Streams {
    /// What is written and not read is thrown away in the clone: that makes no difference to the process.
    fn from(stdio: &Stdio) -> Self {
        Self { stdin: stdio.stdin, stdout: true, stderr: true, terminal: stdio.terminal }
    }
}

impl From<Streams> for Stdio {
    fn from(streams: Streams) -> Self {
        let Streams { stdin, stdout, stderr, terminal } = streams;
        Self { stdin, stdout, stderr, terminal, ..Self::default() }
    }
}

/// The pod's own variables, and those that are the same in every pod.
struct Environment {
    own: Vec<String>,
    common: Vec<String>,
}

impl Environment {
    fn of(spec: &Spec, names: &[String]) -> Self {
        let all = spec.process().as_ref().and_then(|process| process.env().clone()).unwrap_or_default();
        let services = Services::of(&all);
        let (own, common) = all.iter().cloned().partition(|variable| {
            let name = variable.split('=').next().unwrap_or_default();
            names.iter().any(|pattern| matches(pattern, name)) || services.tell(variable)
        });
        Self { own, common }
    }
}

/// With a `*` at its beginning, at its end, or nowhere.
fn matches(pattern: &str, name: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => name.ends_with(end),
        (_, Some(beginning)) => name.starts_with(beginning),
        _ => pattern == name,
    }
}

/// What a restored process is told of the pod it is in.
#[must_use]
pub fn own_environment(plan: &Plan, names: &[String]) -> Vec<String> {
    Environment::of(plan.spec(), names).own
}

impl Blueprint {
    /// That of a container with this plan. Variables called `names` are the pod's own.
    #[must_use]
    pub fn of(plan: &Plan, ready: &Ready, stdio: &Stdio, names: &[String]) -> Self {
        let mut spec = plan.spec().clone();
        let Environment { common, own: mut own_env } = Environment::of(&spec, names);
        if !own_env.iter().any(|variable| variable.starts_with("HOSTNAME=")) {
            own_env.push(format!("HOSTNAME={HOSTNAME}"));
        }
        // Each client writes its own, and all are understood alike.
        spec.set_version("1.0.0".into());
        spec.set_mounts(Some(plan.guest_mounts().collect()));
        spec.set_hostname(Some(HOSTNAME.into())).set_domainname(None).set_annotations(None).set_hooks(None);
        if let Some(root) = spec.root_mut() {
            root.set_path("rootfs".into()).set_readonly(Some(plan.readonly));
        }
        if let Some(process) = spec.process_mut() {
            process.set_env(Some(common)).set_apparmor_profile(None).set_selinux_label(None);
            // Kubernetes makes it of the node's memory. It is set when the process is adopted.
            process.set_oom_score_adj(None);
        }
        if let Some(linux) = spec.linux_mut() {
            linux.set_cgroups_path(None).set_seccomp(None).set_mount_label(None);
            // They are set when the process is adopted; the machine's size has a place of its own in the key.
            linux.set_resources(None);
            // Which of them there are matters, whose they are does not.
            for namespace in linux.namespaces_mut().iter_mut().flatten() {
                // But for those of IPC and names: a pod's is the machine's, one of the container's own is another.
                let shared = [LinuxNamespaceType::Ipc, LinuxNamespaceType::Uts].contains(&namespace.typ());
                let pods = shared && namespace.path().is_some();
                namespace.set_path(pods.then(|| "pod".into()));
            }
        }
        Self { spec, ready: ready.clone(), streams: Streams::from(stdio), own_env }
    }

    /// What a snapshot of it, on an image with this chain ID, has to match.
    ///
    /// # Errors
    /// Where the specification cannot be written down.
    pub fn process(&self, chain_id: &str) -> Result<Process, PlanError> {
        let process = self.spec.process().as_ref().ok_or(PlanError::Missing("process"))?;
        let user = process.user();
        let groups: Vec<_> = user.additional_gids().iter().flatten().map(|gid| format!("+{gid}")).collect();
        let variables = process.env().iter().flatten().filter_map(|variable| variable.split_once('='));
        let env: BTreeMap<_, _> = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        // As a value, in which the names of every map are in their order; capabilities are in none.
        let mut rest = serde_json::to_value(&self.spec)?;
        let sets = rest.pointer_mut("/process/capabilities").and_then(Value::as_object_mut);
        for set in sets.into_iter().flat_map(|sets| sets.values_mut()).filter_map(Value::as_array_mut) {
            set.sort_by(|one, other| one.as_str().cmp(&other.as_str()));
        }
        let rest = serde_json::to_vec(&rest)?;
        Ok(Process {
            chain_id: chain_id.into(),
            args: process.args().clone().unwrap_or_default(),
            cwd: process.cwd().display().to_string(),
            user: format!("{}:{}{}", user.uid(), user.gid(), groups.concat()),
            env,
            ready: self.ready.to_string(),
            streams: serde_json::to_string(&self.streams)?,
            rest: digest_of_bytes(&rest),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan(change: impl FnOnce(&mut serde_json::Value)) -> Plan {
        let mut value = json!({
            "ociVersion": "1.0.2",
            "hostname": "web-1",
            "annotations": {"io.kubernetes.cri.sandbox-id": "x"},
            "process": {
                "capabilities": {
                    "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_FOWNER", "CAP_SETUID", "CAP_SETGID", "CAP_MKNOD"]
                },
                "args": ["/bin/app"], "cwd": "/", "user": {"uid": 1, "gid": 2, "additionalGids": [3]},
                "env": ["PATH=/bin", "HOSTNAME=web-1", "DB_SERVICE_HOST=10.0.0.1", "DB_SERVICE_PORT=5432",
                        "DB_PORT=tcp://10.0.0.1:5432", "DB_PORT_5432_TCP_ADDR=10.0.0.1", "APP_PORT=80"]
            },
            "root": {"path": "rootfs"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/etc/hosts", "type": "bind", "source": "/pods/1/hosts", "options": ["rbind"]},
                {"destination": "/dev/shm", "type": "bind", "source": "/pods/1/shm", "options": ["rbind", "ro"]}
            ],
            "linux": {
                "cgroupsPath": "/pods/1",
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/1"}, {"type": "ipc"},
                               {"type": "uts"}, {"type": "mount"}]
            }
        });
        change(&mut value);
        Plan::of("web", serde_json::from_value(value).unwrap()).unwrap()
    }

    fn process(plan: &Plan) -> Process {
        let names = ["HOSTNAME".to_owned(), "SESSION_*".to_owned()];
        Blueprint::of(plan, &Ready::Notify, &Stdio::default(), &names).process("sha256:1").unwrap()
    }

    #[test]
    fn pods_of_one_image_have_the_same_and_others_another() {
        let one = process(&plan(|_| ()));
        assert_eq!((one.user.as_str(), one.env.len()), ("1:2+3", 2), "{one:?}");
        assert_eq!(one.env["APP_PORT"], "80");
        let other = process(&plan(|v| {
            v["hostname"] = json!("web-2");
            v["annotations"] = json!({});
            v["process"]["env"][1] = json!("HOSTNAME=web-2");
            for (place, variable) in [
                (2, "DB_SERVICE_HOST=10.0.0.9"),
                (4, "DB_PORT=tcp://10.0.0.9:5432"),
                (5, "DB_PORT_5432_TCP_ADDR=10.0.0.9"),
            ] {
                v["process"]["env"][place] = json!(variable);
            }
            v["process"]["env"].as_array_mut().unwrap().push(json!("SESSION_ID=7"));
            v["mounts"][1]["source"] = json!("/pods/2/hosts");
            v["mounts"][2]["source"] = json!("/pods/2/shm");
            v["linux"]["cgroupsPath"] = json!("/pods/2");
            v["linux"]["resources"] = json!({"cpu": {"shares": 1024}});
            v["linux"]["namespaces"][1]["path"] = json!("/run/netns/2");
        }));
        assert_eq!(one, other);
        type Change = fn(&mut serde_json::Value);
        let changes: [Change; 15] = [
            |v| v["process"]["env"][4] = json!("DB_PORT=5433"),
            |v| v["process"]["env"][6] = json!("APP_PORT=81"),
            |v| v["process"]["args"] = json!(["/bin/app", "-v"]),
            |v| v["process"]["user"]["additionalGids"] = json!([4]),
            |v| v["root"]["readonly"] = json!(true),
            |v| v["mounts"][0]["options"] = json!(["nosuid"]),
            |v| v["process"]["noNewPrivileges"] = json!(true),
            |v| v["process"]["cwd"] = json!("/srv"),
            |v| v["process"]["user"]["uid"] = json!(7),
            |v| v["process"]["capabilities"]["bounding"] = json!(["CAP_CHOWN"]),
            |v| v["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 64}]),
            |v| v["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"}),
            |v| v["linux"]["maskedPaths"] = json!(["/proc/keys"]),
            |v| v["linux"]["namespaces"][2]["path"] = json!("/proc/1/ns/ipc"),
            |v| v["linux"]["namespaces"][3]["path"] = json!("/proc/1/ns/uts"),
        ];
        for change in changes {
            assert_ne!(process(&plan(change)), one);
        }
        let blueprint =
            |ready: &Ready, stdio: Stdio| Blueprint::of(&plan(|_| ()), ready, &stdio, &[]).process("sha256:1").unwrap();
        let terminal = Stdio { terminal: true, ..Stdio::default() };
        let keys = [
            blueprint(&Ready::Notify, Stdio::default()),
            blueprint(&Ready::Tcp { port: 1 }, Stdio::default()),
            blueprint(&Ready::Notify, terminal),
        ];
        assert!(keys[0] != keys[1] && keys[0] != keys[2]);
    }

    #[test]
    fn a_restored_process_is_told_what_is_the_pod_s_own() {
        let own = own_environment(&plan(|_| ()), &["HOSTNAME".into()]);
        let names: Vec<_> = own.iter().filter_map(|variable| variable.split('=').next()).collect();
        let expected = ["HOSTNAME", "DB_SERVICE_HOST", "DB_SERVICE_PORT", "DB_PORT", "DB_PORT_5432_TCP_ADDR"];
        assert_eq!(names, expected);
        assert!(matches("A*", "AB") && matches("*B", "AB") && !matches("A", "AB") && matches("*", "AB"));
    }

    #[test]
    fn a_blueprint_makes_the_same_plan_again() {
        let blueprint = Blueprint::of(&plan(|_| ()), &Ready::Notify, &Stdio::default(), &[]);
        let text = serde_json::to_string(&blueprint).unwrap();
        let again: Blueprint = serde_json::from_str(&text).unwrap();
        assert_eq!(again.process("a").unwrap(), blueprint.process("a").unwrap());
        let plan = Plan::of("template", again.spec).unwrap();
        let mounts: Vec<_> = plan.guest_mounts().collect();
        let [proc, shm] = &mounts[..] else { panic!("{mounts:?}") };
        assert_eq!(proc.typ().as_deref(), Some("proc"));
        // Of no pod: it is the template's own, to which it can write.
        assert_eq!((shm.typ().as_deref(), shm.destination().to_str()), (Some("tmpfs"), Some("/dev/shm")));
        assert!(shm.options().iter().flatten().all(|option| option != "ro"));
        assert_eq!(plan.spec().hostname().as_deref(), Some(HOSTNAME));
    }
}
