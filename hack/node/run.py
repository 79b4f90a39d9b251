#!/usr/bin/env python3
"""Runs a command in a node and returns its output and exit status.

    run.py <directory of the sockets> ping [--timeout S]
    run.py <directory of the sockets> run [--connect S] [--timeout S] [--input] [--tty] [--cwd D] -- <argument...>

Exit status: the command's (128 + n for signal n); 125 when the node cannot be spoken to or does not
answer; 124 when the time is over, after which the command is killed.
"""

import argparse
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
import termios
import time
import tty

import wire

# Seconds without a sign of life, of which the agent gives one every 5.
SILENCE = float(os.environ.get("CHSNAP_NODE_SILENCE", "60"))
# Bytes the node may leave untaken before no more input is read.
HOLD_BACK = 1 << 16


class Failure(Exception):
    pass


class TimeOver(Exception):
    pass


class Node:
    """A connection over a port that no other client uses."""

    def __init__(self, directory, deadline):
        self.sock, self.lock = self.connect(directory)
        self.pending = bytearray()
        self.hello(deadline)

    @staticmethod
    def connect(directory):
        for n in range(wire.PORTS):
            try:
                lock = os.open(f"{directory}/port{n}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                raise Failure("no node runs: start one with hack/node.sh start") from None
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                sock = socket.socket(socket.AF_UNIX)
                sock.connect(f"{directory}/port{n}")
                sock.setblocking(False)
                return sock, lock
            except BlockingIOError:
                os.close(lock)
            except (FileNotFoundError, ConnectionRefusedError):
                raise Failure("no node runs: start one with hack/node.sh start") from None
        raise Failure(f"{wire.PORTS} commands run in the node already, and it has no more ports")

    def hello(self, deadline):
        nonce = os.urandom(16)
        self.frames = wire.Frames(wire.TO_HOST, wire.frame(wire.READY, nonce))
        next_hello = 0
        while True:
            now = time.monotonic()
            if now > deadline:
                raise Failure("the node does not answer")
            if now >= next_hello:
                self.send(wire.HELLO, wire.MAGIC + nonce)
                next_hello = now + 1
            for kind, _ in self.receive(min(deadline, next_hello) - now):
                if kind == wire.READY:
                    return

    def send(self, kind, data=b""):
        """Never waits: a node that takes nothing is one whose silence is to be noticed."""
        self.pending += wire.frame(kind, data)

    def wait(self, timeout, more=()):
        """What can be read of `more` and the node by then; sends meanwhile what the node takes."""
        readable, writable, _ = select.select([self.sock, *more], [self.sock] if self.pending else [], [], max(0, timeout))
        if writable:
            try:
                del self.pending[: self.sock.send(self.pending)]
            except BlockingIOError:
                pass
            except OSError as e:
                raise Failure(f"the node has gone: {e.strerror}") from None
        return readable

    def receive(self, timeout):
        return self.read() if self.sock in self.wait(timeout) else ()

    def read(self):
        try:
            data = self.sock.recv(65536)
        except OSError as e:
            raise Failure(f"the node has gone: {e.strerror}") from None
        if not data:
            raise Failure("the node has gone")
        return self.frames.feed(data)


def window():
    size = shutil.get_terminal_size()
    return size.lines, size.columns


def write_all(fd, data):
    while data:
        data = data[os.write(fd, data) :]


def execute(node, args):
    request = {"argv": args.argv, "cwd": args.cwd, "tty": args.tty}
    if args.tty:
        request["rows"], request["columns"] = window()
        request["env"] = {"TERM": os.environ.get("TERM", "linux")}
        signal.signal(signal.SIGWINCH, lambda *_: node.send(wire.SIZE, struct.pack(">HH", *window())))
    node.send(wire.REQUEST, json.dumps(request).encode())
    input_open = args.input
    if not input_open:
        node.send(wire.INPUT_END)
    deadline = time.monotonic() + args.timeout if args.timeout else None
    heard = time.monotonic()
    while True:
        now = time.monotonic()
        if deadline and now > deadline:
            raise TimeOver(f"the command did not end in {args.timeout:g} s and is killed")
        if now - heard > SILENCE:
            raise Failure(f"the node has not answered for {SILENCE:g} s")
        wait = min(1, deadline - now) if deadline else 1
        ready = node.wait(wait, [0] if input_open and len(node.pending) < HOLD_BACK else [])
        if 0 in ready:
            data = os.read(0, 4096)
            if data:
                node.send(wire.INPUT, data)
            else:
                node.send(wire.INPUT_END)
                input_open = False
        if node.sock in ready:
            for kind, data in node.read():
                if kind == wire.OUTPUT:
                    write_all(1, data)
                elif kind == wire.ERROR:
                    write_all(2, data)
                elif kind == wire.FAILED:
                    raise Failure(data.decode(errors="replace"))
                elif kind == wire.EXIT:
                    (status,) = struct.unpack(">i", data)
                    return status if status >= 0 else 128 - status
            # After it was written, for which a reader may have taken its time.
            heard = time.monotonic()


def with_terminal(node, args):
    if not (args.tty and os.isatty(0)):
        return execute(node, args)
    saved = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        return execute(node, args)
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


def end_by(number):
    """As who does not handle it: a shell that has started this ends with it then, and does not go on."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("what", choices=["ping", "run"])
    parser.add_argument("--timeout", type=float, default=0)
    parser.add_argument("--connect", type=float, default=30)
    parser.add_argument("--input", action="store_true")
    parser.add_argument("--tty", action="store_true")
    parser.add_argument("--cwd")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:cut])
    args.argv = sys.argv[cut + 1 :]
    # The command's session is killed by the agent when the connection ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        patience = args.timeout if args.what == "ping" and args.timeout else args.connect
        node = Node(args.directory, time.monotonic() + patience)
        if args.what == "run":
            sys.exit(with_terminal(node, args))
    except TimeOver as e:
        print(f"chsnap: error: {e}", file=sys.stderr)
        sys.exit(124)
    except (Failure, wire.Garbled) as e:
        print(f"chsnap: error: {e}", file=sys.stderr)
        sys.exit(125)
    except BrokenPipeError:
        end_by(signal.SIGPIPE)
    except KeyboardInterrupt:
        end_by(signal.SIGINT)


if __name__ == "__main__":
    main()
