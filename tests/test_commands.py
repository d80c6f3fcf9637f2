"""The published command lines run as written, from the folders that they name, on a pico model and local data."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
import yaml
from runs import OBJECTIVES, write_data

import config

RUN = "mix_moe_reg_00000_00000_00000_gate_00100"
STEPS = [
    (".", "align_basemodel.py --moe_flag 0 --task_name helpfulness"),
    (".", "align_basemodel.py --moe_flag 0 --task_name safety"),
    (".", "align_basemodel.py --moe_flag 0 --task_name truthfulness"),
    ("models", "llama_moe.py"),
    (".", "align_basemodel.py --moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01"),
    (".", f"inference.py --task_name safety --cross_task {RUN} --dataset_type test"),
    (".", "inference.py --task_name safety --cross_task  --aligned_flag 0"),
    ("evaluator", f"evaluate_safety.py --task_name cross_{RUN}"),
]


@pytest.fixture(scope="module")
def place(pico, tmp_path_factory):
    """A results folder and a preset that names the pico base: the only addition to the published lines."""
    folder = tmp_path_factory.mktemp("published")
    data = write_data(folder / "data")
    preset = {
        "common": {"model_name_or_path": str(pico), "output_dir": str(folder / "results"), "dtype": "float32"},
        "align": {"num_train_epochs": 1, "learning_rate": 0.01},
        "fuse": {"router_init": "random"},
        "inference": {"max_new_tokens": 6, "data_path": data["safety"]},
    }
    for task in (*OBJECTIVES, "mix"):
        path = ",".join(f"{t}={p}" for t, p in data.items()) if task == "mix" else data[task]
        content = preset | {"align": preset["align"] | {"data_path": path}}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(content))
    return folder


def _run(place, where, line):
    words = line.split(" ")
    task = next((t for t in OBJECTIVES if "align" in words[0] and t in words), "mix")
    return subprocess.run([sys.executable, *words, "--preset", str(place / f"{task}.yaml")], cwd=config.ROOT / where,
                          env=os.environ | {"PYTHONPATH": str(config.ROOT)}, capture_output=True, text=True,
                          timeout=240, check=False)


def test_the_published_lines(place):
    results = place / "results"
    for where, line in STEPS:
        done = _run(place, where, line)
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    for task in OBJECTIVES:
        assert (results / "outputs" / task / "adapter_model.safetensors").is_file()
    assert (results / "outputs" / RUN / "moe.safetensors").is_file()
    folder = results / "inference" / "safety" / "test" / f"cross_{RUN}"
    with (folder / "outputs_final.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["", "prompts", "outputs"]
    assert len(rows) == 33
    assert (results / "observation" / f"safety_{RUN}.npy").is_file()
    assert (results / "inference" / "safety" / "test" / "raw" / "outputs_final.jsonl").is_file()
    scores = json.loads((results / "scores" / f"cross_{RUN}" / "evaluate_safety.json").read_text())
    assert scores
    kinds = [json.loads(line)["kind"] for line in (results / "registry.jsonl").read_text().splitlines()]
    assert kinds.count("run") == 5
    assert kinds.count("answers") == 2


@pytest.mark.parametrize(("where", "line", "says"), [
    (".", "align_basemodel.py --task_name safty", "did you mean safety?"),
    (".", "align_basemodel.py --gate_los_weight 1", "did you mean gate_loss_weight?"),
    (".", "inference.py --task_name safety --cross_task nothing", "run 'nothing'"),
    ("evaluator", "evaluate_safety.py --task_name cross_nothing", "cross_nothing"),
    ("evaluator", "evaluate_truth_and_info.py --mode 2", "allowed: 0, 1"),
])
def test_errors_leave_with_code_2(place, where, line, says):
    done = _run(place, where, line)
    assert done.returncode == 2, done.stderr[-800:]
    assert says in done.stderr
    assert "Traceback" not in done.stderr
