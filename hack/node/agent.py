#!/usr/bin/env python3
"""Runs in the node, as its first process: executes what run.py asks for over the virtio-serial ports.

The first process only collects orphans; its child serves each port with a thread. A command gets a
session of its own. When its client goes away, that session is killed; what has made itself a session
of its own (a containerd, for instance) stays.
"""

import ctypes
import fcntl
import glob
import json
import os
import select
import signal
import struct
import sys
import termios
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import wire  # noqa: E402

ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "linux",
}
HOLD_BACK = 1 << 20  # bytes of input a command may leave unread before the port is not read any more


class Gone(Exception):
    """No client is attached to the port."""


class Port:
    def __init__(self, fd):
        self.fd = fd

    @classmethod
    def open(cls, path):
        return cls(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))

    def send(self, kind, data=b""):
        for at in range(0, max(1, len(data)), wire.LIMIT):
            self.write(wire.frame(kind, data[at : at + wire.LIMIT]))

    def write(self, data):
        while data:
            try:
                data = data[os.write(self.fd, data) :]
            except BlockingIOError:
                poll = select.poll()
                poll.register(self.fd, select.POLLOUT)
                if any(events & select.POLLHUP for _, events in poll.poll(1000)):
                    raise Gone from None
            except OSError:
                raise Gone from None

    def read(self):
        """What has come; nothing when nothing has, Gone when no client is there."""
        try:
            data = os.read(self.fd, 65536)
        except BlockingIOError:
            return b""
        except OSError:
            raise Gone from None
        if not data:
            raise Gone
        return data


