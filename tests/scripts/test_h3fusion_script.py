"""scripts/h3fusion.sh and the help of the scripts: every command of a dry run parses, with the published preset too."""

from __future__ import annotations

import shlex
import subprocess

import pytest

import config
import flags

COMMANDS = {"align_basemodel.py": flags.AlignArgs, "models/llama_moe.py": flags.FuseMoeArgs,
            "inference.py": flags.InferenceArgs,
            "evaluator/evaluate_safety.py": flags.EvaluateSafetyArgs, "evaluator/report.py": flags.ReportArgs,
            "evaluator/evaluate_helpfulness.py": flags.EvaluateHelpfulnessArgs,
            "evaluator/evaluate_truth_and_info.py": flags.EvaluateTruthArgs}


def run(script, *words, **variables):
    return subprocess.run(["bash", str(config.ROOT / "scripts" / script), *words], capture_output=True, text=True,
                          timeout=60, check=False, env={"PATH": "/usr/bin:/bin", **variables})


@pytest.mark.parametrize("preset", ["embedded", "h3fusion"])
def test_every_command_of_a_dry_run_parses(preset):
    done = run("h3fusion.sh", "--dry_run", "--max_steps", "50", PRESET=preset)
    assert done.returncode == 0, done.stderr
    found = []
    for line in done.stdout.splitlines():
        name, *words = shlex.split(line)[2:]
        found.append(config.parse(COMMANDS[name], words))
    tuned = [one for one in found if isinstance(one.args, flags.FusedMoeArgs)]
    assert len({one.args.name for one in tuned}) == len(tuned) == 4 + 3 * 5 + 3
    assert all(one.training["max_steps"] == 50 for one in tuned)
    harmless = [one.args for one in found if getattr(one.args, "task_name", "") == "overrefusal"]
    # a published preset asks for published prompts, and of harmless ones there are none
    assert [args.data_source for args in harmless] == ["embedded"]


@pytest.mark.parametrize("script", [path.name for path in sorted((config.ROOT / "scripts").glob("*.sh"))
                                    if "-h|--help)" in path.read_text(encoding="utf-8")])
def test_help_is_the_head_of_the_script_and_no_more(script):
    done = run(script, "--help")
    head = []
    for line in (config.ROOT / "scripts" / script).read_text(encoding="utf-8").splitlines()[1:]:
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").removeprefix(" "))
    assert done.returncode == 0
    assert done.stdout.splitlines() == head[:len(done.stdout.splitlines())]
    assert len(done.stdout.splitlines()) >= len(head) - 1
