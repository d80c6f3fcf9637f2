"""Merges of whole checkpoints: recipes, slices, vocabularies, heads, resume, workers, the memory promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from synthetic import digest, make_checkpoint, make_tokenizer, merge_flags, read_all

from models import fuse
from models.merging.methods import METHODS
from models.operators.blocks import fuse_tensors


def recipe(folder: Path, text: str) -> list[str]:
    path = folder / "recipe.yml"
    path.write_text(text.replace("$", f"{folder}/"))
    return ["--recipe", str(path)]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_files_give_what_tensors_give(merge_inputs, run_merge, method):
    row = METHODS[method]
    count = min(3, row.inputs[1])
    given = {key: 0.4 for key, f in row.fields().items() if f.default is None}
    out = run_merge(*merge_flags(merge_inputs, method, "; ".join(f"{k}={v}" for k, v in given.items()), "abc"[:count]))
    base, fused = read_all(merge_inputs / "base"), read_all(out)
    experts = [read_all(merge_inputs / m) for m in "abc"[:count]]
    assert fused.keys() == base.keys()
    values = {f.name: (given.get(k, f.default),) * count if f.metadata["each"] else given.get(k, f.default)
              for k, f in row.fields().items()}
    for name in base:
        expected = fuse_tensors(row, None if row.base == "no" else base[name], [e[name] for e in experts],
                                row.parameters(**values), name, seed=42)
        assert torch.equal(fused[name], expected.to(torch.bfloat16)), name


def test_the_result_is_a_model_that_transformers_loads(pico, tmp_path):
    from pico import make_pico
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = make_pico(tmp_path / "other", seed=1)
    fuse.main(["merge", "--method", "linear", "--models", f"{pico},{other}", "--output_dir", str(tmp_path),
               "--run_name", "mean"])
    out = tmp_path / "outputs" / "mean"
    models = [AutoModelForCausalLM.from_pretrained(f) for f in (pico, other, out)]
    weights = [m.model.layers[1].mlp.down_proj.weight for m in models]
    torch.testing.assert_close(weights[2], (weights[0] + weights[1]) / 2)
    assert AutoTokenizer.from_pretrained(out)("bread").input_ids == AutoTokenizer.from_pretrained(pico)("bread").input_ids
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["metrics"]["method"] == "linear"
    assert len(manifest["inputs"]) == 2


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "sce", "karcher"])
def test_workers_and_shards_do_not_change_the_weights(merge_inputs, run_merge, method):
    words = merge_flags(merge_inputs, method, "density=0.3" if "density" in METHODS[method].fields() else "")
    first = read_all(run_merge(*words, "--threads", "1", name="one"))
    assert digest(run_merge(*words, "--threads", "3", name="three")) == digest(merge_inputs / "results" / "outputs" / "one")
    sharded = run_merge(*words, "--shard_gb", "0.00001", name="sharded")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(first)
    assert all(torch.equal(load_file(sharded / file)[name], first[name]) for name, file in index.items())


def test_seed_decides_the_masks(merge_inputs, run_merge):
    words = merge_flags(merge_inputs, "dare_linear")
    one, again, other = (run_merge(*words, "--seed", seed, name=f"n{i}") for i, seed in enumerate(("1", "1", "2")))
    assert digest(one) == digest(again) != digest(other)


def test_ties_over_the_model_keeps_exactly_k_over_all_tensors(merge_inputs, run_merge):
    words = merge_flags(merge_inputs, "ties", "density=0.1; scope=model; normalize=false", "a")
    out = read_all(run_merge(*words, "--out_dtype", "float32"))
    base, tuned = ({k: v.float() for k, v in read_all(merge_inputs / m).items()} for m in ("base", "a"))
    names = sorted(base)
    deltas = torch.cat([(tuned[n] - base[n]).flatten() for n in names])
    order = deltas.abs().sort(descending=True, stable=True).indices[:int(0.1 * len(deltas))]
    kept = torch.zeros_like(deltas)
    kept[order] = deltas[order]
    assert torch.equal(torch.cat([out[n].flatten() for n in names]), torch.cat([base[n].flatten() for n in names]) + kept)


MERGEKIT = {
    "linear": """
