"""Hours and memory that are reckoned: the sums against figures that were measured or counted, and what they scale with."""

from __future__ import annotations

import json
import shlex

import pytest

import config
import flags
from flags.card import CardFlags
from models.footprint import shapes, training
from workflow import commands, estimate, leaderboard, plan, records

GIB = 2**30
CARD = CardFlags()
LLAMA = shapes.shape_of("meta-llama/Llama-2-7b-hf")


def cost(line, card=CARD):
    words = shlex.split(line)
    return estimate.cost_of(commands.parse(words), words[0], card, LLAMA)


def planned(line):
    """The undivided footprint of a training on a card."""
    parsed = commands.parse(shlex.split(line))
    return training.training(parsed.args, parsed.training, shapes.shape_of(parsed.args.model_name_or_path), estimate.CARD)


def test_shapes(pico):
    assert LLAMA.parameters == 6_738_415_616
    # counted by PEFT: LoRA r 8 on the FFN; on q and v
    assert LLAMA.lora(8, shapes.FFN) == 11_599_872
    assert LLAMA.lora(8, ("q_proj", "v_proj")) == 4_194_304
    config_of = json.loads((pico / "config.json").read_text())
    mine = shapes.shape_of(str(pico))
    assert (mine.layers, mine.hidden, mine.vocabulary) == (2, 32, config_of["vocab_size"])
    # embeddings, tied; two layers of attention, FFN, norms; the last norm
    assert mine.parameters == 384 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 64) + 32
    assert shapes.shape_of("somebody/thing-8B-chat").parameters == 8e9
    assert shapes.shape_of("somebody/b7thing") is None
    assert shapes.shape_of("somebody/b7thing", 3).parameters == 3e9


@pytest.mark.parametrize(("line", "bytes"), [
    ("align_basemodel.py --preset h3fusion --moe_flag 0 --task_name helpfulness", 35e9),
    ("align_basemodel.py --preset h3fusion --moe_flag 1", 40e9),
])
def test_memory_is_near_what_an_h200_took(line, bytes):
    assert cost(line).card == pytest.approx(bytes, rel=0.15)


@pytest.mark.parametrize(("line", "bytes"), [
    # tensors counted by benchmarks/memory/tuning_step.py
    ("align_basemodel.py --preset h3fusion --moe_flag 1", 31.3 * GIB),
    ("align_basemodel.py --preset h3fusion --moe_flag 1 --gradient_checkpointing true", 15.2 * GIB),
    # one T4: 9 GB allocated (LoRA fusion's notebooks)
    ("align_basemodel.py --preset lora_fusion --moe_flag 0 --task_name aoa --data_path a.json "
     "--base_quantization int8", 9e9),
])
def test_tensors_are_near_what_was_counted(line, bytes):
    assert planned(line).tensors == pytest.approx(bytes, rel=0.15)


@pytest.mark.parametrize(("line", "bytes"), [
    # as models/mask/memory.py plans them from the specs of every tensor, activations not counted
    ("align_basemodel.py --preset own --method mask --tasks x --mask_on weights "
     "--model_name_or_path meta-llama/Llama-2-7b-hf", 178 * GIB),
    ("align_basemodel.py --preset somf_tinyllama --method mask --tasks x", 29.7 * GIB),
])
def test_a_masks_memory_is_what_its_own_plan_says(line, bytes):
    held = planned(line)
    assert held.weights + held.data + held.gradients + held.optimiser == pytest.approx(bytes, rel=0.05)
    # and no step without activations
    assert cost(line).card > 1.05 * bytes


def test_hours_are_operations_over_speed():
    line = "align_basemodel.py --preset h3fusion --moe_flag 0 --task_name truthfulness"
    # 1417 rows, 3 epochs, 200 tokens, 4 operations a weight and token
    reckoned = 1417 * 3 * 200 * 4 * LLAMA.parameters / (312e12 * 0.35)
    start = estimate.START + 2 * LLAMA.parameters / estimate.DISK
    assert cost(line).seconds == pytest.approx(start + reckoned)
    assert cost(line, CardFlags(tflops=156)).seconds == pytest.approx(start + 2 * reckoned)
    assert cost(f"{line} --gradient_checkpointing true").seconds == pytest.approx(start + 1.5 * reckoned)
    assert cost(f"{line} --max_train_samples 100").seconds == pytest.approx(start + reckoned * 100 / 1417)
    assert cost(f"{line} --model_max_length 100").seconds == pytest.approx(start + reckoned / 2)
    assert cost(f"{line} --max_steps 10").seconds == pytest.approx(start + reckoned * 80 / 4251)


def test_rows_of_files_are_counted(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n{}\n\n{}\n")
    (tmp_path / "rows.json").write_text("[1, 2]")
    line = "align_basemodel.py --moe_flag 0 --task_name dialogs --data_path {}"
    for file, rows in (("rows.jsonl", 3), ("rows.json", 2)):
        assert estimate.rows_of(commands.parse(shlex.split(line.format(tmp_path / file))).args) == rows
    mask = commands.parse(shlex.split("align_basemodel.py --preset somf_wizardlm --method mask --tasks x --aligned y")).args
    assert estimate.rows_of(mask) == 5135


def test_the_leaderboard_of_another_base_is_reckoned(tmp_path):
    """The embedded default keeps its measured costs; another base has hours of a card, and what is too large is named."""
    table = plan.read(config.ROOT / "workflow" / "arms.yaml")
    own = plan.steps(table, ["tuned_moe"], (1,), tmp_path)
    kept, said = estimate.of_base(own, CARD, plan.base_of(""))
    assert (kept, said) == (own, "measured on the embedded default")
    steps, said = estimate.of_base(plan.steps(table, ["tuned_moe"], (1,), tmp_path, preset="h3fusion"), CARD,
                                   plan.base_of("h3fusion"))
    assert "Llama-2-7b-hf of 6.74e9 parameters" in said
    told = leaderboard.cost_line(steps, records.states(steps, tmp_path), said, 24.0)
    assert "hours of one card" in told
    assert "too large for a card of 24 GB: s1_helpfulness" in told
    assert leaderboard.lanes_of(steps) == 1
    assert leaderboard.lanes_of(own) == leaderboard.LANES
    nameless, said = estimate.of_base(own, CARD, "somebody/thing")
    assert "the size of somebody/thing is not known: --billions N tells it" in said
    assert sum(step.seconds for step in nameless) == 0
    assert config.parse(flags.LeaderboardArgs, ["--tflops", "989"]).args.operations == 989e12 * 0.35