class Command:
    """A process with its terminal or pipes."""

    def __init__(self, request):
        self.tty = request.get("tty", False)
        self.pending, self.input_ended, self.status = bytearray(), False, None
        environment = {**ENVIRONMENT, **request.get("env", {})}
        if self.tty:
            self.input, slave = os.openpty()
            self.resize(request["rows"], request["columns"])
            ends, self.outputs = (slave, slave, slave), {self.input: wire.OUTPUT}
        else:
            (r0, self.input), (out, w1), (err, w2) = os.pipe(), os.pipe(), os.pipe()
            ends, self.outputs = (r0, w1, w2), {out: wire.OUTPUT, err: wire.ERROR}
        # fork rather than subprocess: the exit status has to stay this thread's to collect.
        self.pid = os.fork()
        if self.pid == 0:
            self.become(request, environment, ends)
        for fd in set(ends):
            os.close(fd)
        os.set_blocking(self.input, False)

    def become(self, request, environment, ends):
        try:
            os.setsid()
            for number, fd in enumerate(ends):
                os.dup2(fd, number)
            os.closerange(3, 256)
            if self.tty:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            for number in (signal.SIGPIPE, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.chdir(request.get("cwd") or "/")
            argv = request["argv"]
            os.execvpe(argv[0], argv, environment)
        except OSError as e:
            os.write(2, f"node: {e.filename or ''}: {e.strerror}\n".encode())
        finally:
            os._exit(127)

    def resize(self, rows, columns):
        fcntl.ioctl(self.input, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def feed(self):
        """Hands on what the command has not read yet."""
        try:
            while self.pending:
                del self.pending[: os.write(self.input, self.pending)]
        except BlockingIOError:
            return
        except OSError:
            self.pending.clear()
        if self.input_ended and not self.tty and self.input >= 0:
            os.close(self.input)
            self.input = -1

    def drain(self, port, ready):
        for fd in ready:
            try:
                data = os.read(fd, 65536)
            except OSError:  # a terminal whose last user has gone
                data = b""
            if data:
                port.send(self.outputs[fd], data)
            else:
                del self.outputs[fd]
                if not self.tty:
                    os.close(fd)

    def poll(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def kill(self, number=signal.SIGKILL):
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass

    def close(self):
        if self.status is None:
            self.kill()
            os.waitpid(self.pid, 0)
        for fd in {self.input, *self.outputs} - {-1}:
            os.close(fd)


class Server:
    def __init__(self, port):
        self.port = port
        self.frames = wire.Frames(wire.TO_NODE, wire.frame(wire.HELLO, wire.MAGIC + bytes(16))[: 5 + len(wire.MAGIC)])
        self.command = None

    def serve(self):
        idle = 0
        while True:
            try:
                self.turn()
                idle = 0
            except (Gone, wire.Garbled):
                self.end()
                # A port without a client has no event to wait for, and looking is not free here.
                idle = min(idle + 1, 10)
                time.sleep(idle * 0.05)
            except Exception as e:  # a fault of one command must not take the port with it
                self.end()
                try:
                    self.port.send(wire.FAILED, f"{type(e).__name__}: {e}".encode())
                except Gone:
                    pass

    def end(self):
        if self.command:
            self.command.close()
            self.command = None
        self.frames.reset()

    def turn(self):
        command, poll = self.command, select.poll()
        if not command or len(command.pending) < HOLD_BACK:
            poll.register(self.port.fd, select.POLLIN)
        if command:
            for fd in command.outputs:
                poll.register(fd, select.POLLIN)
            if command.pending:
                poll.register(command.input, select.POLLOUT)
        # The status of a command comes without an event, so look often while one runs.
        events = dict(poll.poll(50 if command else 5000))
        if events.get(self.port.fd, 0):
            if events[self.port.fd] & select.POLLHUP:
                raise Gone
            for kind, data in self.frames.feed(self.port.read()):
                self.receive(kind, data)
        if not (command := self.command):
            return
        command.feed()
        command.drain(self.port, [fd for fd in list(command.outputs) if events.get(fd)])
        if time.monotonic() - self.beat > 5:
            self.beat = time.monotonic()
            self.port.send(wire.BEAT)
        if command.poll() is not None:
            self.finish(command)

    def finish(self, command):
        """A daemon may have kept the pipe, so the end of the output is not waited for for long."""
        deadline = time.monotonic() + 0.5
        while command.outputs and (left := deadline - time.monotonic()) > 0:
            ready, _, _ = select.select(list(command.outputs), [], [], left)
            command.drain(self.port, ready)
        self.port.send(wire.EXIT, struct.pack(">i", command.status))
        command.close()
        self.command = None

    def receive(self, kind, data):
        command = self.command
        if kind == wire.HELLO:
            if command:
                command.close()
                self.command = None
            self.port.send(wire.READY, data[-16:])
        elif kind == wire.REQUEST and not command:
            self.beat = time.monotonic()
            self.command = Command(json.loads(data))
        elif command and kind == wire.INPUT:
            command.pending += data
        elif command and kind == wire.INPUT_END:
            command.input_ended = True
        elif command and kind == wire.SIZE and command.tty:
            command.resize(*struct.unpack(">HH", data))
        elif command and kind == wire.SIGNAL:
            command.kill(data[0])


def ports():
    for name in glob.glob("/sys/class/virtio-ports/*/name"):
        with open(name) as f:
            if f.read().startswith(wire.PORT):
                yield "/dev/" + name.split("/")[-2]


def main():
    ENVIRONMENT.update(p.split("=", 1) for p in sys.argv[1:] if "=" in p)
    if target := ENVIRONMENT.get("CHSNAP_TARGET"):
        ours = [f"{target}/{name}" for name in ["release", "tools/bin", "tools/containerd-2.1/bin"]]
        ENVIRONMENT["PATH"] = ":".join([*ours, ENVIRONMENT["PATH"]])
    child = os.fork()
    if child == 0:
        os.setsid()
        for path in ports():
            threading.Thread(target=Server(Port.open(path)).serve).start()
        return
    while os.wait()[0] != child:
        pass
    print("node: the agent has ended, so the machine does too", flush=True)
    os.sync()
    ctypes.CDLL(None).reboot(0x4321FEDC)


if __name__ == "__main__":
    main()