models:
  - model: $a
    parameters: {weight: 1.0}
  - model: $b
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
""",
    "slerp": """
slices:
  - sources:
      - model: $base
        layer_range: [0, 3]
      - model: $a
        layer_range: [0, 3]
merge_method: slerp
base_model: $base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 1]
    - filter: mlp
      value: [1, 0.5, 0]
    - value: 0.5
dtype: bfloat16
""",
    "ties": """
models:
  - model: $a
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: $b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: $c
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: $base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "dare_ties": """
models:
  - model: $base
  - model: $a
    parameters: {density: 0.53, weight: 0.4}
  - model: $b
    parameters: {density: 0.53, weight: 0.3}
merge_method: dare_ties
base_model: $base
parameters: {int8_mask: true}
dtype: bfloat16
""",
}


def test_a_mergekit_slerp_recipe_with_gradients_and_filters(merge_inputs, run_merge):
    out = read_all(run_merge(*recipe(merge_inputs, MERGEKIT["slerp"])))
    base, a = read_all(merge_inputs / "base"), read_all(merge_inputs / "a")
    slerp = METHODS["slerp"]
    for layer, t in ((0, 0.0), (1, 0.5), (2, 1.0)):
        for part, at in ((f"model.layers.{layer}.self_attn.q_proj.weight", t),
                         (f"model.layers.{layer}.mlp.up_proj.weight", 1 - t),
                         (f"model.layers.{layer}.input_layernorm.weight", 0.5)):
            expected = fuse_tensors(slerp, base[part], [a[part]], slerp.parameters(t=at), part)
            assert torch.equal(out[part], expected.to(torch.bfloat16)), part


