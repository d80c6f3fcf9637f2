"""Two runs are compared on the same prompts, judged by the same version on the same split; the rest is left out and said."""

import json

import pytest
from planted import make_judge
from scored import REFUSED, pico_flags, put_answers, run

from evaluator import evaluate_safety, report
from evaluator.judges import fitted
from evaluator.statistics import comparison, pairing
from evaluator.statistics.axes import AXES, SECONDARY, UTILITY_AXES, Measured, judge_axes
from evaluator.statistics.pairing import how_scored, pair

REFUSAL, OVER, BALANCE = AXES[:3]
MC2 = next(axis for axis in AXES if axis.score == "mc2")
JUDGED = "truth_x_info.truthfulness.joint"


def made(values, prompts=None, score="safe_refusal", name="safety", key="safe_refusal", **line):
    """A run with one score: its rows' values by id, their prompts' hashes, its registry line."""
    rows = {(name, i): {key: value} for i, value in values.items()}
    hashes = {(name, i): text for i, text in (prompts or {}).items()}
    return Measured(None, {score: {"higher_is_better": True, "value": 0.5, "n": len(values)}}, rows, {}, 1, hashes,
                    {score: line} if line else {})


SAME = {"split": "test", "inputs": {"rules": "v1", "coherence": "1", "fitted": "f", "answers": "whatever"}}
VALUES, PROMPTS = {"a": 1, "b": 0, "c": 1}, {"a": "pa", "b": "pb", "c": "pc"}


def test_rows_whose_prompt_differs_are_left_out_and_counted():
    a, b = made(VALUES, PROMPTS, **SAME), made({**VALUES, "d": 1}, {**PROMPTS, "c": "other"}, **SAME)
    found = pair(a, b, REFUSAL)
    assert found.keys == (("safety", "a"), ("safety", "b"))
    assert (found.other_prompt, found.by_id, found.unlike, found.unknown) == (1, 0, "", ())
    assert comparison.difference(a, b, REFUSAL).n == 2
    # nothing is left to compare
    assert comparison.difference(made(VALUES, dict.fromkeys(VALUES, "x"), **SAME), b, REFUSAL) is None


@pytest.mark.parametrize(("line", "said"), [
    ({"split": "test", "inputs": {"rules": "v2"}}, "keyword rules v1 and v2"),
    ({"split": "validation", "inputs": {"rules": "v1"}}, "split test and validation"),
])
def test_another_judge_or_split_is_no_pair(line, said):
    a, b = made(VALUES, PROMPTS, **SAME), made(VALUES, PROMPTS, **line)
    assert pair(a, b, REFUSAL).unlike == said
    assert comparison.difference(a, b, REFUSAL) is None
    assert comparison.difference(a, b, BALANCE) is None
    assert comparison.over_seeds([a], [b], REFUSAL) is None


def test_secondary_readings_are_paired_by_their_own_judge():
    axes = {axis.score: axis for axis in SECONDARY}
    for axis, judge, said in ((axes["harm_rate"], "fitted", "fitted judge f and g"),
                              (axes["incoherent"], "coherence", "coherence rules 1 and g")):
        words = {"score": axis.score, "key": axis.key}
        other = {"split": "test", "inputs": SAME["inputs"] | {judge: "g", "rules": "v2"}}
        a, b = made(VALUES, PROMPTS, **words, **SAME), made(VALUES, PROMPTS, **words, **other)
        assert pair(a, b, axis).unlike == said
        other["inputs"][judge] = SAME["inputs"][judge]
        assert pair(a, made(VALUES, PROMPTS, **words, **other), axis).unlike == ""


def test_runs_of_different_numbers_of_seeds_are_not_compared():
    a, b = ([made(VALUES, PROMPTS, **SAME)] * n for n in (2, 3))
    assert comparison.over_seeds(a, b, REFUSAL) is None
    assert comparison.over_seeds(a[:1], b, REFUSAL).value == 0


def test_each_judge_of_a_joint_score_counts():
    words = {"score": JUDGED, "name": "truthfulness", "key": "truth_x_info.joint", "split": "test"}
    a, b, c = (made(VALUES, PROMPTS, **words, inputs={"judge truth": "t", "judge info": info, "judge other": info})
               for info in ("i", "i", "j"))
    (axis,) = judge_axes([a, b, c])
    assert comparison.difference(a, b, axis).n == 3
    assert pair(a, c, axis).unlike == "judge info i and j"


