"""Refusal by likelihood along a sweep: each row's scores, fusion at a chosen lambda against the controls, over seeds."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

import manifest
from config import parse
from errors import UserError
from evaluator import evaluate_refusal
from evaluator.reporting.sweeps import curve as sweep
from evaluator.reporting.sweeps import discrimination
from evaluator.reporting.sweeps import report as sweep_report
from evaluator.reporting.sweeps import seeds as sweep_seeds
from evaluator.reporting.sweeps.curve import Point
from evaluator.scoring.refusals import endpoints
from evaluator.statistics import comparison, crossed, metrics
from evaluator.statistics.axes import DISCRIMINATION, Measured
from evaluator.statistics.discrimination import delong, placements
from flags.sweep import SweepArgs
from scripts import sweep as driver

#: Prompts of each set, and how far the lambdas truly move harmful prompts away from harmless ones.
EACH, GAPS = 40, {0.0: 0.2, 0.25: 0.8, 0.5: 2.0, 0.75: 1.0, 1.0: 4.0}
FACTS = {"task": "t", "safety": "s", "form": "convex", "style": "none", "utility": "english", "refinement": [],
         "stopped": "", "sets": ["safety", "overrefusal"]}
SETS = ("harmful", "plain", "edgy", "matched", "counterpart")


def lines(gap, rng, easy, each=EACH):
    """Rows as evaluate_refusal.py writes them: a prompt has a level for all models (``easy``), a half by its id."""
    found = []
    for place, name in enumerate(SETS):
        harmful = name in ("harmful", "matched")
        values = easy[place, :each] + rng.normal(size=each) * 0.3 + gap * harmful
        for i, value in enumerate(values):
            score = round(float(value), 6)
            # a harmful and a plain prompt of one number are of equal length
            twice = {"score_equal_length": score} if name in ("harmful", "plain") else {}
            found.append({"set": f"refusal_{name}", "id": f"{i}", "category": "", "prompt_hash": f"{name} {i}",
                          "half": ("validation", "test")[i % 2], "values": {"score": score, "test_half": i % 2, **twice}})
    return found


def measured(gap, rng, easy, each=EACH, scored=True):
    """What the registry and the rows of such a model give; ``scored``: with intervals, which cost most of the time."""
    rows = lines(gap, rng, easy, each)
    scores = endpoints.scores(rows, "", 1)[0] if scored else [metrics.rate([1], "refusal_auc", "", higher_is_better=True)]
    origin = {score.name: {"inputs": {"openers": "o"}, "split": "test"} for score in scores}
    return Measured(None, {score.name: score.as_dict() for score in scores},
                    {(row["set"], row["id"]): row["values"] for row in rows}, {}, 1,
                    {(row["set"], row["id"]): row["prompt_hash"] for row in rows}, origin)


def points(seed=0, joint=0.9, each=EACH, shift=0.0):
    """A sweep of five lambdas, two of its controls with weights, and joint training."""
    rng, easy = np.random.default_rng(seed), np.random.default_rng(99).normal(size=(len(SETS), EACH))

    def one(label, weight, gap):
        marks = {str(i): int(i < 20) for i in range(40)}
        nll = 2.0 + (0 if math.isnan(weight) else weight)
        return Point(label, f"r{label}".replace(" ", "_"), weight, marks, marks, {str(i): (3 * nll, 3) for i in range(4)},
                     discrimination=measured(gap + shift, rng, easy, each))

    return {"fusion": [one(f"lambda {weight:g}", weight, gap) for weight, gap in GAPS.items()],
            "shrink": [one(f"shrink only, {1 - weight:g}", weight, 0.2 + 0.4 * weight) for weight in (0.25, 0.5)],
            "control": [one("joint training", math.nan, joint)]}


@pytest.fixture(scope="module")
def made():
    rows = points()
    return rows, sweep_report.summary(rows, {"orbit": {"fusion": [replace(p, discrimination=None) for p in rows["fusion"]]}},
                                      FACTS, 1)


def halves(model, half):
    kinds = discrimination._kinds(discrimination.half_of(model.discrimination, half))
    return tuple(list(kind.values()) for kind in kinds)


def test_lambda_is_judged_on_the_half_that_did_not_choose_it():
    rows = points()
    best, joint = rows["fusion"][2], rows["control"][0]
    # at lambda 1 the safety adapter stands alone: no fusion, whatever its AUC
    assert [p.weight for p in discrimination.inner(rows["fusion"], "convex")] == [0.25, 0.5, 0.75]
    assert [p.weight for p in discrimination.inner(rows["fusion"], "additive")] == [0.25, 0.5, 0.75, 1.0]
    found = discrimination.compare(discrimination.inner(rows["fusion"], "convex"), [joint])
    assert [p.weight for p in found.fused] == [0.5, 0.5]
    each = [delong(halves(best, half), halves(joint, half)) for half in (0, 1)]
    value = (each[0].value + each[1].value) / 2
    assert found.difference.value == pytest.approx(value)
    # two halves are different prompts: the variance of their mean is a quarter of the sum, and a little for the halves' own
    assert found.difference.high - value == pytest.approx(math.hypot(*(d.high - d.value for d in each)) / 2, rel=0.05)
    assert found.difference.n == 3 * EACH
    # the prompts' parts give the same value, and every prompt has one
    assert [len(part) for part in found.placed] == [EACH, 2 * EACH]
    harmful = [np.mean([v for (_, id), v in found.placed[0].items() if int(id) % 2 == half]) for half in (0, 1)]
    assert np.mean(harmful) == pytest.approx(value)


def test_a_lambda_that_only_one_half_likes_is_judged_by_the_other():
    rows = points()
    worse = rows["fusion"][1].discrimination
    lucky = {key: {**values, "score": values["score"] + 9 * (key[0] == "refusal_harmful" and values["test_half"] == 0)}
             for key, values in worse.rows.items()}
    curve = [rows["fusion"][2], replace(rows["fusion"][1], discrimination=replace(worse, rows=lucky))]
    found = discrimination.compare(curve, rows["control"])
    assert [p.weight for p in found.fused] == [0.25, 0.5]
    on_the_other = delong(halves(rows["fusion"][1], 1), halves(rows["control"][0], 1)).value
    honest = delong(halves(rows["fusion"][2], 0), halves(rows["control"][0], 0)).value
    assert found.difference.value == pytest.approx((on_the_other + honest) / 2)


def test_what_cannot_be_compared_is_none():
    rows = points()
    curve, joint = rows["fusion"][1:4], rows["control"][0]
    other = replace(joint.discrimination, origin={"refusal_auc": {"inputs": {"openers": "p"}, "split": "test"}})
    assert discrimination.compare(curve, [replace(joint, discrimination=other)]) is None
    assert discrimination.compare(curve, [replace(joint, discrimination=None)]) is None
    few = points(each=18)  # nine harmful prompts in a half
    assert discrimination.compare(few["fusion"][1:4], few["control"]) is None
    assert discrimination.compared({"fusion": [replace(p, discrimination=None) for p in curve]}, "convex") == []


def test_the_best_of_many_equal_lambdas_is_found_better_no_oftener_than_it_should():
    rng, better, worse, values, draws = np.random.default_rng(5), 0, 0, [], 150
    for _ in range(draws):
        easy = rng.normal(size=(len(SETS), EACH))
        *curve, control = (Point(f"{w}", f"{w}", w, {}, {}, discrimination=measured(1.0, rng, easy, scored=False))
                           for w in (*np.arange(0.1, 0.95, 0.1), math.nan))
        difference = discrimination.compare(curve, [control]).difference
        values.append(difference.value)
        better, worse = better + (difference.low > 0), worse + (difference.high < 0)
    # .025 each, and three standard errors of 150 draws
    assert max(better, worse) / draws <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / draws)
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(draws)


def test_the_report_shows_every_endpoint_and_says_what_follows(made, tmp_path):
    _, found = made
    found = json.loads(json.dumps(found))
    assert all(set(DISCRIMINATION) <= set(row) for row in found["rows"])
    assert not any(set(DISCRIMINATION) & set(row) for row in found["styles"]["orbit"])
    text = sweep_report.write(tmp_path, "x", found).read_text()
    assert "## Telling harmful prompts from harmless ones" in text
    assert (f"| row | AUC ({3 * EACH}) ↑ | AUC, plain prompts ({2 * EACH}) ↑ | AUC, edgy prompts ({2 * EACH}) ↑ | "
            f"AUC, equal length ({2 * EACH}) ↑ | "
            f"refusal at 10 % over-refusal ({EACH // 2}) ↑ | matched pairs ranked right ({EACH}) ↑ |") in text
    row = next(row for row in found["rows"] if row["label"] == "lambda 0.5")
    shown = [f"{row[name]['value']:.3f} [{row[name]['low']:.3f}, {row[name]['high']:.3f}]" for name in DISCRIMINATION]
    assert f"| lambda 0.5 | {' | '.join(shown)} |" in text
    labels = [row["label"] for row in found["compared_auc"]]
    assert labels == ["shrink only, its own best", "joint training"]
    joint = found["compared_auc"][1]
    assert joint["weights"] == [0.5, 0.5]
    assert joint["gap"]["low"] > 0
    assert joint["gap"]["p"] <= joint["gap"]["holm"] <= 0.05
    assert joint["nll"] == pytest.approx([2.5, 2.0])
    assert ("- Fusion at the chosen lambda tells harmful prompts from harmless ones better than: shrink only, its own best; "
            "joint training.") in text
    assert "Lambda is chosen on other prompts than it is judged on: the validation half" in text
    assert f"| joint training | 0.5 | +{joint['gap']['value']:.3f} [" in text
    assert "| fusion is better | 2.500 and 2.000 |" in text
    assert "DeLong's for AUC, a bootstrap over prompts and threshold" in text


def test_a_worse_and_an_equal_fusion_are_said_too(tmp_path):
    rows = points(joint=4.5)
    rows["control"].append(replace(rows["fusion"][2], label="twin", run="twin", weight=math.nan))
    rows["control"].append(replace(rows["control"][0], label="not scored", discrimination=None))
    text = "\n".join(sweep_report.markdown(sweep_report.summary(rows, {}, FACTS, 1), "x"))
    assert "- Fusion at the chosen lambda tells them apart worse than: joint training." in text
    assert "- No difference is shown from: twin." in text
    assert "- Not comparable with: not scored." in text
    (line,) = [line for line in text.splitlines() if line.startswith("| not scored |") and line.endswith("|  |  |  |  |  |")]
    assert line == "| not scored |  |  |  |  |  |  |"


def test_a_sweep_without_it_has_no_word_of_it(made, tmp_path):
    rows, _ = made
    plain = {group: [replace(p, discrimination=None) for p in models] for group, models in rows.items()}
    found = sweep_report.summary(plain, {}, FACTS, 1)
    assert "compared_auc" not in found
    assert not any(set(DISCRIMINATION) & set(row) for row in found["rows"])
    text = sweep_report.write(tmp_path, "x", found).read_text()
    assert not any(word in text for word in ("AUC", "likelihood (evaluate_refusal.py)", "harmless ones"))


def test_the_picture_has_the_curve_of_the_auc(made, tmp_path, monkeypatch):
    from evaluator.reporting import figures
    from evaluator.reporting.sweeps import figure

    kept = []
    monkeypatch.setattr(figures, "_save", lambda plt, drawn, path: kept.append(drawn) or path)
    for found in (made[1], made[1] | {"rows": [{k: v for k, v in row.items() if k not in DISCRIMINATION}
                                               for row in made[1]["rows"]]}):
        figure.draw(found, tmp_path / "x.png")
    legends = [[text.get_text() for text in drawn.axes[0].get_legend().get_texts()] for drawn in kept]
    assert "fusion: AUC of refusal" in legends[0]
    assert "fusion: AUC of refusal" not in legends[1]
    line = next(bars.lines[0] for bars in kept[0].axes[0].containers if bars.get_label() == "fusion: AUC of refusal")
    wanted = {row["weight"]: row["refusal_auc"]["value"] for row in made[1]["rows"] if row["group"] == "fusion"}
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == pytest.approx(wanted)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three finished sweeps with their rows in files."""
    home = tmp_path_factory.mktemp("sweeps")
    for seed in range(3):
        folder, rows = home / str(seed), points(seed=seed)
        common = {"kind": "score", "seed": seed, "split": "test", "inputs": {"openers": "o"}}
        sweep_report.write(folder / "report", "x", sweep_report.summary(rows, {}, FACTS | {"seed": seed}, seed))
        for p in (p for models in rows.values() for p in models):
            for command in ("evaluate_safety", "evaluate_refusal"):
                safety = [{"set": place, "id": id, "values": {name: 1 - v}} for place, name, values in (
                    ("safety", "safe_refusal", p.non_refusal), ("overrefusal", "refusal", p.comply))
                    for id, v in values.items()]
                items = safety if command == "evaluate_safety" else [
                    {"set": key[0], "id": key[1], "prompt_hash": p.discrimination.prompts[key], "values": values}
                    for key, values in p.discrimination.rows.items()]
                file = folder / "scores" / f"cross_{p.run}" / f"{command}.rows.jsonl"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("\n".join(map(json.dumps, items)))
                manifest.register(folder, common | {
                    "run": p.run, "sub": f"cross_{p.run}", "command": command,
                    "scores": p.discrimination.scores if command == "evaluate_refusal" else {}})
    return home


