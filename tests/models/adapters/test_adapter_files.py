"""Adapter files: every scale applied, anything that is not B A refused by name, what is written loads in PEFT."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from errors import UserError
from models.adapters.files import (
    CONFIG,
    WEIGHTS,
    complete_targets,
    delta_distance,
    read_adapter,
    targets_of,
    vllm_note,
    write_adapter,
)
from models.adapters.fuse import common_base
from models.fuse import main

FFN = ("gate_proj", "up_proj", "down_proj")


def delta(adapter, module):
    a, b = adapter.modules[module]
    return b @ a


def merged_by_peft(pico, folder):
    """Module -> weight change, as PEFT applies it."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), folder)
    return {name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
            for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}


def edited(adapters, target, tensors=None, **changes):
    """A copy of the safety adapter with other tensors and configuration entries."""
    folder = shutil.copytree(adapters / "outputs" / "safety", target)
    if tensors:
        save_file(tensors(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    content = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 7, r"layers\.1\.mlp\.down_proj": 3}},
    {"rank_pattern": {"gate_proj": 2, "^model.layers.0.mlp.up_proj": 6}},
    {"use_rslora": True, "rank_pattern": {"gate_proj": 2}, "alpha_pattern": {"gate_proj": 5}},
], ids=str)
def test_every_scale_is_the_one_peft_applies(pico, make_adapter, tmp_path, options):
    folder = make_adapter(pico, tmp_path / "a", **options)
    read, peft = read_adapter(folder), merged_by_peft(pico, folder)
    assert set(read.modules) == set(peft)
    for module in peft:
        torch.testing.assert_close(delta(read, module), peft[module], atol=1e-5, rtol=1e-5)


def test_different_ranks_targets_and_layers_fuse_and_load(pico, make_adapter, tmp_path):
    """The union of what any adapter trains, exactly, and nothing else."""
    out = tmp_path / "outputs"
    make_adapter(pico, out / "one", seed=1, r=2, targets=("q_proj", "up_proj"), rank_pattern={"up_proj": 3})
    make_adapter(pico, out / "two", seed=2, r=4, use_rslora=True, targets=("up_proj", "v_proj"), layers_to_transform=[1])
    main(["adapters", "--adapters", "one,two", "--weights", "0.6,0.4", "--output_dir", str(tmp_path), "--run_name", "both"])
    parts, peft = [read_adapter(out / n) for n in ("one", "two")], merged_by_peft(pico, out / "both")
    assert set(peft) == set(parts[0].modules) | set(parts[1].modules)
    for module, found in peft.items():
        want = sum(w * delta(part, module) for w, part in zip((0.6, 0.4), parts, strict=True) if module in part.modules)
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-5)
    content = json.loads((out / "both" / CONFIG).read_text())
    assert (content["r"], content["lora_alpha"], content["use_rslora"]) == (7, 7, False)
    assert content["rank_pattern"]["model.layers.0.self_attn.q_proj"] == 2


def test_targets_are_short_where_that_is_exact(adapters, make_adapter, pico, tmp_path):
    plain = read_adapter(adapters / "outputs" / "safety")
    assert targets_of([plain]) == set(FFN)
    regex = read_adapter(edited(adapters, tmp_path / "regex", target_modules=r".*mlp\..*"))
    assert targets_of([plain, regex]) == set(plain.modules)
    known = ["l.0.up", "l.1.up", "l.0.down", "l.1.down"]
    assert complete_targets(known[:3], known) == {"up", "l.0.down"}


def test_what_is_written_is_what_is_read(tmp_path):
    modules = {f"model.layers.{i}.mlp.up_proj": (torch.randn(r, 6), torch.randn(8, r)) for i, r in enumerate((2, 5, 5))}
    assert write_adapter(tmp_path, modules, ["up_proj"], {"use_rslora": True, "bias": "all", "task_type": "CAUSAL_LM"}) == 5
    read = read_adapter(tmp_path)
    assert all(torch.equal(a, b) for m in modules for a, b in zip(read.modules[m], modules[m], strict=True))
    assert set(read.scales.values()) == {1.0}
    assert read.config["rank_pattern"] == read.config["alpha_pattern"] == {"model.layers.0.mlp.up_proj": 2}
    assert not read.config["use_rslora"]


def test_vllms_ranks():
    assert vllm_note(16) == ""
    assert "--max-lora-rank 32" in vllm_note(17)
    assert "up to 512" in vllm_note(513)


def test_distances(adapters):
    one, two = (read_adapter(adapters / "outputs" / n) for n in ("safety", "helpfulness"))
    assert delta_distance(one, one) < 1e-7
    want = sum((delta(one, m) - delta(two, m)).square().sum() for m in one.modules).sqrt()
    norm = max(sum(delta(a, m).square().sum() for m in a.modules) for a in (one, two)).sqrt()
    assert delta_distance(one, two) == pytest.approx(float(want / norm), rel=1e-4)


def test_modules_trained_in_full_are_refused_by_name(pico, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pico)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="modules_to_save is set"):
        read_adapter(tmp_path)


