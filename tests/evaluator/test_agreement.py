"""Kappa equals sklearn's, its interval draws whole prompts, and the report quotes nothing that could harm."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from data.readers import label_files
from evaluator import agreement, evaluate_safety
from evaluator import report as report_command
from evaluator.agreement import Judged, excerpt, kappa_of
from evaluator.judges import fitted
from evaluator.scoring import labelled as scoring_labels
from evaluator.statistics import kappa
from evaluator.statistics.metrics import wilson
from inference import write_rows

REFUSED = "I'm sorry, but I can't help with that."
HARMFUL_WORDS = "First take the secret ingredient"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder; the harm judge calls answers that begin with First harmful."""
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: fitted.HarmJudge(
        lambda answers: [0.9 if a.startswith("First") else 0.1 for a in answers], {}))
    monkeypatch.setattr("data.sources.load_refusal_labels",
                        lambda: [("a", REFUSED, 1), ("b", "Sure.", 0), ("c", "The sea is deep and blue.", 1)])
    return tmp_path


def put(results, task, run, outputs):
    folder = results / "inference" / task / "test" / ("raw" if run == "base" else f"cross_{run}")
    folder.mkdir(parents=True)
    write_rows(folder, [{"index": i, "id": f"{task}-{i}", "prompt": f"p{i}", "input": "", "reference": "", "category": "",
                         "rendered": f"<p{i}>", "output": output, "finish": "stop"} for i, output in enumerate(outputs)])


def report(results, *flags):
    agreement.main(["--output_dir", str(results), *flags])
    return ((results / "report" / "agreement.md").read_text(),
            json.loads((results / "report" / "agreement.json").read_text()))


def pair(found, task, a, b):
    return next(k for k in found["kappa"] if (k["task"], k["a"], k["b"]) == (task, a, b))


def test_kappa_is_sklearns_and_counts_add_up():
    draw = random.Random(0)
    for _ in range(20):
        a = [draw.random() < 0.4 for _ in range(50)]
        b = [x if draw.random() < 0.7 else not x for x in a]
        k = kappa_of(a, b, [str(i) for i in range(50)], 0)
        assert k.value == pytest.approx(cohen_kappa_score(a, b))
        assert k.low <= k.value <= k.high
        assert (k.both, k.only_a, k.only_b, k.neither) == tuple(
            sum((x, y) == cell for x, y in zip(a, b, strict=True))
            for cell in ((True, True), (True, False), (False, True), (False, False)))


def test_the_bootstraps_formula_is_the_same_kappa():
    cells = np.array([[20, 5, 10, 15], [7, 0, 0, 9], [0, 4, 4, 0]])
    for row, value in zip(cells, kappa._kappas(cells), strict=True):
        a = [1] * (row[0] + row[1]) + [0] * (row[2] + row[3])
        b = [1] * row[0] + [0] * row[1] + [1] * row[2] + [0] * row[3]
        assert value == pytest.approx(cohen_kappa_score(a, b))


def test_a_worked_example():
    # 20 both, 5 and 10 alone, 15 neither: (0.7 - 0.5) / 0.5
    a = [True] * 25 + [False] * 25
    b = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    assert kappa_of(a, b, [str(i) for i in range(50)], 0).value == pytest.approx(0.4)


def test_edges():
    perfect = kappa_of([True, False, True], [True, False, True], "abc", 0)
    assert (perfect.value, perfect.high) == (1, 1)
    assert kappa_of([True, False], [False, True], "ab", 0).value == -1
    constant = kappa_of([True, True], [True, True], "ab", 0)
    assert math.isnan(constant.value)
    assert constant.as_dict()["value"] is None
    assert kappa_of([True, True, True], [True, False, True], "abc", 0).value == 0
    assert math.isnan(kappa_of([True, False], [True, False], "aa", 0).low)  # one prompt allows no interval
    with pytest.raises(ValueError, match="rows differ"):
        kappa_of([True], [True, False], "ab", 0)


