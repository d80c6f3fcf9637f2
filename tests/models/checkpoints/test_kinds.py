"""Quantised and packed weights, and folders that hold something else, by name: from the configuration, from the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import make_checkpoint

from errors import UserError
from models import fuse
from models.checkpoints.header import KINDS, TensorInfo
from models.checkpoints.kinds import other_kind, packed
from models.checkpoints.reader import Checkpoint

UP = "model.layers.0.mlp.up_proj"


def infos(*tensors: tuple[str, str]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, dtype, (4, 4), Path("f"), 0, 16 * KINDS[dtype][0]) for name, dtype in tensors}


@pytest.mark.parametrize(("tensors", "what"), [
    ([(f"{UP}.qweight", "I32"), (f"{UP}.qzeros", "I32"), (f"{UP}.scales", "F16")], "GPTQ or AWQ"),
    ([(f"{UP}.g_idx", "I32"), (f"{UP}.qweight", "I32")], "GPTQ"),
    ([(f"{UP}.weight", "U8"), (f"{UP}.weight.absmax", "F32"), (f"{UP}.weight.quant_map", "F32"),
      (f"{UP}.weight.quant_state.bitsandbytes__nf4", "U8")], "bitsandbytes 4-bit"),
    ([(f"{UP}.weight", "I8"), (f"{UP}.SCB", "F32")], "bitsandbytes int8"),
    ([(f"{UP}.weight", "F8_E4M3"), (f"{UP}.weight_scale_inv", "F32")], "FP8"),
    ([(f"{UP}.weight", "F8_E5M2")], "FP8"),
    ([(f"{UP}.weight", "I8"), (f"{UP}.weight_scale", "BF16")], "FP8 or int8"),
    ([(f"{UP}.weight_packed", "I32"), (f"{UP}.weight_scale", "BF16"), (f"{UP}.weight_shape", "I64")], "compressed-tensors"),
    ([("model.layers.0.mlp.experts.gate_up_proj_blocks", "U8"), ("model.layers.0.mlp.experts.gate_up_proj_scales", "U8")],
     "MXFP4"),
    ([(f"{UP}.W_q", "U8"), (f"{UP}.zero", "F16")], "HQQ"),
    ([(f"{UP}.weight", "I8"), (f"{UP}.weight_scales", "F16")], "EETQ"),
    ([(f"{UP}.weight._data", "I8"), (f"{UP}.weight._scale", "F16")], "Quanto"),
    ([(f"{UP}.codes", "I16"), (f"{UP}.codebooks", "F16")], "AQLM"),
    ([("model.embed_tokens.weight", "U8")], "codes"),
    ([(f"{UP}.weight", "C64")], "codes"),
])
def test_tensors_tell_without_a_configuration(tensors, what):
    assert what in (packed(infos(*tensors), {}) or "")


@pytest.mark.parametrize(("config", "what"), [
    ({"quantization_config": {"quant_method": "fp8"}}, "FP8"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes 4-bit"),
    ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
    ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "MXFP4"),
    ({"compression_config": {"format": "pack-quantized"}}, "compressed-tensors"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
])
def test_a_configuration_tells_without_tensors(config, what):
    assert what in packed(infos((f"{UP}.weight", "BF16")), config)


@pytest.mark.parametrize("name", ["transformer.h.0.attn.bias", "vision.embeddings.position_ids",
                                  "bn.num_batches_tracked"])
def test_buffers_of_whole_numbers_are_no_codes(name):
    assert packed(infos((name, "I64"), ("w.weight", "BF16"), ("model.layers.0.mlp.gate.e_score_correction_bias", "F32")),
                  {"num_hidden_layers": 2, "text_config": {"x": 1}}) is None


@pytest.fixture
def quantised(tmp_path) -> Path:
    """A base, a tuned model, and the tuned model as bitsandbytes stores it in nf4, without a word in its config.json."""
    base = make_checkpoint(tmp_path / "base", scale=0.5)
    tuned = make_checkpoint(tmp_path / "tuned", seed=1, base=base)
    make_checkpoint(tmp_path / "nf4", seed=1, base=base)
    tensors = {}
    for name, value in load_file(tuned / "model.safetensors").items():
        if "proj" in name:
            tensors |= {name: torch.zeros(value.numel() // 2, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(4),
                        f"{name}.quant_map": torch.ones(16),
                        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8)}
        else:
            tensors[name] = value
    save_file(tensors, tmp_path / "nf4" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("words", [
    ["merge", "--method", "linear", "--models", "$tuned,$nf4"],
    ["merge", "--method", "ties", "--base_model", "$nf4", "--models", "$tuned", "--parameters", "density=0.5"],
    ["realign", "--model_name_or_path", "$base", "--tasks", "$nf4", "--trust_base"],
    ["realign", "--model_name_or_path", "$nf4", "--tasks", "$tuned", "--trust_base"],
    ["extract", "--model_name_or_path", "$base", "--tuned", "$nf4"],
    ["extract", "--model_name_or_path", "$nf4", "--tuned", "$tuned"],
], ids=" ".join)
def test_every_command_refuses_them_before_it_writes(quantised, capsys, words):
    words = [word.replace("$", f"{quantised}/") for word in words]
    with pytest.raises(SystemExit) as stopped:
        fuse.main([*words, "--output_dir", str(quantised / "r")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert f"{quantised}/nf4" in said
    assert "quantised" in said
    assert "dequantise" in said
    assert not (quantised / "r" / "outputs").exists()


@pytest.mark.parametrize(("files", "says"), [
    (["model-Q4_K_M.gguf", "config.json"], "gguf_file"),
    (["moe.safetensors", "moe_config.json"], "fused MoE"),
    (["mask.safetensors", "mask.json"], "realign --method mask --mask"),
    (["adapter_model.safetensors", "adapter_config.json"], "models/fuse.py adapters"),
])
def test_what_is_no_checkpoint_is_called_what_it_is(tmp_path, capsys, files, says):
    plain = make_checkpoint(tmp_path / "plain")
    odd = tmp_path / "odd"
    odd.mkdir()
    for file in files:
        if file.endswith(".safetensors"):
            save_file({"x": torch.ones(2)}, odd / file)
        else:
            (odd / file).write_text(json.dumps({}))
    assert says in other_kind(odd)
    with pytest.raises(UserError, match=says):
        Checkpoint.open(odd)
    with pytest.raises(SystemExit) as stopped:
        fuse.main(["merge", "--method", "linear", "--models", f"{plain},{odd}", "--output_dir", str(tmp_path / "r")])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_a_gguf_file_is_called_what_it_is(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="GGUF"):
        Checkpoint.open(file)
