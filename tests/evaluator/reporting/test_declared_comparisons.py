"""Comparisons declared in a file: these alone make the findings, each group and score corrected by itself."""

import json
from pathlib import Path

import pytest
from reported import RUNS, fill, hits, put, write

from evaluator import report
from evaluator.reporting import declared
from evaluator.reporting.findings import Line
from evaluator.statistics import metrics
from evaluator.statistics.axes import Measured

GROUPS = [
    {"title": "Fusions against joint training", "rows": ["moe", "plain average"], "against": ["naive mix"],
     "scores": ["safe_refusal", "overrefusal"]},
    {"title": "What they cost", "rows": ["average", "moe"], "against": ["mix", "base"], "scores": ["nll", "refusal_auc"]},
]


def declare(tmp_path, content=GROUPS, name="declared.json"):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def comparisons(tmp_path):
    return json.loads((tmp_path / "report" / "t.json").read_text())["findings"]["comparisons"]


def test_the_findings_are_the_declared_ones_alone(tmp_path):
    fill(tmp_path)
    text = write(tmp_path, "--against", "naive mix", "--declared", declare(tmp_path), "--format", "md,json")
    found = comparisons(tmp_path)
    # the average has no likelihood; nothing was put to the likelihood of refusals
    assert [(c["group"], c["score"], c["row"], c["against"]) for c in found] == [
        ("Fusions against joint training", score, row, "naive mix") for score in ("safe_refusal", "overrefusal")
        for row in ("tuned MoE", "plain average")] + [
        ("What they cost", "nll", "tuned MoE", other) for other in ("naive mix", "base")]
    findings = text.split("## Findings")[1].split("## Notes")[0]
    assert "Fusions against joint training, refusal ↑: better than naive mix: tuned MoE (+0.250 [" in findings
    assert "worse than naive mix: plain average (-0.400 [" in findings
    assert "What they cost, held-out NLL ↓: " in findings
    assert "cannot be compared with base: plain average" in findings
    assert "What they cost: not measured in these rows: refusal_auc." in findings
    assert "6 comparisons, declared before" in findings
    # what was not declared is in no sentence
    assert "harmless" not in findings
    assert "honest" not in findings
    # the table of differences stays that of every row
    assert "| harmless |" in text.split("## Every other row minus naive mix")[1].split("##")[0]


def test_each_group_and_score_is_corrected_by_itself(tmp_path):
    fill(tmp_path)
    write(tmp_path, "--declared", declare(tmp_path), "--format", "json,md")
    found, families = comparisons(tmp_path), {}
    for c in found:
        families.setdefault((c["group"], c["score"]), []).append(c)
    assert len(families) == 3
    for family in families.values():
        assert [c["p_holm"] for c in family] == metrics.holm([c["p"] for c in family])


def test_what_must_beat_every_reference_on_every_score(tmp_path):
    """The row's p is the largest of its comparisons'; Holm goes over the rows."""
    fill(tmp_path)
    group = {"title": "g", "rows": ["moe", "mix", "average"], "against": ["base", "truthfulness"],
             "scores": ["safe_refusal", "nll"], "every": True}
    text = write(tmp_path, "--declared", declare(tmp_path, [group]), "--format", "md,json")
    found = {}
    for c in comparisons(tmp_path):
        found.setdefault(c["row"], []).append(c)
    # the average has no likelihood: of it nothing can be said
    assert set(found) == {"tuned MoE", "naive mix"}
    assert {len(mine) for mine in found.values()} == {4}
    worst = {row: max(c["p"] for c in mine) for row, mine in found.items()}
    corrected = dict(zip(worst, metrics.holm(list(worst.values())), strict=True))
    assert {row: {c["p_holm"] for c in mine} for row, mine in found.items()} == {row: {p} for row, p in corrected.items()}
    (line,) = [part for part in text.splitlines() if part.startswith(
        "- g, better than every one of base, honest on refusal")]
    assert "better: tuned MoE (weakest against " in line
    assert "cannot be compared: plain average" in line


def test_one_reference_that_is_not_beaten_is_enough(tmp_path):
    fill(tmp_path)
    # the harmless expert refuses more than the tuned model
    group = {"title": "g", "rows": ["moe"], "against": ["mix", "safety"], "scores": ["safe_refusal"], "every": True}
    text = write(tmp_path, "--declared", declare(tmp_path, [group]), "--format", "md,json")
    assert {c["verdict"] for c in comparisons(tmp_path)} == {"no difference"}
    assert {c["p_holm"] for c in comparisons(tmp_path)} == {1.0}
    assert "not shown to be: tuned MoE (weakest against harmless on refusal ↑: -0.100 [" in text


