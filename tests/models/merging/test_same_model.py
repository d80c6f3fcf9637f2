"""One model saved in several ways is one model: prefixes, buffers, copies of tied tensors, silent configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import make_checkpoint, read_all

from models import fuse


@pytest.fixture
def pair(tmp_path) -> Path:
    base = make_checkpoint(tmp_path / "base", scale=0.5, dtype=torch.float32)
    make_checkpoint(tmp_path / "a", seed=1, base=base, dtype=torch.float32)
    return tmp_path


def rewrite(folder: Path, change, **settings) -> None:
    """Another state of a folder: ``change`` maps its tensors; settings of its config.json, None takes one out."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def merged(folder: Path, *more: str, order: str = "base a") -> tuple[dict[str, torch.Tensor], dict]:
    names = ",".join(str(folder / name) for name in order.split())
    fuse.main(["merge", "--method", "linear", "--models", names, "--output_dir", str(folder / "r"), *more])
    out = folder / "r" / "outputs" / "merged"
    return read_all(out), json.loads((out / "config.json").read_text())


def refused(folder: Path, capsys, *more: str, order: str = "base a") -> str:
    with pytest.raises(SystemExit) as stopped:
        merged(folder, *more, order=order)
    assert stopped.value.code == 2
    assert not (folder / "r" / "outputs" / "merged").exists()
    return capsys.readouterr().err


def means(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], names) -> dict[str, torch.Tensor]:
    return {name: (one[name] + two[name]) / 2 for name in names}


