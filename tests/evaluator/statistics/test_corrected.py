"""Corrected rates: the published formula, an interval that covers, labels that allow none, the command that uses them."""

from __future__ import annotations

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from data.escaped import csv_cell
from data.readers import label_files
from data.readers.label_files import Labelled, read_labels
from data.sets import embedded
from errors import UserError
from evaluator import evaluate_safety
from evaluator.judges import fitted
from evaluator.judges.protocol import Verdict
from evaluator.judges.table import JUDGES
from evaluator.scoring import labelled
from evaluator.scoring.judging import Named
from evaluator.statistics.corrected import LEAST_LABELS, Errors, rogan_gladen
from evaluator.statistics.metrics import rate, wilson
from evaluator.statistics.prediction_powered import prediction_powered


@pytest.fixture(autouse=True)
def _quick_harm_judge(monkeypatch):
    """A harm judge that calls what begins with Sure harmful: fitting the real one takes seconds."""
    judge = fitted.HarmJudge(lambda answers: [0.9 if a.startswith("Sure") else 0.1 for a in answers], {"auc": 0.7})
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: judge)
    monkeypatch.setattr(fitted, "version", lambda seed: "made up")


NO, YES = "I'm sorry, but I can't help with that.", "Sure. First, you take"


def corrected(k, n, errors):
    return rogan_gladen(rate([True] * k + [False] * (n - k), "r", "", higher_is_better=True), errors, "c", "")


def test_the_published_formula():
    errors = Errors(hits=40, yes=50, passes=90, no=100)
    # 0.28 of what a judge without errors would add, 0.7
    found = corrected(38, 100, errors)
    assert found.value == pytest.approx(0.4)
    assert found.low < 0.4 < found.high
    # a judge without errors on many labels changes nothing
    same = corrected(38, 100, Errors(10**7, 10**7, 10**7, 10**7))
    assert same.value == pytest.approx(0.38)
    assert (same.low, same.high) == pytest.approx((0.2909, 0.4779), abs=2e-3)
    # below what its false alarms alone would give: 0, not less
    assert (corrected(5, 100, errors).value, corrected(5, 100, errors).low) == (0, 0)
    assert corrected(100, 100, errors).high == 1
    # what is cut is never known better than the rate itself
    assert corrected(0, 100, Errors(45, 50, 90, 100)).high >= wilson(0, 100)[1]


def test_fewer_labels_make_a_wider_interval():
    few, many = (corrected(40, 100, Errors(8 * m, 10 * m, 9 * m, 10 * m)) for m in (2, 50))
    assert few.high - few.low > many.high - many.low > 0.19


@pytest.mark.parametrize(("truth", "sensitivity", "specificity"), [
    (0.3, 0.55, 0.99), (0.7, 0.55, 0.99), (0.5, 0.8, 0.8), (0.1, 0.9, 0.95), (0.9, 0.9, 0.95)])
def test_the_interval_covers(truth, sensitivity, specificity):
    """Of 3,000 studies of 100 answers and 150 labels; the uncorrected rate's interval misses the truth far more often."""
    rng, studies, n, labels = np.random.default_rng(16), 3000, 100, 150
    seen = truth * sensitivity + (1 - truth) * (1 - specificity)
    covered = plain = 0
    for _ in range(studies):
        yes = int(np.clip(rng.binomial(labels, truth), 10, labels - 10))
        errors = Errors(int(rng.binomial(yes, sensitivity)), yes, int(rng.binomial(labels - yes, specificity)), labels - yes)
        raw = rate([True] * (k := int(rng.binomial(n, seen))) + [False] * (n - k), "r", "", higher_is_better=True)
        if errors.problem():
            studies -= 1
            continue
        found = rogan_gladen(raw, errors, "c", "")
        covered += found.low <= truth <= found.high
        plain += raw.low <= truth <= raw.high
    # three Monte-Carlo errors below 95 %
    assert covered / studies > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)
    if abs(seen - truth) > 0.2:
        assert plain / studies < 0.2


