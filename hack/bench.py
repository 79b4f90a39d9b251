"""Measures starts through ctr beside the same guest started by hand, in turns, in one run.

Times are in milliseconds, memory in KiB (VmRSS of /proc/<pid>/status). Only the ratios carry over to another machine.
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
OWN = ("shim start", "prepare", "select", "share")
MIN_RUNS = 5
LIMIT_OWN_MS = 50
LIMIT_SHIM_KIB = 10 * 1024
ID = "bench"


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

    def note(self, group, name, value):
        self.series.setdefault(group, {}).setdefault(name, []).append(value)

    def ctr(self, *words, check=True):
        line = [self.args.ctr, "-a", self.args.address, *words]
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if check and done.returncode != 0:
            sys.exit(f"bench: {' '.join(words)}: {done.stderr.strip()}")

    def through_ctr(self):
        a, pod = self.args, pathlib.Path(self.args.state) / "default" / ID
        began = now()
        self.ctr("run", "-d", "--runtime", "io.containerd.chsnap.v2", "--runtime-config-path", a.config,
                 "--annotation", "io.chsnap.expose=8080", a.image, ID)
        ran = now()
        state = json.loads((pod / "state.json").read_text())
        cpu = cpu_ms(state["pid"])
        until_answer(pod / "8080.sock")
        answered = now()
        self.note("first_response_ms", "direct", answered - began)
        created = 0
        for name, us in state["phases_us"]:
            self.note("phases_ms", name, us / 1e3)
            created += us / 1e3
        self.note("phases_ms", "ctr, containerd and shim start", ran - began - created)
        self.note("phases_ms", "process", answered - ran)
        self.note("shim_own_ms", "processor time", cpu)
        self.note("rss_kib", "shim", rss(state["pid"]))
        self.note("rss_kib", "vmm", rss(state["vmm_pid"]))
        self.note("rss_kib", "virtiofsd",
                  sum(rss(p) for p in processes_of(state["pid"]) if command(p) == "virtiofsd"))
        self.ctr("task", "kill", "-s", "SIGKILL", ID)
        self.ctr("task", "rm", "-f", ID, check=False)
        self.ctr("container", "rm", ID)

    def by_hand(self):
        a, path = self.args, pathlib.Path(self.args.state) / "bare.sock"
        began = now()
        with subprocess.Popen([a.bare, a.config, a.rootfs, str(path), "python3", "/app/app.py"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bare:
            line = bare.stdout.readline()
            if not line:
                sys.exit("bench: the guest could not be started by hand")
            until_answer(path)
            self.note("bare_ms", "first response", now() - began)
            steps = json.loads(line)
            self.note("bare_ms", "VMM spawned", steps["spawn_ms"])
            self.note("bare_ms", "agent answers", steps["agent_ms"])
            bare.stdin.close()
        if bare.returncode != 0:
            sys.exit("bench: the guest started by hand did not end well")

    def run(self):
        runs = self.args.runs
        for i in range(runs):
            print(f"chsnap: run {i + 1} of {runs}", file=sys.stderr, flush=True)
            shim = pathlib.Path(self.args.bin, "containerd-shim-chsnap-v2")
            self.note("phases_ms", "shim start", shim_start.measure(str(shim), self.args.address))
            self.through_ctr()
            self.by_hand()
        phases = self.series["phases_ms"]
        for i in range(runs):
            own = sum(phases[name][i] for name in OWN)
            self.note("shim_own_ms", "own phases", own)
            self.note("shim_own_ms", "total", own + self.series["shim_own_ms"]["processor time"][i])
        return {group: {name: spread(values) for name, values in names.items()}
                for group, names in self.series.items()}


def spread(values):
    return {"median": round(statistics.median(values), 2), "min": round(min(values), 2), "max": round(max(values), 2)}


def show(result):
    for group in ("first_response_ms", "bare_ms", "phases_ms", "shim_own_ms", "rss_kib"):
        print(f"\n  {group:32}    median       min       max")
        for name, s in result[group].items():
            print(f"    {name:32}{s['median']:10.1f}{s['min']:10.1f}{s['max']:10.1f}")


def missed(result):
    """What is above its limit."""
    own, kib = result["shim_own_ms"]["total"]["median"], result["rss_kib"]["shim"]["max"]
    print(f"\n  the shim's own share: {own:.1f} ms (limit {LIMIT_OWN_MS}); its memory: {kib:.0f} KiB (limit {LIMIT_SHIM_KIB})")
    if own >= LIMIT_OWN_MS:
        yield f"the shim's own share of a start is {own:.1f} ms (median), not below {LIMIT_OWN_MS}"
    if kib >= LIMIT_SHIM_KIB:
        yield f"the shim's resident memory is {kib:.0f} KiB, not below {LIMIT_SHIM_KIB}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("ctr", "address", "image", "config", "state", "rootfs", "bin", "bare", "out"):
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
    for text in (failures := list(missed(result))):
        print(f"chsnap: error: {text}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
