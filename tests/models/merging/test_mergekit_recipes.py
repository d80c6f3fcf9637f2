"""What mergekit 0.1.5's reader takes, carried out: numbers of merges, and its page in docs/reference."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from synthetic import make_checkpoint, make_tokenizer, read_all

import config
from errors import UserError
from models import fuse
from models.merging import mergekit_keys
from models.merging.methods import METHODS
from models.merging.recipe_tokens import TEMPLATES, WITHOUT_TEXT
from models.merging.recipes import read_recipe

SPECS = {name: row.spec() for name, row in METHODS.items()}
BOTH = "models: [{model: $a}, {model: $b}]\ndtype: float32\n"


@pytest.fixture
def inputs(tmp_path):
    base = make_checkpoint(tmp_path / "base", scale=0.5, vocab=6, dtype=torch.float32)
    for i, name in enumerate("abc"):
        make_checkpoint(tmp_path / name, seed=i + 1, base=base, scale=0.2, vocab=6, dtype=torch.float32)
    return tmp_path


def merged(folder, text, name="out"):
    path = folder / f"{name}.yml"
    path.write_text(text.replace("$", f"{folder}/"))
    fuse.main(["merge", "--recipe", str(path), "--output_dir", str(folder / "r"), "--run_name", name, "--threads", "1"])
    return read_all(folder / "r" / "outputs" / name)


def parsed(folder, text):
    path = folder / "one.yml"
    path.write_text(text)
    return read_recipe(path, SPECS)


@pytest.mark.parametrize(("extra", "head"), [("", 0.1), ("head_at: last\n", 0.9)])
def test_norm_and_head_lie_at_the_gradient_s_first_value(inputs, extra, head):
    out = merged(inputs, BOTH + extra + "merge_method: task_arithmetic\nbase_model: $base\n"
                 "parameters: {weight: [0.1, 0.5, 0.9]}\n")
    base, a, b = (read_all(inputs / m) for m in ("base", "a", "b"))
    for name, w in (("model.embed_tokens.weight", 0.1), ("model.norm.weight", head), ("lm_head.weight", head),
                    ("model.layers.2.mlp.up_proj.weight", 0.9)):
        torch.testing.assert_close(out[name], base[name] + w * (a[name] + b[name] - 2 * base[name]))


def test_anchors_quoted_numbers_mappings_and_extra_keys(inputs, caplog):
    with caplog.at_level(logging.WARNING):
        out = merged(inputs, """
shared: &p {weight: '0.5'}
title: mine
models:
  - {model: {model: {path: $a}}, parameters: *p}
  - {model: {path: $b}, parameters: {<<: *p, weight: 1.5e0}}