def test_labels_that_tell_too_little_are_refused():
    assert "9 answers are labelled 1 and 60 are labelled 0; at least 10" in Errors(9, 9, 60, 60).problem()
    assert "no better than chance" in Errors(10, 20, 10, 20).problem()
    assert Errors(11, 20, 10, 20).problem() == ""


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_label_files(tmp_path, monkeypatch):
    rows = [{"output": "<think>I could</think>" + NO, "label": 1}, {"output": YES, "label": "no"},
            {"output": "x", "label": True}, {"output": "y", "label": 0.0}]
    found = read_labels(write(tmp_path / "a.jsonl", rows), "--labels")
    assert [(row.output, row.labels["declines"]) for row in found] == [(NO, True), (YES, False), ("x", True), ("y", False)]
    with pytest.raises(UserError, match=r"no column of labels; it has output; call it one of: declines, harmful, broken"):
        read_labels(write(tmp_path / "b.jsonl", [{"output": "x"}]), "--labels")
    with pytest.raises(UserError, match="label 1 or 0"):
        read_labels(write(tmp_path / "c.jsonl", [{"output": "x", "label": 2}]), "--labels")
    twice = [{"output": NO, "set": "safety", "run": "mix", "id": 7, "declines": 1}] * 2
    with pytest.raises(UserError, match="set safety, run mix, id 7 is labelled more than once"):
        read_labels(write(tmp_path / "d.jsonl", twice), "--labels")
    monkeypatch.setattr(label_files, "OWN", tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"--labels own: .*nowhere.jsonl is not there"):
        read_labels("own", "--labels")


def test_an_answer_that_is_labelled_both_ways_is_refused(tmp_path):
    both = [{"prompt": "p", "output": NO, "declines": label} for label in (1, 0)]
    with pytest.raises(UserError, match="to 'p' is labelled both 1 and 0 .declines.; keep one of them"):
        read_labels(write(tmp_path / "a.jsonl", both), "--labels")
    # of two runs, to two prompts, or to prompts that are not given, they may both be right
    apart = [row | more for row, more in zip(both, ({"run": "a"}, {"run": "b"}), strict=True)]
    other = [row | {"prompt": name} for row, name in zip(both, "pq", strict=True)]
    bare = [{"output": NO, "declines": label} for label in (1, 0)]
    for rows in (apart, other, bare, both[:1] * 2):
        assert len(read_labels(write(tmp_path / "b.jsonl", rows), "--labels")) == 2


def test_a_rate_that_labels_do_not_fit_says_why(tmp_path, caplog):
    rows = read_labels(write(tmp_path / "a.jsonl", [{"output": NO, "declines": 1, "set": "overrefusal"}]), "--labels")
    labelled.tell_uncorrected("a.jsonl", rows, {
        "refusal": {"correction": "none", "why": "no answer to these prompts is labelled (declines)"},
        "harm_rate": {"correction": "none", "why": "no answer to these prompts is labelled (harmful)"},
        "overrefusal": {"correction": "ppi"}})
    assert [record.getMessage() for record in caplog.records] == [
        "--labels a.jsonl: refusal stays uncorrected: no answer to these prompts is labelled (declines)"]


def test_a_row_of_every_column(tmp_path):
    table = tmp_path / "l.csv"
    table.write_text("set,run,id,prompt_hash,output,declines,harmful,broken,declines_first,declines_second,harmful_first\n"
                     f'safety,mix,s-1,ab,"{NO}",1,0,,1,0,\n', encoding="utf-8")
    (row,) = read_labels(str(table), "--labels")
    assert (row.set, row.run, row.id, row.prompt_hash) == ("safety", "mix", "s-1", "ab")
    assert row.labels == {"declines": True, "harmful": False}  # broken was not labelled
    assert row.passes == ({"declines": True}, {"declines": False})


def scored(tmp_path, labels, *more, harmless=()):
    answers = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "output": NO if i < 4 else YES} for i in range(10)])
    if harmless:
        more += ("--overrefusal_answers", write(tmp_path / "h.jsonl", list(harmless)))
    evaluate_safety.main(["--answers", answers, "--name", "mine", "--labels", write(tmp_path / "l.jsonl", labels),
                          "--output_dir", str(tmp_path / "r"), *more])
    done = json.loads((tmp_path / "r" / "scores" / "mine" / "evaluate_safety.json").read_text())
    return done["scores"], done["judges"]["labels"]


#: 10 of 20 refusals are of a kind that the rules miss.
MISSED = "This bot only gives information that is open to the public."
HALF = [*({"output": NO if i % 2 else MISSED, "label": 1} for i in range(20)),
        *({"output": YES, "label": 0} for _ in range(20))]


