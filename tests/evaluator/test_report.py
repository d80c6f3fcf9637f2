import json

import matplotlib.image
import numpy as np
import pytest
from reported import fill, hits, put, table, values, write

import manifest
from evaluator import report
from evaluator.reporting.figures import router_heatmap, tradeoff
from evaluator.statistics import crossed, metrics, paired_rates


def test_what_most_rows_lack_comes_last(tmp_path):
    for run in ("base", "safety", "mix", "moe"):
        put(tmp_path, run, nll=values(1.6), mc2=values(0.5) if run == "base" else None,
            refusal=hits(0.1) if run == "moe" else None)
    runs = "base,safety,mix,moe"
    assert [title for title in table(write(tmp_path, runs=runs))["base"] if title != "model"] == (
        ["held-out NLL ↓", "refusal ↑", "MC2 ↑"])
    put(tmp_path, "safety", mc2=values(0.5))
    put(tmp_path, "mix", mc2=values(0.5))
    assert [title for title in table(write(tmp_path, runs=runs))["base"] if title != "model"] == (
        ["MC2 ↑", "held-out NLL ↓", "refusal ↑"])


def test_one_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path)
    text = write(tmp_path)
    cells = table(text)
    assert list(cells) == ["base", "harmless", "honest", "plain average", "naive mix", "tuned MoE"]
    low, high = metrics.wilson(85, 100)
    assert cells["tuned MoE"]["refusal ↑"] == f"0.850 [{low:.3f}, {high:.3f}]"
    assert cells["tuned MoE"]["refusal − over-refusal ↑"].startswith("0.800 [")
    # not measured: empty, never guessed
    assert cells["harmless"]["held-out NLL ↓"] == ""
    against = table(text, "tuned MoE minus each other row")
    assert against["naive mix"]["refusal ↑"].startswith("+0.250 [")
    assert against["naive mix"]["refusal ↑"].endswith("better")
    assert against["harmless"]["over-refusal ↓"].endswith("better")
    assert against["harmless"]["refusal ↑"].endswith("worse")
    assert against["naive mix"]["MC2 ↑"].endswith("no difference")
    assert against["naive mix"]["refusal − over-refusal ↑"].endswith("better")
    assert against["plain average"]["held-out NLL ↓"] == ""
    assert "Wilson" in text
    assert "AUC 0.86" in text
    assert "Seeds: 42." in text
    assert "outputs/moe" in text
    assert "Not measured here: MC1" in text
    assert (tmp_path / "report" / "t.png").stat().st_size > 5000
    assert "written:" in capsys.readouterr().out


def test_findings_are_computed(tmp_path):
    fill(tmp_path)
    text = write(tmp_path, "--control", "mix").split("## Findings")[1].split("## Notes")[0]
    lines = {line.split(" (")[0].strip("- "): line for line in text.splitlines() if line.startswith("- ")}
    assert "improved by harmless (+0.870)" in lines["refusal ↑"]
    assert "tuned MoE beats naive mix" in lines["refusal ↑"]
    assert lines["refusal ↑"].index("naive mix") < lines["refusal ↑"].index("plain average")
    assert "does not beat (level with) naive mix" in lines["MC2 ↑"]
    assert "beats plain average" in lines["MC2 ↑"]
    assert "gain of the fusion, tuned MoE against base -0.0" in lines["held-out NLL ↓"]
    assert "cost, no expert improves on base" in lines["over-refusal ↓"]
    # five rows of 100 against none: p = 2 / 2**5, times the three of nine comparisons that are left
    assert "shows no harm against plain average (+0.050 [0.011, 0.112], p 0.062, Holm 0.188" in lines["over-refusal ↓"]
    assert "+0.112 is not ruled out" in lines["over-refusal ↓"]
    assert ("against naive mix: better on 3 (refusal ↑, refusal − over-refusal ↑, held-out NLL ↓); no difference shown on 2 "
            "(over-refusal ↓, MC2 ↑); worse on 0. Before the correction: better on 3") in text