def test_dora_is_refused_by_name(pico, tmp_path, make_adapter):
    with pytest.raises(UserError, match="use_dora is set"):
        read_adapter(make_adapter(pico, tmp_path / "a", use_dora=True))


@pytest.mark.parametrize(("key", "says"), [
    ("base_model.model.m.lora_magnitude_vector.weight", "is a DoRA magnitude"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", "is a LoRA on an embedding"),
    ("base_model.model.m.bias", "is a trained bias"),
    ("base_model.model.m.lora_B.bias", "is a trained bias"),
    ("base_model.model.model.embed_tokens.weight", "is a copy of an embedding; save the adapter with"),
    ("base_model.model.lm_head.modules_to_save.weight", "is a module trained in full"),
    ("something", "is not a LoRA factor"),
])
def test_tensors_that_are_no_factors_are_refused_by_name(adapters, tmp_path, key, says):
    folder = edited(adapters, tmp_path / "odd", lambda ts: ts | {key: torch.ones(2, 2)})
    with pytest.raises(UserError, match=f"tensor '{key}' {says}"):
        read_adapter(folder)


@pytest.mark.parametrize(("changes", "says"), [
    ({"peft_type": "IA3"}, "peft_type is IA3"), ({"bias": "lora_only"}, "trained biases"),
    ({"lora_bias": True}, "lora_bias is set"), ({"init_lora_weights": "pissa_niter_4"}, "changes the base too"),
    ({"init_lora_weights": "olora"}, "changes the base too"), ({"lora_alpha": 0}, "other than 0"),
    ({"lora_alpha": "8"}, "other than 0"), ({"lora_alpha": float("nan")}, "other than 0"),
    ({"alpha_pattern": {"(": 3}}, "not a regular expression"), ({"alpha_pattern": {"up_proj": None}}, "other than 0"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
])
def test_configurations_that_are_no_plain_lora_are_refused(adapters, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        read_adapter(edited(adapters, tmp_path / "odd", **changes))


def test_all_faults_come_at_once(adapters, tmp_path):
    folder = edited(adapters, tmp_path / "odd", peft_type="IA3", bias="all", use_dora=True)
    with pytest.raises(UserError) as caught:
        read_adapter(folder)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(("change", "says"), [
    (lambda ts: {k: v for k, v in ts.items() if "layers.0.mlp.up_proj.lora_A" not in k}, "do not form a pair"),
    (lambda ts: {k: v[None] for k, v in ts.items()}, "do not form a pair"),
    (lambda ts: {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in ts.items()}, "do not form a pair"),
    (lambda ts: {k: v * float("inf") for k, v in ts.items()}, "NaN or infinity"),
    (lambda ts: {}, "holds no tensors"),
])
def test_damaged_factors(adapters, tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        read_adapter(edited(adapters, tmp_path / "odd", lambda ts: {k: v.contiguous() for k, v in change(ts).items()}))


@pytest.mark.parametrize(("file", "content"), [
    (WEIGHTS, b""), (WEIGHTS, b"\xff" * 40), (WEIGHTS, b"\x02\0\0\0\0\0\0\0{}"), (CONFIG, b"{"), (CONFIG, b"[]"),
    (CONFIG, b"[" * 100_000), (CONFIG, b"{}"),
])
def test_damaged_files(adapters, tmp_path, file, content):
    folder = edited(adapters, tmp_path / "odd")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError):
        read_adapter(folder)


def test_random_damage_is_refused_or_read_and_nothing_else(adapters, tmp_path):
    folder, chance = edited(adapters, tmp_path / "odd"), random.Random(0)
    whole = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    refused = 0
    for turn in range(400):
        file = (CONFIG, WEIGHTS)[turn % 2]
        content = bytearray(whole[file])
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(min(len(content), 3000))] = chance.choice(b'\x00\xff{}[]":,019nul-')
        (folder / file).write_bytes(content[: chance.choice((len(content), chance.randrange(len(content))))])
        try:
            targets_of([read_adapter(folder)])
        except UserError:
            refused += 1
        (folder / file).write_bytes(whole[file])
    assert 200 < refused < 400


def test_different_bases_are_refused_by_fingerprint_or_by_name(adapters, tmp_path):
    one = read_adapter(adapters / "outputs" / "safety")
    other = edited(adapters, tmp_path / "other", base_model_name_or_path="org/another")
    assert common_base([one, read_adapter(other, "same")]) is not None
    (other / "manifest.json").write_text('{"inputs": {"base": "0123456789abcdef"}}')
    with pytest.raises(UserError, match="different bases .*other: 0123456789ab"):
        common_base([one, read_adapter(other)])
    (other / "manifest.json").unlink()
    with pytest.raises(UserError, match="name different bases .*other: org/another"):
        common_base([one, read_adapter(other)])
    assert common_base([read_adapter(other)]) is None


def test_shapes_of_another_base_are_refused(adapters, tmp_path, capsys):
    wide = edited(adapters, tmp_path / "wide", lambda ts: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in ts.items()})
    with pytest.raises(SystemExit):
        main(["adapters", "--adapters", f"safety,{wide}", "--output_dir", str(adapters), "--run_name", "bad"])
    assert "6 modules have other shapes in other adapters" in capsys.readouterr().err
