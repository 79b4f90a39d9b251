#!/usr/bin/env python3
"""Print deb822 package sources for other suites, derived from this machine's own ones.

    apt_sources.py bookworm bookworm-backports ...

The machine's entries say where its Debian archive (and its security archive) is and which key
signs it; only the suite is replaced. Mirrors, proxies and keys therefore stay the administrator's.
"""

import glob
import re
import subprocess
import sys
import tempfile

DEBIAN = {"bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable"}


def one_line(path):
    """Entries of a sources.list: `deb [options] uri suite component...`"""
    with open(path, encoding="utf-8") as f:
        for line in f:
            line = line.split("#", 1)[0].strip()
            m = re.match(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s*(.*)$", line)
            if not m:
                continue
            options = dict(o.split("=", 1) for o in (m[1] or "").split() if "=" in o)
            yield {
                "uris": [m[2]],
                "suites": [m[3]],
                "components": m[4].split(),
                "signed-by": options.get("signed-by", "").replace(",", " "),
                "trusted": options.get("trusted", ""),
            }


def deb822(path):
    """Entries of a .sources file; a field may continue on indented lines (an inline key does)."""
    with open(path, encoding="utf-8") as f:
        text = "\n".join(l for l in f.read().splitlines() if not l.startswith("#"))
    for stanza in re.split(r"\n\s*\n", text):
        field, fields = None, {}
        for line in stanza.splitlines():
            if line[:1] in (" ", "\t") and field:
                fields[field] += "\n" + line
            elif ":" in line:
                field, value = line.split(":", 1)
                field = field.strip().lower()
                fields[field] = value.strip()
        if "deb" not in fields.get("types", "").split():
            continue
        if fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        yield {
            "uris": fields.get("uris", "").split(),
            "suites": fields.get("suites", "").split(),
            "components": fields.get("components", "").split(),
            "signed-by": fields.get("signed-by", ""),
            "trusted": fields.get("trusted", ""),
        }


def entries():
    for path in ["/etc/apt/sources.list"] + sorted(glob.glob("/etc/apt/sources.list.d/*.list")):
        try:
            yield from one_line(path)
        except FileNotFoundError:
            pass
    for path in sorted(glob.glob("/etc/apt/sources.list.d/*.sources")):
        yield from deb822(path)


def origins():
    """What apt has read of the archives so far: (URI, suite) -> origin."""
    listing = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(ORIGIN)", "Created-By: Packages"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
    ).stdout
    rows = (line.split(" ", 2) for line in listing.splitlines())
    return {(row[0].rstrip("/"), row[1]): row[2] for row in rows if len(row) == 3}


def rank(known):
    """Other vendors use Debian's suite names too. First the archives that say that they are Debian's, then the
    likeliest; a company's mirror may have a key and a path of its own."""

    def key(entry):
        said = {known.get((u.rstrip("/"), s)) for u in entry["uris"] for s in entry["suites"]} - {None, ""}
        return (
            0 if "Debian" in said else 2 if said else 1,
            0 if "debian" in entry["signed-by"] else 1,
            0 if any("debian" in u for u in entry["uris"]) else 1,
            0 if any(s.endswith("-updates") for s in entry["suites"]) else 1,
        )

    return key


def reachable(uri, suite):
    """Whether apt, with the machine's proxies and certificates, finds such a suite there."""
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            ["/usr/lib/apt/apt-helper", "-o", "APT::Sandbox::User=root", "download-file",
             f"{uri}/dists/{suite}/InRelease", f"{scratch}/InRelease"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
        )
    return done.returncode == 0


def beside(entry, suite):
    """Mirrors have the security archive beside the other, if at all."""
    uris = [re.sub(r"/debian/*$", "/debian-security", u) for u in entry["uris"] if re.search(r"/debian/*$", u)]
    uris = [u for u in uris if reachable(u, suite)]
    return {**entry, "uris": uris} if uris else None


def main(wanted):
    found = sorted((e for e in entries() if "main" in e["components"]), key=rank(origins()))
    archive = [e for e in found if any(s in DEBIAN for s in e["suites"])]
    security = [e for e in found if any(re.fullmatch(r"\w+-security", s) for s in e["suites"])]
    if not archive:
        sys.exit(
            "chsnap: error: no Debian archive (a suite such as bookworm, component main) among "
            "/etc/apt/sources.list and /etc/apt/sources.list.d: add one"
        )
    for suite in wanted:
        entry = archive[0]
        if suite.endswith("-security"):
            entry = security[0] if security else beside(archive[0], suite)
            if not entry:
                continue  # apt.sh says so when something is missing for want of it
        print("Types: deb")
        print("URIs:", " ".join(entry["uris"]))
        print("Suites:", suite)
        print("Components: main")
        if entry["signed-by"]:
            print("Signed-By:", entry["signed-by"])
        if entry["trusted"]:
            print("Trusted:", entry["trusted"])
        print()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1:])
