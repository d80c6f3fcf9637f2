"""models/fuse.py extract: the change of a fine-tune as a LoRA, its residual true, what it cannot hold refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from synthetic import make_checkpoint, read_all
from transformers import AutoModelForCausalLM

from models.adapters.files import read_adapter
from models.fuse import main
from models.operators.low_rank import low_rank, residual


def spectrum(out, into, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, len(values), generator=generator)).Q for n in (out, into))
    return u * torch.tensor(values) @ v.T


@pytest.mark.parametrize("shape", [(60, 90), (700, 600)])
def test_a_rank_cuts_where_the_svd_would(shape):
    matrix = spectrum(*shape, [10.0, 5.0, 2.0, 1.0, 0.5]) + 0.001 * spectrum(*shape, [1.0] * 50, seed=1)
    found = low_rank(matrix, 3)
    values = torch.linalg.svdvals(matrix)
    a, b = found.pair
    assert a.shape[0] == b.shape[1] == 3
    assert found.norm == pytest.approx(float(matrix.double().norm()), rel=1e-6)
    assert found.error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-3)
    assert found.error == pytest.approx(float((matrix - b @ a).norm() / matrix.norm()), rel=1e-4)


def test_a_flat_spectrum_is_cut_almost_as_well_as_by_the_svd():
    torch.manual_seed(0)
    matrix = torch.randn(600, 500)
    values = torch.linalg.svdvals(matrix)
    assert low_rank(matrix, 16).error <= 1.001 * float(values[16:].norm() / values.norm())


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_an_energy_widens_the_sample_until_the_true_residual_keeps_it(energy):
    matrix = spectrum(700, 600, [0.97**i for i in range(300)])
    found = low_rank(matrix, None, energy)
    values = torch.linalg.svdvals(matrix).double()
    kept = values.square().cumsum(0) / values.square().sum()
    best = int((kept < energy).sum()) + 1
    rank = found.pair[0].shape[0]
    assert best <= rank <= best + 2
    assert 1 - found.error**2 >= energy
    off = matrix - found.pair[1] @ found.pair[0]
    assert residual(matrix, found.pair) == pytest.approx(float(off.square().sum()), rel=1e-3)


def test_the_same_seed_gives_the_same_factors_and_zero_is_no_problem():
    torch.manual_seed(1)
    matrix = torch.randn(600, 500)
    first, second = low_rank(matrix, 8, seed=3), low_rank(matrix, 8, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(first.pair, second.pair, strict=True))
    empty = low_rank(torch.zeros(600, 500), 8)
    assert (empty.norm, empty.error, float(empty.pair[0].abs().sum())) == (0, 0, 0)


@pytest.fixture
def tuned(pico, tmp_path):
    """The pico model with a rank-3 change of every projection of layer 0 and of the up projections; its changes."""
    folder = shutil.copytree(pico, tmp_path / "tuned")
    tensors, changes = load_file(folder / "model.safetensors"), {}
    for i, name in enumerate(sorted(tensors)):
        if name.endswith("_proj.weight") and (".0." in name or "up_proj" in name):
            changes[name.removesuffix(".weight")] = change = spectrum(*tensors[name].shape, [0.5, 0.3, 0.1], seed=i)
            tensors[name] += change
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, changes


@pytest.fixture
def extract(pico, tmp_path):
    def run(tuned, *flags, base=pico, name="out"):
        main(["extract", "--model_name_or_path", str(base), "--tuned", str(tuned), "--output_dir", str(tmp_path / "results"),
              "--run_name", name, *flags])
        return tmp_path / "results" / "outputs" / name
    return run


@pytest.fixture
def fails(extract, tmp_path, capsys):
    def run(*words, **options):
        with pytest.raises(SystemExit) as stop:
            extract(*words, **options)
        assert stop.value.code == 2
        assert not list((tmp_path / "results").glob("outputs/*"))
        return capsys.readouterr().err
    return run


def test_the_adapter_on_the_base_is_the_fine_tuned_model(pico, tuned, extract):
    folder = extract(tuned[0], "--rank", "3")
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tuned[0])(ids).logits
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), folder)
        torch.testing.assert_close(model(ids).logits, want, atol=1e-4, rtol=1e-4)
    read = read_adapter(folder)
    assert set(read.modules) == set(tuned[1])
    for module, change in tuned[1].items():
        a, b = read.modules[module]
        torch.testing.assert_close(b @ a, change, atol=1e-6, rtol=1e-4)
    content = json.loads((folder / "adapter_config.json").read_text())
    assert "up_proj" in content["target_modules"]
    assert "model.layers.0.mlp.down_proj" in content["target_modules"]
    assert "down_proj" not in content["target_modules"]


def test_residuals_are_reported_and_true(tuned, extract):
    folder = extract(tuned[0], "--rank", "2")
    content, read = json.loads((folder / "residuals.json").read_text()), read_adapter(folder)
    assert content["left_out"] == []
    for row in content["modules"]:
        a, b = read.modules[row["module"]]
        change = tuned[1][row["module"]]
        assert row["residual"] == pytest.approx(float((change - b @ a).norm() / change.norm()), rel=1e-3)
        assert row["residual"] == pytest.approx(0.1 / (0.25 + 0.09 + 0.01) ** 0.5, rel=1e-3)
    found = json.loads((folder / "manifest.json").read_text())
    assert found["metrics"]["worst_residual"] == max(row["residual"] for row in content["modules"])
    assert found["metrics"]["unchanged"] == 14 - len(tuned[1])
    assert set(found["inputs"]) == {"base", "tuned"}


def test_an_energy_gives_each_module_its_rank(tuned, extract):
    read = read_adapter(extract(tuned[0], "--energy", "0.97"))
    assert {a.shape[0] for a, _ in read.modules.values()} == {2}


def test_an_extracted_adapter_fuses_and_knows_its_base(pico, tuned, extract, tmp_path):
    from models.base.loading import check_base

    folder = extract(tuned[0], "--rank", "3")
    assert check_base(folder, pico)
    main(["adapters", "--adapters", "out", "--method", "svd", "--rank", "2", "--output_dir", str(tmp_path / "results"),
          "--run_name", "cut"])
    assert read_adapter(folder.parent / "cut").config["r"] == 2


def test_shards_and_storage_types(tmp_path, extract):
    base = make_checkpoint(tmp_path / "base", shards=2)
    tuned = make_checkpoint(tmp_path / "tuned", seed=1, base=base, dtype=torch.float32, shards=3, scale=0.01)
    folder = extract(tuned, "--rank", "4", "--ignore_other", base=base)
    read, old, new = read_adapter(folder), read_all(base), read_all(tuned)
    for row in json.loads((folder / "residuals.json").read_text())["modules"]:
        change = new[row["module"] + ".weight"].float() - old[row["module"] + ".weight"].float()
        values = torch.linalg.svdvals(change)
        a, b = read.modules[row["module"]]
        assert (change - b @ a).norm() <= 1.0001 * values[4:].norm()
        assert row["residual"] == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-3)


def test_what_a_lora_cannot_hold_is_refused_by_name_or_left_out_when_told(pico, tuned, extract, fails):
    path = tuned[0] / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    tensors["model.embed_tokens.weight"][3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    said = fails(tuned[0], "--rank", "3")
    assert "2 tensors changed that no LoRA can hold: model.embed_tokens.weight, model.norm.weight; --ignore_other" in said
    folder = extract(tuned[0], "--rank", "3", "--ignore_other")
    content = json.loads((folder / "residuals.json").read_text())
    assert content["left_out"] == ["model.embed_tokens.weight", "model.norm.weight"]


@pytest.mark.parametrize(("change", "says"), [
    (lambda ts: ts, "no linear layer differs"),
    (lambda ts: {k: v for k, v in ts.items() if "layers.0.mlp.up_proj" not in k}, "up_proj.weight: absent, but F32"),
    (lambda ts: {k: v[:, :8].contiguous() if "q_proj" in k else v for k, v in ts.items()}, "q_proj.weight: F32 [32, 8]"),
    (lambda ts: {k: v * float("nan") if "q_proj" in k else v for k, v in ts.items()}, "holds NaN or infinity"),
    (lambda ts: ts | {"model.extra.weight": torch.ones(3)}, "no LoRA can hold: model.extra.weight"),
])
def test_models_that_do_not_fit(pico, tmp_path, fails, change, says):
    folder = shutil.copytree(pico, tmp_path / "odd")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    assert says in fails(folder)


@pytest.mark.parametrize(("flags", "says"), [
    (("--rank", "4", "--energy", "0.9"), "give one of the two"), (("--energy", "1"), "at most 0.9999"),
    (("--rank", "0"), "must be 1 or more"),
])
def test_flags_that_do_not_fit(pico, fails, flags, says):
    assert says in fails(pico, *flags)


def test_an_adapter_and_a_missing_model_are_no_fine_tune(pico, adapters, capsys):
    for tuned, says in (("safety", "holds a LoRA adapter already"), ("no/such/one", "--tuned no/such/one: no such folder")):
        with pytest.raises(SystemExit):
            main(["extract", "--tuned", tuned, "--model_name_or_path", str(pico), "--output_dir", str(adapters)])
        assert says in capsys.readouterr().err
