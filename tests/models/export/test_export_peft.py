"""--layout peft: every expert as an adapter that PEFT loads, exactly the expert; our own commands take it too."""

from __future__ import annotations

import json

import pytest
import torch
from exported import EXPERTS, tuned_moe
from peft import PeftModel
from pico import make_adapter
from pico_families import make_family
from test_export import export, logits_of
from transformers import AutoModelForCausalLM

from models import fuse
from models.llama_moe import main as build_moe


@pytest.fixture(scope="module")
def home(pico, tmp_path_factory):
    results = tmp_path_factory.mktemp("home") / "results"
    tuned_moe(pico, results)
    return results


def with_adapter(base, folder):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)


def written(results, base, *words):
    """The plain model of one expert, by the layout that test_export_dense.py holds to PEFT."""
    return AutoModelForCausalLM.from_pretrained(export(results, base, *words, "--layout", "dense"))


def test_every_expert_is_an_adapter(home, pico):
    folder = export(home, pico, "tuned", "--layout", "peft")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == list(EXPERTS)
    for rank, name in enumerate(EXPERTS):
        model = with_adapter(pico, folder / name)
        assert (logits_of(model) - logits_of(written(home, pico, "tuned", "--merge_expert", name))).abs().max() < 1e-4
        config = json.loads((folder / name / "adapter_config.json").read_text())
        # the raw MoE pads all experts to the largest rank, 5; the tuned ones have 2 more, attention has 2
        assert (config["r"], set(config["rank_pattern"].values())) == (7, {2}), rank
        assert set(config["target_modules"]) == {"gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"}
        assert (folder / name / "tokenizer.json").is_file()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "each as a PEFT adapter" in card
    assert "router is not part" in card


def test_the_factors_are_those_of_the_run(home, pico):
    """Concatenated, not multiplied out: B A is the sum of the parts to the last bits of fp32."""
    from safetensors.torch import load_file

    folder = export(home, pico, "tuned", "--layout", "peft", "--run_name", "exact")
    moe = load_file(home / "outputs" / "tuned" / "moe.safetensors")
    own = load_file(folder / "safety" / "adapter_model.safetensors")
    for i in range(2):
        a, b = (own[f"base_model.model.model.layers.{i}.mlp.up_proj.lora_{part}.weight"] for part in "AB")
        assert torch.equal(a, torch.cat([moe[f"layers.{i}.up.a"][1], moe[f"layers.{i}.up.tuned_a"][1]]))
        assert torch.equal(b, torch.cat([moe[f"layers.{i}.up.b"][1], moe[f"layers.{i}.up.tuned_b"][1] * 1.5], 1))


def test_the_average_is_one_adapter_and_a_run(home, pico):
    folder = export(home, pico, "tuned", "--layout", "peft", "--average")
    assert folder.name == "tuned_average_peft"
    assert (logits_of(with_adapter(pico, folder)) - logits_of(written(home, pico, "tuned", "--average"))).abs().max() < 1e-4
    # what is one adapter is a run: written into its base again, it is the same
    again = AutoModelForCausalLM.from_pretrained(export(home, pico, folder.name, "--layout", "dense"))
    assert (logits_of(again) - logits_of(with_adapter(pico, folder))).abs().max() < 1e-4


def test_our_commands_take_them(home, pico):
    folder = export(home, pico, "raw_moe", "--layout", "peft")
    words = ["--output_dir", str(home), "--model_name_or_path", str(pico)]
    fuse.main(["adapters", "--adapters", ",".join(str(folder / name) for name in EXPERTS), "--report", "false",
               "--run_name", "mean", "--output_dir", str(home)])
    build_moe([*words, "--experts", ",".join(str(folder / name) for name in EXPERTS), "--run_name", "twice"])
    one, two = (export(home, pico, run, "--layout", "dense", "--average") for run in ("raw_moe", "twice"))
    assert (logits_of(AutoModelForCausalLM.from_pretrained(one))
            - logits_of(AutoModelForCausalLM.from_pretrained(two))).abs().max() < 1e-4


def test_gate_and_up_in_one_matrix(tmp_path):
    base = make_family(tmp_path / "base", "phi3")
    for place, name in enumerate(EXPERTS):
        make_adapter(base, tmp_path / "results" / "outputs" / name, seed=place, targets=("gate_up_proj", "down_proj"))
    build_moe(["--model_name_or_path", str(base), "--output_dir", str(tmp_path / "results"), "--dtype", "float32"])
    folder = export(tmp_path / "results", base, "raw_moe", "--layout", "peft", "--merge_expert", "safety")
    adapter = with_adapter(base, tmp_path / "results" / "outputs" / "safety")
    assert (logits_of(with_adapter(base, folder)) - logits_of(adapter)).abs().max() < 1e-4


@pytest.mark.parametrize(("run", "said"), [("safety", "an adapter already"), ("safety=0.5,helpfulness=0.5",
                                                                              "models/fuse.py adapters --weights")])
def test_what_is_no_moe_is_refused(home, pico, capsys, run, said):
    with pytest.raises(SystemExit) as stop:
        export(home, pico, run, "--layout", "peft", "--run_name", "no")
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (home / "outputs" / "no").exists()


def test_a_promise_that_an_adapter_does_not_fit(home, pico, capsys):
    with pytest.raises(SystemExit):
        export(home, pico, "tuned", "--layout", "peft", "--run_name", "no", "--memory_gb", "0.00001")
    assert "an adapter is written whole" in capsys.readouterr().err
