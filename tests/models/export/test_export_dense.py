"""--layout dense: adapters, sums, one expert or the average in a plain model's weights, as PEFT merges them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from exported import EXPERTS, tuned_moe
from peft import PeftModel
from pico_families import make_family
from safetensors.torch import load_file, save_file
from test_export import export, layers_of, logits_of, ours
from transformers import AutoModelForCausalLM

import manifest
from models import fuse


@pytest.fixture(scope="module")
def home(pico, tmp_path_factory):
    results = tmp_path_factory.mktemp("home") / "results"
    tuned_moe(pico, results)
    return results


def peft_merged(base, folder):
    """The state of PEFT's own merge, in fp32."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    return model.merge_and_unload().state_dict()


def same(folder, wanted, atol=1e-6):
    """Whether a folder's model has the tensors of a state, and no other."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert set(state) == set(wanted)
    return all(torch.allclose(state[name], tensor, atol=atol) for name, tensor in wanted.items())


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"alpha_pattern": {"layers.1.mlp.up_proj": 7}},
                                     {"targets": ("q_proj", "o_proj", "down_proj")}, {"targets": ("lm_head", "v_proj")}])
def test_an_adapter_is_what_peft_merges(pico, tmp_path, make_adapter, options):
    """Also on a tied head, which gets a weight of its own: PEFT's merge gives the embedding the head's change."""
    adapter = make_adapter(pico, tmp_path / "results" / "outputs" / "task", **options)
    folder = export(tmp_path / "results", pico, "task", "--layout", "dense")
    if "lm_head" not in options.get("targets", ()):
        assert same(folder, peft_merged(pico, adapter))
    # unmerged PEFT is what was trained
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico, dtype=torch.float32), adapter)
    there = AutoModelForCausalLM.from_pretrained(folder)
    assert (logits_of(there) - logits_of(model)).abs().max() < 1e-4
    assert there.config.tie_word_embeddings is ("lm_head" not in options.get("targets", ()))


@pytest.mark.parametrize("kind", ["gemma2", "phi3", "qwen2", "gpt2", "cohere"])
def test_any_family_with_an_adapter(tmp_path, make_adapter, kind):
    targets = {"phi3": ("gate_up_proj", "qkv_proj"), "gpt2": ("c_attn", "c_fc")}.get(kind, ("q_proj", "down_proj"))
    base = make_family(tmp_path / "base", kind)
    adapter = make_adapter(base, tmp_path / "results" / "outputs" / "task", targets=targets,
                           **({"fan_in_fan_out": True} if kind == "gpt2" else {}))
    assert same(export(tmp_path / "results", base, "task", "--layout", "dense"), peft_merged(base, adapter))


@pytest.mark.parametrize("run", ["helpfulness=0.6,safety=0.4", "helpfulness@0.6_safety@0.4", "safety=-0.5"])
def test_a_weighted_sum_is_what_inference_answers_with(home, pico, caplog, run):
    with caplog.at_level("INFO"):
        folder = export(home, pico, run, "--layout", "dense")
    assert f"next: transformers serve {folder}" in caplog.text
    named = "safety@-0.5" if run.startswith("safety") else "helpfulness@0.6_safety@0.4"
    assert folder.name == f"{named}_dense"
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = ours(home, pico, named).model
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.state_dict().values(), wanted.state_dict().values(),
                                                               strict=True))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ("adapter `safety` times -0.5" if run.startswith("safety") else "adapter `helpfulness` times 0.6") in card


@pytest.mark.parametrize("expert", [0, 2])
def test_one_expert_of_a_moe(home, pico, expert):
    folder = export(home, pico, "tuned", "--layout", "dense", "--merge_expert", EXPERTS[expert])
    assert folder.name == f"tuned_{EXPERTS[expert]}_dense"
    moe = layers_of(home, pico, "tuned")
    wanted = {name: tensor for name, tensor in moe.state_dict().items() if "mlp" not in name and ".lora_" not in name}
    wanted = {name.replace(".base_layer", ""): tensor for name, tensor in wanted.items()}
    for i, layer in enumerate(moe.model.layers):
        own = layer.mlp.materialise(expert)
        wanted |= {f"model.layers.{i}.mlp.{name}_proj.weight": matrix for name, matrix in own.items()}
    assert same(folder, wanted)
    assert "was not scored by itself" in (folder / "README.md").read_text(encoding="utf-8")


def test_an_expert_of_a_raw_moe_is_its_adapter(home, pico):
    folder = export(home, pico, "raw_moe", "--layout", "dense", "--merge_expert", "safety")
    assert same(folder, peft_merged(pico, home / "outputs" / "safety"))


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_the_average_of_the_experts(tmp_path, kind):
    """Phi-3 keeps gate and up in one matrix, so that changes are added to halves of it; Llama's FFN has biases here."""
    base = make_family(tmp_path / "base", kind)
    if kind == "phi3":
        from pico import make_adapter

        for place, name in enumerate(EXPERTS):
            make_adapter(base, tmp_path / "results" / "outputs" / name, seed=place, targets=("gate_up_proj", "down_proj"))
        from models.llama_moe import main
        main(["--model_name_or_path", str(base), "--output_dir", str(tmp_path / "results"), "--router_init", "random",
              "--run_name", "tuned", "--dtype", "float32"])
    else:
        tuned_moe(base, tmp_path / "results")
    folder = export(tmp_path / "results", base, "tuned", "--layout", "dense", "--average")
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for i, layer in enumerate(layers_of(tmp_path / "results", base, "tuned").model.layers):
        experts = [layer.mlp.materialise(e) for e in range(3)]
        mean = {name: sum(e[name] for e in experts) / 3 for name in ("gate", "up", "down")}
        found = {name: state.get(f"model.layers.{i}.mlp.{name}_proj.weight") for name in mean}
        if kind == "phi3":
            found["gate"], found["up"] = state[f"model.layers.{i}.mlp.gate_up_proj.weight"].chunk(2)
        assert all(torch.allclose(found[name], mean[name], atol=1e-6) for name in mean)


