#!/usr/bin/env python3
"""Measure containerd's `start` action of the shim, by hand: until the server's address is printed.

    shim_start.py <shim> <containerd's address>        prints milliseconds

containerd does not tell how long it waited for the shim, so the figure is taken beside a start, not from it.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import time

PATIENCE = 10  # seconds, for each of start and end


def servers(bundle):
    """The shim's servers run in the bundle's directory."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/cwd") == bundle:
                yield int(pid)
        except OSError:
            pass  # it has ended, or is the kernel's


def end(pid):
    os.kill(pid, 15)
    limit = time.monotonic() + PATIENCE
    while os.path.exists(f"/proc/{pid}/exe"):
        if time.monotonic() > limit:
            os.kill(pid, 9)
            sys.exit(f"the shim's server (process {pid}) did not end in {PATIENCE} s and was killed")
        time.sleep(0.005)


def measure(shim, address):
    with tempfile.TemporaryDirectory() as bundle:
        bundle = os.path.realpath(bundle)
        pathlib.Path(bundle, "config.json").write_text('{"ociVersion": "1.0.2"}', encoding="utf-8")
        os.mkfifo(f"{bundle}/log")
        log = os.open(f"{bundle}/log", os.O_RDWR | os.O_NONBLOCK)
        try:
            began = time.monotonic()
            done = subprocess.run(
                [shim, "-namespace", "chsnap-dev", "-id", "start", "-address", address, "start"],
                cwd=bundle, env={**os.environ, "TTRPC_ADDRESS": address + ".ttrpc"}, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, check=False, timeout=PATIENCE,
            )
            took = (time.monotonic() - began) * 1e3
        finally:
            for pid in servers(bundle):
                end(pid)
            os.close(log)
        if done.returncode != 0 or not done.stdout.startswith("unix://"):
            sys.exit(f"the shim's start action failed: {done.stderr.strip()}")
        return took


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(round(measure(*sys.argv[1:]), 3))
