"""--layout gguf: transformers reads the plain models, and the experts are those of the other layouts, row for row."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from exported import tuned_moe
from gguf import GGUFReader
from gguf.quants import dequantize
from pico_families import make_family
from safetensors.torch import load_file
from test_export import LLAMA3, export, logits_of, ours
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import manifest
from data.gguf_model import _undo_rope_permutation
from models.export.gguf_file import _frequencies
from models.merging import execute

HF = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
      "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
      "ffn_gate_inp": "block_sparse_moe.gate"}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
PLAIN = {"attention_bias": False, "mlp_bias": False}


@pytest.fixture(scope="module")
def home(pico, tmp_path_factory):
    results = tmp_path_factory.mktemp("home") / "results"
    tuned_moe(pico, results)
    return results


def values(folder):
    """llama.cpp's name -> fp32 values, in transformers' order of rows."""
    reader = GGUFReader(next(folder.glob("*.gguf")))
    heads = {"attn_q": int(reader.fields["llama.attention.head_count"].contents()),
             "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents())}
    found = {}
    for tensor in reader.tensors:
        array, part = dequantize(tensor.data, tensor.tensor_type), tensor.name.split(".")[-2]
        found[tensor.name] = _undo_rope_permutation(array, heads[part]) if part in heads else np.array(array)
    return found, reader


def as_mixtral(found):
    """The same under Mixtral's names."""
    made = {}
    for name, array in found.items():
        _, layer, part = (*name.split("."), "")[:3]
        if name in TOP:
            made[TOP[name]] = array
        elif part.endswith("_exps"):
            which = {"ffn_gate_exps": "w1", "ffn_up_exps": "w3", "ffn_down_exps": "w2"}[part]
            for expert, matrix in enumerate(array):
                made[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{which}.weight"] = matrix
        else:
            made[f"model.layers.{layer}.{HF[part]}.weight"] = array
    return made


@pytest.mark.parametrize("words", [("tuned", "--merge_expert", "safety"), ("tuned", "--average"), ("safety",),
                                   ("helpfulness=0.6,safety=0.4",)])
def test_transformers_reads_a_plain_model(home, pico, words):
    folder = export(home, pico, *words, "--layout", "gguf")
    file = next(folder.glob("*.gguf")).name
    plain = AutoModelForCausalLM.from_pretrained(export(home, pico, *words, "--layout", "dense"))
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
    # the file holds no head: it is the embedding, which transformers does not know of a GGUF
    read.lm_head.weight = read.model.embed_tokens.weight
    assert (logits_of(read) - logits_of(plain)).abs().max() < 1e-4
    tokenizer, own = AutoTokenizer.from_pretrained(folder, gguf_file=file), AutoTokenizer.from_pretrained(pico)
    text = "<|im_start|>user\nMix flour, 12 times, and water.<|im_end|>\n"
    assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text)
    assert tokenizer.chat_template == own.chat_template
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (own.eos_token_id, own.bos_token_id)


def test_the_experts_are_those_of_the_mixtral(home, pico):
    found, reader = values(export(home, pico, "tuned", "--layout", "gguf"))
    mixtral = load_file(export(home, pico, "tuned", "--layout", "mixtral") / "model.safetensors")
    mine = as_mixtral(found)
    assert set(mine) == set(mixtral)
    assert all(np.array_equal(mine[name], tensor.numpy()) for name, tensor in mixtral.items())
    said = {name: reader.fields[f"llama.{name}"].contents() for name in (
        "expert_count", "expert_used_count", "block_count", "feed_forward_length", "rope.dimension_count", "vocab_size")}
    assert said == {"expert_count": 3, "expert_used_count": 2, "block_count": 2, "feed_forward_length": 64,
                    "rope.dimension_count": 8, "vocab_size": 384}
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 384
    assert reader.fields["tokenizer.ggml.add_bos_token"].contents() is False


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8_0"])
def test_types(home, pico, kind):
    folder = export(home, pico, "tuned", "--layout", "gguf", "--out_dtype", kind, "--run_name", kind)
    found, reader = values(folder)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    wanted = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[kind]
    assert {name for name, own in kinds.items() if own == "F32"} == {
        "output_norm.weight", *(f"blk.{i}.{part}.weight" for i in range(2)
                                for part in ("attn_norm", "ffn_norm", "ffn_gate_inp"))}
    assert set(kinds.values()) == {"F32", wanted}
    assert reader.fields["general.file_type"].contents() == {"F16": 1, "BF16": 32, "Q8_0": 7}[wanted]
    exact = load_file(export(home, pico, "tuned", "--layout", "mixtral") / "model.safetensors")
    step = {"float16": 2**-11, "bfloat16": 2**-8, "q8_0": 1 / 127}[kind]
    for name, array in as_mixtral(found).items():
        whole, array = exact[name].numpy().reshape(-1, 32), array.reshape(-1, 32)
        # 8 bits: half a step of the largest of 32 neighbours, and the scale's own rounding to fp16
        scale = 0.6 * np.abs(whole).max(1, keepdims=True) if kind == "q8_0" else np.abs(whole)
        assert (np.abs(array - whole) <= step * scale + 1e-7).all(), name
    share = manifest.read(folder)["metrics"]["rounding"]
    assert 1e-4 < share < 0.2


