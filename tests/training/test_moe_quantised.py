"""QLoRA for the fused MoE: the frozen base in 8 or 4 bits, experts, router and attention LoRA as without."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from pico import pico_tokenizer
from pico_families import make_family
from runs import align, build_moe, losses, write_data
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from errors import UserError
from models.base.quantised import whole_weight
from models.moe.files import assemble, load_moe, moe_layers
from training.moe import aligned_norms

CPU, IDS = torch.device("cpu"), torch.arange(20, 44)[None]
FLAGS = ("--moe_flag", "1", "--gate_loss_weight", "0.1", "--helpfulness_weight", "0.01", "--lora_r", "4", "--lora_alpha",
         "8", "--learning_rate", "0.01", "--per_device_train_batch_size", "8", "--warmup_steps", "0",
         "--lora_dropout", "0.1", "--num_train_epochs", "3")


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    """A pico whose every row is a multiple of 64 wide, as 4 bits on a CPU need."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), pico_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def home(pico, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("home")
    build_moe(pico, out, data)
    return out


def args_of(pico, home):
    return SimpleNamespace(model_name_or_path=str(pico), cache_dir=None, results=home)


@pytest.mark.parametrize(("kind", "stored", "near"), [("int8", torch.int8, 0.02), ("nf4", torch.uint8, 0.2)])
@torch.no_grad()
def test_the_layer_computes_on_the_base_as_it_is_held(pico, home, kind, stored, near):
    """Against experts written out from the base as it multiplies: only the base's rounding is between the two models."""
    raw = home / "outputs" / "raw_moe"
    few, _ = assemble(raw, args_of(pico, home), torch.float32, CPU, bits=kind)
    whole, _ = assemble(raw, args_of(pico, home), torch.float32, CPU)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(moe_layers(few), moe_layers(whole), strict=True):
        assert mine.gate_proj.weight.dtype == mine.down_proj.weight.dtype == stored
        error = (mine(x) - theirs(x)).norm() / theirs(x).norm()
        # of three matrices, each rounded by 0.09 in 4 bits
        assert 0 < error < near
        # the same layer in fp32 with the base's few bits written out
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(theirs, name).weight.data = whole_weight(getattr(mine, name)).float()
        # int8 rounds its inputs too
        assert (mine(x) - theirs(x)).norm() / theirs(x).norm() < (0.02 if kind == "int8" else 1e-4)
        for one, two in zip(aligned_norms(mine), aligned_norms(theirs), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_it_trains_what_it_trains_without(pico, home, data, kind, dtype):
    plain = align(pico, home, data, "mix", *FLAGS, "--run_name", f"plain_{dtype}", "--dtype", dtype)
    found = align(pico, home, data, "mix", *FLAGS, "--run_name", f"{kind}_{dtype}", "--dtype", dtype, "--base_quantization",
                  kind, "--drift_mode", "relative")
    assert found["config"]["base_quantization"] == kind
    for term in ("loss_lm", "loss_gate"):
        mine, theirs = losses(found, term), losses(plain, term)
        assert mine[-1] < theirs[0]
        assert mine == pytest.approx(theirs, rel=0.1, abs=0.05)
    # written like any other: routers, experts and attention of the plain base
    one, two = (load_file(home / "outputs" / name / "moe.safetensors") for name in (f"{kind}_{dtype}", f"plain_{dtype}"))
    assert {name: (t.shape, t.dtype) for name, t in one.items()} == {name: (t.shape, t.dtype) for name, t in two.items()}
    start = load_file(home / "outputs" / "raw_moe" / "moe.safetensors")
    moved = [name for name in one if name in start and not torch.equal(one[name], start[name])]
    assert moved
    assert all(name.endswith("router") for name in moved)
    assert all(float(one[name].abs().max()) > 0 for name in one if "tuned_b" in name or "lora_B" in name)
    with torch.no_grad():
        logits = load_moe(home / "outputs" / f"{kind}_{dtype}", args_of(pico, home), torch.float32, CPU)(IDS).logits
        base = load_moe(home / "outputs" / "raw_moe", args_of(pico, home), torch.float32, CPU)(IDS).logits
    assert float((logits - base).abs().max()) > 1e-2


def test_checkpointing_and_dropout_draw_the_same_masks(pico, home, data):
    """The base in few bits is always checkpointed: what is computed again must be what was computed."""
    twice = [losses(align(pico, home, data, "mix", *FLAGS, "--run_name", name, "--base_quantization", "nf4"))
             for name in ("one", "two")]
    assert twice[0] == twice[1]


def test_what_cannot_be_parted_is_refused(tmp_path, data, capsys, monkeypatch):
    base = make_family(tmp_path / "phi3", "phi3")
    build_moe(base, tmp_path, data)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="--base_quantization int8: gate and up are one matrix in this model .gate_up_proj."):
        assemble(tmp_path / "outputs" / "raw_moe", args_of(base, tmp_path), torch.float32, CPU, bits="int8")
    with pytest.raises(SystemExit) as stop:
        align(base, tmp_path, data, "mix", *FLAGS, "--run_name", "bad", "--base_quantization", "int8")
    assert stop.value.code == 2
    assert not (tmp_path / "outputs" / "bad" / "moe.safetensors").exists()
    assert json.dumps("one matrix")[1:-1] in capsys.readouterr().err
