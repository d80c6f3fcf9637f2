"""scripts/paper_tables.sh on a pico base: a table of LoRA fusion in miniature, from the safety set to the five files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import yaml
from assets_fixture import require_embedded

import config
from evaluator.reporting.published_numbers import published


def test_a_table_in_miniature(long_pico, tmp_path):
    require_embedded()
    preset = tmp_path / "pico.yaml"
    preset.write_text(yaml.safe_dump({
        # not in common: realign sums in float32 by itself and takes no such flag
        "common": {"model_name_or_path": str(long_pico)},
        "align": {"model_max_length": 1024, "max_steps": 2, "dtype": "float32"},
        "inference": {"max_new_tokens": 4, "dtype": "float32"}, "evaluate": {"dtype": "float32"}}))
    environment = {**os.environ, "PYTHONPATH": str(config.ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-m", "workflow.paper_tables", "--paper", "lora_fusion", "--table", "fusion_or_mixing",
             "--preset", str(preset), "--only", "fused_40", "--name", "mine", "--output_dir", str(tmp_path)]
    done = subprocess.run(words, cwd=config.ROOT, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    place = tmp_path / "mine"
    written = {path.suffix for path in (place / "report").glob("fusion_or_mixing.*")}
    assert written == {".md", ".csv", ".tex", ".html", ".json"}
    content = json.loads((place / "report" / "fusion_or_mixing.json").read_text())
    assert "in miniature" in content["title"]
    assert any(note.endswith(f"the base is {long_pico}.") for note in content["notes"])
    rows = {row["key"]["setting"]: row["cells"] for row in content["rows"]}
    table = published("lora_fusion").tables["fusion_or_mixing"]
    assert set(rows) == {*(key[0] for key in table.rows), "3 % safety mix (ours)"}
    made = rows["fusion 0.4"]
    assert made["harmfulness_rate"]["ours"]["n"] == 48
    assert 0 <= made["harmfulness_rate"]["ours"]["low"] <= made["harmfulness_rate"]["ours"]["value"] <= 1
    assert made["mmlu"]["ours"]["run"] == "identity@0.6_safe@0.4"
    # what the score file has, turned over: compliance is what is not refused
    scores = json.loads((place / "seed_42/scores/cross_identity@0.6_safe@0.4"
                         / "evaluate_safety.safety+orbit.overrefusal+orbit.json").read_text())["scores"]
    assert made["xstest_safe_compliance"]["ours"]["value"] == 1 - scores["overrefusal+orbit.overrefusal"]["value"]
    assert rows["fusion 0.3"]["mmlu"]["ours"] | {"n": 0} == {
        "value": None, "low": None, "high": None, "n": 0, "run": "", "why": "left out by --only"}
    assert "not stated" in rows["3 % safety mix, prompt 1"]["mmlu"]["ours"]["why"]
    # the published half is the file's, row by row
    for (key,), cells in table.rows.items():
        assert {name: cell["published"] for name, cell in rows[key].items() if cell["published"]} == {
            name: {"value": cell.value, "mark": cell.mark} for name, cell in cells.items()}
    assert all(cell["published"] is None for cell in rows["3 % safety mix (ours)"].values())
    with (place / "report" / "fusion_or_mixing.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(line["side"], line["mark"]) for line in lines if line["column"] == "mmlu"} == {
        ("ours", ""), ("published", "unverified")}
    # again: nothing is made anew
    again = subprocess.run(words, cwd=config.ROOT, capture_output=True, text=True, timeout=600, check=False, env=environment)
    assert again.returncode == 0, again.stderr[-2000:]
    assert ", 0 to do" in again.stdout