@pytest.mark.parametrize("order", ["base a", "a base"])
def test_a_prefix_on_one_side_of_two_base_models(pair, order):
    one, two = (read_all(pair / name) for name in ("base", "a"))
    for name in ("base", "a"):
        rewrite(pair / name, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    rewrite(pair / "a", lambda t: {k.removeprefix("model."): v for k, v in t.items()}, architectures=["LlamaModel"])
    out, _ = merged(pair, order=order)
    strip = order.startswith("a")
    names = [name for name in one if name != "lm_head.weight"]
    want = {(name.removeprefix("model.") if strip else name): v for name, v in means(one, two, names).items()}
    torch.testing.assert_close(out, want)


def test_a_model_saved_without_its_head_is_explained(pair, capsys):
    rewrite(pair / "a", lambda t: {k.removeprefix("model."): v for k, v in t.items() if k != "lm_head.weight"},
            architectures=["LlamaModel"])
    said = refused(pair, capsys)
    assert f"{pair / 'a'} holds no lm_head.weight" in said
    assert "AutoModelForCausalLM" in said
    # lending its embedding would be another model: no flag makes it right
    assert "holds no lm_head.weight" in refused(pair, capsys, "--tied_heads", "base")


@pytest.mark.parametrize("side", ["base", "a"])
@pytest.mark.parametrize("buffer", ["self_attn.rotary_emb.inv_freq", "attn.masked_bias", "rotary_emb.cos_cached"])
def test_buffers_that_a_model_computes_may_be_on_one_side(pair, side, buffer, caplog):
    one, two = (read_all(pair / name) for name in ("base", "a"))
    value = torch.tensor([-1e4]) if "masked" in buffer else torch.tensor([1.0, 0.1])
    rewrite(pair / side, lambda t: t | {f"model.layers.{i}.{buffer}": value.clone() for i in range(3)})
    with caplog.at_level("INFO"):
        out, _ = merged(pair)
    torch.testing.assert_close(out, means(one, two, one))
    assert "3 buffers that only some inputs hold" in caplog.text


def test_a_bias_on_one_side_is_no_buffer(pair, capsys):
    rewrite(pair / "a", lambda t: t | {"model.layers.0.self_attn.bias": torch.ones(16)})
    assert "model.layers.0.self_attn.bias" in refused(pair, capsys)


@pytest.mark.parametrize("side", ["base", "a"])
@pytest.mark.parametrize("settings", [
    {"num_key_value_heads": None}, {"architectures": None}, {"num_key_value_heads": None, "architectures": None},
    {"model_type": "llama", "torch_dtype": None}, {"architectures": ["LlamaModel"]},
])
def test_an_absent_value_is_its_class_s_default(pair, side, settings):
    one, two = (read_all(pair / name) for name in ("base", "a"))
    rewrite(pair / side, lambda t: t, **settings)
    torch.testing.assert_close(merged(pair)[0], means(one, two, one))


def test_a_default_that_differs_is_told(pair, capsys):
    # of a Mistral, eight key-value heads are the default, whatever the number of heads
    for name in ("base", "a"):
        rewrite(pair / name, lambda t: t, model_type="mistral", architectures=None)
    rewrite(pair / "a", lambda t: t, num_key_value_heads=None)
    assert "num_key_value_heads 4 and 8" in refused(pair, capsys)


def test_equal_rotary_settings_of_two_versions_are_no_difference(pair, caplog):
    rewrite(pair / "base", lambda t: t, rope_theta=10000.0)
    rewrite(pair / "a", lambda t: t, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with caplog.at_level("INFO"):
        merged(pair)
    assert "differ in" not in caplog.text


def test_a_tied_head_written_twice_is_its_embedding(tmp_path, caplog):
    base = make_checkpoint(tmp_path / "base", scale=0.5, head=False, dtype=torch.float32)
    make_checkpoint(tmp_path / "a", seed=1, base=base, head=False, dtype=torch.float32)
    one, two = (read_all(tmp_path / name) for name in ("base", "a"))
    rewrite(tmp_path / "a", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    with caplog.at_level("INFO"):
        out, config = merged(tmp_path, order="a base")
    torch.testing.assert_close(out, means(one, two, one))
    assert config["tie_word_embeddings"] is True
    assert "copy of its tied embedding" in caplog.text


def test_a_head_that_is_no_copy_still_asks(tmp_path, capsys):
    base = make_checkpoint(tmp_path / "base", scale=0.5, head=False, dtype=torch.float32)
    make_checkpoint(tmp_path / "a", seed=1, base=base, head=False, dtype=torch.float32)
    rewrite(tmp_path / "a", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    assert "--tied_heads" in refused(tmp_path, capsys)


def test_whole_numbers_that_differ_are_not_chosen_from(pair, capsys):
    rewrite(pair / "base", lambda t: t | {"model.layers.0.order": torch.arange(4)})
    rewrite(pair / "a", lambda t: t | {"model.layers.0.order": torch.arange(4)})
    assert torch.equal(merged(pair)[0]["model.layers.0.order"], torch.arange(4))
    rewrite(pair / "a", lambda t: t | {"model.layers.0.order": torch.arange(4).flip(0)})
    with pytest.raises(SystemExit):
        merged(pair, "--run_name", "other")
    assert "model.layers.0.order" in capsys.readouterr().err


def test_layers_beyond_the_model_are_told_with_its_number(pair, capsys):
    (pair / "r.yml").write_text(f"slices:\n  - sources: [{{model: {pair / 'a'}, layer_range: [1, 4]}}]\n"
                                "merge_method: passthrough\n")
    with pytest.raises(SystemExit):
        fuse.main(["merge", "--recipe", str(pair / "r.yml"), "--output_dir", str(pair / "r")])
    assert "layers are 0 to 2" in capsys.readouterr().err


def test_help_names_the_most_and_the_range(capsys):
    fuse.main(["merge", "--parameters", "help"])
    said = capsys.readouterr().out
    assert "models: 1 to 64" in said
    assert "base: yes; models: 2\n" in said  # resta
    assert "share of a task vector that is kept (must be given, 0 to 1, one per model)" in said


@pytest.mark.parametrize(("words", "says"), [
    (["realign", "--tasks", "x", "--device", "cuda"], "--device cuda: realign computes on the CPU"),
    (["realign", "--tasks", "x", "--dtype", "bfloat16"], "--dtype bfloat16: sums are float32"),
    (["extract", "--dtype", "bfloat16"], "--dtype bfloat16: differences are taken in float32"),
])
def test_flags_that_would_change_nothing_are_refused(capsys, words, says):
    with pytest.raises(SystemExit) as stopped:
        fuse.main(words)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
