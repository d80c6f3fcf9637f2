"""Adapters trained on a base in 8 and 4 bits, on the CPU; what is refused, and with which words."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest
import torch
from pico import make_pico, pico_tokenizer
from runs import align, common, losses, write_data
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import manifest
from config import parse
from errors import UserError
from flags import AlignArgs
from models.adapters.files import read_adapter
from models.base import quantised
from models.runs import load_run
from training.sft import to_train

CPU = torch.device("cpu")
FLAGS = ("--moe_flag", "0", "--lora_targets", "q_proj,v_proj", "--lora_r", "4", "--lora_alpha", "16", "--learning_rate",
         "0.01", "--per_device_train_batch_size", "8", "--warmup_steps", "0", "--lora_dropout", "0")
IDS = torch.arange(10, 40)[None]


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    """A pico that is 64 wide, as 4 bits on a CPU need."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), pico_tokenizer()
    config = LlamaConfig(vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.1,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def model_of(pico, *flags, dtype=torch.float32):
    args = parse(AlignArgs, ["--moe_flag", "0", "--task_name", "safety", "--lora_targets", "q_proj,v_proj", *flags]).args
    return to_train(pico, args, dtype, CPU)


@pytest.mark.parametrize(("kind", "stored", "close"), [("int8", torch.int8, 0.02), ("nf4", torch.uint8, 0.12)])
@torch.no_grad()
def test_the_base_is_held_in_few_bits_and_frozen(pico, kind, stored, close):
    model, plain = model_of(pico, "--base_quantization", kind).eval(), model_of(pico).eval()
    attention = model.get_base_model().model.layers[0].self_attn
    assert attention.q_proj.base_layer.weight.dtype == attention.o_proj.weight.dtype == stored
    assert model.get_output_embeddings().weight.dtype == model.get_input_embeddings().weight.dtype == torch.float32
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and dtype == torch.float32 for name, dtype in trained.items())
    assert len(trained) == 8
    assert model.get_base_model().is_gradient_checkpointing
    for name in ("self_attn.q_proj.base_layer", "self_attn.o_proj", "mlp.down_proj"):
        few, whole = (m.get_base_model().model.layers[1].get_submodule(name) for m in (model, plain))
        x = torch.randn(5, whole.in_features, generator=torch.Generator().manual_seed(0))
        error = float((few(x) - whole(x)).norm() / whole(x).norm())
        assert 0 < error < close


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_training_goes_on_after_an_evaluation(pico, kind):
    model = model_of(pico, "--base_quantization", kind)
    with torch.no_grad():
        before = model.eval()(IDS, labels=IDS).loss
    model.train()(IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 4
    assert all(float(gradient.norm()) > 0 for gradient in gradients)
    with torch.no_grad():
        assert float(model.eval()(IDS, labels=IDS).loss) == float(before)


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "float32"), ("nf4", "float32"), ("int8", "bfloat16"),
                                             ("nf4", "bfloat16")])
def test_an_adapter_trains_and_is_an_ordinary_one(pico, tmp_path, data, kind, dtype):
    flags = (*FLAGS, "--num_train_epochs", "6", "--base_quantization", kind, "--run_name", kind, "--dtype", dtype)
    found = align(pico, tmp_path, data, "safety", *flags)
    history = losses(found)
    assert history[-1] < 0.9 * history[0]
    assert found["config"]["base_quantization"] == kind
    folder = tmp_path / "outputs" / kind
    assert {a.dtype for a, _ in read_adapter(folder).modules.values()} == {torch.float32}
    assert "quantization" not in json.loads((folder / "adapter_config.json").read_text())
    # scored on the base as it is on disk
    args = parse(AlignArgs, common(pico, tmp_path)).args
    base, tuned = (load_run(run, args).model(IDS).logits for run in ("", kind))
    assert float((base - tuned).detach().abs().max()) > 1e-2


def test_close_to_the_adapter_of_the_whole_base(pico, tmp_path, data):
    flags = (*FLAGS, "--num_train_epochs", "3")
    plain = losses(align(pico, tmp_path, data, "safety", *flags, "--run_name", "plain"))
    few = losses(align(pico, tmp_path, data, "safety", *flags, "--run_name", "few", "--base_quantization", "int8"))
    assert few == pytest.approx(plain, rel=0.05)
    assert few != plain


def test_an_interrupted_run_goes_on(pico, tmp_path, data):
    import shutil

    flags = (*FLAGS, "--max_steps", "4", "--save_steps", "2", "--base_quantization", "int8", "--run_name", "cut")
    whole = align(pico, tmp_path, data, "safety", *flags)
    first = read_adapter(tmp_path / "outputs" / "cut").modules
    shutil.rmtree(tmp_path / "outputs" / "cut")
    shutil.rmtree(tmp_path / "checkpoints" / "cut" / "checkpoint-4")
    again = align(pico, tmp_path, data, "safety", *flags)
    assert again["metrics"]["steps"] == whole["metrics"]["steps"] == 4
    for module, (a, b) in read_adapter(tmp_path / "outputs" / "cut").modules.items():
        torch.testing.assert_close(b @ a, first[module][1] @ first[module][0], atol=1e-5, rtol=1e-4)