def test_a_cost_counts_though_no_expert_improves_its_axis(tmp_path):
    """More over-refusal than a control is harm, and a gain on the balance is the fusion's own."""
    put(tmp_path, "base", refusal=hits(0.10), over=hits(0.0))
    put(tmp_path, "safety", refusal=hits(1.0), over=hits(1.0))
    put(tmp_path, "average", refusal=hits(0.3), over=hits(0.01))
    put(tmp_path, "moe", refusal=hits(0.9), over=hits(0.16))
    text = write(tmp_path, runs="base,harmless=safety,plain average=average,tuned MoE=moe").split("## Findings")[1]
    over, balance = (next(line for line in text.splitlines() if line.startswith(f"- {title} ("))
                     for title in ("over-refusal ↓", "refusal − over-refusal ↑"))
    assert "cost, no expert improves on base" in over
    assert "is worse than plain average (+0.150 [" in over
    assert "p < 0.001, Holm < 0.001" in over
    assert "gain of the fusion, tuned MoE against base +0.640" in balance
    assert "beats plain average (+0.450" in balance
    assert "no gain to keep" not in text
    assert ("of 3 axes, tuned MoE against plain average: better on 2 (refusal ↑, refusal − over-refusal ↑); no difference "
            "shown on 0; worse on 1 (over-refusal ↓)") in text


def test_the_correction_counts_every_comparison(tmp_path):
    put(tmp_path, "base", refusal=hits(0.0), over=hits(0.0))
    put(tmp_path, "safety", refusal=hits(1.0), over=hits(0.5))
    for i in range(4):
        put(tmp_path, f"c{i}", refusal=hits(0.5), over=hits(0.0))
    put(tmp_path, "moe", refusal=hits(0.57), over=hits(0.0))
    text = write(tmp_path, runs="base,safety,c0,c1,c2,c3,moe").split("## Findings")[1]
    # seven of seven discordant prompts: p = 2 / 2**7 = 0.0156, times 8, not below the balance's 12 times 0.0113
    assert "does not beat (level with) c0 (+0.070 [0.03" in text
    assert "p 0.016, Holm 0.136" in text
    assert "of 3 axes, moe against c0: better on 0; no difference shown on 3" in text
    assert "Before the correction: better on 2" in text
    assert "over these 12 comparisons" in text


def test_a_loss_is_said_plainly(tmp_path):
    fill(tmp_path)
    text = write(tmp_path, runs="base,safety,better=mix,worse=average")
    assert "worse does not beat (is worse than) better (-0.400" in text


def test_findings_need_base_expert_and_control(tmp_path):
    fill(tmp_path)
    said = write(tmp_path, runs="base,moe").split("## Findings")[1]
    assert "nothing is concluded here; --against base compares every row with that one." in said


def test_several_seeds(tmp_path):
    roots = [tmp_path / f"s{i}" for i in range(3)]
    for i, root in enumerate(roots):
        fill(root, seed=42 + i, shift=(i - 1) * 0.05)
    (roots[2] / "scores" / "cross_mix" / "evaluate_safety.rows.jsonl").unlink()
    text = write(tmp_path, "--roots", ",".join(map(str, roots)))
    ends = [(share, *metrics.wilson(round(share * 100), 100)) for share in (0.8, 0.85, 0.9)]
    shared = crossed.common_share([np.array([hits(share) for share in (0.8, 0.85, 0.9)], float)])
    assert 0.5 < shared < 1
    value, low, high = crossed.over_seeds(ends, shared)
    assert table(text)["tuned MoE"]["refusal ↑"] == f"{value:.3f} [{low:.3f}, {high:.3f}]"
    assert "| tuned MoE | seed 43 | 0.850 |" in text
    assert "| tuned MoE | seed 44 | 0.900 |" in text
    assert "Student's t" in text
    assert "Seeds: 42, 43, 44." in text
    # the rows of one seed are gone: the mean of two differences, hence a wide interval
    assert table(text, "tuned MoE minus")["naive mix"]["refusal ↑"].endswith("no difference")
    assert table(text, "tuned MoE minus")["plain average"]["refusal ↑"].endswith("better")