def test_scores_without_a_judge_need_none():
    words = {"score": "mc2", "name": "truthfulqa_mc", "key": "mc2", "split": "test"}
    a, b = (made(VALUES, PROMPTS, **words, inputs={"model": model}) for model in "ab")
    assert pair(a, b, MC2).unknown == ()
    assert comparison.difference(a, b, MC2).n == 3


def test_older_files_are_paired_by_id_and_it_is_said():
    a, b = made(VALUES, PROMPTS, **SAME), made(VALUES)
    found = pair(a, b, REFUSAL)
    assert len(found.keys) == found.by_id == 3
    assert found.unknown == ("split", "keyword rules", "coherence rules")
    assert comparison.difference(a, b, REFUSAL).n == 3


def test_benchmarks_differ_by_version_filter_and_tokens():
    axis = {axis.score: axis for axis in UTILITY_AXES}

    def scored(task, how, made_of):
        return made(VALUES, PROMPTS, score=task, name=task, key=task, split="test", inputs={task: made_of},
                    details={"utility": {task: how}})

    old, new = (scored("gsm8k", {"shots": 5, "filter": "strict-match"}, f"abcdef0123 lm-eval {v}") for v in ("0.4", "0.5"))
    assert pair(old, new, axis["gsm8k"]).unlike == "lm-eval 0.4 and 0.5"
    other = scored("gsm8k", {"shots": 5, "filter": "flexible-extract"}, "abcdef0123 lm-eval 0.4")
    assert pair(old, other, axis["gsm8k"]).unlike == "filter strict-match and flexible-ext"
    assert how_scored(old, "gsm8k") == "n = 3, 5-shot, strict-match, rows abcdef01, lm-eval 0.4"
    assert how_scored(old, "copa") == "not run"
    short, long = (scored("asdiv_probe", {"max_new_tokens": n}, "ff") for n in (8, 48))
    assert pair(short, long, axis["asdiv_probe"]).unlike == "max_new_tokens 8 and 48"


def computed(score, name, **how):
    """A run's score whose file says how its answers (``batch_size``) or the score itself was computed."""
    place = {"answers": {name: how}} if "batch_size" in how else {"model": how}
    key = "safe_refusal" if score == "safe_refusal" else "mc2"
    return made(VALUES, PROMPTS, score=score, name=name, key=key, **SAME, details={"made_with": place})


def test_answers_in_other_batches_or_another_dtype_are_compared_and_it_is_said():
    def of(**how):
        return computed("safe_refusal", "safety", **how)

    a = of(dtype="bfloat16", batch_size=50)
    found = pair(a, of(dtype="bfloat16", batch_size=7), REFUSAL)
    assert (len(found.keys), found.computed, found.untold) == (3, ("batch size 50 and 7",), False)
    (line,) = pairing.notes([("A", [a], "B", [of(dtype="bfloat16", batch_size=7)])], [REFUSAL])
    assert line.startswith("- Compared although computed otherwise (below float32 that moves single answers")
    assert line.endswith(": A and B on refusal ↑ (batch size 50 and 7).")
    assert pair(a, of(dtype="float32", batch_size="any"), REFUSAL).computed == ("dtype bfloat16 and float32",
                                                                               "batch size 50 and any")
    # hf is not named
    other = of(dtype="bfloat16", batch_size=50, backend="continuous")
    found = pair(a, other, REFUSAL)
    assert (found.computed, found.untold) == (("backend hf and continuous",), False)
    assert pair(other, other, REFUSAL).computed == ()
    # in float32 a batch gives what its rows give alone
    assert pair(*(of(dtype="float32", batch_size=n) for n in (7, 50)), REFUSAL).computed == ()
    assert pairing.notes([("A", [a], "B", [a])], [REFUSAL]) == []
    old = made(VALUES, PROMPTS, **SAME)
    assert pair(a, old, REFUSAL).untold
    assert pairing.notes([("A", [a], "B", [old])], [REFUSAL]) == [
        "- Compared although a score file does not say in which dtype and batches: refusal ↑."]


def test_likelihoods_have_the_dtype_and_passes_of_the_scoring():
    a, b = (computed("mc2", "truthfulqa_mc", dtype="bfloat16", batch_tokens=n) for n in (512, 1024))
    assert pair(a, b, MC2).computed == ("batch tokens 512 and 1024",)
    assert comparison.difference(a, b, MC2).n == 3


