"""Measures starts through ctr, in three ways, beside the same guest started by hand, in turns, in one run.

Times are in milliseconds, memory in KiB (VmRSS of /proc/<pid>/status), that of clones in bytes (Pss of
/proc/<pid>/smaps_rollup). Only the ratios carry over to another machine.
"""

import argparse
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import time

import shim_start

# The phases that are the shim's alone. In the others it works beside containerd, the VMM and the guest, and
# waits for them: there its processor time counts. That is taken for the whole of `ctr run`, so what these
# phases compute is counted twice: the sum is an upper bound. It ends where `ctr run` returns, because from
# there on the shim carries this script's own questions to a service that is not up yet.
OWN = ("shim start", "prepare", "select", "lookup", "share")
MIN_RUNS = 5
LIMIT_OWN_MS = 50
LIMIT_SHIM_KIB = 10 * 1024
ID = "bench"
# The service and when it is ready: one whose start is worth saving.
SERVICE = ("python3", "/app/search.py")
READY = "http://:8080/healthz"
# What a start in each way is told.
WAYS = {
    "direct": ("io.chsnap.snapshot=off",),
    "base": ("io.chsnap.snapshot=require",),
    "image": ("io.chsnap.snapshot=require", f"io.chsnap.ready={READY}"),
}
CLONES = (1, 2, 4, 8)
# How often what is measured beside the starts is: as many times as give a median.
REPEATS = 3
# To be reached under TCG.
AIM_IMAGE, AIM_BASE, AIM_BARE, AIM_BARE_MS = 10, 3, 1.3, 100


def now():
    return time.monotonic() * 1e3


def answers(path):
    """True when an HTTP server behind the UNIX socket says 200."""
    try:
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(5)
            s.connect(str(path))
            s.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
            return b" 200 " in s.recv(64)
    except OSError:
        return False


def until_answer(path, seconds=180):
    began = now()
    while not answers(path):
        waited = now() - began
        if waited > seconds * 1e3:
            sys.exit(f"bench: no answer at {path} within {seconds} s")
        # Each question costs the guest time: a hundredth of the wait is as exact as the figure needs.
        time.sleep(min(max(waited / 100, 2), 100) / 1e3)


