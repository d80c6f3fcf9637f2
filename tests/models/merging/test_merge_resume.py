"""Merges that were interrupted, killed, or promised to stay small."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from synthetic import digest, make_checkpoint, merge_flags

from models.merging import execute
from models.merging.methods import METHODS

# --- resume

def test_an_interrupted_merge_resumes_to_the_same_bytes(merge_inputs, run_merge, monkeypatch):
    want = digest(run_merge(*merge_flags(merge_inputs, "dare_ties"), name="whole"))
    original, left = execute.Writer.write, [0]

    def stumbling(self, name, first, data):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        original(self, name, first, data)

    monkeypatch.setattr(execute.Writer, "write", stumbling)
    for allowed in (3, 5, 1, 8):
        left[0] = allowed
        with pytest.raises(KeyboardInterrupt):
            run_merge(*merge_flags(merge_inputs, "dare_ties"), "--threads", "1", name="torn")
        assert not (merge_inputs / "results" / "outputs" / "torn").exists()
    journal = merge_inputs / "results" / "outputs" / ".torn.partial" / execute.JOURNAL
    assert len(journal.read_text().splitlines()) == 17
    # a tensor whose bytes were lost, and a line that was cut short, are done again
    journal.write_text(journal.read_text().replace(journal.read_text()[:8], "00000000", 1) + "0123")
    monkeypatch.setattr(execute.Writer, "write", original)
    out = run_merge(*merge_flags(merge_inputs, "dare_ties"), name="torn")
    assert digest(out) == want
    assert json.loads((out / "manifest.json").read_text())["metrics"]["tensors_run"] == 30 - 16


def test_another_merge_does_not_resume_this_one(merge_inputs, run_merge, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(execute.Writer, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run_merge(*merge_flags(merge_inputs, "ties"))
    words = merge_flags(merge_inputs, "dare_ties")
    assert digest(run_merge(*words)) == digest(run_merge(*words, name="alone"))


def test_killed_ten_times_and_resumed(tmp_path):
    size = {"layers": 6, "hidden": 512, "ffn": 1024, "vocab": 4000}
    base = make_checkpoint(tmp_path / "base", **size)
    for i, name in enumerate("ab"):
        make_checkpoint(tmp_path / name, seed=i + 1, base=base, **size)
    words = [sys.executable, "-c", "from models import fuse; fuse.main()", "merge",
             *merge_flags(tmp_path, "ties", models="ab"), "--output_dir", str(tmp_path / "r"), "--run_name"]
    subprocess.run([*words, "whole"], check=True, capture_output=True)
    want = digest(tmp_path / "r" / "outputs" / "whole")
    luck = random.Random(0)
    journal = tmp_path / "r" / "outputs" / ".torn.partial" / execute.JOURNAL
    kills = 0
    while kills < 10:
        process = subprocess.Popen([*words, "torn"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not journal.exists():
            time.sleep(0.01)
        time.sleep(luck.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        torn = tmp_path / "r" / "outputs" / "torn"
        if torn.exists():  # it was in its place before the signal came, so it must be whole; start anew
            assert digest(torn) == want
            subprocess.run(["rm", "-r", str(torn)], check=True)
    subprocess.run([*words, "torn"], check=True, capture_output=True)
    assert digest(tmp_path / "r" / "outputs" / "torn") == want


# --- memory

MEASURE = """
import sys, torch
from models import fuse
from models.merging import execute
from models.operators import blocks, dense, sparse
def now():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
start = now()
peak = [0]
original = execute.Writer.write
def watched(self, *rest):
    peak[0] = max(peak[0], now())
    original(self, *rest)
execute.Writer.write = watched
fuse.main(sys.argv[1:])
print("RSS", peak[0] - start)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Checkpoints base, a, b, c of 100 MB each in bf16, the embedding alone 41 MB."""
    folder, size = tmp_path_factory.mktemp("large"), {"layers": 2, "hidden": 1024, "ffn": 4096, "vocab": 20000}
    base = make_checkpoint(folder / "base", **size)
    for i, name in enumerate("abc"):
        make_checkpoint(folder / name, seed=i + 1, base=base, **size)
    return folder


@pytest.mark.parametrize("method", ["linear", "ties", "della", "sce"])
def test_the_memory_promise_is_kept(large, tmp_path, method):
    parameters = "density=0.3" if "density" in METHODS[method].fields() else "select_topk=0.5" if method == "sce" else ""
    words = ["merge", *merge_flags(large, method, parameters), "--output_dir", str(tmp_path / "r"), "--threads", "2",
             "--memory_gb", "0.1"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True,
                          env=os.environ | {"MALLOC_ARENA_MAX": "2"})
    used = int(done.stdout.split("RSS")[1])
    assert 0 < used < 0.1 * 2**30, done.stdout
