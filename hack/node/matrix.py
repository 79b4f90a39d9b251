#!/usr/bin/env python3
"""Write the outcome of a run of the integration tests into docs/matrix.md or a table like it.

    matrix.py --arch A --machine M --accelerator A --commit C --log F --cases F --versions F --table F

A row is an architecture, a VMM and its version, an accelerator, a machine, a kernel and a commit; a cell is a
topic: how many cases passed of those that ran, and which failed. --cases is what `suite --list` prints: a topic of which fewer
cases had an outcome shows of how many, and replaces none of which more had one, unless something failed in it. What failed stays until
it is tried again. Runs of one commit share a row. An older commit's row stays until a row of the same machine has all of its topics.
"""

import argparse
import datetime
import os
import re
import sys

HEAD = """# What was run where

Written by `make test-node` and `make test` (`hack/node/matrix.py`) from the outcome of the integration tests; not by hand.
A cell is *passed/run* (and what failed), with the topics of `tests/tests/suite`, and the drivers' own tests (`shim/src/vmm`) on that KVM; `–` was not run, and *passed/run of all* was run in part.
Both containerds count. A row is of one commit; `-dirty` had changes beside it.

"""
FIXED = ["architecture", "VMM", "accelerator", "machine", "kernel"]
TAIL = ["commit", "date"]
# A newer row of these takes an older one's place.
PLACE = ["architecture", "VMM", "accelerator", "machine"]
NAME = r"(?P<vmm>[\w-]+)/(?P<containerd>[\d.]+)/(?P<topic>\w+)::(?P<case>\w+)"
CASE = re.compile(rf"^test {NAME} +\.\.\. (?P<outcome>ok|FAILED|ignored)?")
OUTCOME = re.compile(r"^(ok|FAILED|ignored)$")
LISTED = re.compile(rf"^{NAME}: test$")
# The drivers' own tests, of the library; those of the mask run without Cloud Hypervisor, too.
DRIVER = r"(?P<case>vmm::(?P<vmm>qemu|cloud_hypervisor)::(?!mask::)[\w:]+)"
DRIVER_CASE = re.compile(rf"^test {DRIVER}(?: - should panic)? \.\.\. (?P<outcome>ok|FAILED|ignored)?")
DRIVER_LISTED = re.compile(rf"^{DRIVER}: test$")


def of(match):
    """(vmm, topic) of a line that matched one of these."""
    topic = match["topic"] if "topic" in match.re.groupindex else "drivers"
    return match["vmm"].replace("_", "-"), topic


def read_table(path):
    """Rows as {column: text}, and the columns of topics in the order in which they stand."""
    try:
        with open(path, encoding="utf-8") as f:
            lines = [l.strip() for l in f if l.startswith("|")]
    except FileNotFoundError:
        lines = []
    if not lines:
        return [], []
    cells = [[c.strip() for c in l.strip("|").split("|")] for l in lines]
    columns = cells[0]
    return [dict(zip(columns, row)) for row in cells[2:]], [c for c in columns if c not in FIXED + TAIL]


def read_cases(path):
    """(vmm, topic) -> how many cases there are"""
    all_of = {}
    with open(path, encoding="utf-8", errors="replace") as f:
        for m in filter(None, (LISTED.match(l) or DRIVER_LISTED.match(l) for l in f)):
            key = of(m)
            all_of[key] = all_of.get(key, 0) + 1
    return all_of


class Count:
    """What came of the cases of a topic, by name."""

    def __init__(self):
        self.passed, self.failed, self.ignored = set(), set(), set()

    def add(self, match, outcome):
        named = match.groupdict()
        name = f"{named['case'].split('::')[-1]} {named.get('containerd', '')}".strip()
        {"ok": self.passed, "FAILED": self.failed, "ignored": self.ignored}[outcome].add(name)

    def ran(self):
        return self.passed | self.failed


def read_log(path):
    """vmm -> topic -> Count, and whether the tests came to their end"""
    seen, ended, case = {}, False, None
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            # Each program's tests begin and end.
            ended = (ended or line.startswith("test result: ")) and not re.match(r"running \d+ tests?$", line)
            if m := CASE.match(line) or DRIVER_CASE.match(line):
                case, outcome = m, m["outcome"]
            elif m := OUTCOME.match(line):
                # Something was said while the case ran.
                outcome = m[1]
            else:
                continue
            if case and outcome:
                vmm, topic = of(case)
                seen.setdefault(vmm, {}).setdefault(topic, Count()).add(case, outcome)
                case = None
    return seen, ended


def masks_ran(path):
    """Whether tests ran that are of no VMM, and so of no row."""
    with open(path, encoding="utf-8", errors="replace") as f:
        return any(re.match(r"test vmm::cloud_hypervisor::mask::", line) for line in f)


