#!/usr/bin/env python3
"""Print deb822 package sources for other suites, derived from this machine's own ones.

    apt_sources.py bookworm bookworm-backports ...

The machine's entries say where its Debian archive (and its security archive) is and which key
signs it; only the suite is replaced. Mirrors, proxies and keys therefore stay the administrator's.
"""

import glob
import re
import sys

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


def looks_debian(entry):
    """Other vendors use Debian's suite names too; theirs have a key and a path of their own."""
    if "main" not in entry["components"]:
        return False
    key = entry["signed-by"]
    if key and "debian" not in key and "BEGIN PGP" not in key:
        return False
    return True


def rank(entry):
    """The likeliest Debian archive first."""
    return (
        0 if "debian" in entry["signed-by"] else 1,
        0 if any("debian" in u for u in entry["uris"]) else 1,
    )


def main(wanted):
    found = sorted((e for e in entries() if looks_debian(e)), key=rank)
    archive = [e for e in found if any(s in DEBIAN for s in e["suites"])]
    security = [e for e in found if any(re.fullmatch(r"\w+-security", s) for s in e["suites"])]
    if not archive:
        sys.exit(
            "apt_sources.py: no Debian archive (suite such as bookworm, component main) among "
            "/etc/apt/sources.list and /etc/apt/sources.list.d: add one"
        )
    for suite in wanted:
        if suite.endswith("-security"):
            if not security:
                continue  # a machine without security updates gets none here either
            entry = security[0]
        else:
            entry = archive[0]
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