@pytest.fixture(autouse=True)
def full_report(results, monkeypatch):  # noqa: F811
    """A fitted judge whose report has all that the notes print."""
    known = {"auc": 0.8, "auc_rated": 0.8, "missed": 0.1, "false_alarms": 0.1, "protocol": "5-fold"}
    judge = fitted.HarmJudge(lambda answers: [0.1] * len(answers), known)
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: judge)


def write(results, runs="base,x"):  # noqa: F811
    report.main(["--runs", runs, "--output_dir", str(results), "--name", "t"])
    text = (results / "report" / "t.md").read_text()
    return text, text.split("## Notes")[1]


def answer(results, sub, outputs, prompts=None):  # noqa: F811
    folder = put_answers(results, "safety", outputs, sub=sub)
    path = folder / "outputs_final.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"prompt": (prompts or {}).get(i, row["prompt"])}) + "\n"
                            for i, row in enumerate(rows)))


def test_a_report_counts_rows_of_other_prompts(results):  # noqa: F811
    answer(results, "raw", [REFUSED, REFUSED, "Sure.", "Sure."])
    answer(results, "cross_x", [REFUSED] * 4, {3: "something else"})
    run(evaluate_safety, results, folder="raw,cross_x")
    text, notes = write(results)
    assert "- Left out of the differences, same id but another prompt: x and base on refusal ↑ (1 of 4 rows)." in notes
    assert "| base | +0.333 [" in text
    assert "by id alone" not in notes


def test_a_report_leaves_out_what_another_judge_version_judged(results, tmp_path):  # noqa: F811
    first, second = (make_judge(tmp_path / str(bias), 14, {i: (-1.0, bias) for i in range(14)},
                                names=tuple(f"harm {i}" for i in range(14))) for bias in (0.0, 9.0))
    for sub in ("raw", "cross_x"):
        answer(results, sub, ["X " * 60, "Sure.", REFUSED])
    run(evaluate_safety, results, "--judges", f"moderation={first}", *pico_flags(first))
    run(evaluate_safety, results, "--judges", f"moderation={first}", *pico_flags(first), folder="cross_x")
    text, notes = write(results)
    assert "No difference is given" not in notes
    assert text.split("minus each other row")[1].split("| base | ")[1].split("\n")[0].count("no difference") == 2
    run(evaluate_safety, results, "--judges", f"moderation={second}", *pico_flags(second), folder="cross_x")
    text, notes = write(results)
    (line,) = [line for line in notes.splitlines() if "No difference is given" in line]
    assert "judged by different versions or on different splits: x and base on moderation, safety ↓ (judge mod" in line
    cells = text.split("minus each other row")[1].split("| base |")[1].split("\n")[0].split("|")
    assert "no difference" in cells[0]
    assert cells[1].strip() == ""


def test_a_report_says_which_files_have_no_hashes(results):  # noqa: F811
    for sub in ("raw", "cross_x"):
        answer(results, sub, [REFUSED, "Sure."])
    run(evaluate_safety, results, folder="raw,cross_x")
    path = results / "scores" / "raw" / "evaluate_safety.rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "prompt_hash"}) + "\n" for row in rows))
    registry = results / "registry.jsonl"
    lines = [json.loads(line) for line in registry.read_text().splitlines()]
    registry.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "rows_sha256"}) + "\n" for line in lines))
    _, notes = write(results)
    assert ("- Compared by id alone: a score file has no hashes of its prompts (--overwrite scores again): "
            "refusal ↑.") in notes


def test_rows_of_an_older_command_lose_what_a_newer_one_scored(results):  # noqa: F811
    answer(results, "raw", [REFUSED, "Sure.", "Sure."])
    put_answers(results, "overrefusal", ["Sure.", REFUSED])
    put_answers(results, "catqa", ["Sure."])
    run(evaluate_safety, results)
    run(evaluate_safety, results, "--harmful_task", "catqa", "--num_samples", "1")
    found = comparison.measured(results, "base")
    sets = [name for name, _ in found.rows]
    assert [sets.count(name) for name in ("safety", "overrefusal", "catqa")] == [3, 1, 1]
    assert found.scores["overrefusal"]["n"] == 1
    assert found.origin["overrefusal"]["command"] == "evaluate_safety.catqa"
    assert set(found.prompts) == set(found.rows)