def test_an_adapter_is_gone_on_with(pico, tmp_path, data):
    align(pico, tmp_path, data, "safety", *FLAGS, "--max_steps", "2", "--run_name", "first")
    flags = [word for word in FLAGS if word not in ("--lora_targets", "q_proj,v_proj")]
    found = align(pico, tmp_path, data, "safety", *flags, "--max_steps", "2", "--run_name", "second", "--init_adapter",
                  "first", "--base_quantization", "nf4")
    assert found["inputs"]["init_adapter"] == manifest.sha256(tmp_path / "outputs" / "first" / "adapter_model.safetensors")
    first, second = (set(read_adapter(tmp_path / "outputs" / name).modules) for name in ("first", "second"))
    assert first == second


def test_preference_pairs_train_too(pico, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"Bad thing {i}?", "chosen": "I can't help with that.", "rejected":
                                         "Sure, do it."}) + "\n" for i in range(8)))
    found = align(pico, tmp_path, {"safety": str(pairs)}, "safety", *FLAGS, "--method", "dpo", "--num_train_epochs", "3",
                  "--base_quantization", "int8", "--run_name", "dpo")
    history = losses(found, "loss")
    assert history[-1] < history[0]


@pytest.mark.parametrize("flags", [("--moe_flag", "0", "--tuning", "full"),
                                   ("--moe_flag", "0", "--method", "soup", "--adapters", "a,b")])
def test_refused_with_anything_but_one_adapter(flags):
    with pytest.raises(UserError, match="--base_quantization int8: the frozen base of one adapter"):
        parse(AlignArgs, [*flags, "--base_quantization", "int8"])


def test_unknown_kinds():
    with pytest.raises(UserError, match="--base_quantization int4: not known.*allowed: int8, nf4"):
        parse(AlignArgs, ["--moe_flag", "0", "--base_quantization", "int4"])


def test_an_old_run_without_the_flag_is_still_the_same_run(pico, tmp_path, data, capsys):
    flags = (*FLAGS, "--max_steps", "2", "--run_name", "old")
    align(pico, tmp_path, data, "safety", *flags)
    path = tmp_path / "outputs" / "old" / "manifest.json"
    content = json.loads(path.read_text())
    del content["config"]["base_quantization"]
    path.write_text(json.dumps(content))
    capsys.readouterr()
    align(pico, tmp_path, data, "safety", *flags)
    assert "already trained" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        align(pico, tmp_path, data, "safety", *flags, "--base_quantization", "nf4")
    assert "base_quantization: None there, nf4 here" in capsys.readouterr().err


def fails(pico, tmp_path, data, capsys, monkeypatch):
    """What a command that cannot quantise says; the base must not have been read."""
    def load(*args, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        align(pico, tmp_path, data, "safety", *FLAGS, "--base_quantization", "int8", "--run_name", "bad")
    assert stop.value.code == 2
    assert not (tmp_path / "outputs" / "bad" / "adapter_config.json").exists()
    return capsys.readouterr().err


def test_a_machine_without_the_package(pico, tmp_path, data, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: (
        None if name == "bitsandbytes" else real(name, *rest)))
    said = fails(pico, tmp_path, data, capsys, monkeypatch)
    assert "--base_quantization int8: the package bitsandbytes is not installed; pip install -r requirements.txt" in said


def test_a_device_that_the_package_does_not_know(pico, tmp_path, data, capsys, monkeypatch):
    fake = types.ModuleType("bitsandbytes")
    fake.__version__, fake.supported_torch_devices = "0.1", {"cuda"}
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: True)
    said = fails(pico, tmp_path, data, capsys, monkeypatch)
    assert "bitsandbytes 0.1 does not compute on cpu; use --device cuda" in said


def test_rows_that_four_bits_on_a_cpu_would_read_wrong(tmp_path, data, capsys, monkeypatch):
    make_pico(tmp_path / "narrow")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **options: 1 / 0)
    with pytest.raises(SystemExit):
        align(tmp_path / "narrow", tmp_path, data, "safety", *FLAGS, "--base_quantization", "nf4", "--run_name", "bad")
    said = capsys.readouterr().err
    assert "a multiple of 64 wide, and 12 layers are not, e.g. model.layers.0.self_attn.q_proj (32)" in said


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(UserError, match=r"int8: needs CUDA compute capability 7\.5, this device has 7\.0"):
        quantised.check("int8", torch.device("cuda"))
    quantised.check("nf4", torch.device("cuda"))
