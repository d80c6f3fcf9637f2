"""The table of attacks: rates and changes by hand, on shared prompts only; what is missing is named with its command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

import manifest
from evaluator import attack_table
from evaluator.statistics import metrics
from flags.attack_table import AttackTableArgs


@pytest.fixture
def score(tmp_path):
    """Write a run's refusals: {set: [0 or 1 per prompt]}, in files as evaluate_safety.py names them."""
    def write(run, sets):
        for place, refused in sets.items():
            command = "evaluate_safety" if place == "safety" else f"evaluate_safety.{place}"
            file = tmp_path / "scores" / f"cross_{run}" / f"{command}.rows.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps({"set": place, "id": f"p{i}", "values": {"safe_refusal": hit, "refusal": 1}})
                                    + "\n" for i, hit in enumerate(refused)))
            manifest.register(tmp_path, {"kind": "score", "run": run, "sub": f"cross_{run}", "command": command,
                                         "scores": {}, "seed": 1})
    return write


def ask(tmp_path, runs, **options):
    return attack_table.table(AttackTableArgs(output_dir=str(tmp_path), runs=runs, **options))


def test_a_run_beside_itself_without_the_wrapper_on_the_same_prompts(tmp_path, score):
    score("a", {"safety": [1, 1, 1, 0, 1, 1], "safety+cot": [1, 0, 0, 0]})
    cell = ask(tmp_path, "A=a", attacks="cot")[0]["cells"]["cot"]
    # the last two prompts were not attacked
    assert cell["as_asked"]["value"] == pytest.approx(0.75)
    assert cell["as_asked"]["n"] == 4
    assert cell["attacked"]["value"] == pytest.approx(0.25)
    assert (cell["attacked"]["low"], cell["attacked"]["high"]) == pytest.approx(metrics.wilson(1, 4))
    assert cell["change"]["value"] == pytest.approx(-0.5)
    # two prompts that changed prove nothing yet
    assert cell["change"]["low"] <= -0.5 < 0 < cell["change"]["high"]


def test_several_seeds_have_students_t_and_equal_ones_the_rows_interval(tmp_path, score):
    for run, cot, suffix in (("a", [1, 0, 0, 0], [1, 1, 0, 0]), ("b", [1, 1, 0, 0], [1, 1, 0, 0]),
                             ("c", [1, 0, 0, 1], [1, 1, 0, 0])):
        score(run, {"safety": [1, 1, 1, 1], "safety+cot": cot, "safety+suffix": suffix})
    cells = ask(tmp_path, "m=a+b+c")[0]["cells"]
    values = [0.25, 0.5, 0.5]
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / 3**0.5
    # the prompts are the same for every seed: their part stays. By hand, of the table (seeds, prompts)
    # 1 0 0 0 / 1 1 0 0 / 1 0 0 1: sums of squares 35/12 = 19/12 (prompts) + 2/12 (seeds) + 14/12 (rest)
    prompts, rest = 19 / 12 / 3, 14 / 12 / 6
    shared = (prompts - rest) / 3 / ((prompts - rest) / 3 + rest)
    rows = np.mean([metrics.wilson(round(4 * value), 4)[1] - value for value in values]) * shared**0.5
    assert cells["cot"]["attacked"]["value"] == pytest.approx(np.mean(values))
    assert cells["cot"]["attacked"]["high"] == pytest.approx(min(1.0, np.mean(values) + np.hypot(half, rows)))
    assert (cells["suffix"]["attacked"]["low"], cells["suffix"]["attacked"]["high"]) == pytest.approx(metrics.wilson(2, 4))


def test_the_command_writes_a_table(tmp_path, score, capsys):
    score("a", {"safety": [1, 1, 1, 0], "safety+cot": [1, 0, 0, 0], "safety+suffix": [1, 1, 0, 0]})
    attack_table.main(["--runs", "the a=a", "--output_dir", str(tmp_path), "--name", "under"])
    said = (tmp_path / "report" / "under.md").read_text()
    assert said in capsys.readouterr().out
    assert "| model | prompts | as asked ↑ | cot ↑ | cot: change | suffix ↑ | suffix: change |" in said
    assert "| the a | 4 | 0.750 [" in said
    assert "| -0.500 [" in said
    content = json.loads((tmp_path / "report" / "under.json").read_text())
    assert content["rows"][0]["cells"]["suffix"]["change"]["value"] == pytest.approx(-0.25)


def test_other_prompts_per_attack_have_a_column_each(tmp_path, score):
    score("a", {"safety": [1, 1, 1, 0], "safety+cot": [1, 0, 0], "safety+suffix": [1, 1, 0, 0]})
    args = AttackTableArgs(output_dir=str(tmp_path), runs="a")
    said = attack_table.text(attack_table.table(args), args)
    assert "as asked (cot) ↑ | cot ↑ | cot: change | as asked (suffix) ↑" in said
    assert "| a | 3/4 | 1.000 [" in said


def test_what_is_wrong_is_named(tmp_path, score, capsys):
    score("a", {"safety": [1, 1]})
    for words, says in (
            (["--runs", "a", "--attacks", "cot"], "a: no scores for safety+cot; run python inference.py --task_name safety "
             "--attack cot --cross_task a and python evaluator/evaluate_safety.py --harmful_task safety+cot --task_name "
             "cross_a"),
            (["--runs", "", "--attacks", "cott"], "--attacks cott: not known; allowed: cot, cou, suffix, prefill"),
            (["--runs", "", "--attacks", ""], "--runs: name the rows"),
            (["--runs", "a", "--task_name", "safety+cot"], "--task_name safety+cot: name the task alone")):
        with pytest.raises(SystemExit) as stop:
            attack_table.main([*words, "--output_dir", str(tmp_path)])
        assert stop.value.code == 2
        assert says in capsys.readouterr().err


def test_sets_that_share_no_prompt(tmp_path, score, capsys):
    score("a", {"safety": [1, 1]})
    file = tmp_path / "scores" / "cross_a" / "evaluate_safety.safety+cot.rows.jsonl"
    file.write_text(json.dumps({"set": "safety+cot", "id": "other", "values": {"safe_refusal": 1}}) + "\n")
    manifest.register(tmp_path, {"kind": "score", "run": "a", "sub": "cross_a", "command": "evaluate_safety.safety+cot",
                                 "scores": {}, "seed": 1})
    with pytest.raises(SystemExit):
        attack_table.main(["--runs", "a", "--attacks", "cot", "--output_dir", str(tmp_path)])
    assert "share no prompt" in capsys.readouterr().err


def test_a_csv_and_a_latex_table_hold_what_the_page_holds(tmp_path, score, capsys):
    score("a", {"safety": [1, 1, 1, 0, 1, 1], "safety+cot": [1, 0, 0, 0]})
    attack_table.main(["--output_dir", str(tmp_path), "--runs", "=A_1=a", "--attacks", "cot", "--format", "csv,latex"])
    folder = tmp_path / "report"
    assert sorted(path.name for path in folder.iterdir()) == ["attacks.csv", "attacks.tex"]
    lines = (folder / "attacks.csv").read_text().splitlines()
    assert lines[1].startswith("'=A_1,a,cot.as_asked,as asked (cot) ↑,True,model,,0.75,")
    assert lines[3].split(",")[2:8] == ["cot.change", "cot: change", "True", "model", "", "-0.5"]
    page = capsys.readouterr().out
    for number in ("0.250 [", "-0.500 ["):
        assert number in page
        assert number.replace(" [", " {\\footnotesize [") in (folder / "attacks.tex").read_text()