def test_a_stopped_export_goes_on(home, pico, monkeypatch):
    want = next(export(home, pico, "tuned", "--layout", "gguf", "--run_name", "stop").glob("*.gguf")).read_bytes()
    shutil.rmtree(home / "outputs" / "stop")
    original, left = execute.Writer.put, [20]

    def stumbling(self, *rest):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        original(self, *rest)

    monkeypatch.setattr(execute.Writer, "put", stumbling)
    with pytest.raises(KeyboardInterrupt):
        export(home, pico, "tuned", "--layout", "gguf", "--run_name", "stop", "--threads", "1")
    assert not (home / "outputs" / "stop").exists()
    monkeypatch.setattr(execute.Writer, "put", original)
    folder = export(home, pico, "tuned", "--layout", "gguf", "--run_name", "stop")
    assert next(folder.glob("*.gguf")).read_bytes() == want
    metrics = manifest.read(folder)["metrics"]
    assert 0 < metrics["tensors_run"] < metrics["tensors"]


def test_llama_3_frequencies(tmp_path):
    base = make_family(tmp_path / "base", "llama", rope_parameters=LLAMA3, head_dim=16, **PLAIN)
    config = AutoConfig.from_pretrained(base)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 10000.0 ** (torch.arange(0, 16, 2).double() / 16)
    assert np.allclose(_frequencies(config), (plain / scaled).numpy(), rtol=1e-5)
    tuned_moe(base, tmp_path / "results")
    found, reader = values(export(tmp_path / "results", base, "tuned", "--layout", "gguf"))
    assert np.allclose(found["rope_freqs.weight"], (plain / scaled).numpy(), rtol=1e-5)
    # an untied head is a tensor of its own
    assert np.array_equal(found["output.weight"], load_file(base / "model.safetensors")["lm_head.weight"].numpy())
    assert ours(tmp_path / "results", base, "tuned").model.config.num_attention_heads == 4


@pytest.mark.parametrize(("kind", "settings", "said"), [
    ("mistral", {"sliding_window": 16}, "sliding_window is 16"), ("gemma", {}, "is a gemma"),
    ("llama", {"attention_bias": True}, ".bias, for which there is no place"),
    ("llama", PLAIN | {"hidden_act": "relu"}, "hidden_act is relu"),
    ("llama", PLAIN | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaled by dynamic")])
def test_what_has_no_place_is_refused(tmp_path, make_adapter, capsys, kind, settings, said):
    base = make_family(tmp_path / "base", kind, **settings)
    make_adapter(base, tmp_path / "outputs" / "task")
    with pytest.raises(SystemExit) as stop:
        export(tmp_path, base, "task", "--layout", "gguf")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "convert_hf_to_gguf.py" in error
    assert not (tmp_path / "outputs" / "task_gguf").exists()


@pytest.mark.parametrize(("change", "said"), [
    ({"normalizer": {"type": "NFC"}}, "normalizer NFC"),
    ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}]}}, "Digits")])
def test_a_tokenizer_that_llama_cpp_would_read_otherwise(pico, tmp_path, make_adapter, capsys, change, said):
    adapter = make_adapter(pico, tmp_path / "outputs" / "task")
    path = adapter / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SystemExit):
        export(tmp_path, pico, "task", "--layout", "gguf")
    assert said in capsys.readouterr().err


def test_eight_bits_are_for_gguf(home, pico, capsys):
    for layout, said in (("mixtral", "q8_0: is for --layout gguf"), ("peft", "drop it")):
        with pytest.raises(SystemExit):
            export(home, pico, "tuned", "--layout", layout, "--out_dtype", "q8_0")
        assert said in capsys.readouterr().err
