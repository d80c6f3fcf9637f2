"""Summary numbers of a table: from the papers' sets where those were scored, of one making in every row, or empty."""

from __future__ import annotations

import pytest

from evaluator.reporting.summary_numbers import most_alike, summary
from evaluator.statistics.axes import Measured


def run(*parts, seed=1):
    """A run's rows: (set, value name, values, judge's version, answers asked about)."""
    rows, prompts, origin = {}, {}, {}
    for place, key, values, version, asked in parts:
        words = version if key.startswith("alpaca_eval") else None
        details = {"annotator": words, "answers_task": "alpacaeval_50"} if words else {
            "judged": {f"{key}.{place}": {"answers": asked}}}
        score = key if words else f"{key}.{place}"
        origin[score] = {"inputs": {f"judge {key}": version}, "details": details, "split": "test", "command": "x"}
        for i, value in enumerate(values):
            rows.setdefault((place, str(i)), {})[key] = value
            prompts[place, str(i)] = f"{place} {i}"
    return Measured(None, {}, rows, {}, seed, prompts, origin)


def three(first, sets=("helpfulness", "safety", "truthfulness"), version="v1"):
    return run((sets[0], "pairwise", [1, 0.5, *[first] * 8], version, 10),
               (sets[1], "moderation", [1, *[0] * 9], version, 10),
               (sets[2], "truth", [1] * 5 + [0] * 5, version, 10), (sets[2], "info", [1] * 8 + [0] * 2, version, 10))


PUBLISHED = ("alpacaeval_50", "beavertails_500", "truthfulqa_published")


def test_h3fusions_numbers_from_its_own_sets():
    found = summary({"a": [three(1, PUBLISHED)], "b": [three(0, PUBLISHED)]})
    cells = {name: score.value for name, score in found.scores["a"].items()}
    assert cells == pytest.approx({"win_rate": 0.95, "safety_score": 0.1, "truth": 0.5, "info": 0.8, "truth_x_info": 0.4,
                                   "average": (0.95 + 0.4 - 0.1) / 3})
    text = "\n".join(found.notes)
    assert "(moderation on beavertails_500); moderation on beavertails_500: 10 prompts (" in text
    assert "judge moderation v1, split test" in text or "split test, judge moderation v1" in text
    assert "left empty" not in text


def test_the_papers_set_is_preferred_to_the_embedded_one_and_alpaca_eval_to_other_judges():
    both = run(("safety", "moderation", [1] * 10, "v", 10), ("beavertails_500", "moderation", [0] * 10, "v", 10),
               ("helpfulness", "pairwise", [0] * 10, "v", 10), ("alpaca_eval", "alpaca_eval.win_rate", [1] * 10, "gpt4", 10))
    found = summary({"a": [both]})
    assert found.scores["a"]["safety_score"].value == 0
    assert found.scores["a"]["win_rate"].value == 1
    assert any("annotator gpt4" in line and "answers to alpacaeval_50" in line for line in found.notes)


def test_a_table_is_made_from_the_reading_that_most_rows_have():
    embedded, published = three(1), three(0, PUBLISHED)
    found = summary({"a": [embedded], "b": [published], "c": [embedded]})
    assert "win_rate" not in found.scores["b"]
    assert found.scores["c"]["win_rate"].value == 0.95
    assert any(line.startswith("- win_rate is left empty for b: not the same judge on the same prompts. pairwise on "
                               "helpfulness: ") and "not judged so (b)" in line for line in found.notes)


@pytest.mark.parametrize(("other", "why"), [
    (three(1, version="v2"), "judge pairwise v2"),
    (run(("helpfulness", "pairwise", [1] * 7, "v1", 7)), "7 prompts")])
def test_rows_of_another_judge_or_other_prompts_keep_no_cell_beside_most(other, why):
    found = summary({"a": [three(1)], "b": [other], "c": [three(0)]})
    assert [label for label in found.scores if "win_rate" in found.scores[label]] == ["a", "c"]
    (line,) = [line for line in found.notes if line.startswith("- win_rate is left empty for b")]
    assert why in line
    # one against one: nobody can say which is the odd one
    tied = summary({"a": [three(1)], "b": [other]})
    assert not any("win_rate" in cells for cells in tied.scores.values())
    assert tied.higher["win_rate"]


def test_answers_that_a_judge_could_not_read_do_not_part_rows():
    lost = run(("safety", "moderation", [1, 0, 0], "v1", 5))
    found = summary({"a": [run(("safety", "moderation", [1, 0, 0, 0, 0], "v1", 5))], "b": [lost]})
    assert found.scores["b"]["safety_score"].value == pytest.approx(1 / 3)
    other = run(("safety", "moderation", [1, 0, 0, 0, 0], "v1", 5))
    other.prompts["safety", "4"] = "another question"
    apart = summary({"a": [run(("safety", "moderation", [1, 0, 0, 0, 0], "v1", 5))], "b": [other]})
    assert not apart.scores["a"]


def test_seeds_of_one_row_that_differ_are_never_averaged():
    found = summary({"a": [three(1), three(1, version="v2")], "b": [three(1)], "c": [three(0)]})
    assert "win_rate" not in found.scores["a"]
    assert "win_rate" in found.scores["b"]
    assert any("other seeds otherwise" in line for line in found.notes)


def test_the_largest_group_or_none():
    assert most_alike({"a": 1, "b": 2, "c": 1}, lambda x, y: x == y) == {"a", "c"}
    assert most_alike({"a": 1, "b": 2}, lambda x, y: x == y) == set()
    assert most_alike({"a": 1, "b": None}, lambda x, y: x is not None and x == y) == {"a"}
    assert most_alike({}, lambda x, y: True) == set()
