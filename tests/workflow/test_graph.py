"""The graph on pico adapters, in processes: killed and gone on with, one failure, touched files, a changed flag."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from pico import make_adapter

import config

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(config.ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def line(run, adapters, more=""):
    return f"models/fuse.py adapters --adapters {adapters} --report false --run_name {run} {more}".strip()


@pytest.fixture(scope="module")
def place(pico, tmp_path_factory):
    """A table of five arms: two from adapters on disk, a sum of both, one of the second, one whose input is missing."""
    folder = tmp_path_factory.mktemp("graph")
    for seed in (1, 2):
        make_adapter(pico, folder / f"adapter_{seed}", seed=seed)
    both = f"{folder}/adapter_1,{folder}/adapter_2"
    arms = {"one": {"make": line("one", both, "--weights 0.5,0.5")},
            "two": {"make": line("two", both, "--weights 0.2,0.8")},
            "total": {"needs": ["one", "two"], "make": line("total", "one,two")},
            "broken": {"needs": ["one"], "make": line("broken", "one,nowhere")},
            "half": {"needs": ["two"], "make": line("half", "two", "--scale 0.5")}}
    write(folder, arms)
    return folder, arms


def write(folder, arms):
    body = {"arms": {name: {"kind": "merge", "cost": "fuse", **arm} for name, arm in arms.items()},
            "costs": {"fuse": {"seconds": 5, "memory_mb": 500}}}
    (folder / "arms.yaml").write_text(yaml.safe_dump(body))


def words(folder, *more):
    return [sys.executable, "-m", "workflow.leaderboard", "--arms", str(folder / "arms.yaml"), "--seeds", "7",
            "--output_dir", str(folder), *more]


def graph(folder, *more):
    return subprocess.run(words(folder, *more), cwd=config.ROOT, env=ENVIRONMENT, capture_output=True, text=True,
                          timeout=300, check=False)


def made(folder):
    """Run -> when its manifest was written, as the manifest itself says to the second, and its weights' inode."""
    outputs = folder / "leaderboard" / "seed_7" / "outputs"
    return {path.parent.name: (json.loads(path.read_text())["finished"], path.stat().st_ino)
            for path in outputs.glob("[!.]*/manifest.json")}


def test_a_killed_graph_goes_on_and_one_failure_stops_only_what_needs_it(place):
    folder, arms = place
    # a group of its own, so that every process of it is killed at once, snakemake and the step under way
    process = subprocess.Popen(words(folder, "--", "--cores", "1"), cwd=config.ROOT, env=ENVIRONMENT, preexec_fn=os.setpgrp,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not made(folder) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = made(folder)
    assert first
    assert len(first) < 4
    done = graph(folder)
    assert done.returncode == 1
    now = made(folder)
    assert set(now) == {"one", "two", "total", "half"}
    # what was finished before the kill was not made again
    assert {run: now[run] for run in first} == first
    assert "broken" in done.stderr
    assert "nowhere" in done.stderr
    assert "left out of the table, because a step failed or was not asked for: broken" in done.stderr


def test_touched_files_re_run_nothing(place):
    folder, arms = place
    write(folder, {name: arm for name, arm in arms.items() if name != "broken"})
    before = made(folder)
    assert len(before) == 4
    # what steps made is older than what they read; not in the future, where snakemake rightly sees a clock that is wrong
    now = time.time()
    for path in (*folder.rglob("*.json"), *folder.rglob("*.safetensors"), *folder.rglob("*.yaml")):
        age = 100 if "total" in path.parts or "half" in path.parts else 0
        os.utime(path, (now - age, now - age))
    done = graph(folder)
    assert done.returncode == 0, done.stderr
    assert "4 steps, 0 to do: 0.0 hours" in done.stdout
    assert made(folder) == before


def test_a_changed_flag_re_runs_its_descendants_only(place):
    folder, arms = place
    before = made(folder)
    changed = {name: dict(arm) for name, arm in arms.items() if name != "broken"}
    changed["two"]["make"] = changed["two"]["make"].replace("0.2,0.8", "0.3,0.7")
    write(folder, changed)
    plan = graph(folder, "--dry_run")
    assert "4 steps, 3 to do" in plan.stdout
    finished = [line for line in plan.stdout.splitlines() if line.endswith("# finished")]
    assert ["--run_name one" in line for line in finished] == [True]
    done = graph(folder)
    assert done.returncode == 0, done.stderr
    now = made(folder)
    assert now["one"] == before["one"]
    assert all(now[run] != before[run] for run in ("two", "total", "half"))
    weights = json.loads((folder / "leaderboard/seed_7/outputs/two/manifest.json").read_text())["config"]["weights"]
    assert weights == "0.3,0.7"


def test_a_run_that_somebody_made_by_hand_is_taken_as_its_command_takes_it(place):
    folder, arms = place
    # records are lost, results are not: each command says in seconds that it is finished
    for path in (folder / "leaderboard" / "workflow" / "records").glob("*.json"):
        path.unlink()
    before = made(folder)
    done = graph(folder, "--only", "one")
    assert done.returncode == 0, done.stderr
    assert made(folder) == before
    assert [path.name for path in (folder / "leaderboard" / "workflow" / "records").iterdir()] == ["s7_one.json"]


def test_sigterm_reaches_snakemake(tmp_path):
    """A head that ended alone would leave steps being started behind its back."""
    said = tmp_path / "said"
    child = (f"import pathlib, signal, sys, time; told = pathlib.Path({str(said)!r});"
             "signal.signal(signal.SIGTERM, lambda *_: (told.write_text('told'), sys.exit(3)));"
             "told.write_text('here'); time.sleep(60)")
    head = subprocess.Popen([sys.executable, "-c", "import sys; from workflow.leaderboard import until_it_ends; "
                             "sys.exit(until_it_ends([sys.executable, '-c', sys.argv[1]], ()))", child],
                            cwd=config.ROOT, env=ENVIRONMENT)
    deadline = time.time() + 120
    while not said.exists() and time.time() < deadline:
        time.sleep(0.05)
    head.terminate()
    assert head.wait(60) == 3
    assert said.read_text() == "told"


def test_a_graph_whose_head_was_killed_alone_is_not_run_twice(place):
    folder, arms = place
    write(folder, {name: arm for name, arm in arms.items() if name != "broken"})
    alone = (*words(folder, "--name", "alone"), "--", "--cores", "1")
    head = subprocess.Popen(alone, cwd=config.ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    logs, deadline = folder / "alone" / "workflow" / "logs", time.time() + 120
    while not list(logs.glob("*.log")) and time.time() < deadline:
        time.sleep(0.05)
    head.kill()
    head.wait()
    # snakemake, which runs on, holds the lock
    second = graph(folder, "--name", "alone")
    assert second.returncode == 2
    assert "another run of this graph is under way" in second.stderr
    while second.returncode == 2 and time.time() < deadline + 300:
        time.sleep(0.5)
        second = graph(folder, "--name", "alone")
    assert second.returncode == 0, second.stderr
    assert "4 steps, 0 to do" in second.stdout