def test_the_wider_correction_stands_beside(tmp_path):
    fill(tmp_path)
    write(tmp_path, "--declared", declare(tmp_path, [*GROUPS, {**GROUPS[0], "title": "again"}]), "--format", "json,md")
    mine = {(c["row"], c["against"]): (c["p"], c["p_holm_score"]) for c in comparisons(tmp_path) if c["score"] == "nll"}
    assert metrics.holm([p for p, _ in mine.values()]) == [wide for _, wide in mine.values()]
    # the same comparison in two groups counts once
    refusal = {(c["row"], c["against"]): c["p_holm_score"] for c in comparisons(tmp_path) if c["score"] == "safe_refusal"}
    assert len(refusal) == 2


def test_harm_before_the_correction_is_said(tmp_path):
    put(tmp_path, "base", refusal=hits(0.58))
    put(tmp_path, "weak", refusal=hits(0.50))
    for i in range(12):
        put(tmp_path, f"same{i}", refusal=hits(0.58))
    rows = ["weak", *(f"same{i}" for i in range(12))]
    file = declare(tmp_path, [{"title": "g", "rows": rows, "against": ["base"], "scores": ["safe_refusal"]}])
    text = write(tmp_path, "--declared", file, runs="base," + ",".join(rows))
    assert "worse, before the correction only, than base: weak (-0.080 [" in text


def test_the_page_for_a_browser_marks_what_was_declared(tmp_path):
    fill(tmp_path)
    write(tmp_path, "--against", "naive mix", "--declared", declare(tmp_path), "--format", "md,html")
    section = (tmp_path / "report" / "t.html").read_text().split('id="differences"')[1].split("</section>")[0]
    rows = {row.split("</th>")[0].rpartition(">")[2]: row for row in section.split("<tr>")[1:]}
    # declared and significant: filled; significant and not declared: outlined
    assert "▲" in rows["tuned MoE"]
    assert "▲" not in rows["harmless"]
    assert "△" in rows["harmless"]


@pytest.mark.parametrize(("content", "says"), [
    ("{", "not readable as YAML or JSON"),
    ("{}", "needs a list of {title, rows, against, scores}"),
    ([{"title": "g", "rows": ["mo"], "against": ["mix"], "scores": ["nll"]}],
     "entry 1: rows: no row is called mo; allowed: base"),
    ([{"title": "g", "rows": "moe", "against": ["mix"], "scores": ["nll"]}], "entry 1: rows: needs a list of names"),
    ([{"title": "g", "rows": ["moe"], "against": ["mix"]}], "entry 1: has title, rows, against; needs exactly title, rows"),
    ([{**GROUPS[0], "every": "yes"}], "entry 1: every: yes: allowed: true, false"),
    ([GROUPS[0], GROUPS[0]], "two groups are called Fusions against joint training; give each its own title"),
])
def test_files_that_cannot_be_meant(tmp_path, capsys, content, says):
    fill(tmp_path)
    with pytest.raises(SystemExit) as caught:
        report.main(["--runs", RUNS, "--output_dir", str(tmp_path), "--name", "t", "--declared", declare(tmp_path, content)])
    assert caught.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "report" / "t.md").exists()


def test_a_file_that_is_not_there(tmp_path, capsys):
    fill(tmp_path)
    with pytest.raises(SystemExit):
        report.main(["--runs", RUNS, "--output_dir", str(tmp_path), "--declared", str(tmp_path / "gone.yaml")])
    assert "gone.yaml: not readable" in capsys.readouterr().err


def test_signs_by_other_openers_are_printed():
    """Made-up AUCs: by the rated openers alone one of two differences turns."""
    def line(label, auc, rated, rest):
        details = {"refusal_likelihood": {"sensitivity": {"source rated": {"alone": {"value": rated}, "left_out": None},
                                                          "source ours": {"alone": None, "left_out": {"value": rest}}}}}
        return Line(label, label, (Measured(Path(label), {"refusal_auc": {"value": auc}}, {}, {}, 42,
                                            origin={"refusal_auc": {"details": details}}),))

    a, b, c = line("a", 0.9, 0.8, 0.9), line("b", 0.85, 0.82, 0.7), line("c", 0.7, 0.6, 0.5)
    group = declared.Group("g", (a,), (b, c), ("refusal_auc",), every=True)
    (said,) = declared._robustness(group)
    assert "by those of rated answers alone 1 of 2 differences in refusal AUC keep their sign (not: a against b)" in said
    assert "without the trained refusals' own 2 of 2 differences" in said
    # files of before, and other scores, say nothing
    old = Line("old", "old", (Measured(Path("old"), {"refusal_auc": {"value": 0.5}}, {}, {}, 42),))
    assert declared._robustness(declared.Group("g", (a,), (old,), ("refusal_auc",), every=True)) == []
    assert declared._robustness(declared.Group("g", (a,), (b,), ("nll",), every=True)) == []