def test_the_interval_draws_whole_prompts_and_is_seeded():
    a = [i % 3 == 0 for i in range(60)]
    b = [x if i % 5 else not x for i, x in enumerate(a)]
    own = kappa_of(a, b, [str(i) for i in range(60)], 1)
    assert kappa_of(a, b, [str(i) for i in range(60)], 1) == own
    # ten copies of each answer under the same prompt are no new evidence
    groups = [str(i) for i in range(60)] * 10
    many, independent = kappa_of(a * 10, b * 10, groups, 1), kappa_of(a * 10, b * 10, [str(i) for i in range(600)], 1)
    assert many.high - many.low == pytest.approx(own.high - own.low, rel=0.2)
    assert independent.high - independent.low < 0.5 * (many.high - many.low)


def test_report_on_real_files(results):
    put(results, "safety", "base", [REFUSED, HARMFUL_WORDS, "Sure, fine.", ""])
    put(results, "safety", "x", [REFUSED, REFUSED, "As an aside, it is fine.", HARMFUL_WORDS])
    put(results, "overrefusal", "base", ["Use kill.", REFUSED, "As a rule, yes.", HARMFUL_WORDS])
    put(results, "overrefusal", "x", ["Use kill.", REFUSED, "Yes.", "No problem at all."])
    text, found = report(results, "--runs", "base,x")
    assert found["answers"] == 16
    refusals = pair(found, "safety", "keyword", "published")
    assert (refusals["both"], refusals["only_a"], refusals["only_b"], refusals["neither"]) == (3, 0, 1, 4)
    assert pair(found, "safety", "keyword", "fitted")["neither"] == 2
    assert pair(found, "safety", "coherence", "fitted")["only_b"] == 1  # the empty answer
    assert pair(found, "overrefusal", "keyword", "fitted")["neither"] == 1
    assert found["people"]["keyword"]["missed"] == 0.5
    assert "## Against people" in text
    assert "8 answers" not in text
    assert "16 answers of `base`, `x`" in text


def test_only_harmless_words_are_quoted(results):
    put(results, "safety", "base", [REFUSED, HARMFUL_WORDS, "As a matter of fact, mix them.", REFUSED])
    put(results, "overrefusal", "base", ["Use kill.", REFUSED, HARMFUL_WORDS, "Yes."])
    text, _ = report(results, "--runs", "base", "--examples", "9")
    safety, harmless = text.split("## overrefusal")
    assert HARMFUL_WORDS not in safety
    assert "mix them" not in safety
    assert "`base` safety-1" in safety
    assert HARMFUL_WORDS in harmless  # an answer to a harmless prompt


@pytest.mark.parametrize(("task", "output", "said"), [
    ("safety", REFUSED, f': "{REFUSED}"'), ("safety", HARMFUL_WORDS, ""), ("safety", "", ": (empty)"),
    ("safety", "Acts that violate our principles are: first", ""), ("catqa+cot", HARMFUL_WORDS, ""),
    ("overrefusal", "a|b\n`c`", ": \"a/b 'c'\""), ("xstest+cot", "word " * 40, f': "{("word " * 40)[:100]}..."'),
    ("safety", "x " * 60 + REFUSED, "")])
def test_excerpts(task, output, said):
    assert excerpt(Judged(task, "base", "1", output, {})) == said


def test_no_examples_and_no_variation(results):
    put(results, "safety", "base", ["Fine and dandy.", "Well and good."])
    text, found = report(results, "--runs", "base", "--tasks", "safety", "--examples", "0")
    assert "differ:" not in text
    assert "| coherence, fitted | no variation | 2 | 0 | 0 | 0 |" in text
    assert pair(found, "safety", "coherence", "fitted")["value"] is None


@pytest.mark.parametrize(("flags", "said"), [
    ((), "--runs: name the runs"), (("--runs", "base", "--tasks", ","), "--tasks: name at least one"),
    (("--runs", "base", "--tasks", "safetty"), "did you mean safety?"),
    (("--runs", "base", "--name", "../x"), "--name ../x"),
    (("--runs", "base,gone"), "cross_gone: no answers here")])
def test_bad_flags(results, capsys, flags, said):
    with pytest.raises(SystemExit) as stopped:
        agreement.main(["--output_dir", str(results), *flags])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def labelled(i, said, other=None, **more):
    """A row of data/labels in its whole format; ``other``: what the second pass said."""
    labels = dict(zip(("declines", "harmful", "broken"), said, strict=True))
    return {"set": "safety" if i % 8 else "overrefusal", "run": "mix", "id": f"p{i}", **labels,
            **{f"{name}_first": value for name, value in labels.items()},
            **{f"{name}_second": value for name, value in (labels | (other or {})).items()}, **more}


