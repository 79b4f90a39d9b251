#!/usr/bin/env python3
"""Write the guest's initramfs, byte for byte the same for the same inputs.

    initramfs.py --output F --busybox F --init F --fstab F --agent F
                 [--modules /lib/modules/VERSION --module NAME[:KEY] ...]

KEY says when vm_init.sh loads a module (and what it depends on): a virtio device id such as
d00000013, or a word the kernel command line names in chsnap.modules=. Modules that the kernel has
built in are left out. Order and dependencies are resolved here, so the guest only needs insmod.
"""

import argparse
import lzma
import os
import stat
import subprocess
import sys

# The applets vm_init.sh uses; sh runs the others without a link, people debugging want these.
APPLETS = ["sh", "mount", "mkdir", "insmod", "ip", "poweroff", "cat", "ls", "ps", "dmesg"]
DIRECTORIES = [
    "bin", "dev", "etc", "lib", "lib/modules", "proc", "root", "run", "run/chsnap",
    "run/chsnap/share", "sbin", "sys", "tmp", "var",
]  # fmt: skip


class Cpio:
    """The kernel's `newc` format; every field that could differ between two runs is fixed."""

    def __init__(self):
        self.parts, self.size, self.inode = [], 0, 0

    def _write(self, data):
        self.parts.append(data)
        self.size += len(data)
        pad = -self.size % 4
        self.parts.append(b"\0" * pad)
        self.size += pad

    def add(self, name, mode, data=b"", rdev=(0, 0)):
        self.inode += 1
        links = 2 if stat.S_ISDIR(mode) else 1
        raw = name.encode() + b"\0"
        fields = (self.inode, mode, 0, 0, links, 0, len(data), 0, 0, *rdev, len(raw), 0)
        self._write(b"070701" + b"".join(b"%08X" % f for f in fields) + raw)
        if data:
            self._write(data)

    def finish(self):
        self.inode = -1
        self.add("TRAILER!!!", 0)
        self._write(b"\0" * (-self.size % 512))
        return b"".join(self.parts)


def read(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as e:
        sys.exit(f"initramfs.py: {path}: {e.strerror}")


def module_name(path):
    return os.path.basename(path).split(".ko", 1)[0].replace("-", "_")


def decompressed(path):
    data = read(path)
    if path.endswith(".xz"):
        return lzma.decompress(data)
    if path.endswith((".zst", ".gz")):
        tool = "zstd" if path.endswith(".zst") else "gzip"
        return subprocess.run([tool, "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout
    return data


def dependencies(root):
    """name -> (path, [direct dependencies' names]) from the modules' own .modinfo sections."""
    modules = {}
    for top, _, files in os.walk(root):
        for f in files:
            if ".ko" in f:
                modules[module_name(f)] = os.path.join(top, f)
    return modules


def modinfo(data, key):
    """Entries of an uncompressed module's .modinfo: NUL-separated `key=value`."""
    prefix = key.encode() + b"="
    return [e[len(prefix) :].decode() for e in data.split(b"\0") if e.startswith(prefix)]


def resolve(root, wanted):
    """Yield (key, file name, contents) in an order in which insmod succeeds."""
    paths = dependencies(root)
    builtin = {module_name(l) for l in read(f"{root}/modules.builtin").decode().split()}
    loaded = set()

    def visit(name, key):
        if name in builtin:
            return
        if name not in paths:
            sys.exit(f"initramfs.py: no module {name} in {root}, nor is it built in")
        data = decompressed(paths[name])
        for depends in modinfo(data, "depends"):
            for d in filter(None, depends.split(",")):
                yield from visit(d.replace("-", "_"), key)
        # One entry a key, so that a module which two keys need is loaded for either.
        if (name, key) not in loaded:
            loaded.add((name, key))
            yield key, f"{name}.ko", data

    for item in wanted:
        name, _, key = item.partition(":")
        yield from visit(name.replace("-", "_"), key or name)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--busybox", required=True)
    parser.add_argument("--init", required=True)
    parser.add_argument("--fstab", required=True)
    parser.add_argument("--agent", required=True)
    parser.add_argument("--modules")
    parser.add_argument("--module", action="append", default=[])
    args = parser.parse_args()

    entries = {d: (stat.S_IFDIR | 0o755, b"", (0, 0)) for d in DIRECTORIES}
    # The kernel opens it for init before anything is mounted.
    entries["dev/console"] = (stat.S_IFCHR | 0o600, b"", (5, 1))
    entries["bin/busybox"] = (stat.S_IFREG | 0o755, read(args.busybox), (0, 0))
    for applet in APPLETS:
        entries[f"bin/{applet}"] = (stat.S_IFLNK | 0o777, b"busybox", (0, 0))
    entries["init"] = (stat.S_IFREG | 0o755, read(args.init), (0, 0))
    entries["etc/fstab"] = (stat.S_IFREG | 0o644, read(args.fstab), (0, 0))
    entries["sbin/chsnap-agent"] = (stat.S_IFREG | 0o755, read(args.agent), (0, 0))
    order = []
    if args.modules:
        for key, name, data in resolve(args.modules, args.module):
            entries[f"lib/modules/{name}"] = (stat.S_IFREG | 0o644, data, (0, 0))
            order.append(f"{key} /lib/modules/{name}\n")
    entries["etc/modules.load"] = (stat.S_IFREG | 0o644, "".join(order).encode(), (0, 0))

    cpio = Cpio()
    for name in sorted(entries):
        mode, data, rdev = entries[name]
        cpio.add(name, mode, data, rdev)
    with open(args.output + ".new", "wb") as f:
        f.write(cpio.finish())
    os.replace(args.output + ".new", args.output)


if __name__ == "__main__":
    main()
