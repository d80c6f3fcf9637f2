"""models/fuse.py: the sub-commands, and adapters fused by the command: exact, loadable, refused with a reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import config
from flags.fuse import ADAPTER_METHODS as NAMES
from models.adapters.files import read_adapter
from models.adapters.methods import ADAPTER_METHODS
from models.fuse import COMMANDS, main

OBJECTIVES = ("helpfulness", "safety", "truthfulness")
NEEDS = {name: ("--density", "0.4") for name in ("ties", "dare_linear", "dare_ties", "magnitude_prune", "knots")}


@pytest.fixture
def fuse(pico, adapters):
    """Run `fuse.py adapters`; returns the folder of the result."""
    def run(*flags, name="fused"):
        main(["adapters", "--model_name_or_path", str(pico), "--output_dir", str(adapters), "--run_name", name,
              "--overwrite", "--report", "false", *flags])
        return adapters / "outputs" / name
    return run


@pytest.fixture
def fails(fuse, adapters, capsys):
    """Run `fuse.py adapters`, which must end with code 2 and leave nothing; returns what it said."""
    def run(*flags):
        with pytest.raises(SystemExit) as stop:
            fuse(*flags, name="bad")
        assert stop.value.code == 2
        assert not (adapters / "outputs" / "bad").exists()
        return capsys.readouterr().err
    return run


def delta(adapter, module):
    a, b = adapter.modules[module]
    return b @ a


def parts(adapters, names=OBJECTIVES):
    return [read_adapter(adapters / "outputs" / n) for n in names]


def expected(adapters, weights, module):
    return sum(w * delta(part, module) for w, part in zip(weights, adapters, strict=True))


def test_the_table_of_flags_is_the_table_of_methods():
    assert tuple(ADAPTER_METHODS) == NAMES
    assert all(row.source for row in ADAPTER_METHODS.values())


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize(("flags", "weights"), [((), (1 / 3, 1 / 3, 1 / 3)), (("--weights", "0.5,-1,2"), (0.5, -1, 2))])
def test_the_sum_is_exact(adapters, fuse, method, flags, weights):
    fused = read_adapter(fuse("--method", method, *flags))
    trained = parts(adapters)
    assert set(fused.modules) == set(trained[0].modules)
    for module in fused.modules:
        torch.testing.assert_close(delta(fused, module), expected(trained, weights, module), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", NAMES)
def test_peft_loads_every_method_with_the_logits_of_its_change(pico, fuse, method):
    folder = fuse("--method", method, *NEEDS.get(method, ()))
    ids = torch.arange(10, 26)[None]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico), folder)
    dense = AutoModelForCausalLM.from_pretrained(pico)
    with torch.no_grad():
        plain = dense(ids).logits
        for module in (fused := read_adapter(folder)).modules:
            dense.get_submodule(module).weight += delta(fused, module)
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)
        assert (dense(ids).logits - plain).abs().max() > 0.01


def test_the_configuration_is_what_vllm_reads(fuse):
    content = json.loads((fuse("--method", "svd", "--rank", "6") / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"], content["bias"]) == (6, 6, "none")
    assert not any(content[flag] for flag in ("use_rslora", "use_dora", "modules_to_save", "rank_pattern"))
    assert content["target_modules"] == ["down_proj", "gate_proj", "up_proj"]


def test_ranks_that_vllm_cannot_serve_are_noted(fuse, capsys, monkeypatch):
    fuse("--method", "svd", "--rank", "3")
    assert "vLLM" not in capsys.readouterr().out
    monkeypatch.setattr("models.adapters.files.VLLM_RANKS", (1, 2))
    fuse("--method", "svd", "--rank", "3")
    assert "vLLM serves ranks up to 2" in capsys.readouterr().out


def test_the_truncation_error_is_the_true_one(adapters, fuse):
    folder = fuse("--method", "svd", "--rank", "5", "--weights", "0.6,0.3,0.1")
    fused, trained = read_adapter(folder), parts(adapters)
    for row in json.loads((folder / "truncation.json").read_text()):
        want = expected(trained, (0.6, 0.3, 0.1), row["module"])
        off = (delta(fused, row["module"]) - want).norm() / want.norm()
        best = torch.linalg.svdvals(want)[5:].norm() / want.norm()
        assert row["rank"] == 5
        assert row["error"] == pytest.approx(float(off), rel=1e-3)
        assert row["error"] == pytest.approx(float(best), rel=1e-3)


def test_an_energy_picks_the_smallest_rank_that_keeps_it(adapters, fuse):
    folder = fuse("--method", "svd", "--energy", "0.8")
    trained = parts(adapters)
    content = json.loads((folder / "adapter_config.json").read_text())
    ranks = set()
    for row in json.loads((folder / "truncation.json").read_text()):
        values = torch.linalg.svdvals(expected(trained, (1 / 3,) * 3, row["module"]))
        kept = values.square().cumsum(0) / values.square().sum()
        assert kept[row["rank"] - 1] >= 0.8
        assert row["rank"] == 1 or kept[row["rank"] - 2] < 0.8
        ranks.add(row["rank"])
    assert content["r"] == content["lora_alpha"] == max(ranks)
    assert content["rank_pattern"] == content["alpha_pattern"]


def test_weights_by_layer_in_flags_and_in_a_file(adapters, fuse, tmp_path):
    names = ("helpfulness", "safety")
    trained = parts(adapters, names)
    (tmp_path / "layers.yaml").write_text("1: [0.9, 0.1]\n")
    for layers in ("1:0.9,0.1", str(tmp_path / "layers.yaml")):
        fused = read_adapter(fuse("--adapters", ",".join(names), "--weights", "0.5,0.2", "--layer_weights", layers))
        for module in fused.modules:
            weights = (0.9, 0.1) if ".1." in module else (0.5, 0.2)
            torch.testing.assert_close(delta(fused, module), expected(trained, weights, module), atol=1e-6, rtol=1e-5)


def test_scale_multiplies_the_change(fuse):
    one, three = (read_adapter(fuse("--method", "ties", "--density", "0.5", "--scale", s)) for s in ("1", "3"))
    for module in one.modules:
        torch.testing.assert_close(delta(three, module), 3 * delta(one, module), atol=1e-5, rtol=1e-4)


def test_the_same_command_gives_the_same_bytes_and_the_seed_matters(fuse):
    flags = ("--method", "dare_ties", "--density", "0.5")
    first = (fuse(*flags) / "adapter_model.safetensors").read_bytes()
    assert (fuse(*flags) / "adapter_model.safetensors").read_bytes() == first
    assert (fuse(*flags, "--seed", "1") / "adapter_model.safetensors").read_bytes() != first


def test_manifest_and_registry_record_the_run(adapters, fuse):
    folder = fuse("--method", "svd", "--rank", "2")
    content = json.loads((folder / "manifest.json").read_text())
    assert content["inputs"]["base"] == json.loads((adapters / "outputs/safety/manifest.json").read_text())["inputs"]["base"]
    assert set(content["inputs"]) == {*OBJECTIVES, "base"}
    assert 0 < content["metrics"]["truncation_error"] < content["metrics"]["worst_error"] < 1
    assert json.loads((adapters / "registry.jsonl").read_text().splitlines()[-1])["command"] == "fuse adapters"


@pytest.mark.parametrize(("flags", "says"), [
    (("--weights", "1,2"), "3 adapters need as many weights"),
    (("--weights", "1,x,2"), "needs numbers"),
    (("--weights", "1,nan,2"), "finite"),
    (("--adapters", "helpfulness,nothing"), "adapter 'nothing'"),
    (("--adapters", "helpfulness,helpfulness"), "the same adapter twice"),
    (("--method", "tie"), "did you mean ties"),
    (("--method", "ties"), "--density: ties needs one"),
    (("--method", "svd", "--density", "0.5"), "svd takes none"),
    (("--method", "cat", "--rank", "4"), "cat takes none"),
    (("--method", "knots", "--density", "0.5", "--space", "dense"), "knots takes none"),
    (("--method", "ties", "--density", "0"), "above 0"),
    (("--method", "svd", "--rank", "4", "--energy", "0.9"), "give one of the two"),
    (("--method", "svd", "--energy", "1"), "at most 0.9999"),
    (("--method", "lego", "--weights", "1,-1,1"), "weights of 0 and more"),
    (("--scale", "inf"), "finite"),
    (("--layer_weights", "0-1:1,2"), "3 adapters need as many finite weights"),
    (("--layer_weights", "0-1:1,1,1;1:2,2,2"), "layer 1 stands there twice"),
    (("--layer_weights", "5:1,1,1"), "no adapter trains layer 5; allowed: 0, 1"),
    (("--layer_weights", "3-1:1,1,1"), "no such range"),
    (("--layer_weights", "nonsense"), "needs the form"),
    (("--layer_weights", "missing.yaml"), "not readable"),
    (("--compat", "peft", "--method", "knots", "--density", "0.5"), "PEFT has no such combination type"),
    (("--compat", "peft", "--method", "linear", "--space", "dense"), "PEFT has no such combination type"),
    (("--compat", "peft", "--space", "core"), "PEFT works on factors"),
])
def test_bad_input(fails, flags, says):
    assert says in fails(*flags)


def test_the_result_cannot_replace_an_input(adapters, capsys):
    with pytest.raises(SystemExit):
        main(["adapters", "--output_dir", str(adapters), "--run_name", "safety", "--overwrite"])
    assert "is an input of this fusion" in capsys.readouterr().err
    assert (adapters / "outputs" / "safety" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("words", [[], ["average"], ["--adapters", "a,b"]])
def test_without_a_sub_command_they_are_listed(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert f"needs one of {', '.join(COMMANDS)} first" in capsys.readouterr().err


def test_help_lists_the_sub_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(f"\n    {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_sub_command_loads_no_torch(name):
    run = subprocess.run([sys.executable, "-X", "importtime", "fuse.py", name, "--help"], cwd=config.ROOT / "models",
                         capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(config.ROOT)}, check=False)
    assert run.returncode == 0, run.stderr[-500:]
    assert "--run_name" in run.stdout
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in run.stderr.splitlines() if "|" in line}
    assert not loaded & {"torch", "numpy", "transformers", "peft"}
