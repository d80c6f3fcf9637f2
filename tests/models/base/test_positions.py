"""How many tokens a model reads, and rows beyond them."""

from __future__ import annotations

import json

import pytest
import transformers
from pico import make_pico

import align_basemodel
from errors import UserError
from models.base.positions import check_rows, positions

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "rope_theta": 500000.0}


@pytest.mark.parametrize(("made", "expected"), [
    (transformers.LlamaConfig(max_position_embeddings=2048), 2048),
    # Vicuna 16k: 4096 positions, stretched
    (transformers.LlamaConfig(max_position_embeddings=4096, rope_parameters={
        "rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}), 16384),
    # Qwen 2.5 with YaRN: the factor is not in the number yet
    (transformers.Qwen2Config(max_position_embeddings=32768, rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}), 131072),
    # DeepSeek's kind: it is
    (transformers.LlamaConfig(max_position_embeddings=163840, rope_parameters={
        "rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "rope_theta": 1e4}), 163840),
    # Llama 3.1: the number is the whole reach, and its factor no multiple of anything
    (transformers.LlamaConfig(max_position_embeddings=131072, rope_parameters=LLAMA3), 131072),
    (transformers.GPT2Config(n_positions=1024), 1024),
    (transformers.MambaConfig(), None),
])
def test_positions(made, expected):
    assert positions(made) == expected


def test_each_kind_of_layer_has_its_own_rope():
    made = transformers.Gemma3TextConfig(max_position_embeddings=8192, rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}})
    assert positions(made) == 65536


def test_rows_beyond_the_positions_are_refused(tmp_path):
    base = make_pico(tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "max_position_embeddings": 32}))
    check_rows(base, [5, 32], 64)
    with pytest.raises(UserError, match=r"--model_max_length 64: 2 of 3 rows are longer than the 32 positions of this base "
                                        r"\(the longest: 64 tokens\); give --model_max_length 32"):
        check_rows(base, [5, 33, 64], 64)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_training_refuses_them_before_the_model_is_read(tmp_path, method, capsys, monkeypatch):
    base = make_pico(tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**content, "max_position_embeddings": 48}))
    monkeypatch.setattr("training.sft.load_base", lambda *_: pytest.fail("a model was loaded"))
    rows = [{"prompt": f"Bread {i}?", "chosen": "bake " * 60, "rejected": "no " * 60} for i in range(3)]
    data = tmp_path / "rows.json"
    if method == "sft":
        rows = [{"prompt": row["prompt"], "output": row["chosen"]} for row in rows]
    data.write_text(json.dumps(rows))
    with pytest.raises(SystemExit) as stopped:
        align_basemodel.main(["--moe_flag", "0", "--task_name", "safety", "--method", method, "--data_path", str(data),
                              "--model_name_or_path", str(base), "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "3 of 3 rows are longer than the 48 positions of this base" in capsys.readouterr().err