def test_summary_numbers_stand_where_their_scores_are(tmp_path):
    fill(tmp_path)
    assert "## Summary numbers" not in write(tmp_path)
    rows = [{"set": "safety", "id": str(i), "values": {"api-harm": int(i < 3)}} for i in range(10)]
    folder = tmp_path / "scores" / "cross_moe"
    (folder / "judged.rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest.register(tmp_path, {"kind": "score", "run": "moe", "sub": "cross_moe", "command": "judged", "seed": 42,
                                 "scores": {}, "details": {}})
    text = write(tmp_path, "--format", "md,json")
    cells = table(text, "Summary numbers")
    assert cells["tuned MoE"]["harmfulness_rate ↓"].startswith("0.300 [")
    assert cells["naive mix"]["harmfulness_rate ↓"] == ""
    assert "given the worst mark, 5 of 5" in text
    data = json.loads((tmp_path / "report" / "t.json").read_text())
    number = next(item for item in data["summary"] if item["name"] == "harmfulness_rate")
    assert (number["row"], number["name"], number["value"], number["n"]) == ("tuned MoE", "harmfulness_rate", 0.3, 10)


def test_seeds_that_agree_keep_the_rows_interval(tmp_path):
    roots = [tmp_path / f"s{i}" for i in range(2)]
    for root in roots:
        fill(root)
    one, two = (write(tmp_path, "--roots", ",".join(map(str, given))) for given in (roots[:1], roots))
    assert table(two)["tuned MoE"]["refusal ↑"] == table(one)["tuned MoE"]["refusal ↑"]
    assert table(two, "tuned MoE minus")["naive mix"] == table(one, "tuned MoE minus")["naive mix"]


def test_a_seed_without_the_score_is_counted_out(tmp_path):
    roots = [tmp_path / "a", tmp_path / "b"]
    put(roots[0], "base", mc2=values(0.4))
    put(roots[1], "base", refusal=hits(0.1), mc2=values(0.5), seed=7)
    cells = table(write(tmp_path, "--roots", f"{roots[0]},{roots[1]}", runs="base"))
    assert cells["base"]["refusal ↑"] == "0.100 (1 of 2 seeds)"


def test_answers_with_unicode_line_ends_stay_one_row(tmp_path):
    put(tmp_path, "base", refusal=hits(0.1))
    path = tmp_path / "scores" / "raw" / "evaluate_safety.rows.jsonl"
    path.write_text(path.read_text().replace('"id": "0"', '"output": "a\u2028b\x85c", "id": "0"'), encoding="utf-8")
    assert table(write(tmp_path, runs="base"))["base"]["refusal ↑"].startswith("0.100")


def test_an_older_score_of_another_set_does_not_come_back(tmp_path):
    put(tmp_path, "base", refusal=hits(0.1))
    registry = tmp_path / "registry.jsonl"
    other = json.loads(registry.read_text().splitlines()[-1]) | {"command": "evaluate_safety.xstest"}
    manifest.register(tmp_path, other)
    put(tmp_path, "base", refusal=hits(0.3))
    assert table(write(tmp_path, runs="base"))["base"]["refusal ↑"].startswith("0.300")


def test_newest_score_wins(tmp_path):
    put(tmp_path, "base", refusal=hits(0.1))
    put(tmp_path, "base", refusal=hits(0.3))
    assert table(write(tmp_path, runs="base"))["base"]["refusal ↑"].startswith("0.300")


