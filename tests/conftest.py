"""Shared fixtures: a pico base model on disk and LoRA adapters trained on nothing, made once per session, offline."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path

# read when huggingface_hub and OpenMP are imported, hence before any fixture
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as runtime.short_waits
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# triton reads it at its first import, which may be any library's; where a GPU is, kernels are compiled for it
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from pico import make_adapter as _make_adapter
from pico import make_pico

pytest_plugins = ["scored"]  # the fixture `results` of the evaluators
OBJECTIVES = ("helpfulness", "safety", "truthfulness")
#: Files of more than a minute, the longest first. A file stays with its worker (scripts/test.sh), so one that begins last
#: leaves the other worker without work.
SLOW = ("models/generation/test_backends", "workflow/test_slurm", "models/base/test_families",
        "scripts/test_gpu_check_script", "test_commands", "workflow/test_graph", "workflow/test_durability_graph",
        "models/merging/test_merge_resume", "training/distributed/test_two_processes", "training/test_trajectories",
        "faults/test_faults", "evaluator/reporting/test_sweep_discrimination", "models/export/test_export",
        "evaluator/test_hostile_reports", "training/test_validation", "benchmarks/test_generate_race",
        "training/test_resume", "test_howto")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long begin first; else the order is kept."""
    tests = Path(__file__).parent
    place = {tests / f"{name}.py": i for i, name in enumerate(SLOW)}
    if gone := [str(path) for path in place if not path.is_file()]:
        raise pytest.UsageError(f"SLOW in tests/conftest.py names what is no file: {', '.join(gone)}")
    items.sort(key=lambda item: place.get(item.path, len(SLOW)))


def pytest_collection_finish():
    """What was imported stays: Python need not look for dead cycles in it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    """Two torch threads over all workers of pytest-xdist; sessions that import no torch stay without it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(scope="session")
def pico(tmp_path_factory) -> Path:
    """A pico base model: config, safetensors weights, tokenizer."""
    return make_pico(tmp_path_factory.mktemp("pico"))


@pytest.fixture
def long_pico(pico, tmp_path) -> Path:
    """``pico`` with positions for any embedded prompt: a byte is a token here, and the longest questions have thousands."""
    base = tmp_path / "base"
    shutil.copytree(pico, base)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 32768}))
    return base


@pytest.fixture(scope="session")
def make_adapter():
    """The function itself, for tests that need an adapter of their own."""
    return _make_adapter


@pytest.fixture(scope="session")
def adapters(pico, tmp_path_factory) -> Path:
    """A results folder with three different adapters of ``pico`` under outputs/{helpfulness,safety,truthfulness}."""
    results = tmp_path_factory.mktemp("results")
    for seed, name in enumerate(OBJECTIVES):
        _make_adapter(pico, results / "outputs" / name, seed=seed)
    return results


@pytest.fixture
def home(adapters, tmp_path) -> Path:
    """A results folder of a test's own with the three adapters of ``pico``; what other tests fused there stays away."""
    shutil.copytree(adapters / "outputs", tmp_path / "results" / "outputs",
                    ignore=lambda folder, names: [n for n in names if n in ("fused", "average", "bad")])
    return tmp_path / "results"


@pytest.fixture
def merge_inputs(tmp_path) -> Path:
    """Checkpoints base, a, b, c under one folder; a in three shards."""
    from synthetic import make_checkpoint

    base = make_checkpoint(tmp_path / "base", scale=0.5)
    for i, name in enumerate("abc"):
        make_checkpoint(tmp_path / name, seed=i + 1, base=base, shards=3 if name == "a" else 1)
    return tmp_path


@pytest.fixture
def run_merge(merge_inputs):
    """Run ``models/fuse.py merge`` on those checkpoints; returns the result's folder."""
    from models import fuse

    def call(*words: str, name: str = "out") -> Path:
        fuse.main(["merge", *words, "--output_dir", str(merge_inputs / "results"), "--run_name", name])
        return merge_inputs / "results" / "outputs" / name
    return call


@pytest.fixture
def merge_fails(run_merge, capsys):
    """The same, for command lines that must end with exit code 2; returns what was said."""
    def call(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_merge(*words)
        assert stopped.value.code == 2
        return capsys.readouterr().err
    return call
