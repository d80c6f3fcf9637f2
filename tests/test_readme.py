"""Commands of README and of the pages behind it parse, their files exist, the presets are all there, the door is small."""

from __future__ import annotations

import re
import shlex

import pytest

import config
import flags
from evaluator import registry
from models import fuse

README = (config.ROOT / "README.md").read_text(encoding="utf-8")
#: README, and the pages that its longer parts moved to.
TEXT = README + "".join((config.ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
                        for page in ("quickstart", "commands", "merging", "assets", "serving", "scale"))
COMMANDS = {
    "align_basemodel.py": flags.AlignArgs, "llama_moe.py": flags.FuseMoeArgs,
    "inference.py": flags.InferenceArgs, "evaluate_safety.py": flags.EvaluateSafetyArgs,
    "evaluate_helpfulness.py": flags.EvaluateHelpfulnessArgs, "report.py": flags.ReportArgs,
    "evaluate_truth_and_info.py": flags.EvaluateTruthArgs,
}
LINES = [part.strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()
         for part in line.split("#")[0].split(";") if part.strip()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python ")])
def test_commands_parse(line):
    script, *words = shlex.split(line)[1:]
    if script == "-m":
        module, sub, *words = words
        assert module == "evaluator.registry"
        command, _, runs = registry.COMMANDS[sub]
        assert config.parse(command, words[runs:]).args is not None
        return
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
    assert not re.findall(r"%[A-Z_]+%", TEXT)


def rows(page: str) -> dict[str, dict[str, str]]:
    """model -> {column: cell} of the first table of models on a page."""
    head, _, *lines = page[page.index("| model |"):].split("\n\n")[0].splitlines()
    names, *cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines))
    return {row[0]: dict(zip(names, row, strict=True)) for row in cells}


def test_the_front_table_is_that_of_the_three_seeds():
    whole = rows((config.ROOT / "docs" / "h3fusion.md").read_text(encoding="utf-8"))
    short = rows(README)
    assert len(short) == 6
    assert all(cell == whole[model][name] for model, row in short.items() for name, cell in row.items())


def test_the_readme_is_a_door():
    assert len(README.splitlines()) <= 150