@pytest.fixture
def planted_labels(tmp_path):
    """16 refusals, 4 of which the rules miss; 8 answers that begin with First; 4 broken ones; 4 others."""
    rows = [labelled(i, (1, 0, 0), output=REFUSED if i >= 4 else "Only the public may know.") for i in range(16)]
    rows += [labelled(i, (0, 1, 0), {"harmful": int(i < 23)}, output=HARMFUL_WORDS + f" {i}") for i in range(16, 24)]
    rows += [labelled(i, (0, 0, 1), output="" if i % 2 else "@@ ## $$ %% ^^ &&") for i in range(24, 28)]
    rows += [labelled(i, (0, 0, 0), output="First, boil the water." if i == 28 else "Sure.") for i in range(28, 32)]
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_judges_against_labelled_answers(results, planted_labels):
    agreement.main(["--output_dir", str(results), "--labels", str(planted_labels)])
    found = json.loads((results / "report" / "agreement_labels.json").read_text())
    judges = found["judges"]
    assert judges["keyword"]["all"]["sensitivity"] == pytest.approx(
        {"value": 12 / 16, "low": wilson(12, 16)[0], "high": wilson(12, 16)[1], "n": 16})
    assert judges["keyword"]["all"]["specificity"]["value"] == 1
    assert judges["keyword"]["safety"]["sensitivity"]["n"] == 14
    assert (judges["coherence"]["all"]["sensitivity"]["value"], judges["coherence"]["all"]["specificity"]["n"]) == (1, 28)
    assert judges["fitted"]["all"]["sensitivity"]["value"] == 1
    assert judges["fitted"]["all"]["specificity"]["value"] == 23 / 24
    kappas = {k["task"]: k for k in found["passes"]}
    assert kappas["declines"]["value"] == 1
    # 7 both, 1 first only, 24 neither
    assert kappas["harmful"]["value"] == pytest.approx(cohen_kappa_score([1] * 8 + [0] * 24, [1] * 7 + [0] * 25))
    assert kappas["harmful"]["low"] < kappas["harmful"]["value"] <= kappas["harmful"]["high"]
    text = (results / "report" / "agreement_labels.md").read_text()
    assert "32 labelled answers of mix." in text
    assert "| keyword | declines | all | 0.750 [0.505, 0.898] | 16 | 1.000 [0.806, 1.000] | 16 |" in text
    assert "| harmful | 0.9" in text
    assert not (results / "report" / "agreement.md").exists()


def test_own_labels_stand_in_scores_and_reports(results, planted_labels, monkeypatch):
    """Where labelled answers are kept with the code, safety scores and reports name the judges' errors on them."""
    errors = {"auc": 0.7, "auc_rated": 0.7, "missed": 0.2, "false_alarms": 0.2, "protocol": "5-fold"}
    judge = fitted.HarmJudge(lambda answers: [0.9 if a.startswith("First") else 0.1 for a in answers], errors)
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: judge)
    monkeypatch.setattr(fitted, "version", lambda seed: "made up")
    monkeypatch.setattr(scoring_labels, "OWN", planted_labels)
    monkeypatch.setattr(label_files, "OWN", planted_labels)
    put(results, "safety", "mix", [REFUSED, "Sure.", "Sure, fine.", "Why not."])
    put(results, "safety", "base", [REFUSED, "Sure.", "Sure, fine.", "Why not."])
    for folder in ("cross_mix", "raw"):
        evaluate_safety.main(["--task_name", folder, "--output_dir", str(results), "--labels", "own"])
    report_command.main(["--runs", "base,mix", "--output_dir", str(results), "--name", "t"])
    text = (results / "report" / "t.md").read_text()
    assert "- Judges against 32 labelled answers of the embedded models: keyword (declines) sensitivity 0.750 [0.505" in text
    # a rate of .25, and 11 of 14 refusals found
    assert "- refusal, corrected by labels: base, mix 0.318 [" in text
    assert "- harm_rate, corrected by labels: base, mix uncorrected, 7 answers are labelled 1 and 21 are labelled 0" in text
