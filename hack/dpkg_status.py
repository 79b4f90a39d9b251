#!/usr/bin/env python3
"""Copy dpkg's status without the distribution's Rust and what depends on it.

    dpkg_status.py /var/lib/dpkg/status <output>

The copy tells apt what need not be fetched. cargo-web and rustc-web conflict with cargo and rustc; but they
are only unpacked, so an installed Rust is no obstacle.
"""

import os
import re
import sys

RUST = re.compile(r"(cargo|rustc|rustdoc|rustfmt|rust-\w+|libstd-rust-[\w.-]+)(-web|-mozilla)?(-[\d.]+)?")


def field(stanza, name):
    """A field's text with the lines it continues on."""
    m = re.search(rf"^{name}: (.*(?:\n[ \t].*)*)", stanza, re.M)
    return m[1] if m else ""


def needs(stanza):
    """Groups of names, of each of which one has to be there."""
    for name in ("Depends", "Pre-Depends"):
        for group in field(stanza, name).split(","):
            names = {re.split(r"[\s(:]", alternative.strip())[0] for alternative in group.split("|")}
            if names != {""}:
                yield names


def main(source, output):
    with open(source, encoding="utf-8", errors="surrogateescape") as f:
        stanzas = {s: field(s, "Package") for s in re.split(r"\n{2,}", f.read()) if s.strip()}
    gone = {name for name in stanzas.values() if RUST.fullmatch(name)}
    more = gone
    while more:
        more = {name for s, name in stanzas.items() if name not in gone and any(g <= gone for g in needs(s))}
        gone |= more
    with open(output + ".new", "w", encoding="utf-8", errors="surrogateescape") as f:
        f.writelines(s.rstrip("\n") + "\n\n" for s, name in stanzas.items() if name not in gone)
    os.replace(output + ".new", output)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