def rss(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def pss(pid):
    for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_ms(pid):
    """Processor time of all threads, those that have ended included: clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2) * 1e3


def processes_of(parent):
    """All descendants."""
    found, todo = [], [parent]
    while todo:
        pid = todo.pop()
        children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found += children
        todo += children
    return found


def command(pid):
    return pathlib.Path(f"/proc/{pid}/comm").read_text().strip()


class Bench:
    def __init__(self, args):
        self.args = args
        self.series = {}
        self.driver = {}

    def note(self, group, name, value):
        self.series.setdefault(group, {}).setdefault(name, []).append(value)

    def ctr(self, *words, check=True):
        line = [self.args.ctr, "-a", self.args.address, *words]
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if check and done.returncode != 0:
            sys.exit(f"bench: {' '.join(words)}: {done.stderr.strip()}")

    def start(self, name, way):
        a = self.args
        annotations = [word for one in ("io.chsnap.expose=8080", *WAYS[way]) for word in ("--annotation", one)]
        self.ctr("run", "-d", "--runtime", "io.containerd.chsnap.v2", "--runtime-config-path", a.config,
                 *annotations, a.image, name, *SERVICE)
        pod = pathlib.Path(a.state) / "default" / name
        state = json.loads((pod / "state.json").read_text())
        if state["way"] != way:
            sys.exit(f"bench: {name} was started in the way {state['way']} ({state.get('why_not')}), not {way}")
        self.driver = {"vmm": state["vmm"], "accelerator": state["accelerator"]}
        return pod / "8080.sock", state

    def end(self, name):
        self.ctr("task", "kill", "-s", "SIGKILL", name)
        self.ctr("task", "rm", "-f", name, check=False)
        self.ctr("container", "rm", name)

    def through_ctr(self, way):
        began = now()
        socket_path, state = self.start(ID, way)
        ran = now()
        cpu = cpu_ms(state["pid"])
        until_answer(socket_path)
        answered = now()
        self.note("first_response_ms", way, answered - began)
        phases = f"phases_ms.{way}"
        created = 0
        for name, us in state["phases_us"]:
            self.note(phases, name, us / 1e3)
            created += us / 1e3
        agent = {"direct": ("share", "vmm", "kernel", "agent"), "base": ("share", "restore", "resume")}.get(way)
        if agent:
            self.note("agent_up_ms", way, sum(us / 1e3 for name, us in state["phases_us"] if name in agent))
        self.note(phases, "ctr, containerd and shim start", ran - began - created)
        self.note(phases, "process", answered - ran)
        self.note(f"shim_own_ms.{way}", "processor time", cpu)
        self.note("rss_kib", f"shim, {way}", rss(state["pid"]))
        if way == "direct":
            self.note("rss_kib", "vmm", rss(state["vmm_pid"]))
            self.note("rss_kib", "virtiofsd",
                      sum(rss(p) for p in processes_of(state["pid"]) if command(p) == "virtiofsd"))
        self.end(ID)

    def by_hand(self, group, *words):
        a, path = self.args, pathlib.Path(self.args.state) / "bare.sock"
        began = now()
        with subprocess.Popen([a.bare, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bare:
            line = bare.stdout.readline()
            if not line:
                sys.exit("bench: the guest could not be started by hand")
            until_answer(path)
            self.note(group, "first response", now() - began)
            steps = json.loads(line)
            self.note(group, "VMM spawned", steps["spawn_ms"])
            self.note(group, "agent answers", steps["agent_ms"])
            bare.stdin.close()
        if bare.returncode != 0:
            sys.exit("bench: the guest started by hand did not end well")

    def chsnap(self, *words):
        """What `chsnap snapshot` prints."""
        line = [str(pathlib.Path(self.args.bin, "chsnap")), "snapshot", words[0], "--config", self.args.config, *words[1:]]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit(f"bench: chsnap snapshot {words[0]} failed")
        return done.stdout

    def build(self):
        """The key of the image snapshot, and what it cost, of several builds."""
        a, key = self.args, None
        for _ in range(REPEATS):
            if key:
                self.chsnap("rm", key)
            key = self.chsnap("build", a.image, "--stdin", "--ready", READY, "--ctr", a.ctr, "--address", a.address,
                              "--", *SERVICE).split()[0]
            shown = json.loads(self.chsnap("inspect", "--json", key))
            self.note("snapshot", "build_ms", shown["manifest"]["build_ms"])
            self.note("snapshot", "bytes", shown["bytes"])
        return key

    def clones(self):
        """Memory of each of several that run at the same time: its VMM, virtiofsd and shim together."""
        for n in CLONES:
            for _ in range(REPEATS):
                names = [f"{ID}-{i}" for i in range(n)]
                pods = []
                for name in names:
                    path, state = self.start(name, "image")
                    until_answer(path)
                    pods.append(state["pid"])
                # Once all of them run: what they share is divided by those that do.
                for pid in pods:
                    self.note("clones", n, sum(map(pss, [pid, *processes_of(pid)])))
                for name in names:
                    self.end(name)
        return [{"n": n, **flat("pss_bytes", self.series["clones"][n])} for n in CLONES]

    def run(self):
        runs = self.args.runs
        self.chsnap("build", "--base")
        key = self.build()
        for i in range(runs):
            print(f"chsnap: run {i + 1} of {runs}", file=sys.stderr, flush=True)
            shim = pathlib.Path(self.args.bin, "containerd-shim-chsnap-v2")
            for way in WAYS:
                self.note(f"phases_ms.{way}", "shim start", shim_start.measure(str(shim), self.args.address))
                self.through_ctr(way)
            a, path = self.args, str(pathlib.Path(self.args.state) / "bare.sock")
            self.by_hand("bare_ms", a.config, a.rootfs, path, *SERVICE)
            self.by_hand("bare_restore", "--restore", str(pathlib.Path(a.snapshots) / key), a.config, a.rootfs, path)
        for way in WAYS:
            phases, group = self.series[f"phases_ms.{way}"], f"shim_own_ms.{way}"
            for i in range(runs):
                own = sum(phases[name][i] for name in OWN if name in phases)
                self.note(group, "own phases", own)
                self.note(group, "total", own + self.series[group]["processor time"][i])
        result = {group: {name: spread(values) for name, values in names.items()}
                  for group, names in self.series.items()}
        result.update(flat("bare_restore_ms", self.series["bare_restore"]["first response"]))
        result["snapshot"] = {k: v for name in ("build_ms", "bytes") for k, v in flat(name, self.series["snapshot"][name]).items()}
        result["clones"] = self.clones()
        return {**result, **self.driver}


def spread(values):
    return {"median": round(statistics.median(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


def flat(name, values):
    """The median under the name itself, and how far the others are from it beside."""
    return {name: round(statistics.median(values)), f"{name}_min": round(min(values)), f"{name}_max": round(max(values))}


def show(result):
    groups = ["first_response_ms", "agent_up_ms", "bare_ms", "bare_restore", *(f"phases_ms.{way}" for way in WAYS),
              *(f"shim_own_ms.{way}" for way in WAYS), "rss_kib"]
    for group in groups:
        print(f"\n  {group:32}    median       min       max")
        for name, s in result[group].items():
            print(f"    {name:32}{s['median']:10.1f}{s['min']:10.1f}{s['max']:10.1f}")
    snapshot = result["snapshot"]
    print(f"\n  image snapshot: built in {snapshot['build_ms']} ms ({snapshot['build_ms_min']} to {snapshot['build_ms_max']}), "
          f"{snapshot['bytes'] / 2**20:.0f} MiB")
    for one in result["clones"]:
        least, median, most = (one[f"pss_bytes{end}"] / 2**20 for end in ("_min", "", "_max"))
        print(f"  {one['n']} clones: {median:.0f} MiB each ({least:.0f} to {most:.0f})")
    print(f"  on {result['vmm']} with {result['accelerator']}")


def ratios(result):
    """What is aimed at, and what came of it."""
    first, up = result["first_response_ms"], result["agent_up_ms"]
    direct, base, image = (first[way]["median"] for way in WAYS)
    bare = result["bare_restore_ms"]
    yield f"restored with its process, {direct / image:.1f} times faster than booted (aim: {AIM_IMAGE})", direct / image >= AIM_IMAGE
    faster = up["direct"]["median"] / up["base"]["median"]
    yield f"to the agent, restored from a base snapshot {faster:.1f} times faster than booted (aim: {AIM_BASE})", faster >= AIM_BASE
    limit = AIM_BARE * bare + AIM_BARE_MS
    yield f"through the whole stack {image:.0f} ms, the guest restored by hand {bare:.0f} ms (aim: {limit:.0f} ms)", image <= limit


def missed(result):
    """What is above its limit."""
    own = max(result[f"shim_own_ms.{way}"]["total"]["median"] for way in WAYS)
    kib = max(result["rss_kib"][f"shim, {way}"]["max"] for way in WAYS)
    print(f"\n  the shim's own share: {own:.1f} ms (limit {LIMIT_OWN_MS}); its memory: {kib:.0f} KiB (limit {LIMIT_SHIM_KIB})")
    if own >= LIMIT_OWN_MS:
        yield f"the shim's own share of a start is {own:.1f} ms (median), not below {LIMIT_OWN_MS}"
    if kib >= LIMIT_SHIM_KIB:
        yield f"the shim's resident memory is {kib:.0f} KiB, not below {LIMIT_SHIM_KIB}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("ctr", "address", "image", "config", "state", "snapshots", "rootfs", "bin", "bare", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if args.runs < MIN_RUNS:
        parser.error(f"--runs must be {MIN_RUNS} or more")
    result = Bench(args).run()
    result["runs"] = args.runs
    result["machine"] = {"cpus": os.cpu_count(), "kernel": platform.release(), "arch": platform.machine()}
    pathlib.Path(args.out).write_text(json.dumps(result, indent=2) + "\n")
    show(result)
    print()
    failures = []
    for text, reached in ratios(result):
        print(f"  {text}{'' if reached else ': MISSED'}")
        failures += [] if reached else [f"missed: {text}"]
    failures += missed(result)
    for text in failures:
        print(f"chsnap: error: {text}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
