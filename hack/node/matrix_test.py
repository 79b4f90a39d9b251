#!/usr/bin/env python3
"""Tests what matrix.py makes of runs: no cell may stand beside a commit, or for cases, that it is not of."""

import os
import subprocess
import sys
import tempfile
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
CASES = [f"{vmm}/{containerd}/{topic}::{case}" for vmm in ("qemu", "cloud-hypervisor") for containerd in ("2.1", "1.6")
         for topic, case in (("exec", "a"), ("exec", "b"), ("rung", "c"))]  # fmt: skip
END = "\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s\n"


class Matrix(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory()
        self.write("versions", "kernel 6.12\nqemu 10.0.2\ncloud-hypervisor v53.0\n")
        self.write("cases", "qemu: 1 cases are ignored: a reason\n" + "".join(f"{c}: test\n" for c in CASES))

    def tearDown(self):
        self.directory.cleanup()

    def path(self, name):
        return os.path.join(self.directory.name, name)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as f:
            f.write(text)

    def run_of(self, commit, *filters, failed=(), ignored=(), end=END, machine="M", said="", before=""):
        chosen = [c for c in CASES if any(f in c for f in filters)]
        outcome = {**dict.fromkeys(failed, "FAILED"), **dict.fromkeys(ignored, "ignored")}
        lines = "".join(f"test {c:<40} ... {said}{outcome.get(c, 'ok')}\n" for c in chosen)
        self.write("log", f"{before}\nrunning {len(chosen)} tests\n{lines}{end}")
        argv = [sys.executable, f"{HERE}/matrix.py", "--arch", "amd64", "--machine", machine, "--accelerator", "KVM", "--commit", commit]
        for name in ("log", "cases", "versions", "table"):
            argv += [f"--{name}", self.path(name)]
        return subprocess.run(argv, stderr=subprocess.DEVNULL, check=False).returncode

    def named(self):
        with open(self.path("table"), encoding="utf-8") as f:
            lines = [[c.strip() for c in l.strip().strip("|").split("|")] for l in f if l.startswith("|")]
        return [dict(zip(lines[0], l)) for l in lines[2:]]

    def rows(self):
        """Of (VMM, commit), the cells."""
        return {(r["VMM"].split()[0], r["commit"]): (r.get("exec", "–"), r.get("rung", "–")) for r in self.named()}

    def test_a_run_is_a_row_of_each_vmm(self):
        self.assertEqual(self.run_of("c1", "/", failed=["qemu/1.6/exec::a"]), 0)
        self.assertEqual(self.rows(), {("qemu", "c1"): ("**3/4** (a 1.6)", "2/2"), ("cloud-hypervisor", "c1"): ("4/4", "2/2")})

    def test_what_is_said_while_a_case_runs_hides_no_outcome(self):
        self.run_of("c1", "qemu/", failed=["qemu/1.6/exec::a"], said="note: it has been running for 60 s\nmore\n")
        self.assertEqual(self.rows(), {("qemu", "c1"): ("**3/4** (a 1.6)", "2/2")})

    def test_what_is_ignored_is_not_missing(self):
        self.run_of("c1", "qemu/", ignored=["qemu/1.6/exec::a"])
        self.assertEqual(self.rows(), {("qemu", "c1"): ("3/3", "2/2")})

    def test_a_part_says_so_and_hides_no_whole(self):
        self.run_of("c1", "qemu/2.1/exec")
        self.assertEqual(self.rows(), {("qemu", "c1"): ("2/2 of 4", "–")})
        self.run_of("c1", "qemu/")
        self.run_of("c1", "qemu/2.1/exec")
        self.assertEqual(self.rows(), {("qemu", "c1"): ("4/4", "2/2")})
        self.run_of("c1", "qemu/2.1/exec", failed=["qemu/2.1/exec::a"])
        self.assertEqual(self.rows(), {("qemu", "c1"): ("**1/2 of 4** (a 2.1)", "2/2")})

    def test_a_smaller_part_hides_no_failure(self):
        self.run_of("c1", "qemu/2.1/exec", failed=["qemu/2.1/exec::a"])
        self.run_of("c1", "qemu/2.1/exec::b")
        self.assertEqual(self.rows(), {("qemu", "c1"): ("**1/2 of 4** (a 2.1)", "–")})
        self.run_of("c2", "qemu/2.1/exec::b")
        self.assertEqual(self.rows(), {("qemu", "c1"): ("**1/2 of 4** (a 2.1)", "–"), ("qemu", "c2"): ("1/1 of 4", "–")})
        self.run_of("c2", "qemu/2.1/exec")
        self.assertEqual(self.rows(), {("qemu", "c2"): ("2/2 of 4", "–")})

    def test_what_failed_stays_until_it_is_tried_again(self):
        self.run_of("c1", "qemu/2.1/exec", failed=["qemu/2.1/exec::a"])
        self.run_of("c1", "qemu/1.6/exec")
        self.assertEqual(self.rows(), {("qemu", "c1"): ("**2/3 of 4** (a 2.1)", "–")})
        self.run_of("c1", "qemu/1.6/exec::b", failed=["qemu/1.6/exec::b"])
        self.assertEqual(self.named()[0]["exec"].split("** ")[1], "(a 2.1, b 1.6)")
        self.run_of("c1", "qemu/2.1/exec::a")
        self.assertEqual(self.rows(), {("qemu", "c1"): ("**2/3 of 4** (b 1.6)", "–")})
        # Another commit's does not hide it either.
        self.run_of("c2", "qemu/2.1/exec", "qemu/1.6/exec::a")
        self.assertIn(("qemu", "c1"), self.rows())
        self.run_of("c2", "qemu/2.1/exec", "qemu/1.6/exec")
        self.assertEqual(self.rows(), {("qemu", "c2"): ("4/4", "–")})

    def test_what_is_whole_stays_so(self):
        self.run_of("c1", "qemu/", failed=["qemu/1.6/exec::a"])
        self.run_of("c1", "qemu/2.1/exec")
        self.assertEqual(self.rows(), {("qemu", "c1"): ("**3/4** (a 1.6)", "2/2")})
        self.run_of("c1", "qemu/1.6/exec::a")
        self.assertEqual(self.rows(), {("qemu", "c1"): ("4/4", "2/2")})

    def test_another_commit_has_its_own_row_until_it_has_all(self):
        self.run_of("c1", "qemu/")
        self.run_of("c2", "qemu/2.1/exec", "rung")
        self.assertEqual(self.rows()["qemu", "c1"], ("4/4", "2/2"))
        self.assertEqual(self.rows()["qemu", "c2"], ("2/2 of 4", "2/2"))
        self.run_of("c2", "qemu/1.6/exec", "qemu/2.1/exec")
        self.assertEqual({k: v for k, v in self.rows().items() if k[0] == "qemu"}, {("qemu", "c2"): ("4/4", "2/2")})

    def test_dirty_trees_are_not_one(self):
        self.run_of("c1-dirty", "qemu/2.1/exec", "qemu/1.6/exec")
        self.run_of("c1-dirty", "qemu/2.1/rung", "qemu/1.6/rung")
        self.assertEqual(sorted((r["exec"], r["rung"]) for r in self.named()), [("4/4", "–"), ("–", "2/2")])
        self.run_of("c1-dirty", "qemu/")
        self.assertEqual([(r["exec"], r["rung"]) for r in self.named()], [("4/4", "2/2")])

    def test_a_run_that_is_cut_off_leaves_what_it_came_to(self):
        self.assertNotEqual(self.run_of("c1", "qemu/2.1", "qemu/1.6/rung", end="test qemu/1.6/exec::a ... "), 0)
        self.assertEqual(self.rows(), {("qemu", "c1"): ("2/2 of 4", "2/2")})

    def test_the_drivers_tests_are_a_topic_and_their_end_is_not_that_of_all(self):
        drivers = [f"vmm::{vmm}::tests::{name}" for vmm in ("qemu", "cloud_hypervisor") for name in ("a", "b")]
        self.write("cases", "".join(f"{d}: test\n" for d in drivers) + "".join(f"{c}: test\n" for c in CASES))
        lines = "".join(f"test {d} ... {'FAILED' if d.endswith('hypervisor::tests::b') else 'ok'}\n" for d in drivers)
        before = f"\nrunning 4 tests\n{lines}{END}"
        self.assertEqual(self.run_of("c1", "qemu/2.1", before=before), 0)
        self.assertEqual({r["VMM"].split()[0]: r["drivers"] for r in self.named()}, {"qemu": "2/2", "cloud-hypervisor": "**1/2** (b)"})
        self.assertNotEqual(self.run_of("c2", "qemu/2.1", before=before, end="test qemu/1.6/exec::a ... "), 0)

    def test_machines_do_not_replace_each_other(self):
        self.run_of("c1", "qemu/", machine="M")
        self.run_of("c2", "qemu/", machine="N")
        self.assertEqual(set(self.rows()), {("qemu", "c1"), ("qemu", "c2")})

    def test_nothing_ran(self):
        self.assertNotEqual(self.run_of("c1", "no-such"), 0)
        self.assertFalse(os.path.exists(self.path("table")))


if __name__ == "__main__":
    unittest.main()
