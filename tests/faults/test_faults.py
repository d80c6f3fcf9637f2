"""scripts/faults.sh in small: a kill of every command, the other faults on a few; the long form is a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from faults.__main__ import MARKS, PAGE, table
from faults.trials import Outcome

import config

#: Seeds of the bounded form; each is another set of moments.
SEED = 1
SCRIPT = """
import json, sys
from pathlib import Path
from faults import __main__ as faults, children
from faults.trials import Trial
from faults.victims import VICTIMS

folder, seed = Path(sys.argv[1]), int(sys.argv[2])
children.load()
place, mounts, found = children.made(folder / "place"), children.may_mount(), []
for number, (name, victim) in enumerate(VICTIMS.items()):
    trial = Trial(victim, place, folder)
    found.append(trial.kill(2 if name in ("train: sft", "train: moe", "fuse: merge") else 1, seed))
    if name in ("train: sft", "inference"):
        found += faults.others(trial, seed, mounts)
    trial.close()
print(json.dumps([vars(outcome) for outcome in found]))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """In a process of its own: faults are forked, and pytest's process has torch's threads."""
    environment = {**os.environ, "PYTHONPATH": f"{config.ROOT}:{config.ROOT / 'tests'}", "OMP_NUM_THREADS": "1",
                   "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("faults")), str(SEED)], text=True,
                          cwd=config.ROOT, env=environment, capture_output=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return [Outcome(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]


def test_no_fault_loses_anything_or_leaves_half_of_something(outcomes):
    assert not {f"{o.command}, {o.fault}": o.wrong for o in outcomes if o.wrong}
    assert sum(outcome.times for outcome in outcomes if outcome.fault == "kill -9") >= 16


def test_what_a_person_can_mend_is_said(outcomes):
    said = {outcome.fault: outcome.said for outcome in outcomes if outcome.command == "train: sft"}
    assert "may not grow that large" in said["file size limit"]
    assert "--per_device_train_batch_size 2 --gradient_accumulation_steps 4" in said["out of memory"]
    answered = {outcome.fault: outcome.said for outcome in outcomes if outcome.command == "inference"}
    assert "--batch_size 1 (now 3)" in answered["out of memory"]


def test_the_table_tells_what_broke_and_hides_this_machines_folders():
    made = [Outcome("kill -9", "inference", 6, 2), Outcome("two at once", "inference", 2, said=(
        "/x1/inference/results/inference/cross_a is being written by process 77 on box: waiting for it (Ctrl-C ..)")),
        Outcome("kill -9", "fuse: merge", 8, wrong=["at the end: a: other bytes"])]
    told = table(made, seed=3, seconds=120.0)
    assert "14 kills and 2 other faults (seed 3, 2 minutes on " in told
    assert "broken rules: 1." in told
    assert "| command | kill -9 | two at once |" in told
    assert "| inference | 6, same bytes (2 when it was done) | same bytes |" in told
    assert "| fuse: merge | **1 wrong** |  |" in told
    assert "- two at once: RESULTS/inference/cross_a is being written by process 4242 on HOST: waiting for it" in told


def test_the_page_has_a_place_for_the_table():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count(MARKS[0]) == page.count(MARKS[1]) == 1
    assert page.index(MARKS[0]) < page.index(MARKS[1])
