"""docs/reference: up to date, complete, and its list of files is what runs leave behind."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml
from runs import align, build_moe, common, write_data
from scored import REFUSED, put_answers, run

import flags
import inference
from config import PRESETS, ROOT
from evaluator import evaluate_safety, report
from models import fuse
from scripts import reference

#: Names that stand for others in scripts/run_files.yaml.
NAMES = r"(?<![A-Za-z])(RUN|NAME|TASK|SPLIT|FOLDER|COMMAND|HASH|STEP|FILE|PICTURE|N|P)(?![A-Za-z])"


@pytest.fixture(scope="module")
def made():
    return reference.pages()


def test_the_pages_are_those_of_the_code(made):
    assert reference.stale(made) == [], "run python scripts/reference.py"


def test_a_changed_a_missing_and_a_forgotten_page_are_found(made, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    for name, text in made.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert reference.stale(made) == []
    (tmp_path / "scores.md").write_text("old", encoding="utf-8")
    (tmp_path / "judges.md").unlink()
    (tmp_path / "gone.md").write_text(f"{reference.MADE}\n", encoding="utf-8")
    (tmp_path / "by_hand.md").write_text("what people write stays", encoding="utf-8")
    assert reference.stale(made) == ["gone.md", "judges.md", "scores.md"]


def test_every_command_has_its_flags_on_a_page(made):
    shown = {kind for kinds in reference.commands().values() for kind in kinds.values()}
    # AlignArgs is what the objectives have in common
    assert set(flags.COMMANDS) - {flags.AlignArgs} <= shown
    for call, kinds in reference.commands().items():
        page = made[f"flags/{reference.slug(call)}.md"]
        assert all(f"| `--{item.name}` |" in page for kind in kinds.values() for item in dataclasses.fields(kind))


def test_values_and_defaults_are_those_of_the_flags(made):
    row = next(line for line in made["flags/inference.md"].splitlines() if line.startswith("| `--attack` |"))
    assert row.split(" | ")[1:3] == ["`none`, `cot`, `cou`, `suffix`, `prefill`", "`none`"]
    row = next(line for line in made["flags/align_basemodel.md"].splitlines() if line.startswith("| `--lora_r` |"))
    assert row.split(" | ")[1:3] == ["number, 1 or more", "`8`"]


def test_every_preset_and_method_is_there(made):
    assert all(path.read_text(encoding="utf-8").strip() in made["presets.md"] for path in PRESETS.glob("*.yaml"))
    for name in (*fuse.COMMANDS, "ties", "knots", "safe_lora", "task_arithmetic"):
        assert name in made["methods.md"] + made["commands.md"]


def test_no_cell_breaks_its_table(made):
    for name, text in made.items():
        for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(widths) == 1, (name, block[:200])


@pytest.fixture(scope="module")
def trained(pico, tmp_path_factory):
    """A results folder with experts, checkpoints, a raw and a tuned MoE, a fused adapter, a realigned model, answers."""
    data, out = write_data(tmp_path_factory.mktemp("data")), tmp_path_factory.mktemp("out")
    build_moe(pico, out, data)
    align(pico, out, data, "safety", "--moe_flag", "0", "--run_name", "saved", "--max_steps", "2", "--save_steps", "1")
    align(pico, out, data, "mix", "--moe_flag", "1", "--gate_loss_weight", "0.1", "--max_steps", "2")
    tuned = next(path.name for path in (out / "outputs").iterdir() if path.name.startswith("mix_moe"))
    inference.main(["--task_name", "safety", "--data_path", data["safety"], "--max_new_tokens", "4", "--num_samples", "2",
                    "--cross_task", tuned, *common(pico, out)[:-2]])
    fuse.main(["adapters", "--adapters", "helpfulness,safety", "--method", "svd", "--rank", "2", "--output_dir", str(out)])
    fuse.main(["realign", "--tasks", "safety", "--model_name_or_path", str(pico), "--output_dir", str(out)])
    return out


def test_every_file_of_a_run_is_listed(trained, results):
    put_answers(results, "safety", [REFUSED, "Sure."])
    run(evaluate_safety, results)
    report.main(["--runs", "base", "--output_dir", str(results), "--format", "md,csv,latex,json"])
    found = {path.relative_to(root).as_posix() for root in (trained, results) for path in root.rglob("*") if path.is_file()}
    found = {path for path in found if not any(part.startswith(".") for part in path.split("/"))}
    parts = yaml.safe_load((ROOT / "scripts" / "run_files.yaml").read_text(encoding="utf-8"))
    patterns = [re.sub(NAMES, "[^/]+", file.replace(".", r"\.")) for part in parts for file in part["files"]]
    unknown = sorted(path for path in found if not any(re.fullmatch(pattern, path) for pattern in patterns))
    assert not unknown
    tops = {"outputs", "checkpoints", "inference", "observation", "scores", "report"}
    assert {path.split("/")[0] for path in found} >= tops
