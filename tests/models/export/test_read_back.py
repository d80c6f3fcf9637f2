"""fuse.py import: what export wrote comes back bit for bit; other folders by what their experts add to the base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from exported import tuned_moe
from pico import make_pico
from pico_families import make_family
from safetensors.torch import load_file, save_file
from test_export import export, logits_of, ours

import manifest
from models import fuse
from models.export.recover import last_place, recover


@pytest.fixture(scope="module")
def home(pico, tmp_path_factory):
    results = tmp_path_factory.mktemp("home") / "results"
    tuned_moe(pico, results)
    return results


def read_back(results, base, folder, *words, name="again"):
    fuse.main(["import", str(folder), "--output_dir", str(results), "--model_name_or_path", str(base), "--run_name", name,
               "--overwrite", *words])
    return results / "outputs" / name


def foreign(folder, target, **changed):
    """A copy that holds nothing of ours; ``changed``: file content of config.json."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("factors", "manifest.json"))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changed))
    return target


def spoilt(folder, name, values):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = values(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_comes_back_bit_for_bit(home, pico, dtype):
    folder = export(home, pico, "tuned", "--layout", "mixtral", "--out_dtype", dtype, "--run_name", f"as_{dtype}")
    again = read_back(home, pico, folder)
    for file in ("moe.safetensors", "moe_config.json", "tokenizer.json"):
        assert (again / file).read_bytes() == (home / "outputs" / "tuned" / file).read_bytes()
    assert manifest.read(again)["metrics"]["exact"] is True
    assert torch.equal(logits_of(ours(home, pico, "again").model), logits_of(ours(home, pico, "tuned").model))


def test_factors_come_out_of_the_weights_alone(home, pico, tmp_path):
    folder = foreign(export(home, pico, "tuned", "--layout", "mixtral"), tmp_path / "foreign")
    again = read_back(home, pico, folder, "--experts", "a,b,c")
    config = json.loads((again / "moe_config.json").read_text())
    assert (config["experts"], config["top_k"], config["tuning"]) == (["a", "b", "c"], 2, None)
    # attention was a LoRA of rank 2; experts of ranks 3, 4 and 5 with 2 more each: what is largest
    assert config["attention"]["r"] == 2
    tensors, own = load_file(again / "moe.safetensors"), load_file(home / "outputs" / "tuned" / "moe.safetensors")
    assert tensors["layers.0.up.a"].shape == (3, 7, 32)
    # smaller ranks are found smaller
    assert not tensors["layers.0.up.a"][0, 5:].any()
    assert tensors["layers.0.up.a"][0, :5].any(1).all()
    assert all(torch.equal(tensors[f"layers.{i}.router"], own[f"layers.{i}.router"]) for i in range(2))
    for part in ("gate", "up", "down"):
        mine = tensors[f"layers.1.{part}.b"] @ tensors[f"layers.1.{part}.a"]
        its = own[f"layers.1.{part}.b"] @ own[f"layers.1.{part}.a"] \
            + 1.5 * own[f"layers.1.{part}.tuned_b"] @ own[f"layers.1.{part}.tuned_a"]
        assert (mine - its).abs().max() < 1e-6
    assert (logits_of(ours(home, pico, "again").model) - logits_of(ours(home, pico, "tuned").model)).abs().max() < 1e-4
    said = manifest.read(again)["metrics"]["said"]
    assert "3 experts of rank 7 at most, a LoRA of rank 2 on attention" in said


def test_a_rounded_file_gives_back_what_it_holds(home, pico, tmp_path):
    """In bfloat16 the directions below the rounding are gone; the imported model is the file's within its last places."""
    folder = foreign(export(home, pico, "tuned", "--layout", "mixtral", "--out_dtype", "bfloat16", "--run_name", "b"),
                     tmp_path / "foreign")
    again = read_back(home, pico, folder)
    tensors, there = load_file(again / "moe.safetensors"), load_file(folder / "model.safetensors")
    assert json.loads((again / "moe_config.json").read_text())["experts"] == ["expert_0", "expert_1", "expert_2"]
    base = load_file(pico / "model.safetensors")
    for e in range(3):
        stored = there[f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight"].double()
        mine = base["model.layers.0.mlp.down_proj.weight"] + tensors["layers.0.down.b"][e] @ tensors["layers.0.down.a"][e]
        rounding = (last_place(stored, "BF16").square().mean() / 12) ** 0.5
        assert (mine - stored).square().mean() ** 0.5 < 1.1 * rounding


def test_an_export_that_was_changed_is_looked_at_again(home, pico, tmp_path, caplog):
    """Its own record no longer holds: an expert's matrix has another low-rank change."""
    folder = shutil.copytree(export(home, pico, "raw_moe", "--layout", "mixtral"), tmp_path / "moved")
    spoilt(folder, "model.layers.0.block_sparse_moe.experts.1.w1.weight", lambda w: w + torch.ones(64, 32))
    with caplog.at_level("INFO"):
        again = read_back(home, pico, folder)
    assert "is not what factors gives" in caplog.text
    assert manifest.read(again)["metrics"]["exact"] is False
    ranks = load_file(again / "moe.safetensors")["layers.0.gate.a"].any(2).sum(1)
    assert ranks.tolist() == [3, 5, 5]  # they were 3, 4, 5
    export(home, pico, "again", "--layout", "mixtral", "--run_name", "third")
    one, two = (load_file(place / "model.safetensors") for place in (folder, home / "outputs" / "third"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_qwen3_moe_comes_back(tmp_path):
    base = make_family(tmp_path / "base", "qwen3", use_sliding_window=False)
    tuned_moe(base, tmp_path / "results")
    folder = export(tmp_path / "results", base, "tuned", "--layout", "qwen3_moe")
    read_back(tmp_path / "results", base, foreign(folder, tmp_path / "foreign"))
    one, two = (logits_of(ours(tmp_path / "results", base, run).model) for run in ("again", "tuned"))
    assert (one - two).abs().max() < 1e-4


def test_what_has_no_such_structure_is_refused(home, pico, tmp_path, capsys):
    folder = export(home, pico, "raw_moe", "--layout", "mixtral", "--run_name", "whole")
    expert = "model.layers.0.block_sparse_moe.experts.1.w1.weight"

    def said(place, *words, base=pico):
        with pytest.raises(SystemExit) as stop:
            read_back(home, base, place, *words, name="no")
        assert stop.value.code == 2
        assert not (home / "outputs" / "no").exists()
        return capsys.readouterr().err

    spoilt(full := foreign(folder, tmp_path / "full"), expert, lambda w: w + 0.1 * torch.randn(w.shape))
    assert f"{expert} differs from the base by more than rank 8" in said(full)
    spoilt(norm := foreign(folder, tmp_path / "norm"), "model.norm.weight", lambda w: w * 1.01)
    assert "model.norm.weight is not the base's" in said(norm)
    assert "rms_norm_eps is 0.001, and 1e-06" in said(foreign(folder, tmp_path / "eps", rms_norm_eps=1e-3))
    assert "model_type is llama; import reads mixtral and qwen3_moe" in said(pico)
    assert "by more than rank" in said(foreign(folder, tmp_path / "other"), base=make_pico(tmp_path / "base", seed=3))
    assert "the folder has 3; name as many" in said(foreign(folder, tmp_path / "names"), "--experts", "a,b")
    assert "num_hidden_layers is 2, and 3" in said(folder, base=make_pico(tmp_path / "deep", layers=3))


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_the_last_place(dtype, name):
    values = torch.tensor([1.0, 1.5, -0.3, 1000.0, 2e-3, 0.0]).to(dtype)
    after = torch.nextafter(values.abs(), torch.tensor(torch.inf, dtype=dtype)) if dtype is not torch.bfloat16 else \
        (values.abs().view(torch.int16) + 1).view(torch.bfloat16)
    step = (after.double() - values.abs().double())
    assert torch.equal(last_place(values.double(), name)[:5], step[:5])


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 24, 3), (600, 520, 12), (600, 520, 40)])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.bfloat16, "BF16")])
def test_the_rank_of_a_rounded_change_is_found(rows, columns, rank, dtype, name):
    generator = torch.Generator().manual_seed(rank)
    base = torch.randn(rows, columns, generator=generator).mul_(0.05).to(dtype)
    change = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator) * 0.05
    stored = (base.float() + change).to(dtype)
    found = recover(base, stored, name, rank + 5, 0)
    assert found.rank == rank
    # in fp32 the factors themselves are as coarse as the sum, and so is their product
    coarse = 8 if name == "F32" else 1.2
    assert found.left < coarse
    assert recover(base, stored, name, rank - 1, 0) is None
    a, b = found.pair
    # what was lost is of the size of the rounding; fp64, for this sum must not be coarser than what it measures
    rounding = (stored.double() - base.double() - change.double()).norm()
    assert (b.double() @ a.double() - change.double()).norm() < (coarse + 1) * rounding