def cell(count, of):
    passed, run = len(count.passed), len(count.ran())
    return show(passed, run, of if run + len(count.ignored) != of else 0, count.failed)


def show(passed, run, of, failed):
    text = f"{passed}/{run} of {of}" if of else f"{passed}/{run}"
    return text if passed == run else f"**{text}** ({', '.join(sorted(failed))})"


CELL = re.compile(r"^\**(?P<passed>\d+)/(?P<run>\d+)(?: of (?P<of>\d+))?\**(?: \((?P<failed>.*)\))?$")


def failures(row, topic):
    """The names of the cases that failed, where the cell tells."""
    m = CELL.match(row.get(topic, ""))
    return set(m["failed"].split(", ")) if m and m["failed"] else set()


def has(row, topic):
    """Whether a topic was run: 0 not, 1 in part, 2 as a whole."""
    text = row.get(topic, "–")
    return 0 if text in ("–", "") else 1 if " of " in text else 2


def much(row, topic):
    """How much of a topic was run: of a part, how many cases."""
    part = has(row, topic) == 1
    return has(row, topic), int(re.search(r"/(\d+)", row[topic])[1]) if part else 0


def joined(old, new, kept, failed):
    """Of two parts of a topic in one cell, so that neither hides what failed in the other. Of what passed in the old one the names
    are not known, so no more is counted than surely ran: what failed there and was `kept`, beside the new one."""
    a, b = CELL.match(old), CELL.match(new)
    run = max(int(a["run"]), int(b["run"]) + len(kept))
    of = int(a["of"] or b["of"] or a["run"])
    return show(run - len(failed), run, 0 if run == of else of, failed)


def merge(rows, topics, named, cells, ran):
    """Puts the cells into the row of that name; `rows` and `topics` are changed. `ran`: topic -> the cases of this run"""
    # Two states of a tree are both called dirty, so these share no row.
    sure = not named["commit"].endswith("-dirty") and named["commit"] != "unknown"
    same = [r for r in rows if sure and all(r.get(c) == named[c] for c in [*FIXED, "commit"])]
    row = {**(same[0] if same else {}), **named}
    for topic, text in cells.items():
        part = has({topic: text}, topic) == 1
        if part and failures(row, topic):
            # Of what failed, perhaps not all was tried again.
            kept = failures(row, topic) - ran[topic]
            row[topic] = joined(row[topic], text, kept, kept | failures({topic: text}, topic))
        elif much({topic: text}, topic) >= much(row, topic) or text.startswith("**"):
            row[topic] = text
        if topic not in topics:
            topics.append(topic)
    rows[:] = [r for r in rows if r not in same]

    def covers(topic, old):
        tried = has(row, topic) == 2 or failures(old, topic) <= ran.get(topic, set())
        return much(old, topic) <= much(row, topic) and tried

    def covered(old):
        return all(old.get(c) == row[c] for c in PLACE) and all(covers(topic, old) for topic in topics)

    rows[:] = [r for r in rows if not covered(r)] + [row]


def write_table(path, rows, topics):
    # A column of which the last cell has gone goes, too.
    columns = FIXED + [t for t in topics if any(has(r, t) for r in rows)] + TAIL
    with open(path + ".new", "w", encoding="utf-8") as f:
        f.write(HEAD)
        f.write("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns) + "\n")
        for row in sorted(rows, key=lambda r: [r.get(c, "") for c in [*FIXED, "date", "commit"]]):
            f.write("| " + " | ".join(row.get(c) or "–" for c in columns) + " |\n")
    os.replace(path + ".new", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ["arch", "machine", "accelerator", "commit", "log", "cases", "versions", "table"]:
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    with open(args.versions, encoding="utf-8") as f:
        versions = dict(l.split(maxsplit=1) for l in f.read().splitlines() if " " in l)
    rows, topics = read_table(args.table)
    all_of = read_cases(args.cases)
    (seen, ended), written = read_log(args.log), False
    for vmm, counts in seen.items():
        # runc is the reference for the cases, and no VMM.
        cells = {t: cell(c, all_of.get((vmm, t), 0)) for t, c in counts.items() if c.ran() and vmm != "runc"}
        if not cells:
            continue
        named = {
            "architecture": args.arch,
            "VMM": f"{vmm} {versions.get(vmm, '').strip()}".strip(),
            "accelerator": args.accelerator,
            "machine": args.machine,
            "kernel": versions.get("kernel", ""),
            "commit": args.commit,
            "date": datetime.date.today().isoformat(),
        }
        merge(rows, topics, named, cells, {topic: count.ran() for topic, count in counts.items()})
        written = True
    if not written:
        if ended and masks_ran(args.log):
            return
        sys.exit("matrix.py: no case ran, so the table stays as it is")
    write_table(args.table, rows, topics)
    if not ended:
        sys.exit("matrix.py: the tests did not come to their end; the table has what they came to")


if __name__ == "__main__":
    main()
