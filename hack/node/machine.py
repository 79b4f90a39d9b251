#!/usr/bin/env python3
"""Keeps a node: starts QEMU and the virtiofsd's it needs, and ends all of them with itself.

    machine.py --state D --sockets D [--with PID] ... (see hack/node.sh)

When one of them ends, or this process is told to (SIGTERM), or PID has gone before it said that the node is to
outlive it (SIGUSR1), everything is taken down. The children die with this process even if it is killed.
"""

import argparse
import ctypes
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import wire

PR_SET_PDEATHSIG = 1
# The scratch disk is sparse: with nothing left for it below, QEMU stops the machine and says nothing, and to a client
# that is a node that hangs.
ROOM = int(os.environ.get("CHSNAP_NODE_ROOM", 256 << 20))
LIBC = ctypes.CDLL(None)


class Trouble(Exception):
    pass


def die_with_parent():
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Machine:
    def __init__(self, args):
        self.args = args
        self.children = []
        self.log = open(f"{args.state}/machine.log", "wb", buffering=0)

    def spawn(self, argv):
        self.log.write(("+ " + " ".join(argv) + "\n").encode())
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.children.append((os.path.basename(argv[0]), child))
        return child

    def share(self, tag, directory, access):
        path = f"{self.args.sockets}/{tag}.fs"
        # One that was left by a keeper that was killed would pass for the new one.
        if os.path.exists(path):
            os.unlink(path)
        argv = [
            self.args.virtiofsd, f"--socket-path={path}", f"--shared-dir={directory}",
            "--sandbox=chroot", "--inode-file-handles=never", "--log-level=warn",
            # An overlay refuses a lower directory with submounts in it.
            "--no-announce-submounts",
            f"--cache={'auto' if access == 'rw' else self.args.cache}",
        ]  # fmt: skip
        if access == "ro":
            argv.append("--readonly")
        child = self.spawn(argv)
        for _ in range(200):
            if os.path.exists(path):
                break
            if child.poll() is not None:
                raise Trouble(f"virtiofsd for {directory} ended with status {child.returncode}")
            time.sleep(0.02)
        else:
            raise Trouble(f"virtiofsd for {directory} did not open its socket in 4 s")
        # See the shim's vmm/qemu/args.rs: with one CPU, its barriers are none.
        alone = ",event_idx=off" if self.args.cpus == 1 else ""
        return [
            "-chardev", f"socket,id=fs-{tag},path={path}",
            "-device", f"vhost-user-fs-pci,chardev=fs-{tag},tag={tag},queue-size=256{alone}",
        ]  # fmt: skip

    def arguments(self):
        a, sockets = self.args, self.args.sockets
        machine = {
            "amd64": "q35,smm=off,usb=off,vmport=off,sata=off,memory-backend=mem",
            "arm64": "virt,virtualization=on,gic-version=3,memory-backend=mem",
        }[a.arch]
        argv = [
            a.qemu, "-name", f"chsnap-node-{a.arch}", "-M", machine, "-accel", "tcg,thread=multi",
            "-cpu", a.cpu, "-smp", str(a.cpus), "-m", a.memory,
            "-object", f"memory-backend-memfd,id=mem,size={a.memory},share=on",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", a.kernel, "-initrd", a.initrd, "-append", a.append,
            "-chardev", f"file,id=console,path={a.state}/console.log", "-serial", "chardev:console",
            "-drive", f"if=none,id=scratch,file={a.state}/scratch.ext4,format=raw,cache=unsafe,discard=unmap",
            "-device", "virtio-blk-pci,drive=scratch",
            "-device", "virtio-rng-pci",
            "-device", "virtio-serial-pci",
            "-pidfile", f"{a.state}/qemu.pid",
        ]  # fmt: skip
        if a.disk:
            argv += ["-drive", f"if=none,id=disk,file={a.disk},format=raw", "-device", "virtio-blk-pci,drive=disk"]
        for n in range(wire.PORTS):
            argv += [
                "-chardev", f"socket,id=port{n},path={sockets}/port{n},server=on,wait=off",
                "-device", f"virtserialport,chardev=port{n},name={wire.PORT}{n}",
            ]  # fmt: skip
        return argv

    def make_disk(self):
        path = f"{self.args.state}/scratch.ext4"
        with open(path, "wb") as disk:
            disk.truncate(16 << 30)
        # Without a journal: the disk does not outlive the machine.
        argv = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=1", path]
        if subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, check=False).returncode:
            raise Trouble(f"cannot make the scratch disk {path}")

    def run(self, wake, starter):
        os.makedirs(self.args.sockets, exist_ok=True)
        os.chmod(self.args.sockets, 0o700)
        self.make_disk()
        fs = []
        for share in self.args.share:
            tag, access, directory = share.split(":", 2)
            fs += self.share(tag, directory, access)
        self.spawn(self.arguments() + fs)
        while True:
            for name, child in self.children:
                if child.poll() is not None:
                    raise Trouble(f"{name} ended with status {child.returncode}")
            room = os.statvfs(self.args.state)
            if room.f_bfree * room.f_frsize < ROOM:
                raise Trouble(f"no space left below {self.args.state}, where the node's disk is: {ROOM >> 20} MiB are needed")
            ready, _, _ = select.select([wake] + starter, [], [], 1)
            if starter and starter[0] in ready:
                # Its word may have come together with its end, too late for this look.
                ready += select.select([wake], [], [], 0.2)[0]
            said = os.read(wake, 64) if wake in ready else b""
            if signal.SIGTERM in said:
                return
            if signal.SIGUSR1 in said:
                starter = []
            elif starter and starter[0] in ready:
                raise Trouble("who started the node has gone")

    def end(self):
        # QEMU first: a virtiofsd ends by itself with its client, and says nothing then.
        for _, child in reversed(self.children):
            if child.poll() is None:
                child.terminate()
        for _, child in reversed(self.children):
            try:
                child.wait(timeout=3)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def lock(state):
    fd = os.open(f"{state}/lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Trouble("a node runs here already") from None
    os.truncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def watched(pid):
    """A descriptor that is readable once the process has ended, whether its parent knows or not."""
    try:
        return [os.pidfd_open(pid)] if pid else []
    except ProcessLookupError:
        raise Trouble("who started the node has gone") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["arch", "state", "sockets", "qemu", "virtiofsd", "cpu", "memory", "kernel", "initrd", "append", "cache"]:
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--disk")
    parser.add_argument("--with", dest="bound", type=int, default=0)
    parser.add_argument("--share", action="append", default=[], metavar="TAG:ro|rw:DIRECTORY")
    args = parser.parse_args()
    wake, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        held = lock(args.state)
    except Trouble as e:
        sys.exit(f"chsnap: error: {e}")
    machine, status = Machine(args), 0
    try:
        machine.run(wake, watched(args.bound))
    except Trouble as e:
        machine.log.write(f"chsnap: {e}\n".encode())
        status = 1
    finally:
        machine.end()
        shutil.rmtree(args.sockets, ignore_errors=True)
        for name in ("scratch.ext4", "qemu.pid"):
            try:
                os.unlink(f"{args.state}/{name}")
            except FileNotFoundError:
                pass
        os.truncate(held, 0)
    sys.exit(status)


if __name__ == "__main__":
    main()
