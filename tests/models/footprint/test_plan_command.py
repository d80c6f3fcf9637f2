"""--plan: what is told, what does not fit and what would, and that nothing is loaded or written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest

import align_basemodel
import config
import inference
from config import ROOT
from errors import UserError
from evaluator import evaluate_refusal, evaluate_safety
from flags import AlignArgs, LeaderboardArgs
from models import fuse, llama_moe
from models.footprint import command
from models.footprint.shapes import shape_of
from models.footprint.strategies import Footprint, divided

EXPERT = ("--preset", "h3fusion", "--moe_flag", "0", "--task_name", "helpfulness", "--plan")
MASK = ("--preset", "somf_tinyllama", "--method", "mask", "--tasks", "a", "--plan")
#: Every command that has a plan, for a base that lies nowhere here.
COMMANDS = [
    (align_basemodel, EXPERT), (align_basemodel, (*EXPERT, "--tuning", "full")),
    (align_basemodel, (*EXPERT, "--method", "dpo")),
    (align_basemodel, ("--preset", "h3fusion", "--moe_flag", "1", "--plan")),
    (align_basemodel, ("--preset", "somf_wizardlm", "--method", "mask", "--aligned", "a", "--tasks", "b", "--plan")),
    (align_basemodel, (*EXPERT, "--method", "soup", "--adapters", "a,b")),
    (align_basemodel, (*EXPERT, "--method", "search", "--adapters", "a,b")),
    (inference, ("--preset", "h3fusion", "--cross_task", "a", "--plan")),
    (evaluate_refusal, ("--preset", "h3fusion", "--task_name", "raw", "--plan")),
    (llama_moe, ("--preset", "h3fusion", "--router_init", "data", "--plan")),
    (fuse, ("extract", "--model_name_or_path", "meta-llama/Llama-2-7b-hf", "--plan")),
    (fuse, ("realign", "--model_name_or_path", "meta-llama/Llama-2-7b-hf", "--tasks", "a", "--plan")),
    (fuse, ("import", "folder", "--model_name_or_path", "meta-llama/Llama-2-7b-hf", "--plan")),
]


def peak(text: str) -> float:
    """GB of each device that a plan tells."""
    return float(re.search(r"peak of each device +([\d.]+) GB", text)[1])


@pytest.mark.parametrize(("module", "words"), COMMANDS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_command_tells_and_writes_nothing(module, words, tmp_path, capsys):
    # files are fused on the CPU
    device = () if module is fuse else ("--device", "cuda")
    module.main([*words, "--output_dir", str(tmp_path / "results"), *device])
    said = capsys.readouterr().out
    assert said.startswith("plan: 6.738e9 parameters")
    assert peak(said) > 0
    assert ("; one process, cpu, float32" if module is fuse else "; one process, cuda, bfloat16") in said
    assert not list(tmp_path.iterdir())


def test_the_parts_are_the_peak(capsys):
    align_basemodel.main([*EXPERT, "--plan_gb", "80"])
    said = capsys.readouterr().out
    parts = {name.strip(): float(size) for name, size in re.findall(r"^  (.+?) +([\d.]+) GB$", said, re.M)}
    assert sum(size for name, size in parts.items() if name != "peak of each device") == pytest.approx(
        parts["peak of each device"], abs=0.01)
    # counted by PEFT: LoRA of rank 8 on the FFN
    assert "11.60e6 train" in said
    assert "fits 80.0 GB (--plan_gb)" in said


def test_what_does_not_fit_is_said_with_what_does(capsys):
    """The setting that is named computes the same step, and the plan of it fits."""
    with pytest.raises(SystemExit) as stopped:
        align_basemodel.main([*EXPERT, "--plan_gb", "24"])
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert peak(told.out) > 24
    assert "24.0 GB is there (--plan_gb)" in told.err
    words = re.search(r"nearest that fits: (--\S.*?) \(", told.err)[1].split()
    assert words == ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    align_basemodel.main([*EXPERT, "--plan_gb", "24", *words])
    assert "fits 24.0 GB" in capsys.readouterr().out
    # or with more devices
    devices = re.search(r"or (--plan_strategy fsdp2 --plan_devices \d+) ", told.err)[1].split()
    align_basemodel.main([*EXPERT, "--plan_gb", "24", *devices])
    assert "fits 24.0 GB" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "wanted"), [
    (("--tuning", "full"), "--tuning lora"),
    (("--per_device_train_batch_size", "1", "--gradient_checkpointing", "true", "--model_max_length", "2048"),
     "--base_quantization nf4"),
])
def test_the_next_way_is_another_one(words, wanted, capsys):
    with pytest.raises(SystemExit):
        align_basemodel.main([*EXPERT, *words, "--plan_gb", "12"])
    assert wanted in capsys.readouterr().err


def test_a_base_that_no_setting_saves_is_said(capsys):
    with pytest.raises(SystemExit):
        inference.main(["--preset", "h3fusion", "--cross_task", "a", "--plan", "--plan_gb", "2"])
    assert "no smaller setting fits; use a smaller base" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (("--plan_gb", "24"), "--plan_gb 24.0: belongs to --plan"),
    (("--plan", "--plan_devices", "4", "--plan_strategy", "one"), "one is one process on one device"),
    (("--plan", "--plan_devices", "1", "--plan_strategy", "ddp"), "--plan_devices is 1"),
    (("--plan", "--plan_strategy", "fsdp"), "--plan_strategy fsdp: not known (did you mean fsdp2?)"),
    (("--plan", "--plan_devices", "-1"), "--plan_devices -1: must be 0 or more"),
    (("--plan", "--plan_strategy", "zero3"), "over how many devices? add --plan_devices N"),
    (("--plan", "--plan_devices", "2", "--plan_strategy", "fsdp2", "--base_quantization", "nf4"),
     "--plan_strategy fsdp2: a base in nf4 is held whole by every process; use one, or ddp"),
    (("--plan", "--model_name_or_path", "somebody/thing"), "--plan knows a base by its folder or by a name"),
])
def test_wrong_words_end_with_a_sentence(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        align_basemodel.main(["--preset", "h3fusion", "--moe_flag", "0", "--task_name", "helpfulness", *words])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_plan_is_no_setting_of_a_run():
    """The same run with and without: what a manifest compares does not know of it."""
    plain, asked = (config.parse(AlignArgs, ["--preset", "h3fusion", "--moe_flag", "0", *more]) for more in (
        (), ("--plan", "--plan_gb", "8")))
    assert plain.args.settings(plain.training) == asked.args.settings(asked.training)
    assert plain.plan is None
    assert asked.plan.plan_gb == 8


def test_a_device_that_is_not_here_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(command, "_memory", lambda cuda, devices: 0.0)
    align_basemodel.main([*EXPERT, "--device", "cuda"])
    assert "whether that fits is not known: no GPU is found here; name it with --plan_gb N" in capsys.readouterr().out


def test_commands_that_are_graphs_have_none():
    with pytest.raises(UserError, match="--plan: unknown flag"):
        config.parse(LeaderboardArgs, ["--plan"])


def test_answers_alone_load_no_model(capsys):
    evaluate_safety.main(["--preset", "h3fusion", "--task_name", "cross_a", "--plan"])
    assert capsys.readouterr().out == "plan: no model is loaded; answers are read as text\n"


def test_a_merge_keeps_the_promise_that_was_named(merge_inputs, run_merge, merge_fails, capsys):
    models = ",".join(str(merge_inputs / name) for name in "ab")
    words = ("--method", "linear", "--models", models, "--parameters", "weight=1,1")
    run_merge(*words, "--plan")
    said = capsys.readouterr().out
    assert "linear of 2 models" in said
    assert re.search(r"memory  [\d.]+ GB at most", said)
    assert not (merge_inputs / "results").exists()
    assert "one worker needs" in merge_fails(*words, "--plan", "--plan_gb", "0.0001")


def test_no_torch_is_loaded_for_a_base_of_a_known_name():
    code = ("import sys, align_basemodel\nalign_basemodel.main(sys.argv[1:])\n"
            "assert not {'torch', 'transformers'} & sys.modules.keys()")
    run = subprocess.run([sys.executable, "-c", code, *EXPERT, "--device", "cuda", "--dtype", "bfloat16"], cwd=ROOT,
                         capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr


def test_the_launcher_says_the_strategy(monkeypatch):
    asked = config.parse(AlignArgs, list(EXPERT)).plan
    named = config.parse(AlignArgs, [*EXPERT, "--plan_devices", "2", "--plan_strategy", "zero2"]).plan
    assert command.launched(asked) == ("one", 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command.launched(asked) == ("ddp", 4)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert command.launched(asked) == ("fsdp2", 4)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert command.launched(asked) == ("zero3", 4)
    # what is asked for wins
    assert command.launched(named) == ("zero2", 2)


def test_what_no_strategy_parts_is_copied(capsys):
    align_basemodel.main([*EXPERT, "--base_quantization", "nf4", "--plan_devices", "8", "--plan_gb", "80"])
    assert "DDP on 8 devices" in capsys.readouterr().out
    # and more devices are no way out
    with pytest.raises(SystemExit):
        align_basemodel.main([*MASK, "--granularity", "layer", "--plan_gb", "16"])
    said = capsys.readouterr().err
    assert "nearest that fits: --storage bfloat16" in said
    assert "--plan_devices" not in said


def test_a_mask_is_parted_where_each_logit_lies_in_a_row(capsys):
    align_basemodel.main([*MASK, "--plan_gb", "80", "--plan_devices", "4"])
    parted = capsys.readouterr().out
    assert "FSDP2 on 4 devices" in parted
    align_basemodel.main([*MASK, "--plan_gb", "80", "--plan_devices", "4", "--granularity", "layer"])
    assert "DDP on 4 devices" in capsys.readouterr().out
    align_basemodel.main([*MASK, "--plan_gb", "80"])
    assert peak(parted) < 0.5 * peak(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        align_basemodel.main([*MASK, "--plan_devices", "4", "--plan_strategy", "zero3"])
    assert "--plan_strategy zero3: a mask with its model is held whole" in capsys.readouterr().err


def test_strategies_divide_what_they_say():
    whole = Footprint(1000, 1000, weights=4e3, gradients=4e3, optimiser=8e3, activations=500.0, unit=100.0, root=50.0)
    held = {name: divided(whole, name, 4) for name in ("ddp", "zero2", "zero3", "fsdp2")}
    assert (held["ddp"].weights, held["ddp"].gradients, held["ddp"].optimiser) == (4000, 4000, 8000)
    assert (held["zero2"].weights, held["zero2"].gradients, held["zero2"].optimiser) == (4000, 1000, 2000)
    for name in ("zero3", "fsdp2"):
        assert (held[name].weights, held[name].gradients, held[name].optimiser) == (1000, 1000, 2000)
    # DDP's second copy of the gradients; FSDP2's root, two layers, a layer's gradient
    assert held["ddp"].communication == 4000
    assert held["fsdp2"].communication == 50 + 2 * 100 + 100
    assert all(one.activations == 500 for one in held.values())
    # a mask's, of whose AdamW each process has a share
    shared = divided(replace(whole, shared=True), "ddp", 4)
    assert (shared.gradients, shared.optimiser, shared.communication) == (4000, 2000, 0)
    assert divided(whole, "fsdp2", 1) == whole


def test_fsdp2_holds_about_half_of_weights_and_state_on_two():
    parsed = config.parse(AlignArgs, [*EXPERT, "--tuning", "full"])
    place = command.Place(True, 2)
    whole = command.footprint(parsed.args, parsed.training, shape_of("meta-llama/Llama-2-7b-hf"), place)
    half = divided(whole, "fsdp2", 2)
    assert half.weights + half.optimiser + half.communication <= 0.6 * (whole.weights + whole.optimiser)


def test_an_adapter_that_is_there_is_read(tmp_path, capsys):
    folder = tmp_path / "outputs" / "first"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 64, "target_modules": ["q_proj", "v_proj"]}))
    align_basemodel.main([*EXPERT, "--init_adapter", "first", "--output_dir", str(tmp_path), "--plan_gb", "80"])
    # 32 layers x 64 x 2 modules x (4096 + 4096)
    assert "33.55e6 train" in capsys.readouterr().out
