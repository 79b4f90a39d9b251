#!/usr/bin/env python3
"""Write a node's initramfs: initramfs.py <output> <busybox> <init> <modules' directory> <SET=name,name,...>...

The modules of a set are loaded by init.sh in the order in which they stand in etc/modules.load.
A module marked with a trailing `?` may be missing.
"""

import os
import stat
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../guest"))
import initramfs as guest  # noqa: E402

APPLETS = ["sh", "mount", "umount", "mkdir", "insmod", "ip", "poweroff", "cat", "chmod", "ln", "rm", "hostname", "uname", "switch_root"]


def available(root):
    names = set(guest.dependencies(root))
    return names | {guest.module_name(l) for l in guest.read(f"{root}/modules.builtin").decode().split()}


def main():
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    output, busybox, init, modules = sys.argv[1:5]
    entries = {d: (stat.S_IFDIR | 0o755, b"", (0, 0)) for d in ["bin", "dev", "etc", "lib", "lib/modules", "proc", "sys"]}
    entries["dev/console"] = (stat.S_IFCHR | 0o600, b"", (5, 1))
    entries["bin/busybox"] = (stat.S_IFREG | 0o755, guest.read(busybox), (0, 0))
    for applet in APPLETS:
        entries[f"bin/{applet}"] = (stat.S_IFLNK | 0o777, b"busybox", (0, 0))
    entries["init"] = (stat.S_IFREG | 0o755, guest.read(init), (0, 0))
    known, wanted = available(modules), []
    for item in sys.argv[5:]:
        group, _, names = item.partition("=")
        for name in filter(None, names.split(",")):
            if name.endswith("?") and name[:-1].replace("-", "_") not in known:
                continue
            wanted.append(f"{name.rstrip('?')}:{group}")
    order, seen = [], set()
    for key, name, data in guest.resolve(modules, wanted):
        entries[f"lib/modules/{name}"] = (stat.S_IFREG | 0o644, data, (0, 0))
        # A dependency that an earlier set has loaded already.
        if name not in seen:
            seen.add(name)
            order.append(f"{key} /lib/modules/{name}\n")
    entries["etc/modules.load"] = (stat.S_IFREG | 0o644, "".join(order).encode(), (0, 0))
    cpio = guest.Cpio()
    for name in sorted(entries):
        mode, data, rdev = entries[name]
        cpio.add(name, mode, data, rdev)
    with open(output + ".new", "wb") as f:
        f.write(cpio.finish())
    os.replace(output + ".new", output)


if __name__ == "__main__":
    main()
