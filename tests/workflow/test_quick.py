"""scripts/leaderboard.sh --quick on a pico base, with the embedded rows and prompts: from experts to the table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import yaml
from assets_fixture import require_embedded

import config
from workflow import plan


def test_quick_ends_in_a_table(long_pico, tmp_path):
    require_embedded()
    preset = tmp_path / "pico.yaml"
    preset.write_text(yaml.safe_dump({
        "common": {"model_name_or_path": str(long_pico), "dtype": "float32"}, "align": {"model_max_length": 64},
        "inference": {"max_new_tokens": 4}}))
    done = subprocess.run(
        [sys.executable, "-m", "workflow.leaderboard", "--quick", "--only", "base,average", "--preset", str(preset),
         "--output_dir", str(tmp_path)], cwd=config.ROOT, capture_output=True, text=True, timeout=1800, check=False,
        env={**os.environ, "PYTHONPATH": str(config.ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    place = tmp_path / "leaderboard"
    # one seed, the experts made and not scored
    assert [folder.name for folder in place.glob("seed_*")] == ["seed_42"]
    scored = {folder.name for folder in (place / "seed_42" / "scores").iterdir() if folder.is_dir()}
    assert scored == {"raw", "cross_average"}
    content = json.loads((place / "report" / "leaderboard.json").read_text())
    assert [row["label"] for row in content["rows"]] == ["base", "plain average"]
    assert {"nll", "mc2", "safe_refusal", "overrefusal", "mmlu_probe"} <= content["rows"][1]["cells"].keys()
    assert content["rows"][1]["cells"]["nll"]["n"] == 8
    # what it costs: the average and the three experts
    assert content["costs"]["plain average"]["all_seconds"] > content["costs"]["plain average"]["seconds"] > 0
    with (place / "report" / "leaderboard.csv").open(newline="") as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"base", "plain average"}
    steps = json.loads((place / "workflow" / "plan.json").read_text())["steps"]
    table = plan.read(config.ROOT / "workflow" / "arms.yaml")
    assert len(steps) == 4 + 2 * (len(table.endpoints) - len(plan.missing_commands(table)))
    assert {path.stem for path in (place / "workflow" / "records").iterdir()} == {step["name"] for step in steps}