def test_a_base_saved_without_its_head_s_prefix(pico, tmp_path, make_adapter):
    """layers.0 instead of model.layers.0, as AutoModel saves; and a copy of the tied head, which is left out."""
    base = shutil.copytree(pico, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    adapter = make_adapter(pico, tmp_path / "results" / "outputs" / "task")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (adapter / "manifest.json").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    folder = export(tmp_path / "results", base, "task", "--layout", "dense")
    assert same(folder, peft_merged(pico, adapter))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_what_is_written_can_be_merged(home, pico):
    """What README promises: an adapter becomes an input of fuse.py merge."""
    folders = [export(home, pico, name, "--layout", "dense", "--run_name", f"{name}_full") for name in EXPERTS]
    fuse.main(["merge", "--method", "linear", "--models", ",".join(folder.name for folder in folders), "--output_dir",
               str(home), "--run_name", "mean"])
    fuse.main(["adapters", "--output_dir", str(home), "--run_name", "average", "--report", "false"])
    assert same(home / "outputs" / "mean", peft_merged(pico, home / "outputs" / "average"), atol=2e-6)


def test_an_adapter_that_does_not_fit_and_a_plain_model_are_refused(home, pico, tmp_path, make_adapter, capsys):
    other = make_family(tmp_path / "base", "llama")
    make_adapter(other, home / "outputs" / "foreign")
    for words, said in ((("foreign",), "was trained on another base"), (("foreign=1,safety=x",), "not a number"),
                        (("foreign=0.5,gone=0.5",), "run 'gone'")):
        with pytest.raises(SystemExit) as stop:
            export(home, pico, *words, "--layout", "dense")
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    assert not (home / "outputs" / "foreign_dense").exists()
    export(home, pico, "safety", "--layout", "dense", "--run_name", "whole")
    with pytest.raises(SystemExit):
        export(home, pico, "whole", "--layout", "dense")
    assert "is a plain model already" in capsys.readouterr().err


def test_a_retrained_adapter_is_another_export(pico, tmp_path, make_adapter, capsys):
    task = make_adapter(pico, tmp_path / "outputs" / "task")
    folder = export(tmp_path, pico, "task", "--layout", "dense")
    assert manifest.read(folder)["inputs"].keys() == {"base", "task", "task (configuration)"}
    shutil.rmtree(task)
    make_adapter(pico, task, seed=9)
    with pytest.raises(SystemExit):
        export(tmp_path, pico, "task", "--layout", "dense")
    assert "another configuration" in capsys.readouterr().err
    assert same(export(tmp_path, pico, "task", "--layout", "dense", "--overwrite"), peft_merged(pico, task))
