"""The tests that are marked ``cuda``, shared out to several processes: each kernel is compiled, which takes a core seconds.

    python -m benchmarks.gpu_check.suite --json tests.json                # on a machine with a GPU
    python -m benchmarks.gpu_check.suite --processes 1 -k same_bits --json tests.json

A test that fails is an entry with its reason; so is one that had not ended when the time was up. Exit code 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "cuda")
#: A line of ``pytest -v``, and one of its summary.
_VERDICT = re.compile(r"^(?P<test>tests/\S+::.+?) (?P<verdict>PASSED|FAILED|ERROR|SKIPPED)\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (?P<test>tests/\S+::.+?)(?: - (?P<why>.*))?$")


def collected(select: str) -> list[str]:
    """The marked tests, by the names that pytest gives them.

    Raises:
        RuntimeError: pytest finds none, or cannot say.
    """
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")
                   if re.search(r"mark\.cuda\b", path.read_text(encoding="utf-8")))
    done = subprocess.run([*_PYTEST, "--collect-only", "-q", *(["-k", select] if select else []), *files],
                          capture_output=True, text=True, cwd=ROOT, check=False)
    tests = [line for line in done.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))]
    if done.returncode or not tests:
        raise RuntimeError(f"pytest collected nothing (exit code {done.returncode}): {(done.stdout + done.stderr)[-1500:]}")
    return tests


def run(tests: Sequence[str], processes: int, limit_s: float) -> dict[str, Any]:
    """{"passed": number, "skipped": number, "failed": [{"test", "why"}], "seconds"} of tests, shared out in turn."""
    start = time.monotonic()
    # kernels of one shape lie side by side: in turn, so that they do not all fall to one process
    shares = [share for share in (list(tests[i::processes]) for i in range(processes)) if share]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.log" for i in range(len(shares))]
        running = []
        for share, file in zip(shares, files, strict=True):
            with file.open("w", encoding="utf-8") as out:
                running.append(subprocess.Popen([*_PYTEST, "-v", "--tb=short", *share], stdout=out,
                                                stderr=subprocess.STDOUT, cwd=ROOT,
                                                env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"}))
        late = False
        for process in running:
            try:
                process.wait(max(0.0, start + limit_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                late = True
                process.kill()
                process.wait()
        said = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    verdicts, reasons = read("\n".join(said))
    failed = [{"test": test, "why": reasons.get(test) or "see the log"} for test in tests
              if verdicts.get(test) in ("FAILED", "ERROR")]
    gone = f"had not ended after {limit_s:.0f} s" if late else "its process ended first; see the log"
    failed += [{"test": test, "why": gone} for test in tests if test not in verdicts]
    # what went well is told in a line; the log is for the rest
    print(*(text for text, process in zip(said, running, strict=True) if process.returncode), sep="\n")
    count = Counter(verdicts.values())
    return {"passed": count["PASSED"], "skipped": count["SKIPPED"], "failed": failed, "seconds": time.monotonic() - start,
            "processes": len(shares)}


def read(said: str) -> tuple[dict[str, str], dict[str, str]]:
    """(test -> verdict, test -> why it failed) out of what pytest -v wrote."""
    verdicts = {found["test"]: found["verdict"] for line in said.splitlines() if (found := _VERDICT.match(line))}
    reasons = {found["test"]: (found["why"] or "").strip()[:300]
               for line in said.splitlines() if (found := _REASON.match(line))}
    return verdicts, reasons


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--limit_s", type=float, default=600, help="seconds for all of them (default: 600)")
    parser.add_argument("-k", dest="select", default="", help="as pytest takes it")
    parser.add_argument("--json", type=Path, required=True, help="where the verdicts go")
    args = parser.parse_args(argv)
    start = time.monotonic()
    tests = collected(args.select)
    found = run(tests, max(1, args.processes), args.limit_s - (time.monotonic() - start))
    args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{found['passed']} passed, {len(found['failed'])} failed, {found['skipped']} skipped")
    sys.exit(1 if found["failed"] or not found["passed"] else 0)


if __name__ == "__main__":
    main()