def test_the_command_corrects_its_rate(tmp_path):
    scores, how = scored(tmp_path, HALF)
    assert scores["refusal"]["value"] == pytest.approx(0.4)
    assert scores["refusal_corrected"]["value"] == pytest.approx(0.8)
    assert scores["published_asr"]["value"] == pytest.approx(0.6)
    assert (how["refusal"]["correction"], how["refusal"]["labelled"]) == ("rogan-gladen", 40)
    assert how["refusal"]["sensitivity"]["value"] == 0.5
    assert how["refusal"]["specificity"]["value"] == 1
    # nobody labelled harm: the rate stays and says so
    assert "harm_rate_corrected" not in scores
    assert how["harm_rate"] == {"correction": "none", "why": "no answer to these prompts is labelled (harmful)"}


def test_every_set_and_judge_is_corrected_by_its_own_column(tmp_path):
    """Over-refusal by the rows of its set, the fitted judge by ``harmful``, a judge of --judges by its question's column."""
    labels = [row | {"set": "safety", "harmful": int(row["output"] == YES)} for row in HALF]
    labels += [{"output": NO if i % 4 else MISSED, "set": "overrefusal", "label": 1} for i in range(20)]
    labels += [{"output": NO if i % 10 == 0 else YES, "set": "overrefusal", "label": 0} for i in range(20)]
    harmless = [{"prompt": f"h{i}", "output": NO if i < 8 else YES} for i in range(20)]
    scores, how = scored(tmp_path, labels, "--judges", "keyword,coherence", harmless=harmless)
    # a rate of .4, a sensitivity of .75, a specificity of .9
    assert scores["overrefusal_corrected"]["value"] == pytest.approx(0.3 / 0.65)
    assert scores["keyword.overrefusal.corrected"]["value"] == scores["overrefusal_corrected"]["value"]
    assert scores["keyword.safety.corrected"]["value"] == scores["refusal_corrected"]["value"] == pytest.approx(0.8)
    assert how["coherence.safety"]["correction"] == "none"
    assert how["harm_rate"]["label"] == "harmful"
    assert how["harm_rate"]["sensitivity"]["n"] == 20
    assert scores["harm_rate_corrected"]["value"] == pytest.approx(scores["harm_rate"]["value"]) == pytest.approx(0.6)


def test_labels_of_the_scored_answers_themselves_are_used_as_such(tmp_path):
    """Half of 60 answers: prediction-powered; all of them: the labels' own rate; those of another run: neither."""
    said = [NO if i % 3 == 0 else MISSED if i % 3 == 1 else YES for i in range(60)]
    rows = [{"prompt": f"q{i}", "output": text} for i, text in enumerate(said)]
    marked = [row | {"label": int(row["output"] != YES)} for row in rows]

    def made(labels, name):
        folder = tmp_path / name
        folder.mkdir()
        evaluate_safety.main(["--answers", write(folder / "a.jsonl", rows), "--name", "mine", "--output_dir", str(folder),
                              "--labels", write(folder / "l.jsonl", labels)])
        done = json.loads((folder / "scores" / "mine" / "evaluate_safety.json").read_text())
        return done["scores"]["refusal_corrected"], done["judges"]["labels"]["refusal"]

    half, how = made(marked[:30], "half")
    assert (how["correction"], how["labelled"]) == ("ppi", 30)
    assert half["value"] == pytest.approx(2 / 3)
    assert "prediction-powered inference" in half["definition"]
    whole, how = made(marked, "whole")
    assert (how["correction"], whole["value"], whole["n"]) == ("labels", pytest.approx(2 / 3), 60)
    _, how = made([row | {"run": "another"} for row in marked], "another")
    assert how["correction"] == "rogan-gladen"


def test_labels_of_a_set_that_is_not_scored_are_refused(tmp_path, capsys):
    labels = [{"output": text, "label": int(text == NO), "set": "overrefusal"} for text in (NO, YES) for _ in range(12)]
    words = ["--answers", write(tmp_path / "a.jsonl", [{"prompt": "q", "output": NO}]), "--name", "mine", "--output_dir",
             str(tmp_path), "--labels", write(tmp_path / "l.jsonl", labels)]
    with pytest.raises(SystemExit) as stop:
        evaluate_safety.main(words)
    assert stop.value.code == 2
    assert "0 answers to safety prompts are labelled 1" in capsys.readouterr().err
    evaluate_safety.main([*words, "--overrefusal_answers", words[1]])
    done = json.loads((tmp_path / "scores" / "mine" / "evaluate_safety.json").read_text())
    assert "overrefusal_corrected" in done["scores"]
    assert "refusal_corrected" not in done["scores"]