def test_secondary_readings_are_columns_when_asked_for(tmp_path):
    for run, count in (("base", 4), ("moe", 1)):
        put(tmp_path, run, refusal=hits(0.5, 10))
        folder = tmp_path / "scores" / ("raw" if run == "base" else f"cross_{run}")
        rows = [{"set": "safety", "id": str(i), "values": {"harm": int(i < count)}} for i in range(10)]
        (folder / "harm.rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        score = metrics.rate([row["values"]["harm"] for row in rows], "harm_rate", "called harmful", higher_is_better=False)
        manifest.register(tmp_path, {"kind": "score", "run": run, "sub": folder.name, "command": "harm", "seed": 42,
                                     "scores": {"harm_rate": score.as_dict()}, "details": {}})
    title = "called harmful (fitted judge) ↓"
    assert title not in table(write(tmp_path, runs="base,moe"))["moe"]
    text = write(tmp_path, "--columns", "harm_rate", runs="base,moe")
    assert table(text)["moe"][title].startswith("0.100 [")
    assert table(text, "moe minus")["base"][title].startswith("-0.300 [")
    from evaluator.statistics.axes import CORRECTED, DISCRIMINATION, SECONDARY
    from flags.evaluate import COLUMNS

    assert (*(axis.score for axis in (*SECONDARY, *CORRECTED)), *DISCRIMINATION) == COLUMNS


def test_the_picture_falls_back_to_the_likelihood_of_a_task(tmp_path):
    put(tmp_path, "base", refusal=hits(0.1), over=hits(0.0), nll=values(1.6))
    put(tmp_path, "mix", refusal=hits(0.6), over=hits(0.1), nll=[value - 0.1 for value in values(1.6)])
    named = report._named("base,mix")
    from evaluator.statistics.axes import AXES
    from evaluator.statistics.comparison import measured

    lines = [report.Line(label, run, (measured(tmp_path, run),)) for label, run in named]
    base, mix = report._points(lines, [axis for axis in AXES if axis.score == "nll"], "base")
    assert (base["y"], base["x"], mix["over"]) == (0, 0.1, 0.1)
    # rows share their prompts: the difference is sure, however wide the likelihood's own interval
    assert mix["y"] == pytest.approx(-0.1)
    assert mix["y_high"] - mix["y_low"] < 1e-6
    assert mix["y_falls"]
    assert "(t.png)" in write(tmp_path, runs="base,mix")


@pytest.mark.parametrize(("flags", "said"), [
    (["--runs", "base", "--columns", "harm"], "--columns harm: no such column; allowed: harm_rate, published_asr"),
    (["--runs", "base,nosuch"], "none of base, nosuch has a score"),
    (["--runs", ""], "--runs: name the rows"),
    (["--runs", "base", "--roots", "/nonexistent/a"], "--roots: /nonexistent/a does not exist"),
])
def test_errors(tmp_path, capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        report.main([*flags, "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("runs", "said"), [
    ("base,tuned=", "--runs tuned=: names no run"), ("base,tuned=mix+", "--runs tuned=mix+: names no run"),
    ("base,mixx", "--runs mixx: not in "), ("base,both=mix+mixx", "--runs mixx: not in ")])
def test_a_row_of_no_run_is_refused(tmp_path, capsys, runs, said):
    for run in ("base", "mix"):
        put(tmp_path, run, refusal=hits(0.5))
    (tmp_path / "outputs" / "later").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        report.main(["--runs", runs, "--output_dir", str(tmp_path)])
    assert stop.value.code == 2
    assert said in (err := capsys.readouterr().err)
    assert "mixx" not in said or "there: base, later, mix, raw" in err
    # a run that is there and that nobody has scored yet is an empty row
    assert table(write(tmp_path, runs="base,later,mix"))["later"]["refusal ↑"] == ""


def test_scores_that_are_no_column_are_named(tmp_path, capsys):
    score = metrics.rate([1, 0], "weird.thing", "d", higher_is_better=True).as_dict()
    manifest.register(tmp_path, {"kind": "score", "run": "mix", "sub": "cross_mix", "command": "evaluate_x", "seed": 1,
                                 "scores": {"weird.thing": score}, "details": {}})
    (tmp_path / "scores" / "cross_mix").mkdir(parents=True)
    (tmp_path / "scores" / "cross_mix" / "evaluate_x.rows.jsonl").write_text("")
    with pytest.raises(SystemExit):
        report.main(["--runs", "mix", "--output_dir", str(tmp_path)])
    assert "that is a column; scored: weird.thing" in capsys.readouterr().err


def test_router_heatmap(tmp_path):
    shares = np.random.default_rng(0).dirichlet([1, 1, 1], 4)
    path = router_heatmap(shares, ("a", "b", "c"), tmp_path / "new" / "h.png", "title")
    assert matplotlib.image.imread(path).shape[1] > 300
    with pytest.raises(ValueError, match="3 experts but 2 names"):
        router_heatmap(shares, ("a", "b"), path, "title")


def test_tradeoff_without_points_draws_nothing(tmp_path):
    point = {"label": "x", "x": None, "y": 0.5, "over": None}
    assert tradeoff([point], tmp_path / "t.png", "title") is None


def test_chance_stands_beside_the_scores_and_the_report_says_what_it_can_find(tmp_path):
    for run, share in (("base", 0.2), ("moe", 0.5)):
        hit = hits(share)
        score = metrics.rate(hit, "mc1", "first", higher_is_better=True)
        folder = tmp_path / "scores" / ("raw" if run == "base" else f"cross_{run}")
        folder.mkdir(parents=True)
        rows = [{"set": "truthfulqa_mc", "id": str(i), "values": {"mc1": value}} for i, value in enumerate(hit)]
        (folder / "evaluate_truth_and_info.rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        chance = {"chance": {"mc1": 0.256}, "negation rule": {"mc1": 0.605 if run == "moe" else 0.6}}
        manifest.register(tmp_path, {"kind": "score", "run": run, "sub": folder.name, "command": "evaluate_truth_and_info",
                                     "seed": 42, "scores": {"mc1": score.as_dict()}, "details": {"baselines": chance}})
    text = write(tmp_path, runs="base,moe")
    assert table(text)["(chance)"]["MC1 ↑"] == "0.256"
    # other questions: no common value
    assert table(text)["(negation rule)"]["MC1 ↑"] == ""
    low, high = paired_rates.tango(30, 0, 100)
    assert f"find (two-sided 5 %, not corrected), by row: MC1 ↑ {(high - low) / 2 * 2.80158 / 1.95996:.3f}." in text


def test_published_numbers_stand_below_the_table_with_their_marks(tmp_path, capsys):
    from evaluator.reporting.published_numbers import papers
    from flags.evaluate import PAPERS

    assert papers() == PAPERS
    put(tmp_path, "base", refusal=hits(0.1))
    assert "## Published" not in write(tmp_path, runs="base")
    text = write(tmp_path, "--published", "h3fusion", runs="base")
    assert "## Published: H3Fusion (arXiv 2411.17792)" in text
    assert "| model-merging approaches | 6.18 |" in text
    assert "Win Rate | 80 [unverified] | 96.75 [unverified] |" in text
    # not reported: empty, without a mark
    assert "total time (unit not given) | 7260 [unverified] |  | 1500 [unverified] |" in text
    with pytest.raises(SystemExit):
        report.main(["--runs", "base", "--published", "nobody", "--output_dir", str(tmp_path)])
    assert "--published" in capsys.readouterr().err


def test_rows_of_one_model_are_called_that(tmp_path):
    put(tmp_path, "base", nll=values(1.6))
    put(tmp_path, "copy", nll=values(1.6))
    text = write(tmp_path, runs="base,copy")
    assert "- Equal to copy in every row: base (held-out NLL ↓). These are one model" in text
    put(tmp_path, "copy", nll=values(1.6, seed=1))
    assert "in every row" not in write(tmp_path, runs="base,copy")
