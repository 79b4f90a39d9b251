"""Hooks that run before this process is saved in a snapshot, and after it is restored from one.

    from snapshot_restore_py import register_before_snapshot, register_after_restore

    @register_before_snapshot
    def disconnect(): ...

    @register_after_restore
    def reconnect(): ...

Hooks before a snapshot run in the reverse order of their registration, those after a restore in its order. An exception
in one fails the snapshot, or the restore. They run in a thread of their own; from the end of the former to the end of
the latter no other thread of Python runs, except where a hook waits for something.

Before the hooks after a restore, `os.environ` has the variables of the pod that the process is in now, and `random`, `ssl`
and `numpy.random` are seeded anew if they are loaded: all of that is done for whoever imports this module, and
`sitecustomize.py` beside it does.

Where there are no snapshots, nothing is ever called. `docs/hooks.md` has the protocol, for other languages.
"""

# Little, since every Python of the container imports this at its start; `_event` has the rest.
import os
import sys
import threading
import time
from _socket import AF_UNIX, SOCK_STREAM, socket

__all__ = ["register_before_snapshot", "register_after_restore"]

_SOCKET = "/dev/chsnap/snapshot.sock"
_GREETING = b'{"hooks":1}'
# Bytes that an event may have: the environment of a pod is in it.
_MAX_EVENT = 4 << 20
# Seconds for which a thread runs before another one may ask for its turn, around a snapshot.
_LONG_TURN = 1.0

_before_snapshot = []
_after_restore = []


def register_before_snapshot(func, *args, **kwargs):
    """Has func(*args, **kwargs) called before the process is saved. Returns func, and so is a decorator."""
    _before_snapshot.append((func, args, kwargs))
    return func


def register_after_restore(func, *args, **kwargs):
    """Has func(*args, **kwargs) called after the process is restored. Returns func, and so is a decorator."""
    _after_restore.append((func, args, kwargs))
    return func


def get_before_snapshot():
    """What is registered: (func, args, kwargs), in the order of registration."""
    return _before_snapshot


def get_after_restore():
    """What is registered: (func, args, kwargs), in the order of registration."""
    return _after_restore


def _seed():
    ssl = sys.modules.get("ssl")
    if hasattr(ssl, "RAND_add"):
        ssl.RAND_add(os.urandom(64), 64.0)
    # A program's own module may have such a name, too.
    for name, known in (("random", "SystemRandom"), ("numpy.random", "RandomState")):
        module = sys.modules.get(name)
        if hasattr(module, known):
            module.seed()


class _Selfish:
    """Reads and writes without giving other threads a turn meanwhile."""

    def __init__(self):
        import ctypes

        self._errno = ctypes.get_errno
        self._buffer = ctypes.create_string_buffer
        library = ctypes.PyDLL(None, use_errno=True)
        for name in ("read", "write"):
            call = library[name]
            call.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
            call.restype = ctypes.c_ssize_t
            setattr(self, "_" + name, call)

    def _done(self, call, *args):
        while True:
            done = call(*args)
            if done >= 0:
                return done
            if self._errno() != 4:  # EINTR
                raise OSError(self._errno(), os.strerror(self._errno()))

    def write(self, fd, data):
        while data:
            data = data[self._done(self._write, fd, data, len(data)):]

    def read(self, fd, size):
        buffer = self._buffer(size)
        done = self._done(self._read, fd, buffer, size)
        return buffer.raw[:done]


class _Plain:
    """Of a Python without ctypes: other threads have their turns."""

    @staticmethod
    def write(fd, data):
        while data:
            data = data[os.write(fd, data):]

    @staticmethod
    def read(fd, size):
        return os.read(fd, size)


class _Connection:
    # Of this process; a child of it begins with its parent's.
    current = None

    def __init__(self, stream):
        self._stream = stream
        self._fd = stream.fileno()
        self._rest = b""
        self._selfish = None
        self._read = _Plain.read
        self._turn = None

    def line(self):
        while b"\n" not in self._rest:
            more = self._read(self._fd, 65536)
            if not more or len(self._rest) > _MAX_EVENT:
                raise EOFError
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def answer(self, error):
        import json

        answer = {"ok": True} if error is None else {"ok": False, "error": error[-8192:]}
        self._selfish.write(self._fd, json.dumps(answer).encode() + b"\n")

    def serve(self):
        try:
            while True:
                self._event(self.line())
        except (EOFError, OSError, ValueError, ImportError):
            self._others()
            self._stream.close()

    def abandon(self):
        """In a child: the parent alone is asked here, and has hung up when it has ended."""
        self._others()
        self._stream.close()
        # A hook that forks goes on in the child, too, and is not to answer for the parent.
        self._fd = -1

    def _event(self, line):
        # All that is needed until the next event, in a process which may not see its files meanwhile.
        import json
        import traceback

        if self._selfish is None:
            try:
                self._selfish = _Selfish()
            except (ImportError, OSError, AttributeError):
                self._selfish = _Plain()
        event = json.loads(line)
        kind = event.get("event")
        if kind == "before-snapshot":
            error = _run(reversed(_before_snapshot))
            if error is None:
                self._alone()
            self.answer(error)
        elif kind == "after-restore":
            error = _run([(os.environ.update, (event.get("env", {}),), {}), (_seed, (), {})] + _after_restore)
            self._others()
            self.answer(error)
        else:
            self.answer("there is no event %r" % (kind,))

    def _alone(self):
        """From here on no other thread has a turn."""
        if self._turn is None:
            self._turn = sys.getswitchinterval()
            sys.setswitchinterval(_LONG_TURN)
            # Whoever has asked for a turn already gets it now.
            time.sleep(0)
        self._read = self._selfish.read

    def _others(self):
        self._read = _Plain.read
        if self._turn is not None:
            sys.setswitchinterval(self._turn)
            self._turn = None


def _run(hooks):
    try:
        for func, args, kwargs in hooks:
            func(*args, **kwargs)
    except BaseException:  # What ends a thread ends nobody's waiting.
        import traceback

        return traceback.format_exc().strip()
    return None


def _connect():
    stream = socket(AF_UNIX, SOCK_STREAM)
    try:
        stream.connect(os.environ.get("CHSNAP_SNAPSHOT_SOCKET", _SOCKET))
    except OSError:
        stream.close()
        return
    connection = _Connection.current = _Connection(stream)
    try:
        # From here on this process is asked. Who greets brought this module, and there is no other greeting.
        if connection.line() != _GREETING:
            raise ValueError
    except (EOFError, OSError, ValueError):
        stream.close()
        return
    threading.Thread(target=connection.serve, name="snapshot-hooks", daemon=True).start()


def _after_fork():
    # A thread does not survive a fork, and a worker is another process.
    connection, _Connection.current = _Connection.current, None
    if connection is not None:
        connection.abandon()
    _connect()


_connect()
os.register_at_fork(after_in_child=_after_fork)