merge_method: linear
parameters: {normalize: "off", random_seed: 3, density: 0.2}
dtype: float32
""")
    a, b = read_all(inputs / "a"), read_all(inputs / "b")
    assert all(torch.allclose(out[n], 0.5 * a[n] + 1.5 * b[n], atol=1e-6) for n in a)
    assert "title: no key of mergekit's" in caplog.text
    assert "parameters.density: no effect: linear has no such parameter" in caplog.text
    assert "shared" not in caplog.text


@pytest.mark.parametrize(("text", "says"), [
    ("merge_method: linear\nmodels: [{model: a, weight: 1}]", "weight: stands outside parameters"),
    ("merge_method: linear\nmodels: [{model: a}]\ntokens: {}", "tokens: not supported; it belongs under tokenizer"),
    ("merge_method: linear\nmodels: [{model: a}]\nmodel: b", "model: unknown key (did you mean models?)"),
    ("merge_method: linear\nmodels: [{model: a+b+c}]", "a+b+c: needs MODEL+ADAPTER"),
    ("merge_method: linear\nmodels: [{model: {model: a, override_architecture: X}}]", "override_architecture: not"),
    ("merge_method: linear\nmodels: [{model: a}]\nchat_template: alpaca", "alpaca: no chat template; allowed: auto"),
    ("merge_method: linear\nmodels: [{model: a}]\ntokenizer: {pad_to_multiple_of: 0}", "0: needs a whole number of 1"),
    ("merge_method: linear\nmodels: [{model: a}]\ntokenizer: {tokens: {x: {force: true}}}", "x: has no source"),
    ("merge_method: linear\nmodels: [{model: a}]\ntokenizer: {tokens: {x: {source: {kind: , model: a}}}}",
     "x.source.kind: no value: not known; allowed: zero, model_token"),
    ("merge_method: linear\nmodels: [{model: a}]\nhead_at: middle", "middle: not known; allowed: first, last"),
    ("merge_method: passthrough\nbase_model: b\nmodels: [{model: a}]", "b would be one more model of passthrough"),
    ("merge_method: linear\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]", "has no weight; list it"),
])
def test_slips_are_errors(tmp_path, text, says):
    with pytest.raises(UserError) as error:
        parsed(tmp_path, text)
    assert says in str(error.value)


def test_karcher_counts_every_input_the_same_and_an_unlisted_base_takes_part(tmp_path):
    found = parsed(tmp_path, "merge_method: karcher\nbase_model: c\nmodels: [{model: a, parameters: {weight: 3}}]")
    assert [(s.model, dict(s.parameters)) for s in found.slices[0].sources] == [("a", {}), ("c", {})]
    ours = parsed(tmp_path, "method: karcher\ninputs: [{model: a, weight: 3}]")
    assert ours.slices[0].sources[0].parameters == {"weight": 3.0}


def put_lora(folder):
    """A LoRA of rank 2 and scale 3 on one matrix; returns its factors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    a, b = torch.randn(2, 16), torch.randn(40, 2)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_{}.weight"
    save_file({key.format("A"): a, key.format("B"): b}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    return a, b


def test_flags_take_an_adapter_on_a_model_too(inputs, capsys):
    # a run is found by its name, as a model is
    a, b = put_lora(inputs / "r" / "outputs" / "lora")
    words = ["merge", "--method", "task_arithmetic", "--base_model", str(inputs / "base"), "--parameters", "weight=0.5",
             "--output_dir", str(inputs / "r"), "--threads", "1"]
    fuse.main([*words, "--models", f"{inputs / 'base'}+lora,{inputs / 'b'}", "--run_name", "flags"])
    out, base, two = (read_all(place) for place in (inputs / "r" / "outputs" / "flags", inputs / "base", inputs / "b"))
    wanted = {name: (base[name] + two[name]) / 2 for name in base}
    wanted["model.layers.1.mlp.up_proj.weight"] += 0.5 * 3 * b @ a
    assert all(torch.allclose(out[name], wanted[name], atol=1e-5) for name in base)
    made = json.loads((inputs / "r" / "outputs" / "flags" / "manifest.json").read_text())
    assert str(inputs / "r" / "outputs" / "lora") in made["parents"]
    with pytest.raises(SystemExit):
        fuse.main([*words, "--models", "base+lora+lora,b", "--run_name", "wrong"])
    assert "--models base+lora+lora: needs MODEL+ADAPTER, one adapter at most" in capsys.readouterr().err


def test_an_adapter_on_a_model_is_added_in_fp32(inputs):
    a, b = put_lora(inputs / "lora")
    out = merged(inputs, "models: [{model: $a+$lora}, {model: $b}]\nmerge_method: linear\ndtype: float32\n")
    one, two = read_all(inputs / "a"), read_all(inputs / "b")
    one["model.layers.1.mlp.up_proj.weight"] += 3 * b @ a
    assert all(torch.allclose(out[n], (one[n] + two[n]) / 2, atol=1e-5) for n in one)


def test_an_adapter_on_the_head_changes_the_head_alone_whatever_it_copied(inputs):
    """The file of model a has its tied head twice, its names lack model., the adapter's keys have the adapter's name."""
    from safetensors.torch import save_file

    tensors = read_all(inputs / "a")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, inputs / "a" / "model.safetensors")
    written = json.loads((inputs / "a" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (inputs / "a" / "config.json").write_text(json.dumps(written))
    (inputs / "lora").mkdir()
    rows, size = tensors["lm_head.weight"].shape
    factors, key = {}, "base_model.model.{}.lora_{}.default.weight"
    for module, (out, into) in {"lm_head": (rows, size), "model.layers.0.mlp.up_proj": (40, 16)}.items():
        factors |= {key.format(module, "A"): torch.randn(2, into), key.format(module, "B"): torch.randn(out, 2)}
    save_file(factors, inputs / "lora" / "adapter_model.safetensors")
    (inputs / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    out = merged(inputs, "models: [{model: $b}, {model: $a+$lora}]\nmerge_method: linear\ndtype: float32\n")
    other = read_all(inputs / "b")
    for module in ("lm_head", "model.layers.0.mlp.up_proj"):
        tensors[f"{module}.weight"] += factors[key.format(module, "B")] @ factors[key.format(module, "A")]
    assert all(torch.allclose(out[n], (tensors[n] + other[n]) / 2, atol=1e-5) for n in other)


def test_another_tokenizer_single_tokens_and_padding(inputs):
    make_tokenizer(inputs / "a", ["x", "y", "z"], ["<s>"])
    make_tokenizer(inputs / "b", ["z", "y", "x"], ["<s>", "<t>"])
    out = merged(inputs, BOTH + """merge_method: linear
tokenizer:
  source: $b
  pad_to_multiple_of: 4
  tokens:
    <n>: {source: {kind: model_token, model: $a, token: y}}
    x: {source: {kind: zero}, force: true}
""")["model.embed_tokens.weight"]
    a, b = (read_all(inputs / m)["model.embed_tokens.weight"] for m in "ab")
    rows_a = torch.stack([a[2], a[1], 0 * a[0], a[3], b[4], a[1]])
    rows_b = torch.stack([b[0], b[1], 0 * b[2], b[3], b[4], a[1]])
    rows = [torch.cat([r, r.mean(0).expand(2, -1)]) for r in (rows_a, rows_b)]
    torch.testing.assert_close(out, sum(rows) / 2, rtol=1e-5, atol=1e-6)
    folder = inputs / "r" / "outputs" / "out"
    assert json.loads((folder / "config.json").read_text())["vocab_size"] == 8
    tokens = json.loads((folder / "tokenizer.json").read_text())
    assert list(tokens["model"]["vocab"]) == ["z", "y", "x"]
    assert [t["content"] for t in tokens["added_tokens"]] == ["<s>", "<t>", "<n>"]


def test_chat_templates(inputs):
    for name, text in (("a", "{{ one }}"), ("b", "{{ two }}"), ("c", "{{ two }} ")):
        make_tokenizer(inputs / name, ["x"])
        (inputs / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    three = "models: [{model: $a}, {model: $b}, {model: $c}]\nmerge_method: linear\n"
    for i, (value, want) in enumerate((("auto", "{{ two }}"), ("chatml", TEMPLATES["chatml"]))):
        merged(inputs, three + f"chat_template: {value}\n", f"m{i}")
        folder = inputs / "r" / "outputs" / f"m{i}"
        assert (folder / "chat_template.jinja").read_text() == want
        assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_the_page_names_every_method_and_key():
    page = (config.ROOT / "docs" / "reference" / "mergekit.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([^`]+)`", page, re.M))
    keys = {key for keys in mergekit_keys.KEYS.values() for key in keys} | set(mergekit_keys.EXTENSIONS)
    wanted = {*mergekit_keys.METHOD_NAMES, *keys, *mergekit_keys.PARAMETERS}
    assert named == wanted
    assert set(mergekit_keys.METHOD_NAMES) <= set(METHODS)
    assert all(name in page for name in (*TEMPLATES, *WITHOUT_TEXT))
