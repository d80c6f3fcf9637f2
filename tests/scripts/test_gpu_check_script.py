"""scripts/gpu_check.sh: all of it on a CPU, no GPU, a check that fails, the ten minutes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check.processes import RUNS
from benchmarks.gpu_check.steps import PARTS

ROOT = Path(__file__).resolve().parents[2]
CHECKS = "tests,processes,steps,race_moe,race_generate,race_mask,race_static"
SCRIPT = ROOT / "scripts" / "gpu_check.sh"


def check(*words, python=None, **environment):
    path = f"{python or Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", str(SCRIPT), "--no_install", *map(str, words)], capture_output=True, text=True,
                          check=False, env=os.environ | {"PATH": path} | environment)


@pytest.fixture
def python(tmp_path):
    """A python that does what a case of the shell says, and is the real one for the table."""
    def make(case):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "python").write_text(f'#!/bin/bash\ncase "$*" in *gpu_check.table*) exec {sys.executable} "$@" ;; {case} '
                                       '*) echo fine ;; esac\n')
        (folder / "python").chmod(0o755)
        return folder
    return make


def test_all_but_one_race_on_a_cpu(tmp_path):
    """The race of the mask starts three more processes; tests/benchmarks/test_mask_race.py runs its sides."""
    out = tmp_path / "checked"
    done = check("--device", "cpu", "--shape", "pico", "--out", out, "--only", "tests,processes,race_moe,steps")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "gpu_check.md").read_text() in done.stdout
    rows = json.loads((out / "gpu_check.json").read_text())["rows"]
    assert not [row for row in rows if row["failed"]]
    parts = {f"{part}, pico" for part in PARTS}
    assert {row["check"] for row in rows} == {"tests", "processes", "MoE layer", "versions", "limits", *parts}
    assert re.search(r"1 passed", (out / "tests.log").read_text())
    launched = {row["setting"] for row in rows if row["check"] == "processes"}
    assert {name for runs in RUNS.values() for name, *_ in runs} < launched
    assert "answers of two processes" in launched
    found = json.loads((out / "steps.json").read_text())
    read = {(row["part"], row.get("batch")): round(row["tokens_per_second"] * row["seconds"]) for row in found["rows"]}
    # 4 rows of 24; 2 pairs of a prompt of 8 and two answers of 16; batches of 6 new tokens; pairs of LENGTHS
    for part in ("SFT", "MoE tuning", "full tuning"):
        assert read[part, None] == read[f"{part}, checkpointing", None] == 96
    for part in ("DPO", "DPO, checkpointing", "mask on factors", "mask on weights, by row, bf16",
                 "mask on weights, by element"):
        assert read[part, None] == 2 * (8 + 2 * 16)
    assert read["generation", 1] == read["generation, fused MoE", 1] == 6
    assert read["generation", 4] == 24
    assert read["DPO, embedded lengths", None] == read["DPO, embedded lengths, TRL", None] > 300
    for row in found["rows"]:
        assert 0 < row["of_limit"] < 1
        assert row["peak_gib"] > 0.01
        # TRL's own trainer has no plan of ours
        assert (row["plan_bytes"] is None) == row["part"].endswith("TRL")
    assert "| SFT, pico |  | 0.00 |  |" in (out / "gpu_check.md").read_text()


def test_without_a_gpu_it_says_so_and_stops(tmp_path, python):
    done = check("--out", tmp_path / "no", python=python("*torch.cuda*) exit 1 ;;"))
    assert done.returncode == 2
    assert done.stderr == ("error: torch sees no GPU here; run this where one is, or all of it small with --device cpu "
                           "--shape pico\n")
    assert not (tmp_path / "no").exists()


def test_one_check_that_fails_stops_no_other(tmp_path, python):
    out = tmp_path / "checked"
    failing = python('*mask.py*) echo "$@"; echo "RuntimeError: CUDA error"; exit 1 ;; '
                     '*suite*) echo "TRITON=$TRITON_INTERPRET" ;;')
    done = check("--out", out, python=failing, TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "| race_mask |  | failed: exit code 1: RuntimeError: CUDA error |" in done.stdout
    ended = [line.split("\t")[:2] for line in (out / "ended.tsv").read_text().splitlines()]
    assert ["race_mask", "1"] in ended
    assert ended[-1] == ["race_static", "0"]
    assert "benchmarks/mask.py --device cuda --modes lora" in (out / "race_mask.log").read_text()
    # compiled, whatever the caller's shell says
    assert (out / "tests.log").read_text() == "TRITON=0\n"


def test_what_ran_before_is_not_told_again(tmp_path, python):
    out = tmp_path / "checked"
    out.mkdir()
    (out / "steps.json").write_text(json.dumps({"device": "old", "shape": "7b", "rows": []}))
    done = check("--out", out, python=python(""))
    assert done.returncode == 1
    assert "failed: wrote no steps.json" in done.stdout


@pytest.mark.parametrize(("words", "said"), [
    (("--shape", "70b"), "error: --shape 70b: needs 7b or pico"),
    (("--device", "mps"), "error: --device mps: needs cuda or cpu"),
    (("--quick",), "error: --quick: unknown; allowed: --device cuda or cpu, --shape 7b or pico, --out FOLDER, --only "
                    "CHECK,CHECK, --seconds N, --no_install"),
    (("--only", "tests,race"), f"error: --only race: no check; allowed: {CHECKS}"),
    (("--only", ","), f"error: --only: names no check; allowed: {CHECKS}"),
    (("--seconds", "soon"), "error: --seconds soon: needs a number"),
])
def test_flags_that_are_wrong(words, said):
    done = check(*words)
    assert (done.returncode, done.stderr.strip()) == (2, said)


def test_the_time_limits_are_ten_minutes_together():
    limits = {name: int(seconds) for name, seconds in re.findall(r"^\s*check (\w+) (\d+) ", SCRIPT.read_text(), re.M)}
    assert ",".join(limits) == CHECKS
    # the first two run side by side, and the last gets what time is left
    assert sum(limits.values()) - limits["processes"] - limits["race_static"] <= 560


def test_what_cannot_end_in_time_does_not_begin(tmp_path, python):
    out = tmp_path / "checked"
    done = check("--out", out, "--seconds", "34", python=python('*limit_s*|*total_s*) echo "$@" ;;'))
    assert done.returncode == 1
    ended = {name: (code, limit) for name, code, _, limit in (
        line.split("\t") for line in (out / "ended.tsv").read_text().splitlines())}
    # 270 s: a third of it is not left; the shorter ones get what there is
    assert ended["steps"][0] == "-"
    assert ended["tests"][0] == "-"
    assert "| steps |  | failed: not run: " in done.stdout
    code, limit = ended["processes"]
    assert (code, 15 < int(limit) < 30) == ("0", True)
    assert f"--limit_s {int(limit) - 4} " in (out / "processes.log").read_text()
