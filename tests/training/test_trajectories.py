"""Two command lines that must give the same losses: accumulation, padding, resume, reruns, processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from runs import MOE, align, build_moe, common, losses, write_data
from safetensors.torch import load_file

import config

MOE_FLAGS = ("--gate_loss_weight", "0.1", "--helpfulness_weight", "0.001")
KINDS = {"sft": ("helpfulness", ("--moe_flag", "0")), "moe": ("mix", MOE_FLAGS)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def fused(pico, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("fused")
    build_moe(pico, out, data)
    return out


def _run(pico, fused, tmp, data, kind, *flags):
    task, first = KINDS[kind]
    if kind == "moe":
        shutil.copytree(fused / "outputs" / "raw_moe", tmp / "outputs" / "raw_moe", dirs_exist_ok=True)
    return align(pico, tmp, data, task, *first, *flags)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_times_accumulation(pico, fused, data, tmp_path, kind):
    found = [_run(pico, fused, tmp_path / str(b), data, kind, "--per_device_train_batch_size", str(b),
                  "--gradient_accumulation_steps", str(8 // b)) for b in (8, 4, 2)]
    names = ["loss_lm"] if kind == "sft" else ["loss_lm", "loss_gate", "loss_drift_helpfulness"]
    for name in names:
        want = losses(found[0], name)
        assert len(want) >= 2
        for other in found[1:]:
            assert losses(other, name) == pytest.approx(want, abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_equals_bucketed(pico, fused, data, tmp_path, kind):
    short = _run(pico, fused, tmp_path / "short", data, kind)
    padded = _run(pico, fused, tmp_path / "padded", data, kind, "--pad_to_max", "--model_max_length", "192")
    assert losses(padded) == pytest.approx(losses(short), abs=2e-5)
    assert padded["metrics"]["train_loss"] == pytest.approx(short["metrics"]["train_loss"], abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_equals_uninterrupted(pico, fused, data, tmp_path, monkeypatch, kind):
    from training.trainer import FusionTrainer

    flags = ("--num_train_epochs", "3", "--save_steps", "2", "--lora_dropout", "0.1")
    whole = _run(pico, fused, tmp_path / "whole", data, kind, *flags)
    step = FusionTrainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            _run(pico, fused, tmp_path / "cut", data, kind, *flags)
    name = MOE if kind == "moe" else "helpfulness"
    assert not (tmp_path / "cut" / "outputs" / name).exists()
    resumed = _run(pico, fused, tmp_path / "cut", data, kind, *flags)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    file = "moe.safetensors" if kind == "moe" else "adapter_model.safetensors"
    one, two = (load_file(tmp_path / where / "outputs" / name / file) for where in ("whole", "cut"))
    assert all((one[key] == two[key]).all() for key in one)


def test_the_same_command_gives_the_same_weights(pico, fused, data, tmp_path):
    for where in ("a", "b"):
        _run(pico, fused, tmp_path / where, data, "moe")
    one, two = (load_file(tmp_path / where / "outputs" / MOE / "moe.safetensors") for where in ("a", "b"))
    assert set(one) == set(two)
    assert all((one[key] == two[key]).all() for key in one)


def _in_two_processes(port, *words):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port,
         str(config.ROOT / "align_basemodel.py"), *words, "--device", "cpu", "--threads", "1"],
        env=os.environ | {"PYTHONPATH": str(config.ROOT)}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_pairs_validated_by_two_processes_count_once(pico, tmp_path):
    """Shared out, the last batch of an odd number of rows was filled up with pairs that were there before."""
    import align_basemodel
    import manifest

    files = {}
    for name, count in (("train", 8), ("held", 5)):
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(
            {"prompt": f"{name} {i}", "chosen": "good " * (1 + i), "rejected": f"bad {i}"}) + "\n" for i in range(count)))
    words = ["--moe_flag", "0", "--method", "dpo", "--task_name", "safety", "--data_path", str(files["train"]),
             "--validation_path", str(files["held"]), "--learning_rate", "0.01", "--max_steps", "2", "--warmup_steps", "0",
             "--eval_strategy", "steps", "--eval_steps", "2", "--gradient_accumulation_steps", "1"]
    align_basemodel.main([*words, *common(pico, tmp_path / "one"), "--per_device_train_batch_size", "4"])
    _in_two_processes("29532", *words, *common(pico, tmp_path / "two"), "--per_device_train_batch_size", "2")
    one, two = (manifest.read(tmp_path / where / "outputs" / "safety")["metrics"] for where in ("one", "two"))
    names = [name for name in one if name.startswith("validation_") and name != "validation_history"]
    assert {"validation_loss", "validation_rewards/margins", "validation_logps/chosen"} <= set(names)
    assert one["validation_loss"] < 0.69
    assert [two[name] for name in names] == pytest.approx([one[name] for name in names], rel=1e-4)