def test_a_mergekit_ties_recipe_resolves_gradients_per_layer(merge_inputs, run_merge):
    out = read_all(run_merge(*recipe(merge_inputs, MERGEKIT["ties"])))
    base, experts = read_all(merge_inputs / "base"), [read_all(merge_inputs / m) for m in "abc"]
    ties = METHODS["ties"]
    for layer, densities, weights in ((0, (1, 0.5, 0.33), (1, 0.0, 0.5)), (1, (0.7, 0.5, 0.33), (1, 0.5, 0.5)),
                                      (2, (0.1, 0.5, 0.33), (1, 1.0, 0.5))):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        p = ties.parameters(weight=weights, density=densities)
        expected = fuse_tensors(ties, base[name], [e[name] for e in experts], p, name)
        torch.testing.assert_close(out[name].float(), expected.half().float(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["linear", "dare_ties"])
def test_public_recipes_run_unchanged(merge_inputs, run_merge, name):
    out = read_all(run_merge(*recipe(merge_inputs, MERGEKIT[name])))
    assert all(torch.isfinite(t).all() for t in out.values())
    assert {t.dtype for t in out.values()} == {torch.float16 if name == "linear" else torch.bfloat16}
    if name == "linear":
        a, b = (read_all(merge_inputs / m)["model.norm.weight"].float() for m in "ab")
        torch.testing.assert_close(out["model.norm.weight"].float(), (a + 0.5 * b) / 1.5, rtol=1e-3, atol=1e-5)


def test_slices_stack_layers(merge_inputs, run_merge):
    out_folder = run_merge(*recipe(merge_inputs, """
slices:
  - sources:
      - {model: $a, layer_range: [0, 2]}
  - sources:
      - {model: $b, layer_range: [1, 3]}
merge_method: passthrough
"""))
    out, a, b = read_all(out_folder), read_all(merge_inputs / "a"), read_all(merge_inputs / "b")
    for target, source, layer in ((0, a, 0), (1, a, 1), (2, b, 1), (3, b, 2)):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(out[name.format(target)], source[name.format(layer)])
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(out["lm_head.weight"], b["lm_head.weight"])
    assert json.loads((out_folder / "config.json").read_text())["num_hidden_layers"] == 4


def test_dry_run_writes_nothing_and_loads_no_torch(merge_inputs):
    words = ["merge", *merge_flags(merge_inputs), "--dry_run", "--output_dir", str(merge_inputs / "results")]
    code = "import sys; from models import fuse; fuse.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert "30 tensors matched" in done.stdout
    assert "GB at most, beyond the interpreter" in done.stdout
    assert not (merge_inputs / "results").exists()


def test_same_run_is_not_repeated_and_another_is_refused(merge_inputs, run_merge, merge_fails, capsys):
    first = digest(run_merge(*merge_flags(merge_inputs)))
    capsys.readouterr()
    assert digest(run_merge(*merge_flags(merge_inputs))) == first
    assert "already merged" in capsys.readouterr().out
    assert "parameters" in merge_fails(*merge_flags(merge_inputs, parameters="density=0.4"))


# --- vocabularies and heads

@pytest.fixture
def vocabularies(tmp_path) -> Path:
    base = make_checkpoint(tmp_path / "base", vocab=5, scale=0.5)
    make_tokenizer(base, ["a", "b", "c", "d"], ["<s>"])
    wide = make_checkpoint(tmp_path / "a", vocab=6, seed=1, base=None, scale=0.5)
    make_tokenizer(wide, ["b", "a", "c", "d"], ["<s>", "<new>"])
    return tmp_path


def words_for(folder: Path, *more: str) -> list[str]:
    return ["merge", "--method", "linear", "--models", f"{folder / 'base'},{folder / 'a'}",
            "--output_dir", str(folder / "r"), *more]


def test_differing_vocabularies_are_explained(vocabularies, capsys):
    with pytest.raises(SystemExit):
        fuse.main(words_for(vocabularies))
    err = capsys.readouterr().err
    assert all(word in err for word in ("has 6", "'a' is 0 in one and 1", "--vocab base", "union", "pad"))


@pytest.mark.parametrize(("policy", "rows"), [("base", 5), ("union", 6), ("pad", 6)])
def test_vocabulary_policies(vocabularies, policy, rows):
    fuse.main(words_for(vocabularies, "--vocab", policy))
    out_folder = vocabularies / "r" / "outputs" / "merged"
    base, wide, out = (read_all(f)["model.embed_tokens.weight"].float()
                       for f in (vocabularies / "base", vocabularies / "a", out_folder))
    assert out.shape[0] == rows == json.loads((out_folder / "config.json").read_text())["vocab_size"]
    # by text, row 0 is "a": the other model's row 1
    partner = 0 if policy == "pad" else 1
    torch.testing.assert_close(out[0], ((base[0] + wide[partner]) / 2), rtol=1e-2, atol=1e-2)
    if rows == 6:  # the base lacks the last token: it takes the mean of those that have it, here one
        torch.testing.assert_close(out[5], wide[5], rtol=1e-2, atol=1e-2)
    tokens = json.loads((out_folder / "tokenizer.json").read_text())["added_tokens"]
    assert [t["content"] for t in tokens] == ["<s>", "<new>"][:2 if policy == "union" else 1]


def test_union_refuses_foreign_word_pieces(vocabularies, capsys):
    make_tokenizer(vocabularies / "a", ["b", "a", "c", "zebra"], ["<s>", "<new>"])
    with pytest.raises(SystemExit):
        fuse.main(words_for(vocabularies, "--vocab", "union"))
    assert "zebra" in capsys.readouterr().err


def test_tied_and_untied_heads(tmp_path, capsys):
    base = make_checkpoint(tmp_path / "base", scale=0.5)
    make_checkpoint(tmp_path / "a", seed=1, base=base, head=False)
    with pytest.raises(SystemExit):
        fuse.main(words_for(tmp_path))
    assert "--tied_heads" in capsys.readouterr().err
    fuse.main(words_for(tmp_path, "--tied_heads", "untie"))
    out, a = read_all(tmp_path / "r" / "outputs" / "merged"), read_all(tmp_path / "a")
    mean = (read_all(base)["lm_head.weight"].float() + a["model.embed_tokens.weight"].float()) / 2
    torch.testing.assert_close(out["lm_head.weight"].float(), mean, rtol=1e-2, atol=1e-2)


# --- bad input

@pytest.mark.parametrize(("words", "says"), [
    (["--method", "tied"], "did you mean ties"), (["--method", "ties", "--models", "a"], "--base_model"),
    ([], "--recipe and --method"), (["--recipe", "nowhere.yml"], "nowhere.yml"),
])
def test_flags_that_do_not_fit(merge_fails, words, says):
    if "--method" in words and "--models" not in words:
        words = [*words, "--models", "a,b"]
    assert says in merge_fails(*words)


@pytest.mark.parametrize(("parameters", "says"), [
    ("", "density"), ("density=1.5", "out of range"), ("densty=0.2", "did you mean density"), ("density=x", "not a number"),
    ("density=0.2,0.3", "one for each model"), ("density=0.2; normalize=maybe", "true or false"),
    ("density=0.2; scope=modle", "modle is not known; allowed: tensor, model"),
])
def test_parameters_that_do_not_fit(merge_inputs, merge_fails, parameters, says):
    assert says in merge_fails(*merge_flags(merge_inputs, parameters=parameters))


def test_a_recipe_s_word_that_the_method_does_not_know(merge_inputs, merge_fails):
    text = f"""method: ties
base: {merge_inputs / 'base'}
inputs: [{{model: {merge_inputs / 'a'}}}]
parameters: {{density: 0.3, scope: modle}}
"""
    assert "scope: modle is not known; allowed: tensor, model" in merge_fails(*recipe(merge_inputs, text))


def test_different_architectures_and_missing_tensors(merge_inputs, merge_fails, tmp_path):
    make_checkpoint(tmp_path / "wide", hidden=32)
    assert "different architectures" in merge_fails(*merge_flags(merge_inputs, models=["a", "wide"]))
    make_checkpoint(tmp_path / "short", layers=2)
    assert "no tensor" in merge_fails(*merge_flags(merge_inputs, models=["a", "short"]))


def test_an_adapter_an_absent_folder_and_the_output_as_input(merge_inputs, merge_fails, run_merge, adapters):
    safety = str(adapters / "outputs" / "safety")
    assert "models/fuse.py adapters" in merge_fails("--method", "linear", "--models", f"{safety},{merge_inputs / 'a'}")
    assert "nowhere" in merge_fails("--method", "linear", "--models", f"{merge_inputs / 'nowhere'},{merge_inputs / 'a'}")
    out = run_merge(*merge_flags(merge_inputs))
    words = ["--method", "linear", "--models", f"{out},{merge_inputs / 'a'}", "--overwrite"]
    assert "is an input of this merge" in merge_fails(*words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named_and_leave_nothing(merge_inputs, merge_fails, value):
    from safetensors.torch import save_file

    tensors = read_all(merge_inputs / "b")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, merge_inputs / "b" / "model.safetensors")
    err = merge_fails(*merge_flags(merge_inputs))
    assert "model.layers.1.mlp.up_proj.weight" in err
    assert f"element {3 * 16 + 4}" in err
    assert not list((merge_inputs / "results").rglob("*"))


def test_a_result_beyond_float16_is_refused(merge_inputs, merge_fails):
    err = merge_fails(*merge_flags(merge_inputs, "task_arithmetic", "weight=1e9", "a"), "--out_dtype", "float16")
    assert "beyond float16" in err


def test_a_promise_too_small_names_the_least(merge_inputs, merge_fails, run_merge):
    assert "one worker needs" in merge_fails(*merge_flags(merge_inputs), "--memory_gb", "0.0001")
