"""Shows that every test marked fault(NAME) fails on the code in which the fault was found and passes now; writes
dev/results/faults.md.

    python dev/faults.py                  all of them, on two processes
    python dev/faults.py F4 L2            only these entries; the rows of the others stay as they are

dev/faults.toml holds the entries: what happened, and what happens now or why an entry stays open. The old code is a
temporary worktree of COMMIT with the tests of TESTS; the contracts themselves (OLD_TESTS), which some entries are
about, are the old ones there too. A test that hangs fails after two minutes. The last line is a JSON document; the exit
code is 1 if a test passes on the old code in all of its cases, fails now, or an entry has neither test nor reason."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "9e9a9b1"
TESTS = "2a1b979"  # the last commit whose tests import the old code's modules: the packages were laid out anew after it
OLD_TESTS = [f"tests/contracts/{name}.py" for name in ("axes", "contracts", "covering", "test_pairs")]
sys.path.insert(0, str(ROOT))

from nanolab.cli import read_toml  # noqa: E402


def outcomes(tree: Path, only: list[str]) -> dict[str, dict[str, list[bool]]]:
    """{entry: {test: passed, by case}} of the marked tests in `tree`. A test that cannot be collected is absent."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "fault and not gpu",
            "-n",
            "2",
            "--dist",
            "loadfile",
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
            "--tb=no",
            "--timeout=120",
        ]
        if only:
            command += ["--fault", ",".join(only)]
        subprocess.run(command, cwd=tree, stdout=sys.stderr, env=_environment(tree))
        found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        for case in ET.parse(report).iter("testcase"):
            if case.find("skipped") is not None:
                continue
            passed = case.find("failure") is None and case.find("error") is None
            test = f"{case.get('classname')}::{case.get('name', '').partition('[')[0]}"
            for entry in (p.get("value", "") for p in case.iter("property") if p.get("name") == "fault"):
                found[entry][test].append(passed)
    return found


def _environment(tree: Path) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def old_tree(folder: Path) -> Path:
    """The tests of TESTS beside the old code."""
    tree = folder / "old"
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), COMMIT], cwd=ROOT, check=True)
    shutil.rmtree(tree / "tests")
    subprocess.run(["git", "checkout", "--quiet", TESTS, "--", "tests", "pyproject.toml"], cwd=tree, check=True)
    subprocess.run(["git", "checkout", "--quiet", COMMIT, "--", *OLD_TESTS], cwd=tree, check=True)
    return tree


def main(only: list[str]) -> int:
    now = outcomes(ROOT, only)
    with tempfile.TemporaryDirectory() as folder:
        tree = old_tree(Path(folder))
        try:
            then = outcomes(tree, only)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    entries = read_toml(ROOT / "dev" / "faults.toml")
    wrong, names, path = [], only or {*entries, *now}, ROOT / "dev" / "results" / "faults.md"
    rows = dict(re.findall(r"^(?=[|] ([^|]+) [|])(.*)$", path.read_text(encoding="utf-8"), re.M)) if only else {}
    for name in names:
        entry, tests = entries.get(name, {}), now.get(name, {})
        if not entry or not (tests or entry.get("open") or entry.get("not_reproduced")):
            wrong.append(f"{name}: no {'test and no reason' if entry else 'entry in dev/faults.toml'}")
        lines = []
        for test, passed in sorted(tests.items()):
            before = then.get(name, {}).get(test, [])
            short = test.removeprefix("tests.").replace(".", "/").replace("::", ".py::")
            lines.append(
                f"{short} ({before.count(False)} of {len(before)} cases failed, {passed.count(True)} of {len(passed)}"
                " pass)"
            )
            if not all(passed) or False not in before:
                wrong.append(f"{name}: {lines[-1]}")
        state = "open" if entry.get("open") else "not reproduced" if entry.get("not_reproduced") else "fixed"
        says = entry.get("open") or entry.get("not_reproduced") or entry.get("now", "")
        if state == "open" and entry.get("now"):
            state, says = "partly fixed", f"{entry['now']} Open: {says}"
        rows[name] = f"| {name} | {entry.get('was', '')} | {state} | {says} | {'<br>'.join(lines) or '-'} |"
    text = (
        f"# Faults that users of other projects met, tried here on {COMMIT}\n\nWritten by `python dev/faults.py` from"
        " dev/faults.toml and two runs of the tests that are marked with the entry's\n"
    )
    text += (
        f"name: on the code of {COMMIT} (how many cases failed) and on today's (how many pass).\n\n| entry | what"
        " happened | state | what happens now, or why not | tests |\n|---|---|---|---|---|\n"
    )
    order = sorted(entries.keys() & rows, key=lambda n: (n.rstrip("0123456789"), int(re.sub(r"\D", "", n) or 0)))
    path.write_text(text + "".join(rows[name] + "\n" for name in order), encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    n = sum(len(tests) for tests in now.values())
    print(json.dumps({"entries": len(names), "tests": n, "wrong": len(wrong), "commit_of_the_old_code": COMMIT}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
