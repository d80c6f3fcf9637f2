"""Published sets and AlpacaEval's win rate become columns of a report by their scores' names."""

import pytest
from scored import REFUSED, put_answers, run

from evaluator import evaluate_safety, report
from evaluator.judges import fitted
from evaluator.statistics import comparison, metrics
from evaluator.statistics.axes import Measured, set_axes


def test_a_published_set_alone_fills_a_report(results, monkeypatch):
    errors = {"auc": 0.7, "auc_rated": 0.7, "missed": 0.2, "false_alarms": 0.2, "protocol": "5-fold"}
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: fitted.HarmJudge(lambda answers: [0.1] * len(answers), errors))
    for sub, refused in (("raw", 1), ("cross_x", 3)):
        put_answers(results, "beavertails_500", [REFUSED] * refused + ["Sure, here it is."] * (4 - refused), sub)
        put_answers(results, "xstest", ["Sure, here it is."] * 4, sub)
        run(evaluate_safety, results, "--harmful_task", "beavertails_500", "--overrefusal_task", "xstest", folder=sub)
    found = [comparison.measured(results, name) for name in ("base", "x")]
    axes = {axis.score: axis for axis in set_axes(found)}
    assert list(axes) == ["beavertails_500.safe_refusal", "xstest.overrefusal", "beavertails_500,xstest.balance"]
    change = comparison.difference(found[1], found[0], axes["beavertails_500.safe_refusal"])
    assert (change.value, change.n) == (0.5, 4)
    # the balance of both sets: Newcombe's interval alone, the parts' paired intervals against another model
    balance = axes["beavertails_500,xstest.balance"]
    parts = [metrics.rate(values, "", "", higher_is_better=True) for values in ([1, 1, 1, 0], [0] * 4)]
    alone, own = comparison.cell(found[1:], balance), metrics.newcombe(*parts, "", "")
    assert (alone.value, alone.low, alone.high) == pytest.approx((own.value, own.low, own.high))
    gap = comparison.difference(found[1], found[0], balance)
    none = comparison.difference(found[1], found[0], axes["xstest.overrefusal"])
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.5, *(getattr(metrics.subtract(change, none), end)
                                                                    for end in ("low", "high"))))
    report.main(["--runs", "base,x", "--output_dir", str(results), "--name", "t"])
    text = (results / "report" / "t.md").read_text()
    assert ("| model | refusal, beavertails_500 ↑ | over-refusal, xstest ↓ | "
            "refusal − over-refusal, beavertails_500 − xstest ↑ |") in text
    assert "- refusal, beavertails_500 ↑: " in text
    assert "; judge: keyword and coherence rules (n = 4)" in text
    assert "| base | 0.250 [" in text
    # the answers of this test have no manifest
    assert ("Compared although a score file does not say in which dtype and batches: refusal, beavertails_500 ↑; "
            "over-refusal, xstest ↓.") in text
    assert "does not say:" not in text


def test_the_win_rate_is_paired_under_one_annotator():
    def made(values, annotator):
        rows = {("alpaca_eval", str(i)): {"alpaca_eval.win_rate": value} for i, value in enumerate(values)}
        score = {"higher_is_better": True, "value": 0.5, "low": 0.4, "high": 0.6, "n": len(values)}
        line = {"command": "evaluate_helpfulness.alpaca_eval", "split": "test", "details": {"annotator": annotator}}
        return Measured(None, {"alpaca_eval.win_rate": score}, rows, {}, 1, {}, {"alpaca_eval.win_rate": line})

    a, b, c = made([1, 1, 0.5], "gpt4"), made([0, 1, 0.5], "gpt4"), made([0, 0, 0], "other")
    (axis,) = set_axes([a, b])
    assert axis.title == "win rate, alpaca_eval ↑"
    assert axis.judge == "gpt4"
    assert comparison.difference(a, b, axis).value == 1 / 3
    assert comparison.difference(a, c, axis) is None


def test_two_balances_of_one_set_stand_apart():
    """beavertails_500 beside xstest and beside the embedded prompts: one score name in the files, two columns here."""
    balance = {"beavertails_500.balance": {"higher_is_better": True, "value": 0.5, "low": 0.4, "high": 0.6, "n": 4}}
    lines = [{"command": f"evaluate_safety.{sets}", "scores": balance} for sets in ("beavertails_500.xstest",
                                                                                    "beavertails_500", "xstest")]
    assert [list(comparison._scores(line)) for line in lines] == [
        ["beavertails_500,xstest.balance"], ["beavertails_500,overrefusal.balance"], ["safety,xstest.balance"]]
    usual = {"command": "evaluate_safety", "scores": {"balance": balance["beavertails_500.balance"]}}
    assert list(comparison._scores(usual)) == ["balance"]
    # a balance whose parts have no columns cannot be compared, so it is none
    alone = Measured(None, comparison._scores(lines[0]), {}, {}, 1, {}, {"beavertails_500,xstest.balance": lines[0]})
    assert set_axes([alone]) == ()


def test_an_attack_on_one_side_alone_has_no_balance():
    score = {"higher_is_better": True, "value": 0.5, "low": 0.4, "high": 0.6, "n": 4}
    names = ["safety+cot.safe_refusal", "safety+cot,overrefusal.balance", "overrefusal+cot.overrefusal",
             "safety+cot,overrefusal+cot.balance"]
    found = Measured(None, dict.fromkeys(names, score), {}, {}, 1, {}, dict.fromkeys(names, {"command": "evaluate_safety"}))
    assert [axis.score for axis in set_axes([found])] == [names[0], names[2], names[3]]
