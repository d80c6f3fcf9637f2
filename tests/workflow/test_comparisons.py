"""The comparisons that workflow/arms.yaml declares: names that exist, scores that are measured, labels for the report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import yaml

import config
import flags
from errors import UserError
from workflow import comparisons, leaderboard, plan

FILE = config.ROOT / "workflow" / "arms.yaml"
TABLE = plan.read(FILE)
NAMES = plan.chosen(TABLE, (), quick=False, more=False)
#: Score -> the endpoint of the table that measures it.
MEASURED = {"refusal_auc": "refusal", "refusal_auc_length": "refusal", "refusal_at_10": "refusal", "nll": "nll",
            "mc2": "truth", "mmlu_probe": "utility"}


def groups(names=NAMES):
    return comparisons.resolved(TABLE.comparisons, TABLE.arms, names)


def test_every_fusion_is_compared_with_joint_training_once_on_each_endpoint_of_safety():
    fusions = {arm.label for name, arm in TABLE.arms.items() if name in NAMES and arm.shown
               and arm.kind in ("merge", "lora_fusion", "somf", "h3fusion")}
    # rows that are another row's model again
    fusions -= {"Safe LoRA", "SafeMERGE"}
    for score in ("refusal_auc", "refusal_auc_length", "refusal_at_10", "nll"):
        compared = [row for group in groups() if "naive mix" in group["against"] and score in group["scores"]
                    and not group["every"] for row in group["rows"] if group["rows"] != ["tuned MoE"]]
        assert sorted(compared) == sorted(fusions), score


def test_the_primary_question_is_one():
    (primary,) = [group for group in groups(plan.chosen(TABLE, (), quick=False, more=True)) if group["every"]]
    assert primary["against"] == ["naive mix", "naive mix at rate 4e-3", "naive mix rank 48",
                                  "naive mix of whole answers"]
    assert primary["scores"] == ["refusal_auc", "refusal_auc_length"]
    assert [arm.label for arm in TABLE.arms.values() if arm.key and arm.kind in (
        "merge", "lora_fusion", "somf", "h3fusion")] == primary["rows"]


def test_scores_are_those_that_the_endpoints_measure():
    assert {score for group in groups() for score in group["scores"]} == set(MEASURED)
    assert set(MEASURED.values()) <= TABLE.endpoints.keys()


def test_the_tuned_moe_meets_its_controls():
    met = {other for group in groups() if group["rows"] == ["tuned MoE"] for other in group["against"]}
    assert met == {"raw MoE", "raw MoE k 1", "naive mix + second stage", "naive mix rank 48 + second stage",
                   "tuned MoE - gate", "tuned MoE - drift", "tuned MoE - gate - drift", "raw MoE + router tuned"}


def test_rows_that_are_not_in_the_report_are_left_out_and_so_are_empty_groups():
    few = groups(["base", "mix", "raw_moe", "tuned_moe"])
    assert [group["title"] for group in few] == [
        "Fusions against joint training", "Fusions against each joint training",
        "What fusions cost against joint training", "What tuning adds, and fusing at an equal second stage"]
    assert few[0]["rows"] == ["raw MoE", "tuned MoE"]
    assert few[0]["against"] == ["naive mix"]
    assert few[3]["against"] == ["raw MoE"]
    assert groups(["base", "mix"]) == []


def test_the_report_reads_what_is_written(tmp_path):
    args = config.parse(flags.LeaderboardArgs, ["--output_dir", str(tmp_path)]).args
    words = leaderboard.report_words(args, TABLE, NAMES, tmp_path)
    asked = config.parse(flags.ReportArgs, words[1:]).args
    assert asked.declared == str(leaderboard.declared_file(tmp_path))
    assert {"md", "html", "json", "csv", "latex"} == set(asked.formats)
    alone = leaderboard.report_words(args, TABLE, ["base", "mix"], tmp_path)
    assert "--declared" not in alone


def test_the_graph_leaves_the_file_beside_its_plan(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(leaderboard, "_scored", lambda *_: True)
    monkeypatch.setattr(leaderboard.subprocess, "run",
                        lambda words, **_: ran.append(words) or type("R", (), {"returncode": 0}))
    args = config.parse(flags.LeaderboardArgs, ["--output_dir", str(tmp_path)]).args
    (tmp_path / "workflow").mkdir()
    assert leaderboard.finish(args, TABLE, NAMES, tmp_path, False, []) == 0
    written = json.loads((tmp_path / "workflow" / "comparisons.json").read_text(encoding="utf-8"))
    assert written == groups()
    assert str(tmp_path / "workflow" / "comparisons.json") in ran[0]


@pytest.mark.parametrize(("change", "says"), [
    ({"rows": ["tuned_mo"]}, "comparisons, entry 1: rows: tuned_mo: no arm and no kind of arms"),
    ({"against": []}, "comparisons, entry 1: needs against"),
    ({"score": "nll"}, "comparisons, entry 1: score: unknown; allowed: against, but, every, rows, scores, title"),
])
def test_wrong_entries_are_named(change, says):
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    content["comparisons"] = [{**content["comparisons"][0], **change}]
    with pytest.raises(UserError) as caught:
        plan.checked(content, "mine.yaml")
    assert says in str(caught.value)


def test_arms_that_are_no_rows_are_never_compared():
    hidden = replace(TABLE.arms["raw_moe"], shown=False)
    found = comparisons.resolved(TABLE.comparisons, {**TABLE.arms, "raw_moe": hidden}, NAMES)
    assert not any("raw MoE" in (*group["rows"], *group["against"]) for group in found)