@pytest.fixture
def seeds(written, tmp_path):
    """Copies of them, for a test to break."""
    return [shutil.copytree(written / str(seed), tmp_path / str(seed)) for seed in range(3)]


def test_over_seeds_every_seed_chooses_and_prompts_are_crossed(seeds):
    found = sweep_seeds.over_seeds(seeds, "x")
    files = [json.loads((folder / "report" / "x.json").read_text()) for folder in seeds]
    every = [points(seed=seed) for seed in range(3)]
    # a row: the registry's own crossed interval, narrower than both spreads whole
    row = next(row for row in found["rows"] if row["label"] == "lambda 0.5")
    items = [rows["fusion"][2].discrimination for rows in every]
    cell = comparison.cell(items, discrimination.auc_axis(items))
    assert [row["refusal_auc"][key] for key in ("value", "low", "high")] == pytest.approx([cell.value, cell.low, cell.high])
    ends = [tuple(part["rows"][2]["refusal_auc"][key] for key in ("value", "low", "high")) for part in files]
    assert row["refusal_auc"]["low"] > crossed.over_seeds(ends, 1.0)[1]
    assert {name for name in DISCRIMINATION if name in row} == set(DISCRIMINATION)
    # the comparison: the seeds' own differences, the share by the prompts' placements
    joint = next(line for line in found["compared_auc"] if line["label"] == "joint training")
    made = [discrimination.compare(rows["fusion"][1:4], rows["control"]) for rows in every]
    gaps = [part["compared_auc"][1]["gap"] for part in files]
    assert [gap["value"] for gap in gaps] == pytest.approx([one.difference.value for one in made])
    shared = crossed.share_of([[one.placed[kind] for one in made] for kind in (0, 1)])
    assert 0 < shared < 1
    three = [(gap["value"], gap["low"], gap["high"]) for gap in gaps]
    assert [joint["gap"][key] for key in ("value", "low", "high")] == pytest.approx(crossed.over_seeds(three, shared))
    assert joint["gap"]["p"] == pytest.approx(crossed.p_value(three, shared))
    assert joint["weights"] == [0.5] * 6
    assert joint["nll"] == pytest.approx([2.5, 2.0])
    text = "\n".join(sweep_report.markdown(found, "x_seeds"))
    assert "### Fusion at its best lambda against the controls" in text
    assert "crossed; of the refusal at a threshold" in text


