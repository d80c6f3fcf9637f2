"""What a row costs, from made-up manifests and real files: ancestors once, experts counted by k, nothing guessed."""

import json
from types import SimpleNamespace

import pytest
import torch
from reported import RUNS, fill, table, write
from safetensors.torch import save_file

from evaluator.reporting import costs


def put_run(results, name, *, seconds, parents=(), tensors=None, memory=100.0, kind="adapter_config.json", config=None,
            **metrics):
    folder = results / "outputs" / name
    folder.mkdir(parents=True)
    # a parent's path of another machine: results were moved
    content = {"seconds": seconds, "peak_memory_mb": memory, "metrics": metrics,
               "parents": [f"elsewhere/results/outputs/{parent}" for parent in parents]}
    (folder / "manifest.json").write_text(json.dumps(content))
    (folder / kind).write_text(json.dumps(config or {}))
    if tensors:
        save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, folder / "weights.safetensors")


@pytest.fixture
def results(tmp_path):
    put_run(tmp_path, "safety", seconds=20, tensors={"a": (2, 8), "b": (8, 2)}, tokens_per_second=160.0)
    put_run(tmp_path, "truthfulness", seconds=30, tensors={"a": (2, 8), "b": (8, 2)})
    put_run(tmp_path, "average", seconds=1, parents=["safety", "truthfulness"], tensors={"a": (4, 8), "b": (8, 4)})
    put_run(tmp_path, "raw", seconds=4, parents=["safety", "truthfulness"], kind="moe_config.json",
            config={"experts": ["safety", "truthfulness"], "top_k": 1},
            tensors={"layers.0.gate.a": (2, 2, 8), "layers.0.gate.b": (2, 8, 2), "layers.0.router": (2, 8)})
    put_run(tmp_path, "moe", seconds=40, parents=["raw", "safety"], kind="moe_config.json", memory=300.0,
            config={"experts": ["safety", "truthfulness"], "top_k": 2},
            tensors={"layers.0.gate.a": (2, 2, 8), "layers.0.router": (2, 8), "attention.q.lora_A.weight": (2, 8)})
    put_run(tmp_path, "mix", seconds=60, kind="config.json", tensors={"w": (8, 8)})
    return tmp_path


def test_ancestors_count_once(results):
    assert costs.of_run(results, "safety") == costs.Cost(20, 20, 100, 32, 0, 160)
    assert costs.of_run(results, "average").all_seconds == 51
    # the harmless expert is a parent and a grandparent
    assert costs.of_run(results, "moe").all_seconds == 40 + 4 + 20 + 30


@pytest.mark.parametrize(("setting", "value", "seconds"), [
    ("init_adapter", "mix", 5 + 60), ("mask", "results/outputs/moe", 5 + 40 + 4 + 20 + 30), ("mask", None, 5),
    ("models", "base+safety, base+truthfulness,mix", 5 + 20 + 30 + 60), ("models", "mix,elsewhere", 5 + 60)])
def test_a_run_that_a_setting_names_is_an_ancestor(results, setting, value, seconds):
    put_run(results, "made", seconds=5)
    file = results / "outputs" / "made" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config": {setting: value, "seed": 1}}))
    assert costs.of_run(results, "made").all_seconds == seconds


def test_a_token_meets_k_experts(results):
    raw, moe = costs.of_run(results, "raw"), costs.of_run(results, "moe")
    assert (raw.stored, raw.active) == (32 + 32 + 16, 16 + 16 + 16)
    assert (moe.stored, moe.active) == (32 + 16 + 16, 32 + 16 + 16)
    assert (costs.of_run(results, "mix").stored, costs.of_run(results, "mix").active) == (64, 0)


def test_a_weighted_sum_costs_its_parts(results):
    assert costs.of_run(results, "safety@0.5_truthfulness@0.5") == costs.Cost(0, 50, None, 64, 0)


def test_what_is_not_known_is_empty(results):
    assert costs.of_run(results, "gone") == costs.Cost()
    (results / "outputs" / "safety" / "manifest.json").write_text("[]")
    assert costs.of_run(results, "safety") == costs.Cost(None, None, None, 32, 0)
    (results / "outputs" / "raw" / "weights.safetensors").write_bytes(b"\xff" * 40)
    assert (costs.of_run(results, "raw").stored, costs.of_run(results, "raw").active) == (None, None)


def test_a_seed_that_still_has_its_weights_tells_for_all(results, tmp_path):
    other = tmp_path / "other"
    put_run(other, "safety", seconds=40, memory=300.0, tokens_per_second=80.0)
    lines = [SimpleNamespace(label="harmless", run="safety")]
    assert costs.of_lines(lines, [other, results]) == {"harmless": costs.Cost(30, 30, 200, 32, 0, 120)}
    assert costs.of_lines(lines, [other])["harmless"].stored is None


def test_the_report_shows_them_when_asked(results, capsys):
    fill(results)
    assert "## Cost" not in write(results)
    found = table(write(results, "--costs", "true"), "Cost")
    assert list(found) == [part.partition("=")[0] for part in RUNS.split(",")]
    assert found["plain average"]["with all that it is made of, s"] == "51"
    assert found["tuned MoE"]["peak memory, MB"] == "300"
    assert found["base"]["stored beside the base, M"] == "0.0"
    assert found["harmless"]["training tokens/s"] == "160"
    assert found["naive mix"]["training tokens/s"] == ""
    write(results, "--costs", "true", "--format", "md,json")
    data = json.loads((results / "report" / "t.json").read_text())["costs"]
    assert data["tuned MoE"] == {"seconds": 40, "all_seconds": 94, "memory_mb": 300, "stored": 64, "active": 64,
                                 "tokens_per_second": None}
