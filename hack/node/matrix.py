#!/usr/bin/env python3
"""Write the outcome of a run of the integration tests into docs/matrix.md.

    matrix.py --arch A --machine M --accelerator A --commit C --log F --versions F --table F

A row is an architecture, a VMM and its version, an accelerator and a machine; a cell is a topic: how many
cases passed of those that ran. A run replaces the cells of what it ran, and leaves all others.
"""

import argparse
import datetime
import os
import re
import sys

HEAD = """# What was run where

Written by `make test-node` (`hack/node/matrix.py`) from the outcome of the integration tests; not by hand.
A cell is *passed/run*, with the topics of `tests/tests/suite`; `–` was not run. Both containerds count.
The date is the row's newest run.

"""
FIXED = ["architecture", "VMM", "accelerator", "machine", "kernel"]
TAIL = ["commit", "date"]
CASE = re.compile(r"^test (?P<vmm>[\w-]+)/(?P<containerd>[\d.]+)/(?P<topic>\w+)::(?P<case>\w+) +\.\.\. (?P<outcome>ok|FAILED|ignored)")


def read_table(path):
    """key -> {column: text}, and the columns of topics in the order in which they stand."""
    rows, topics = {}, []
    try:
        with open(path, encoding="utf-8") as f:
            lines = [l.strip() for l in f if l.startswith("|")]
    except FileNotFoundError:
        return rows, topics
    if not lines:
        return rows, topics
    cells = [[c.strip() for c in l.strip("|").split("|")] for l in lines]
    columns = cells[0]
    topics = [c for c in columns if c not in FIXED + TAIL]
    for row in cells[2:]:
        named = dict(zip(columns, row))
        rows[tuple(named.get(c, "") for c in FIXED)] = named
    return rows, topics


def read_log(path):
    """vmm -> topic -> [passed, run]"""
    seen, running = {}, False
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            running = (running or line.startswith("running ")) and not line.startswith("test result: ")
            m = CASE.match(line)
            if m and m["outcome"] != "ignored":
                count = seen.setdefault(m["vmm"], {}).setdefault(m["topic"], [0, 0])
                count[0] += m["outcome"] == "ok"
                count[1] += 1
    if running:
        sys.exit("matrix.py: the tests did not come to their end, so the table stays as it is")
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["arch", "machine", "accelerator", "commit", "log", "versions", "table"]:
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    with open(args.versions, encoding="utf-8") as f:
        versions = dict(l.split(maxsplit=1) for l in f.read().splitlines() if " " in l)
    rows, topics = read_table(args.table)
    seen = read_log(args.log)
    if not seen:
        sys.exit("matrix.py: no case ran, so the table stays as it is")
    for vmm, counts in seen.items():
        named = {
            "architecture": args.arch,
            "VMM": f"{vmm} {versions.get(vmm, '').strip()}".strip(),
            "accelerator": args.accelerator,
            "machine": args.machine,
            "kernel": versions.get("kernel", ""),
        }
        row = rows.setdefault(tuple(named.values()), named)
        for topic, (passed, run) in counts.items():
            row[topic] = f"{passed}/{run}" if passed == run else f"**{passed}/{run}**"
            if topic not in topics:
                topics.append(topic)
        row["commit"] = args.commit
        row["date"] = datetime.date.today().isoformat()
    columns = FIXED + topics + TAIL
    with open(args.table + ".new", "w", encoding="utf-8") as f:
        f.write(HEAD)
        f.write("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n")
        for key in sorted(rows):
            f.write("| " + " | ".join(rows[key].get(c) or "–" for c in columns) + " |\n")
    os.replace(args.table + ".new", args.table)


if __name__ == "__main__":
    main()