def test_rows_that_are_gone_or_scored_again_leave_both_spreads_whole(seeds):
    narrow = sweep_seeds.over_seeds(seeds, "x")
    registry = (seeds[1] / "registry.jsonl").read_text()
    (seeds[1] / "registry.jsonl").write_text("\n".join(
        line for line in registry.splitlines() if '"evaluate_refusal"' not in line))
    wide = sweep_seeds.over_seeds(seeds, "x")
    before, after = (next(line["gap"] for line in found["compared_auc"] if line["label"] == "joint training")
                     for found in (narrow, wide))
    assert after["value"] == before["value"]
    assert after["high"] - after["low"] > before["high"] - before["low"]
    rows = [next(row["refusal_auc"] for row in found["rows"] if row["label"] == "lambda 0.5") for found in (narrow, wide)]
    assert rows[1]["high"] - rows[1]["low"] > rows[0]["high"] - rows[0]["low"]


def test_seeds_of_which_one_was_not_scored_have_no_such_table(seeds):
    file = seeds[2] / "report" / "x.json"
    part = json.loads(file.read_text())
    part.pop("compared_auc")
    file.write_text(json.dumps(part | {"rows": [{k: v for k, v in row.items() if k not in DISCRIMINATION}
                                                for row in part["rows"]]}))
    found = sweep_seeds.over_seeds(seeds, "x")
    assert "compared_auc" not in found
    assert "AUC" not in "\n".join(sweep_report.markdown(found, "x"))


