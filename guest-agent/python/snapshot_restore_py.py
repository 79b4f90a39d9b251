"""Hooks that run before this process is saved in a snapshot, and after it is restored from one.

    from snapshot_restore_py import register_before_snapshot, register_after_restore

    @register_before_snapshot
    def disconnect(): ...

    @register_after_restore
    def reconnect(): ...

Hooks before a snapshot run in the reverse order of their registration, those after a restore in its order; what a hook
registers for the same event runs, too. An exception in one fails the snapshot, or the restore. They run in a thread of
their own.

Before the hooks after a restore, and before any other thread runs, `os.environ` has the variables of the pod that the
process is in now, and `random`, `ssl` and `numpy.random` are seeded anew if they are loaded: all of that is done for whoever
imports this module, and `sitecustomize.py` beside it does.

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
# Bytes of one in whose time no other thread has a turn.
_MAX_PROMPT = 64 << 10
# Seconds for which a thread runs before another one may ask for its turn, around a snapshot. Not more: a hook that has
# waited for something is the one that asks then.
_LONG_TURN = 1.0
# Modules that have random numbers, with what tells them from a program's own of such a name.
_RANDOM = (("ssl", "RAND_add"), ("random", "SystemRandom"), ("numpy.random", "RandomState"))

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


def _last_first(hooks):
    """Those that are registered meanwhile, too. All stay, for another snapshot."""
    left, seen = [], 0
    while True:
        left += hooks[seen:]
        seen = len(hooks)
        if not left:
            return
        yield left.pop()


def _loaded():
    """Of each of those modules, it or None."""
    modules = ((sys.modules.get(name), known) for name, known in _RANDOM)
    return [module if hasattr(module, known) else None for module, known in modules]


def _seed():
    ssl, *others = _loaded()
    if ssl:
        ssl.RAND_add(os.urandom(64), 64.0)
    for module in filter(None, others):
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

    def prompt(self, fd, answer, done, turn):
        """What sends `answer`, waits for the event after a restore, has variables and seeds be the pod's, and sends `done`,
        all before any other thread has a turn. It returns what came of the event, and whether it was followed.

        A thread that wants its turn gets it between two instructions of Python, however long it has to ask for that. So
        there are none: C calls C. All iterators here go on only then, some of them over lists that are empty until then.
        """
        import gc
        import json
        import signal
        from collections import deque
        from functools import partial
        from itertools import chain
        from operator import attrgetter, itemgetter, methodcaller

        event, events, followed = self._buffer(_MAX_PROMPT), [], []
        text = map(methodcaller("decode"), map(attrgetter("value"), [event]))
        parsed = map(json.JSONDecoder().scan_once, text, [0])

        def each(what):
            return chain.from_iterable(map(what, events))

        encode = methodcaller("encode", sys.getfilesystemencoding(), "surrogateescape")
        steps = [
            partial(self._write, fd, answer, len(answer)),
            partial(self._read, fd, event, _MAX_PROMPT),
            partial(events.extend, map(itemgetter("env"), map(itemgetter(0), parsed))),
            # Of an event that is not all there, nothing came.
            partial(events.__getitem__, 0),
            partial(os.environ._data.update, zip(map(encode, each(dict.keys)), map(encode, each(dict.values)))),
            partial(deque, map(os.putenv, each(dict.keys), each(dict.values)), 0),
        ]
        # Not by os.urandom, which gives others a turn.
        source = open("/dev/urandom", "rb", 0)

        def seed(function, made, *more):
            buffer = self._buffer(64)
            seeds = made(map(attrgetter("raw"), [buffer]))
            steps.append(partial(self._read, source.fileno(), buffer, 64))
            steps.append(partial(deque, map(function, seeds, *more), 0))

        ssl, random, numpy = _loaded()
        if ssl:
            seed(ssl.RAND_add, iter, [64.0])
        if random:
            # This is all that its method does with a number.
            shared = random.seed.__self__
            seed(super(random.Random, shared).seed, partial(map, partial(int.from_bytes, byteorder="big")))
            steps.append(partial(setattr, shared, "gauss_next", None))
        if numpy:
            seed(numpy.seed, lambda raw: map(list, map(methodcaller("cast", "I"), map(memoryview, raw))))
        # Whoever has a turn next may replace the program, which would hang up on who has not answered.
        steps += [partial(followed.append, True), partial(self._write, fd, done, len(done))]
        # Nor does whoever asked meanwhile get a long one.
        steps.append(partial(sys.setswitchinterval, turn))

        signals = getattr(signal, "valid_signals", lambda: range(1, signal.NSIG))()

        def go():
            # What is collected may have Python of its own to run.
            collects = gc.isenabled()
            gc.disable()
            # Nor is the wait to be interrupted: a signal goes to any thread.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            try:
                deque(map(methodcaller("__call__"), steps), 0)
            except Exception:
                pass  # It is for Python to do, then, and to tell.
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if collects:
                gc.enable()
            source.close()
            return event.value, bool(followed)

        return go


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
        self._followed = False
        self._hooks = False

    def line(self):
        while b"\n" not in self._rest:
            more = self._read(self._fd, 65536)
            if not more or len(self._rest) > _MAX_EVENT:
                raise EOFError
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def answer(self, error):
        self._selfish.write(self._fd, _answer(error))

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
            self._others()
            error = _run(_last_first(_before_snapshot))
            if error is None:
                self._alone()
            else:
                self.answer(error)
        elif kind == "after-restore":
            error, followed = None, self._followed
            hooks = self._hooks if followed else _after_restore
            if not followed:
                error = _run([(os.environ.update, (event.get("env", {}),), {}), (_seed, (), {})])
            if error is None and hooks:
                sys.setswitchinterval(_LONG_TURN)
                error = _run(_after_restore)
            self._others()
            if hooks or not followed:
                self.answer(error)
        else:
            self.answer("there is no event %r" % (kind,))

    def _alone(self):
        """Answers. From then on no other thread has a turn, until variables and seeds are the pod's."""
        self._turn = sys.getswitchinterval()
        sys.setswitchinterval(_LONG_TURN)
        # Whoever has asked for a turn already gets it now.
        time.sleep(0)
        self._read = self._selfish.read
        # With none to run, it is answered at once.
        self._hooks = bool(_after_restore)
        done = b"" if self._hooks else _answer(None)
        try:
            go = self._selfish.prompt(self._fd, _answer(None), done, self._turn)
        except Exception:  # No ctypes, or a Python in which something is otherwise.
            self.answer(None)
        else:
            self._rest, self._followed = go()

    def _others(self):
        self._read = _Plain.read
        self._followed = False
        if self._turn is not None:
            sys.setswitchinterval(self._turn)
            self._turn = None


def _answer(error):
    import json

    answer = {"ok": True} if error is None else {"ok": False, "error": error[-8192:]}
    return json.dumps(answer).encode() + b"\n"


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
