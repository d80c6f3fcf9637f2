"""README's commands parse, its files exist, its presets are all there."""

from __future__ import annotations

import re
import shlex

import pytest

import config
import flags
from models import fuse

README = (config.ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {
    "align_basemodel.py": flags.AlignArgs, "llama_moe.py": flags.FuseMoeArgs,
    "inference.py": flags.InferenceArgs, "evaluate_safety.py": flags.EvaluateSafetyArgs,
    "evaluate_helpfulness.py": flags.EvaluateHelpfulnessArgs, "report.py": flags.ReportArgs,
    "evaluate_truth_and_info.py": flags.EvaluateTruthArgs,
}
LINES = [part.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()
         for part in line.split("#")[0].split(";") if part.strip()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python ")])
def test_commands_parse(line):
    script, *words = shlex.split(line)[1:]
    name = script.rpartition("/")[2]
    command = fuse.COMMANDS[words.pop(0)][0] if name == "fuse.py" else COMMANDS[name]
    assert config.parse(command, words).args is not None


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(("bash ", "cd "))])
def test_scripts_and_folders_exist(line):
    place = shlex.split(line)[1]
    assert place == ".." or (config.ROOT / place).exists()


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (config.ROOT / target).is_file(), target


def test_every_preset_is_in_the_table():
    table = README.split("## Presets")[1].split("##")[0]
    for preset in config.PRESETS.glob("*.yaml"):
        assert f"`{preset.stem}`" in table


def test_nothing_was_left_to_fill_in():
    assert not re.findall(r"%[A-Z_]+%", README)
