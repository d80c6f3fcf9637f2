"""extract and realign find one model saved in several ways to be one, as merge does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import make_checkpoint, read_all

from models import fuse
from models.adapters.files import read_adapter

#: How a file was saved otherwise -> its tensors.
SAVED = {
    "without the prefix": lambda t: {k.removeprefix("model."): v for k, v in t.items()},
    "with old buffers": lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(3)},
    "with a copy of its tied head": lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()},
}
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(params=[(side, how) for side in ("base", "tuned") for how in SAVED] + [("both", "without the prefix")],
                ids=lambda p: f"{p[0]} {p[1]}")
def pair(request, tmp_path) -> tuple[Path, dict, dict]:
    """A folder with base and tuned, of which a side is saved otherwise; the tensors of both under one set of names."""
    base = make_checkpoint(tmp_path / "base", scale=0.5, head=False, dtype=torch.float32)
    make_checkpoint(tmp_path / "tuned", seed=1, base=base, head=False, scale=0.1, dtype=torch.float32)
    plain = [read_all(tmp_path / name) for name in ("base", "tuned")]
    side, how = request.param
    for name in ("base", "tuned") if side == "both" else (side,):
        file = tmp_path / name / "model.safetensors"
        save_file(SAVED[how](load_file(file)), file, metadata={"format": "pt"})
    return tmp_path, *plain


def test_extract_finds_the_change(pair):
    folder, base, tuned = pair
    fuse.main(["extract", "--tuned", str(folder / "tuned"), "--model_name_or_path", str(folder / "base"), "--rank", "16",
               "--ignore_other", "--output_dir", str(folder / "r"), "--run_name", "lora"])
    run = folder / "r" / "outputs" / "lora"
    modules = read_adapter(run).modules
    assert set(modules) == {name.removesuffix(".weight") for name in base if "_proj" in name}
    a, b = modules[UP]
    # a matrix of 16 columns has rank 16: nothing is cut off
    torch.testing.assert_close(b @ a, tuned[f"{UP}.weight"] - base[f"{UP}.weight"], atol=1e-5, rtol=1e-4)
    left = json.loads((run / "residuals.json").read_text())["left_out"]
    assert sorted(left) == sorted(name for name in base if "_proj" not in name)


def test_realign_goes_half_of_the_way(pair):
    folder, base, tuned = pair
    fuse.main(["realign", "--tasks", str(folder / "tuned"), "--model_name_or_path", str(folder / "base"), "--trust_base",
               "--method", "wise_ft", "--parameters", "alpha=0.5", "--output_dir", str(folder / "r"), "--run_name", "half"])
    out = read_all(folder / "r" / "outputs" / "half")
    # by the aligned model's own names, without what only one of the two holds
    own = {name: name for name in base} if "model.norm.weight" in out else {n: n.removeprefix("model.") for n in base}
    assert set(out) == set(own.values())
    for name in base:
        torch.testing.assert_close(out[own[name]], (base[name] + tuned[name]) / 2)


@pytest.mark.parametrize("command", ["extract", "realign"])
def test_shapes_that_fit_by_chance_are_told_apart(tmp_path, capsys, command):
    base = make_checkpoint(tmp_path / "base", scale=0.5, dtype=torch.float32)
    make_checkpoint(tmp_path / "tuned", seed=1, base=base, dtype=torch.float32)
    path = tmp_path / "tuned" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_attention_heads": 2, "num_key_value_heads": 2}))
    flags = {"extract": ["--tuned", str(tmp_path / "tuned"), "--rank", "4", "--ignore_other"],
             "realign": ["--tasks", str(tmp_path / "tuned"), "--trust_base"]}[command]
    with pytest.raises(SystemExit) as stopped:
        fuse.main([command, "--model_name_or_path", str(base), *flags, "--output_dir", str(tmp_path / "r")])
    assert stopped.value.code == 2
    assert "num_attention_heads 4 and 2" in capsys.readouterr().err
    assert not (tmp_path / "r" / "outputs").exists() or not any((tmp_path / "r" / "outputs").iterdir())