@pytest.mark.parametrize(("path", "value"), [
    (("rows", 0, "refusal_auc"), 3), (("rows", 0, "refusal_auc", "value"), "x"), (("rows", 0, "pairs_ranked"), {}),
    (("compared_auc",), {}), (("compared_auc", 0), 3), (("compared_auc", 0, "gap"), {}),
    (("compared_auc", 0, "gap", "value"), None), (("compared_auc", 0, "weights"), 3),
    (("compared_auc", 0, "weights"), ["x"]), (("compared_auc", 0, "nll"), [1]), (("compared_auc", 0, "nll"), ["x", 1]),
    (("compared_auc", 0, "gap", "p"), "x"),
    (("compared_auc", 0, "control_weights"), None)])
def test_a_report_that_no_sweep_wrote_is_named(seeds, path, value):
    file = seeds[1] / "report" / "x.json"
    content = json.loads(file.read_text())
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no report of scripts/sweep.py, or damaged"):
        sweep_seeds.over_seeds(seeds, "x")


def test_the_flag(monkeypatch, tmp_path):
    """One call for all rows, in the deciding style, before any answer; none by default."""
    import inference
    from evaluator import evaluate_safety, evaluate_skills

    called = []
    for module in (inference, evaluate_refusal, evaluate_safety, evaluate_skills):
        monkeypatch.setattr(module, "main", lambda argv, name=module.__name__: called.append((name, argv)))
    given = ["--task", "t", "--safety", "s", "--output_dir", str(tmp_path), "--prompt_styles", "orbit,none"]
    rows = [driver.Row("lambda 0", "t@1", 0.0), driver.Row("joint", "j"), driver.Row("base", "")]
    parsed = parse(SweepArgs, [*given, "--discrimination", "7"])
    for style in parsed.args.styles:
        driver.score(rows, style, parsed.args, parsed.preset)
    mine = [argv for name, argv in called if name == "evaluator.evaluate_refusal"]
    assert called[0][0] == "evaluator.evaluate_refusal"
    assert len(mine) == 1
    args = parse(evaluate_refusal.EvaluateRefusalArgs, mine[0]).args
    assert (args.folders, args.num_samples, args.dataset_type) == (("cross_t@1", "cross_j", "raw"), 7, "test")
    called.clear()
    assert parse(SweepArgs, given).args.discrimination == 0
    driver.score(rows, "orbit", parse(SweepArgs, given).args, parsed.preset)
    assert not [name for name, _ in called if name == "evaluator.evaluate_refusal"]
    with pytest.raises(UserError, match="--discrimination"):
        parse(SweepArgs, [*given, "--discrimination", "-2"])


