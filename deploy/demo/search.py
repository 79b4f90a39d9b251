"""A service that takes its time to start: a search in the library of the Python that runs it.

    GET /search?q=word   the modules that mention the word
    GET /identity        what no two machines may share
    and everything that app.py answers

It is why snapshots exist: loading modules and indexing sources is done once, in the template, and never again.
"""

import asyncio  # noqa: F401  imported for its weight, as frameworks do
import ctypes  # noqa: F401
import decimal
import email.message  # noqa: F401
import logging.config
import os
import pathlib
import random
import re
import sqlite3  # noqa: F401
import ssl
import sys
import time
import unittest.mock  # noqa: F401
import urllib.request  # noqa: F401
import uuid
import xml.dom.minidom  # noqa: F401
from urllib.parse import parse_qs, urlsplit

import app

try:
    from snapshot_restore_py import register_after_restore
except ImportError:
    # Without a snapshot to be restored from.
    def register_after_restore(func):
        return func


# As many modules are indexed as an hour's worth of searches needs; fewer where the machine is slow.
SECONDS = float(os.environ.get("INDEX_SECONDS", "2"))
RESTORED = []
INDEX = {}


def index():
    """Words of the library's sources, for SECONDS at most."""
    began = time.monotonic()
    modules = 0
    library = pathlib.Path(os.__file__).parent
    while time.monotonic() - began < SECONDS:
        for path in sorted(library.glob("*.py")):
            for word in set(re.findall(r"[a-z]{4,}", path.read_text("utf-8", "replace").lower())):
                INDEX.setdefault(word, set()).add(path.stem)
            modules += 1
            if time.monotonic() - began >= SECONDS:
                break
    return modules


@register_after_restore
def restored():
    RESTORED.append(time.time())


class Handler(app.Handler):
    def do_GET(self):
        url = urlsplit(self.path)
        if url.path == "/search":
            word = parse_qs(url.query).get("q", [""])[0].lower()
            self.answer(200, {"word": word, "modules": sorted(INDEX.get(word, ()))})
        elif url.path == "/identity":
            with open("/dev/chsnap/epoch") as epoch, open("/proc/sys/kernel/random/uuid") as kernel:
                self.answer(200, {
                    "hostname": os.uname().nodename,
                    "epoch": epoch.read().strip(),
                    "kernel_uuid": kernel.read().strip(),
                    "uuid4": str(uuid.uuid4()),
                    "urandom": os.urandom(8).hex(),
                    "random": random.getrandbits(64),
                    "ssl": ssl.RAND_bytes(8).hex(),
                    "restored": len(RESTORED),
                })
        else:
            super().do_GET()


if __name__ == "__main__":
    began = time.monotonic()
    decimal.getcontext().prec = 50
    logging.config.dictConfig({"version": 1})
    modules = index()
    print(f"indexed {len(INDEX)} words, {modules} modules, in {time.monotonic() - began:.1f} s", flush=True)
    sys.exit(app.main(Handler))
