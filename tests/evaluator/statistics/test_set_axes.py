"""Published sets and AlpacaEval's win rate become columns of a report by their scores' names."""

from scored import REFUSED, put_answers, run

from evaluator import evaluate_safety, report
from evaluator.judges import fitted
from evaluator.statistics import comparison
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
    assert list(axes) == ["beavertails_500.safe_refusal", "xstest.overrefusal"]
    change = comparison.difference(found[1], found[0], axes["beavertails_500.safe_refusal"])
    assert (change.value, change.n) == (0.5, 4)
    report.main(["--runs", "base,x", "--output_dir", str(results), "--name", "t"])
    text = (results / "report" / "t.md").read_text()
    assert "| model | refusal, beavertails_500 ↑ | over-refusal, xstest ↓ |" in text
    assert "| base | 0.250 [" in text
    assert "Compared although" not in text


def test_the_win_rate_is_paired_under_one_annotator():
    def made(values, annotator):
        rows = {("alpaca_eval", str(i)): {"alpaca_eval.win_rate": value} for i, value in enumerate(values)}
        score = {"higher_is_better": True, "value": 0.5, "low": 0.4, "high": 0.6, "n": len(values)}
        line = {"command": "evaluate_helpfulness.alpaca_eval", "split": "test", "details": {"annotator": annotator}}
        return Measured(None, {"alpaca_eval.win_rate": score}, rows, {}, 1, {}, {"alpaca_eval.win_rate": line})

    a, b, c = made([1, 1, 0.5], "gpt4"), made([0, 1, 0.5], "gpt4"), made([0, 0, 0], "other")
    (axis,) = set_axes([a, b])
    assert axis.title == "win rate, alpaca_eval ↑"
    assert comparison.difference(a, b, axis).value == 1 / 3
    assert comparison.difference(a, c, axis) is None
