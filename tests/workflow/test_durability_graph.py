"""The target --durability: its steps, what they share with the leaderboard, one budget for all rows, errors; end to end."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from assets_fixture import require_embedded

import config
import flags
from errors import UserError
from workflow import commands, durability, leaderboard, plan

TABLE = plan.read(config.ROOT / "workflow" / "arms.yaml")
NAMES = durability.chosen(TABLE, (), quick=False)


def steps_of(names, results, **options):
    return durability.steps(TABLE, names, (42,), results, preset="embedded", asked=False, **options)


def test_the_key_rows_of_all_three_systems_are_attacked():
    assert NAMES == ["base", "safety", "mix", "average", "lora_fusion_50", "somf_multi", "raw_moe", "tuned_moe"]
    assert {TABLE.arms[name].kind for name in NAMES} >= {"control", "expert", "merge", "lora_fusion", "somf", "h3fusion"}


def test_every_row_has_one_budget_on_the_same_modules(tmp_path):
    steps = steps_of(NAMES, tmp_path)
    made = set()
    for step in steps:
        assert set(step.needs) <= made, step.name
        made.add(step.makes)
    assert len(made) == len({step.name for step in steps}) == len(steps)
    attacks = {step.arm: commands.parse(step.words) for step in steps if step.name.endswith("__harmful")}
    assert set(attacks) == set(NAMES)
    asked = [{**parsed.args.settings(parsed.training), "run_name": "", "model_name_or_path": "", "output_dir": ""}
             for parsed in attacks.values()]
    assert all(one == asked[0] for one in asked)
    assert asked[0]["lora_targets"] == "q_proj,k_proj,v_proj,o_proj"
    assert asked[0]["training_arguments"]["max_steps"] == 80
    assert asked[0]["save_steps"] == 5
    # a mixture has as many steps, at the same rate and rank
    for step in steps:
        if "__mixed" in step.name and not step.name.endswith("scored"):
            parsed = commands.parse(step.words)
            assert parsed.training["max_steps"] == 80
            for name in ("learning_rate", "lora_r", "lora_alpha", "lora_targets", "per_device_train_batch_size",
                         "gradient_accumulation_steps", "model_max_length"):
                assert getattr(parsed.args, name) == asked[0][name], name
            assert parsed.args.extra_share == {"00": None, "05": 0.05, "30": 0.3}[step.name[-2:]]


def test_what_is_attacked_is_one_checkpoint(tmp_path):
    steps = {step.name: step for step in steps_of(NAMES, tmp_path)}
    root = tmp_path / "seed_42"
    bases = {name: commands.parse(steps[f"s42_{name}__harmful"].words).args.model_name_or_path for name in NAMES}
    assert bases["base"] == "embedded"
    assert bases["somf_multi"] == str(root / "outputs" / "somf_multi")
    assert bases["tuned_moe"] == str(root / "outputs" / "whole_tuned_moe")
    exported = {name: commands.parse(steps[f"s42_{name}__whole"].words).args for name in NAMES
                if name not in ("base", "somf_multi")}
    assert {name: args.layout for name, args in exported.items()} == {
        "safety": "dense", "mix": "dense", "average": "dense", "lora_fusion_50": "dense", "raw_moe": "mixtral",
        "tuned_moe": "mixtral"}
    assert exported["lora_fusion_50"].run == TABLE.arms["lora_fusion_50"].run
    # its parts are made first
    assert root / "outputs" / "safety" / "manifest.json" in steps["s42_lora_fusion_50__whole"].needs
    # before, at checkpoints, at the end; on the base that was attacked
    at = {step: commands.parse(steps[f"s42_mix__{kind}_scored"].words).args for step, kind in (
        (0, "whole"), (5, "harmful_5"), (80, "harmful"))}
    assert (at[0].task_name, at[0].num_samples) == ("cross_whole_mix", -1)
    assert (at[5].checkpoint_number, at[80].checkpoint_number) == (5, -1)
    assert at[5].model_name_or_path == bases["mix"]
    assert steps["s42_mix__harmful_5_scored"].makes == root / "scores" / "cross_harmful_mix_5" / "evaluate_refusal.json"
    assert steps["s42_mix__harmful_5_scored"].needs == (root / "outputs" / "harmful_mix" / "manifest.json",)


def test_steps_that_the_leaderboard_has_are_the_same_steps(tmp_path):
    """Same name, words and settings: what one target finished is finished for the other."""
    mine = {step.name: step for step in steps_of(["base", "average", "somf_multi"], tmp_path)}
    theirs = {step.name: step for step in plan.steps(TABLE, ["base", "average", "somf_multi"], (42,), tmp_path)}
    shared = mine.keys() & theirs.keys()
    assert {"s42_average", "s42_somf_multi", "s42_base__refusal", "s42_somf_multi__refusal"} <= shared
    assert all(mine[name] == theirs[name] for name in shared)
    assert not any(name.endswith(("__truth", "__nll")) for name in mine)


def test_the_plan_fits_two_hours_on_two_cores(tmp_path):
    steps = durability.steps(TABLE, NAMES, (42, 43, 44), tmp_path, preset="embedded", asked=False)
    own = [step for step in steps if "__" in step.name and not step.name.endswith("__refusal")]
    assert sum(step.seconds for step in own) / 2 <= 2 * 3600


@pytest.mark.parametrize(("change", "only", "says"), [
    ({"durability": {}}, (), "section durability of the table needs score"),
    ({"durability": {**TABLE.durability, "stpes": 1}}, (), "stpes: unknown in the section durability"),
    ({"durability": {**TABLE.durability, "steps": [20, 5]}}, (), r"steps \[20, 5\]: needs whole numbers of 1 or more"),
    ({"endpoints": {}}, (), "the table needs the endpoint refusal"),
    ({}, ("ties",), "--only ties: not marked durability in the table; marked: base, safety"),
    ({}, ("tuned",), "--only tuned: no such arm"),
])
def test_what_cannot_be_planned(change, only, says):
    with pytest.raises(UserError, match=says):
        durability.chosen(replace(TABLE, **change), only, quick=False)


def test_a_layout_that_is_none(tmp_path):
    path = tmp_path / "arms.yaml"
    path.write_text(yaml.safe_dump({"arms": {"a": {"kind": "merge", "durability": "gguf"}}}))
    with pytest.raises(UserError, match="a: durability gguf: allowed: whole, dense, mixtral, qwen3_moe"):
        plan.read(path)


def test_the_report_lines_parse(tmp_path):
    table, page = durability.report_words(TABLE, NAMES, [tmp_path], tmp_path, quick=False)
    args = config.parse(flags.DurabilityArgs, table[1:]).args
    assert args.against == "naive mix"
    assert args.step_numbers == (5, 10, 20, 40, 80)
    assert args.share_numbers == (0, 0.05, 0.3)
    assert dict(args.rows)["tuned MoE"] == ("whole_tuned_moe", "harmful_tuned_moe", "mixed_00_tuned_moe",
                                            "mixed_05_tuned_moe", "mixed_30_tuned_moe")
    assert dict(args.rows)["base"][0] == "base"
    assert len(config.parse(flags.ReportArgs, page[1:]).args.curve_files) == 3
    asked = config.parse(flags.LeaderboardArgs, ["--durability", "--quick"]).args
    assert leaderboard.reports(asked, TABLE, NAMES, tmp_path)[0][0] == "evaluator/durability.py"


def test_quick_ends_in_a_half_life(long_pico, tmp_path):
    """On a pico base: an expert and the base attacked, scored, put into the table; a second call has nothing to do."""
    require_embedded()
    preset = tmp_path / "pico.yaml"
    preset.write_text(yaml.safe_dump({"common": {"model_name_or_path": str(long_pico), "dtype": "float32"},
                                      "align": {"model_max_length": 64}}))
    # a byte is a token here: 128 hold no prompt; ten harmful and ten harmless prompts are the least
    content = yaml.safe_load((config.ROOT / "workflow" / "arms.yaml").read_text())
    content["words"]["attack"] = content["words"]["attack"].replace("--model_max_length 128", "--model_max_length 400")
    content["durability"]["shares"] = [0.3]
    content["quick"]["samples"] = 14
    (tmp_path / "arms.yaml").write_text(yaml.safe_dump(content))

    def call(*more):
        return subprocess.run(
            [sys.executable, "-m", "workflow.leaderboard", "--durability", "--quick", "--only", "base,safety", "--arms",
             str(tmp_path / "arms.yaml"), "--preset", str(preset), "--output_dir", str(tmp_path), *more], cwd=config.ROOT,
            capture_output=True, text=True, timeout=1800, check=False,
            env={**os.environ, "PYTHONPATH": str(config.ROOT), "OMP_NUM_THREADS": "1"})

    done = call()
    assert done.returncode == 0, done.stderr[-4000:]
    report = tmp_path / "leaderboard" / "report"
    content = json.loads((report / "durability.json").read_text())
    assert [row["label"] for row in content["rows"]] == ["base", "harmless expert"]
    assert content["steps"] == [0, 1, 2]
    assert {"refused_0", "refused_1", "refused_2", "auc_0", "auc_2", "mixed_0.3"} <= content["rows"][1]["cells"].keys()
    with (report / "durability.csv").open(newline="") as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"base", "harmless expert"}
    assert (report / "durability.tex").is_file()
    assert "harmful prompts refused ↑ over steps of harmful fine-tuning" in (report / "durability_page.html").read_text()
    # harmful texts are in no log
    from data.sets import reattack

    logs = "".join(path.read_text() for path in (tmp_path / "leaderboard" / "workflow" / "logs").glob("*.log"))
    assert not [row.id for row in reattack.records("train") if row.prompt in logs or row.answer in logs]
    again = call("--dry_run")
    assert ", 0 to do" in again.stdout, again.stderr[-2000:]
