"""Learned and searched weights: the mixed model is the fused one, weights move the right way, nothing else trains."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import align_basemodel
import manifest
from config import parse
from errors import UserError
from flags import AlignArgs
from models.adapters.files import read_adapter
from models.adapters.mixture import load_mix
from models.adapters.resident import ResidentBase
from models.base.loading import load_base
from training.soup import MixedModel

IDS = torch.arange(10, 40)[None]
NAMES = ("helpfulness", "safety")


@pytest.fixture
def home(adapters, tmp_path):
    shutil.copytree(adapters / "outputs", tmp_path / "outputs")
    return tmp_path


@pytest.fixture
def few(tmp_path):
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"Do {i}."},
                                                     {"role": "assistant", "content": "No, I can't."}]}) + "\n"
                            for i in range(12)))
    return str(file)


def mixed(home, pico, per_layer):
    base = load_base(pico, torch.float32, torch.device("cpu"))
    return MixedModel(base, torch.float32, [read_adapter(home / "outputs" / name) for name in NAMES], per_layer)


def run(home, pico, few, method, *flags):
    name = f"{method}_run"
    steps = ["--logging_steps", "1", "--warmup_steps", "0"] if method == "soup" else []  # a search takes none
    align_basemodel.main(["--moe_flag", "0", "--method", method, "--adapters", ",".join(NAMES), "--task_name", "dialogs",
                          "--data_path", few, "--run_name", name, "--model_name_or_path", str(pico), "--output_dir",
                          str(home), "--dtype", "float32", *steps, *flags])
    return home / "outputs" / name


@torch.no_grad()
def test_the_mixed_model_is_the_weighted_sum(pico, home):
    base = ResidentBase(pico, torch.float32, torch.device("cpu"))
    want = load_mix(home, (("helpfulness", 0.6), ("safety", -0.3)), base)(IDS).logits
    model = mixed(home, pico, per_layer=False)
    model.weights = torch.tensor([0.6, -0.3])
    torch.testing.assert_close(model.causal_lm(IDS).logits, want, atol=1e-4, rtol=1e-4)


def test_a_soup_starts_equal_and_trains_only_its_logits(pico, home):
    model = mixed(home, pico, per_layer=True)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["logits"]
    torch.testing.assert_close(model.shares(), torch.full((2, 2), 0.5))


def test_soup_writes_the_fused_adapter_and_its_weights(pico, home, few):
    folder = run(home, pico, few, "soup", "--learning_rate", "0.3", "--num_train_epochs", "3")
    weights = json.loads((folder / "weights.json").read_text())
    assert set(weights["layers"]) == {"0", "1"}
    assert all(sum(row) == pytest.approx(1) and row != [0.5, 0.5] for row in weights["layers"].values())
    history = [entry["loss"] for entry in manifest.read(folder)["metrics"]["history"]]
    assert history[-1] < history[0]
    fused, parts = read_adapter(folder), [read_adapter(home / "outputs" / name) for name in NAMES]
    for module, (a, b) in fused.modules.items():
        row = weights["layers"][module.split(".")[2]]
        want = sum(w * (part.modules[module][1] @ part.modules[module][0]) for w, part in zip(row, parts, strict=True))
        torch.testing.assert_close(b @ a, want, atol=1e-5, rtol=1e-5)


def test_search_finds_better_weights_than_none_and_is_deterministic(pico, home, few):
    first = manifest.read(run(home, pico, few, "search"))["metrics"]
    again = manifest.read(run(home, pico, few, "search", "--overwrite"))["metrics"]
    assert first["weights"] == again["weights"]
    assert first["loss"] < first["loss_at_start"]
    assert 1 < first["evaluations"] <= 40
    assert all(abs(weight) <= 1.5 for weight in first["weights"].values())


@pytest.mark.parametrize(("flags", "said"), [
    (["--method", "soup"], "needs two different adapters"),
    (["--method", "search", "--adapters", "a,a"], "needs two different adapters"),
    (["--method", "sft", "--adapters", "a,b"], "belongs to --method soup or search"),
    (["--method", "soup", "--adapters", "a,b", "--init_adapter", "c"], "trains no adapter"),
    (["--extra_share", "0.03"], "goes with --extra_data"),
    (["--extra_min_rows", "8", "--extra_data", "x"], "--extra_min_rows 8: goes with --extra_share"),
    (["--extra_min_rows", "0"], "--extra_min_rows 0: must be 1 or more"),
    (["--lr_epoch_decay", "1.5"], "above 0 and at most 1"),
])
def test_bad_flags(flags, said):
    with pytest.raises(UserError, match=said):
        parse(AlignArgs, ["--moe_flag", "0", *flags])


def test_another_base_is_refused(home, few, tmp_path, capsys):
    from pico import make_pico

    other = make_pico(tmp_path / "other", seed=5)
    with pytest.raises(SystemExit):
        run(home, other, few, "soup")
    assert "was trained on another base" in capsys.readouterr().err