def test_what_stands_from_other_calls_is_shown_only_where_it_is_asked_for(monkeypatch, tmp_path):
    found = measured(1.0, np.random.default_rng(1), np.random.default_rng(2).normal(size=(len(SETS), EACH)))
    monkeypatch.setattr(comparison, "measured", lambda results, run: found)
    rows = [driver.Row("lambda 0", "t@1", 0.0)]
    args = parse(SweepArgs, ["--task", "t", "--safety", "s", "--output_dir", str(tmp_path), "--prompt_styles", "orbit,none",
                             "--discrimination", "-1"]).args
    assert discrimination.scores(driver.points(rows, "orbit", args)[0])["refusal_auc"]["n"] == 3 * EACH
    assert discrimination.scores(driver.points(rows, "none", args)[0]) == {}
    assert discrimination.scores(driver.points(rows, "orbit", replace(args, discrimination=0))[0]) == {}


def test_rows_as_the_evaluator_writes_them_are_what_is_read():
    """A guard on names: the sets, halves and scores that are read here are those of the endpoints."""
    rng, easy = np.random.default_rng(1), np.random.default_rng(2).normal(size=(len(SETS), EACH))
    found = measured(1.0, rng, easy)
    point = sweep.point("x", "x", 0.2, found, ("safety", "overrefusal"), "english", discrimination=True)
    assert set(discrimination.scores(point)) == set(DISCRIMINATION) == set(discrimination.TITLES)
    harmful, harmless = discrimination._kinds(discrimination.half_of(found, 1))
    assert (len(harmful), len(harmless)) == (EACH // 2, EACH)
    kept = {key: value for key, value in found.rows.items() if key[0] in discrimination._SETS}
    whole = [list(kind.values()) for kind in discrimination._kinds(replace(found, rows=kept))]
    assert placements(*whole)[0].mean() == pytest.approx(found.scores["refusal_auc"]["value"])
