#!/usr/bin/env python3
"""Tests how run.py and agent.py speak with each other, over a socket instead of a virtio-serial port."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import agent  # noqa: E402
import wire  # noqa: E402


class Transport(unittest.TestCase):
    """As in the node there is one server for a port, but a client gets a connection of its own."""

    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{self.directory.name}/port0")
        self.listener.listen()
        self.first, self.deaf, self.held = b"", False, []
        threading.Thread(target=self.accept, daemon=True).start()

    def tearDown(self):
        self.listener.close()
        self.directory.cleanup()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            connection.setblocking(False)
            if self.first:
                connection.send(self.first)
            if self.deaf:
                self.greet(connection)
                continue
            server = agent.Server(agent.Port(connection.detach()))
            threading.Thread(target=server.serve, daemon=True).start()

    def greet(self, connection):
        """As a node that answers once and then no more."""
        connection.setblocking(True)
        hello = connection.recv(65536)
        connection.send(wire.frame(wire.READY, hello[5 + len(wire.MAGIC) :][:16]))
        self.held.append(connection)

    def client(self, *argv, options=(), **more):
        command = [sys.executable, f"{HERE}/run.py", self.directory.name, "run", *options, "--", *argv]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)

    def outcome(self, *argv, options=(), stdin=None):
        process = self.client(*argv, options=options, stdin=subprocess.PIPE)
        out, err = process.communicate(stdin, timeout=30)
        return process.returncode, out, err

    def test_output_error_and_status(self):
        self.assertEqual(self.outcome("sh", "-c", "echo a; echo b >&2; exit 7"), (7, b"a\n", b"b\n"))

    def test_a_signal_is_a_status(self):
        self.assertEqual(self.outcome("sh", "-c", "kill -9 $$")[0], 137)

    def test_bytes_come_unchanged(self):
        data = os.urandom(1 << 20) + wire.frame(wire.READY, bytes(16)) + wire.MAGIC
        self.assertEqual(self.outcome("cat", options=["--input"], stdin=data), (0, data, b""))

    def test_what_came_before_is_passed_over(self):
        self.first = wire.frame(wire.OUTPUT, b"of another client") + b"\0h\0\0\0" + wire.MAGIC
        self.assertEqual(self.outcome("echo", "x"), (0, b"x\n", b""))

    def test_no_such_program(self):
        status, _, error = self.outcome("/no/such/program")
        self.assertEqual(status, 127)
        self.assertIn(b"No such file", error)

    def test_a_terminal(self):
        status, out, _ = self.outcome("sh", "-c", "tty >/dev/null && stty size", options=["--tty"])
        self.assertEqual((status, len(out.split())), (0, 2))

    def test_the_time_is_over(self):
        status, _, error = self.outcome("sleep", "30", options=["--timeout", "0.3"])
        self.assertEqual(status, 124)
        self.assertIn(b"did not end in 0.3 s", error)

    def test_the_time_is_over_although_nobody_takes_the_input(self):
        with open("/dev/zero", "rb") as zero:
            process = self.client("sleep", "30", options=["--input", "--timeout", "1"], stdin=zero)
            _, error = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 124)
        self.assertIn(b"did not end in 1 s", error)

    def test_much_both_ways_blocks_neither(self):
        data = os.urandom(8 << 20)
        status, out, _ = self.outcome("sh", "-c", "head -c 8388608 /dev/zero; cat | sha256sum", options=["--input"], stdin=data)
        self.assertEqual((status, out[8 << 20 :].split()[0].decode()), (0, hashlib.sha256(data).hexdigest()))

    def test_a_node_that_hangs_is_told_although_there_is_input(self):
        self.deaf = True
        with open("/dev/zero", "rb") as zero:
            environment = {**os.environ, "CHSNAP_NODE_SILENCE": "2"}
            process = self.client("cat", options=["--input"], stdin=zero, env=environment)
            _, error = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 125)
        self.assertIn(b"has not answered for 2 s", error)

    def test_a_reader_that_goes_ends_it_as_any_program(self):
        process = self.client("sh", "-c", "while :; do echo line; done")
        process.stdout.readline()
        process.stdout.close()
        with process.stderr as error:
            self.assertEqual((process.wait(timeout=20), error.read()), (-signal.SIGPIPE, b""))

    def test_an_interrupt_is_its_end_for_its_parent_too(self):
        # Whoever runs these tests beside something else may ignore it, and all below inherit that.
        process = self.client("sh", "-c", "echo up; sleep 30", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        self.assertEqual(process.returncode, -signal.SIGINT)

    def test_a_daemon_does_not_hold_the_command_up(self):
        before = time.monotonic()
        status, out, _ = self.outcome("sh", "-c", "sleep 7.25 & echo $!")
        os.kill(int(out), signal.SIGKILL)
        self.assertEqual(status, 0)
        self.assertLess(time.monotonic() - before, 7)

    def test_a_command_ends_with_its_client(self):
        process = self.client("sh", "-c", "echo $$; exec sleep 31")
        pid = int(process.stdout.readline())
        process.kill()
        process.communicate()
        for _ in range(100):
            if not os.path.exists(f"/proc/{pid}"):
                return
            time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        self.fail("the command outlived its client")

    def test_no_node(self):
        # Closing alone does not wake the thread that accepts, which would then serve one more.
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        status, _, error = self.outcome("true")
        self.assertEqual(status, 125)
        self.assertIn(b"no node runs", error)


if __name__ == "__main__":
    unittest.main()
