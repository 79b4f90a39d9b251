#!/usr/bin/env python3
"""Pack a root file system and a few files as an OCI image archive, the same for the same inputs.

    oci_pack.py --output F.tar --name REF --arch amd64 --base ROOT.tar [--file SRC=/DEST ...]
                [--env K=V ...] [--expose 8080/tcp ...] [--workdir DIR] -- COMMAND...

Two layers: the base without documentation and package caches, and the files. Layers are not
compressed: the archive is imported on the machine that made it.
"""

import argparse
import hashlib
import io
import json
import os
import tarfile

DROPPED = (
    "dev/", "usr/share/doc/", "usr/share/man/", "usr/share/locale/", "usr/share/info/",
    "usr/share/lintian/", "var/cache/", "var/lib/apt/", "var/lib/dpkg/", "etc/apt/", "var/log/",
    "usr/lib/python3/dist-packages/__pycache__/",
)  # fmt: skip
LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def base_layer(path):
    out = io.BytesIO()
    with tarfile.open(path) as src, tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as dst:
        # A hard link's target has to come first, so the order stays the source's.
        for m in src:
            name = m.name.removeprefix("./")
            if name in ("", ".") or (name + "/").startswith(DROPPED) and not name + "/" in DROPPED:
                continue
            m.name = name
            if m.islnk():
                m.linkname = m.linkname.removeprefix("./")
            m.mtime = int(m.mtime)
            m.pax_headers = {k: v for k, v in m.pax_headers.items() if k.startswith("SCHILY.xattr.")}
            dst.addfile(m, src.extractfile(m) if m.isreg() else None)
    return out.getvalue()


def file_layer(pairs):
    out = io.BytesIO()
    made = set()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as dst:
        for source, dest in sorted(pairs, key=lambda p: p[1]):
            parts = dest.strip("/").split("/")
            for n in range(1, len(parts)):
                parent = "/".join(parts[:n])
                if parent not in made:
                    made.add(parent)
                    d = tarfile.TarInfo(parent)
                    d.type, d.mode, d.mtime = tarfile.DIRTYPE, 0o755, 1
                    dst.addfile(d)
            with open(source, "rb") as f:
                data = f.read()
            t = tarfile.TarInfo("/".join(parts))
            t.size, t.mode, t.mtime = len(data), 0o755 if os.access(source, os.X_OK) else 0o644, 1
            dst.addfile(t, io.BytesIO(data))
    return out.getvalue()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--output", required=True)
    p.add_argument("--name", required=True)
    p.add_argument("--arch", required=True)
    p.add_argument("--base", required=True)
    p.add_argument("--file", action="append", default=[], metavar="SRC=/DEST")
    p.add_argument("--env", action="append", default=[])
    p.add_argument("--expose", action="append", default=[])
    p.add_argument("--workdir", default="/")
    p.add_argument("command", nargs="+")
    a = p.parse_args()

    blobs = {}

    def blob(data, media):
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}

    def document(value, media):
        return blob(json.dumps(value, sort_keys=True).encode(), media)

    layers = [blob(base_layer(a.base), LAYER)]
    if a.file:
        layers.append(blob(file_layer([f.split("=", 1) for f in a.file]), LAYER))
    config = document(
        {
            "architecture": a.arch,
            "os": "linux",
            "config": {
                "Env": a.env,
                "Cmd": a.command,
                "WorkingDir": a.workdir,
                "ExposedPorts": {e: {} for e in a.expose},
            },
            "rootfs": {"type": "layers", "diff_ids": [l["digest"] for l in layers]},
        },
        CONFIG,
    )
    manifest = document(
        {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}, MANIFEST
    )
    # ctr names the image after the annotation; the OCI one is for other tools.
    manifest["annotations"] = {
        "io.containerd.image.name": a.name,
        "org.opencontainers.image.ref.name": a.name.rsplit(":", 1)[-1],
    }
    manifest["platform"] = {"architecture": a.arch, "os": "linux"}
    index = {"schemaVersion": 2, "manifests": [manifest]}

    files = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": json.dumps(index, sort_keys=True).encode(),
        **{f"blobs/sha256/{d}": data for d, data in blobs.items()},
    }
    with tarfile.open(a.output + ".new", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            t = tarfile.TarInfo(name)
            t.size, t.mode, t.mtime = len(files[name]), 0o644, 1
            tar.addfile(t, io.BytesIO(files[name]))
    os.replace(a.output + ".new", a.output)


if __name__ == "__main__":
    main()
