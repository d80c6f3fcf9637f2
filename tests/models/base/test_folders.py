"""Bases that cannot be opened, or would be opened as something else: one sentence each, before any weight is read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pico import make_pico
from safetensors.torch import load_file, save_file

from errors import UserError
from models.base import folders
from models.base.loading import base_path, load_base

CPU = torch.device("cpu")


@pytest.fixture
def base(tmp_path):
    return make_pico(tmp_path / "base")


@pytest.fixture
def shards(base, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(out, max_shard_size="40KB")
    for file in base.glob("*token*"):
        shutil.copy(file, out)
    assert len(list(out.glob("*.safetensors"))) > 2
    return out, sorted(out.glob("*.safetensors"))[1]


def refused(folder, use=folders.CAUSAL):
    with pytest.raises(UserError) as error:
        base_path(str(folder), use=use)
    return error.value.problems


def settings(base, **changes):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"


@pytest.mark.parametrize(("damage", "says"), [
    (lambda file: file.unlink(), "which is not in the folder"),
    (lambda file: file.write_bytes(file.read_bytes()[:2000]), "cut short"),
    (lambda file: file.write_bytes(b""), "0 bytes are no safetensors file"),
    (lambda file: file.write_text(POINTER), "a Git LFS pointer, which stands for the weights"),
])
@pytest.mark.parametrize("use", [folders.CAUSAL, folders.TENSORS])
def test_damaged_shards(shards, damage, says, use):
    folder, shard = shards
    damage(shard)
    (problem,) = refused(folder, use)
    assert problem.startswith(f"--model_name_or_path {folder}: ")
    assert shard.name in problem
    assert says in problem


def test_a_single_file_that_is_a_pointer(base):
    (base / "model.safetensors").write_text(POINTER)
    assert "git lfs pull" in refused(base)[0]


@pytest.mark.parametrize(("content", "says"), [
    (POINTER, "Git LFS pointer"), ("{", "cannot be read"), ("[]", "not a JSON object")])
def test_a_damaged_config(base, content, says):
    (base / "config.json").write_text(content)
    (problem,) = refused(base)
    assert "config.json" in problem
    assert says in problem


@pytest.mark.parametrize(("changes", "says"), [
    ({"model_type": "llama9"}, "model_type 'llama9' is not known to transformers"),
    ({"model_type": "internlm2", "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}},
     "Python code of its own (auto_map in config.json), which is never executed"),
    ({"model_type": None}, "names no model_type"),
    ({"model_type": "clip"}, "model_type 'clip' is no language model"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised (gptq, 4 bits)"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised (awq, 4 bits)"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantised (bitsandbytes, 4 bits)"),
    ({"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}}, "quantised (compressed-tensors)"),
])
def test_configurations(base, changes, says):
    settings(base, **changes)
    (problem,) = refused(base)
    assert says in problem


def test_an_architecture_is_asked_for_only_where_it_runs(base):
    settings(base, model_type="llama9")
    assert base_path(str(base), use=folders.TENSORS) == base.resolve()
    settings(base, quantization_config={"quant_method": "gptq"})
    assert "quantised (gptq)" in refused(base, folders.TENSORS)[0]


def test_remote_code_of_a_known_architecture_is_not_needed(base):
    # Phi-3's uploads name code that transformers has a class of its own for
    settings(base, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"})
    assert base_path(str(base)) == base.resolve()


@pytest.mark.parametrize(("name", "value", "says"), [
    ("model.layers.0.mlp.up_proj.qweight", torch.ones(2, dtype=torch.int32), "GPTQ or AWQ codes"),
    ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(2), "FP8 scales"),
    ("model.layers.0.mlp.up_proj.SCB", torch.ones(2), "bitsandbytes' scales"),
    ("model.layers.0.mlp.up_proj.weight.absmax", torch.ones(2), "bitsandbytes' scales"),
    ("x", torch.ones(2).to(torch.float8_e4m3fn), "is F8_E4M3"),
])
def test_quantised_weights_without_a_word_in_the_config(base, name, value, says):
    save_file(load_file(base / "model.safetensors") | {name: value}, base / "model.safetensors")
    (problem,) = refused(base)
    assert says in problem


def test_pickles(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    (problem,) = refused(base)
    assert "pickled weights may run code" in problem
    assert "save_pretrained" in problem


def test_gguf_files_and_folders(tmp_path):
    file = tmp_path / "model.Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    for given in (file, tmp_path):
        (problem,) = refused(given)
        assert "turn it into a folder once" in problem
        assert "gguf_file='model.Q4_K_M.gguf'" in problem


def test_the_headers_alone_are_read(base, monkeypatch):
    monkeypatch.setattr(folders.Checkpoint, "read", lambda *_: pytest.fail("values were read"))
    assert base_path(str(base)) == base.resolve()


def test_weights_that_are_missing_or_left_over_are_errors(base):
    weights = load_file(base / "model.safetensors")
    form = {"format": "pt"}
    lost = {name: value for name, value in weights.items() if name != "model.layers.1.mlp.up_proj.weight"}
    save_file(lost, base / "model.safetensors", metadata=form)
    with pytest.raises(UserError, match=r"lacks weights of LlamaForCausalLM, 1 of .*model.layers.1.mlp.up_proj.weight"):
        load_base(base, torch.float32, CPU)
    save_file(weights | {"model.layers.0.mlp.up_proj.bias": torch.ones(64)}, base / "model.safetensors", metadata=form)
    with pytest.raises(UserError, match=r"no part of LlamaForCausalLM, 1 of them, e.g. model.layers.0.mlp.up_proj.bias"):
        load_base(base, torch.float32, CPU)
    save_file(weights | {"model.norm.weight": torch.ones(31)}, base / "model.safetensors", metadata=form)
    with pytest.raises(UserError, match="other shapes than its config.json says"):
        load_base(base, torch.float32, CPU)


def test_a_repository_of_the_hub_with_pickles_alone_says_how_to_convert_it(tmp_path, monkeypatch):
    """They are never fetched, so that the snapshot is without weights; a folder of the name takes its place."""
    import huggingface_hub

    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "snapshot"))
    for use, kind in ((folders.CAUSAL, "CausalLM"), (folders.CLASSIFIER, "SequenceClassification")):
        with pytest.raises(UserError, match=rf"no \*.safetensors.*AutoModelFor{kind}.from_pretrained\('old/model'\)"):
            base_path("old/model", use=use)
    monkeypatch.chdir(tmp_path)
    make_pico(tmp_path / "old" / "model")
    assert base_path("old/model") == tmp_path / "old" / "model"


@pytest.mark.parametrize("command", ["inference", "align", "score", "llama_moe", "extract", "realign", "judge"])
def test_every_command_says_so(base, shards, tmp_path, capsys, command):
    from pico import make_adapter

    import align_basemodel
    import inference
    from evaluator import evaluate_safety, evaluate_utility
    from models import fuse, llama_moe

    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "Hi"}\n')
    for name in ("one", "two", "three"):
        make_adapter(base, tmp_path / "results" / "outputs" / name, seed=len(name))
    folder, shard = shards
    shard.write_text(POINTER)
    common = ["--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "results")]
    answers = tmp_path / "answers.csv"
    answers.write_text("prompt,response\nHi,Hello there\n")
    main, flags = {
        "inference": (inference.main, [*common, "--task_name", "safety", "--data_path", str(prompts)]),
        "align": (align_basemodel.main, [*common, "--moe_flag", "0", "--task_name", "safety", "--max_steps", "1"]),
        "score": (evaluate_utility.main, [*common, "--task_name", "raw", "--tasks", "probes"]),
        "llama_moe": (llama_moe.main, [*common, "--experts", "one,two,three"]),
        "extract": (fuse.main, ["extract", *common, "--tuned", str(base), "--run_name", "e"]),
        "realign": (fuse.main, ["realign", "--aligned", str(folder), "--tasks", "one", "--run_name", "r", *common]),
        "judge": (evaluate_safety.main, ["--answers", str(answers), "--judges", f"guard={folder}",
                                         "--output_dir", str(tmp_path / "results")]),
    }[command]
    with pytest.raises(SystemExit) as stop:
        main(flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "a Git LFS pointer" in said, said