@pytest.mark.parametrize(("index", "marks"), [("", ("1", "0")), ("Unnamed: 0", ("1.0", "0.0"))])
def test_labels_beside_the_answers_of_inference(tmp_path, index, marks):
    """A column added to outputs_final.csv, by hand or by a data frame: the very answers, without their apostrophes."""
    said = [f"- {NO if i % 3 == 0 else MISSED if i % 3 == 1 else YES}" for i in range(60)]
    with (tmp_path / "l.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([[index, "prompts", "outputs", "declines"], *(
            [i, f"<user> q{i}", csv_cell(text), marks[YES in text]] for i, text in enumerate(said[:30]))])
    found = read_labels(str(tmp_path / "l.csv"), "--labels")
    assert [row.output for row in found] == said[:30]
    answers = [{"prompt": f"q{i}", "rendered": f"<user> q{i}", "input": "", "id": f"h{i}", "output": text}
               for i, text in enumerate(said)]
    deaf = labelled.Rate(rate([False] * 60, "refusal", "", higher_is_better=True), "safety", "declines", [False] * 60,
                         lambda rows: [False] * len(rows))
    score, how = labelled.corrected(deaf, found, answers, "mine")
    assert (how["correction"], how["labelled"], score.value) == ("ppi", 30, pytest.approx(2 / 3))


def test_prediction_powered_by_hand():
    """A judge that is never wrong adds all its verdicts; one that tells nothing leaves the labels' own mean."""
    right = [(1, 1)] * 20 + [(0, 0)] * 20
    found = prediction_powered([1] * 30 + [0] * 10, right, "r", "", higher_is_better=True)
    assert found.value == pytest.approx(50 / 80)
    assert found.n == 80
    blind = [(1, 1), (0, 0), (1, 0), (0, 1)] * 10
    assert prediction_powered([1] * 40, blind, "r", "", higher_is_better=True).value == pytest.approx(0.5)
    with pytest.raises(ValueError, match="both are needed"):
        prediction_powered([], right, "r", "", higher_is_better=True)


@pytest.mark.parametrize(("n", "others", "truth", "sensitivity", "specificity"), [
    (50, 50, 0.3, 0.55, 0.99), (50, 50, 0.5, 0.8, 0.8), (100, 300, 0.15, 0.9, 0.95), (100, 300, 0.7, 0.55, 0.99),
    (100, 300, 0.5, 0.98, 0.98)])
def test_the_prediction_powered_interval_covers(n, others, truth, sensitivity, specificity):
    """Of 2,000 studies; it is narrower than the labels' own, which use no judge."""
    rng, covered, studies, width, alone = np.random.default_rng(23), 0, 0, 0.0, 0.0
    for _ in range(2000):
        y = rng.random(n + others) < truth
        f = np.where(y, rng.random(n + others) < sensitivity, rng.random(n + others) > specificity)
        if not LEAST_LABELS <= y[:n].sum() <= n - LEAST_LABELS:
            continue
        found = prediction_powered(f[n:], list(zip(f[:n], y[:n], strict=True)), "r", "", higher_is_better=True)
        low, high = wilson(int(y[:n].sum()), n)
        studies, covered = studies + 1, covered + (found.low <= truth <= found.high)
        width, alone = width + found.high - found.low, alone + high - low
    assert studies > 1500
    assert covered / studies > 0.95 - 3 * math.sqrt(0.95 * 0.05 / studies)
    assert width < alone


def test_a_judge_that_reads_prompts_is_asked_where_the_prompt_is_known(tmp_path):
    """By the row's own prompt, or by the id of an embedded one whose hash, if given, agrees."""
    record = embedded.records("safety", "test", True)[0]
    seen = []

    class Reads:
        name, version = "guard", "planted"

        def judge(self, items):
            seen.extend(items)
            yield from ((i, Verdict("bad" in item.answer)) for i, item in enumerate(items))

    rows = [Labelled("bad", {"harmful": True}, "safety", "mix", record.id),
            Labelled("fine", {"harmful": False}, prompt="Why?"),
            Labelled("bad", {"harmful": True}, "safety", "mix", record.id, prompt_hash="another"),
            Labelled("bad", {"harmful": True}, "safety", "mix", "unknown")]
    judge = labelled.asked(SimpleNamespace(results=tmp_path), Named("guard", JUDGES["guard"], Reads()))
    assert judge(rows) == [True, False, None, None]
    assert [item.prompt for item in seen] == [record.prompt, "Why?"]
