"""Tables of pages out of docs/data: the right cells, and nothing where a page asks for what is not there."""

from __future__ import annotations

import json

import pytest

from scripts import study_tables


def cell(value, low=None, high=None, per_seed=()):
    return {"value": value, "low": low, "high": high, "n": 5, "per_seed": list(per_seed)}


REPORT = {
    "title": "t",
    "columns": [{"name": "auc", "title": "AUC ↑"}, {"name": "nll", "title": "NLL ↓"}],
    "rows": [{"label": "base", "run": "base", "seeds": ["42", "43"], "cells": {"auc": cell(0.5, 0.4, 0.6, [0.4, 0.6])}},
             {"label": "x", "run": "x", "seeds": ["42", "43"],
              "cells": {"auc": cell(0.75, 0.7, 0.8, [0.7, 0.8]), "nll": cell(1.5, None, None, [None, 1.5])}}],
    "without_model": {"length": {"auc": 0.9, "nll": None}, "chance": {"auc": None, "nll": None}},
    "differences": [{"row": "x", "against": "base", "column": "auc", "value": 0.25, "low": 0.1, "high": 0.4,
                     "verdict": "better"}],
    "findings": {"sentences": ["- In sum: yes.", "- Else: no."], "comparisons": [
        {"group": "fusions", "row": "x", "against": "base", "column": "AUC ↑", "score": "auc", "value": 0.25, "low": 0.1,
         "high": 0.4, "p": 0.0001, "p_holm": None, "verdict": "better"},
        # one that was not declared: no group, and its score as the column
        {"row": "x", "against": "mix", "column": "auc", "value": -0.1, "low": -0.2, "high": 0.0, "p": 0.04, "p_holm": 0.08,
         "verdict": "no difference"}]},
    "costs": {"base": {"seconds": 0, "stored": None}, "x": {"seconds": 12.6, "stored": 3_010_000}},
}
#: As evaluator/durability.py writes it.
LASTING = {
    "columns": [{"name": "half_life", "title": "half gone ↑"}, {"name": "kept", "title": "kept ↑"}],
    "rows": [{"label": "mix", "run": "m", "seeds": ["42"],
              "cells": {"half_life": cell(12.34, 5, None), "kept": cell(0.5, 0.4, 0.6)}},
             {"label": "moe", "run": "r", "seeds": ["42"], "cells": {"half_life": cell(None), "kept": cell(0.9, 0.8, 1.0)}},
             {"label": "none", "run": "n", "seeds": ["42"], "cells": {}}],
    "steps": [0, 5, 80], "against": "mix",
    "half_life": {"mix": {"value": 12.34, "low": 5.0, "high": None, "beyond": ["high"]},
                  "moe": {"value": None, "low": 60.06, "high": None, "beyond": ["value", "high"]}, "none": None},
    "differences": {"kept": {"moe": {"value": 0.4, "low": 0.2, "high": 0.6, "p": 0.01, "p_holm": 0.02},
                             "none": {"value": -0.1, "low": -0.3, "high": 0.1, "p": 0.4, "p_holm": 0.4}}},
}

#: Answers as evaluator/equal_utility.py writes them.
ANSWER = {"title": "WiSE-FT", "skill": "english", "utility": 1.5, "equal": True, "safety_is": "balance", "safety": 0.4,
          "line_safety": 0.5, "end": None, "difference": -0.1, "low": -0.2, "high": 0.05, "seed_low": -0.3, "seed_high": 0.1,
          "verdict": "neither safer nor less safe"}
ANSWERS = {"answers": [
    ANSWER, ANSWER | {"title": "random", "equal": False, "line_safety": None, "end": 0.25, "difference": None, "low": None,
                      "high": None, "seed_low": None, "seed_high": None, "verdict": "not compared"}]}
#: As evaluator/attack_table.py writes it.
ATTACKS = {"attacks": ["cot"], "rows": [{"label": "x", "cells": {"cot": {
    "as_asked": cell(0.5, 0.4, 0.6), "attacked": cell(0.25, 0.2, 0.3), "change": cell(-0.25, -0.4, -0.1)}}}]}
#: As scripts/sweep.py writes it.
SWEEP = {
    "form": "convex", "seed": 42, "task": "maths", "safety": "safe", "style": "none", "utility": "maths", "styles": {},
    "rows": [{"label": f"λ = {weight}", "group": "fusion", "front": weight == 1, "non_refusal": cell(weight),
              "compliance": cell(1), "nll": cell(2)} for weight in (0, 1)],
    "cliff": {"half": 0.5, "low": 0.4, "high": 0.6, "bracket": [0.4, 0.6], "drop": 0.75},
    "compared": [{"label": "shrink only", "gap": {"value": 0.1, "low": -0.1, "high": 0.3, "p": 0.25, "holm": 0.5}}]}

SENTENCES = """
right:
- "- {cell|auc|base} of {span|auc|x}, so {diff|auc|x|base} (p {p|fusions|auc|x|base}); {cost@other|seconds|base} s, {no}."
- Another one.
- "{diff|auc|x|mix}, p {p||auc|x|mix}"
lasting:
- "Gone after {span@lasting|half_life|moe} against {cell@lasting|half_life|mix}; keeps {diff@lasting|kept|moe|mix}
  (p {p@lasting|kept|kept|moe|mix})."
row: ["{span|auc|none}"]
score: ["{cell|nll|base}"]
pair: ["{diff|auc|base|x}"]
group: ["{p|merges|auc|x|base}"]
file: ["{cell@gone|auc|base}"]
"""


@pytest.fixture
def page(tmp_path, monkeypatch):
    (tmp_path / "docs" / "data").mkdir(parents=True)
    (tmp_path / "docs" / "data" / "board.json").write_text(json.dumps(REPORT))
    (tmp_path / "docs" / "data" / "other.json").write_text(json.dumps({**REPORT, "costs": {"base": {"seconds": 7}}}))
    (tmp_path / "docs" / "data" / "lasting.json").write_text(json.dumps(LASTING))
    for name, made in {"answers": ANSWERS, "attacks": ATTACKS, "sweep": SWEEP}.items():
        (tmp_path / "docs" / "data" / f"{name}.json").write_text(json.dumps(made))
    (tmp_path / "docs" / "data" / "sentences.yaml").write_text(SENTENCES)
    (tmp_path / "README.md").write_text("no table\n")
    monkeypatch.setattr(study_tables, "ROOT", tmp_path)
    monkeypatch.setattr(study_tables, "DATA", tmp_path / "docs" / "data")
    path = tmp_path / "docs" / "page.md"

    def written(words, inside=""):
        path.write_text(f"before\n<!-- made from {words} -->\n{inside}<!-- end -->\nafter\n")
        return path

    return written


@pytest.mark.parametrize(("words", "lines"), [
    ("board: models", ["| model | AUC ↑ | NLL ↓ |", "| --- | --- | --- |", "| base | 0.500 [0.400, 0.600] |  |",
                       "| x | 0.750 [0.700, 0.800] | 1.500 |", "| (length) | 0.900 |  |"]),
    ("board: models; rows=x; columns=nll", ["| model | NLL ↓ |", "| --- | --- |", "| x | 1.500 |"]),
    ("board: models; rows=base; without=chance", [
        "| model | AUC ↑ | NLL ↓ |", "| --- | --- | --- |", "| base | 0.500 [0.400, 0.600] |  |"]),
    ("board: models; rows=x; columns=nll; without=none", ["| model | NLL ↓ |", "| --- | --- |", "| x | 1.500 |"]),
    ("answers: lines", [
        "| against | NLL | safety | both | difference, over prompts | over seeds | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| WiSE-FT | english 1.500 | balance | 0.400, the line's 0.500 | -0.100 [-0.200, 0.050] | [-0.300, 0.100] "
        "| neither safer nor less safe |",
        "| random | english 1.500 (not equal) | balance | 0.400, the nearest end's 0.250 |  |  | not compared |"]),
    ("attacks: attacks", ["| model | prompts | cot's prompts as asked ↑ | cot ↑ | cot: change |",
                          "| --- | --- | --- | --- | --- |",
                          "| x | 5 | 0.500 [0.400, 0.600] | 0.250 [0.200, 0.300] | -0.250 [-0.400, -0.100] |"]),
    ("sweep: section; title=rows; rows=λ = 1", [
        "| row | non-refusal ↓ | compliance ↑ | maths NLL ↓ | front |", "| --- | --- | --- | --- | --- |",
        "| λ = 1 | 1.000 | 1.000 | 2.000 | * |"]),
    ("sweep: section; title=Where non-refusal breaks", [
        "- Steepest step: between lambda 0.4 and 0.6, 0.750 of the non-refusal.",
        "- Non-refusal is half of what it was at lambda 0.5000 [0.400, 0.600]."]),
    ("sweep: section; title=Against the controls, at equal compliance", [
        "| control | difference in non-refusal | p | Holm | verdict |", "| --- | --- | --- | --- | --- |",
        "| shrink only | +0.100 [-0.100, 0.300] | 0.250 | 0.500 | no difference |"]),
    ("board: seeds; rows=x", ["| model | seed | AUC ↑ | NLL ↓ |", "| --- | --- | --- | --- |",
                                  "| x | 42 | 0.700 |  |", "| x | 43 | 0.800 | 1.500 |"]),
    ("board: differences; columns=auc", ["| row | against | AUC ↑ |", "| --- | --- | --- |",
                                         "| x | base | +0.250 [0.100, 0.400] better |"]),
    ("board: declared; group=fusions", [
        "| row | against | score | difference | p | p corrected | verdict |", "| --- | --- | --- | --- | --- | --- | --- |",
        "| x | base | AUC ↑ | +0.250 [0.100, 0.400] | < 0.001 | unknown | better |"]),
    ("board: costs; columns=seconds,stored", ["| model | to make it, s | stored beside the base, M |", "| --- | --- | --- |",
                                              "| base | 0 |  |", "| x | 13 | 3.0 |"]),
    ("board: findings; starts=In sum|Nothing", ["- In sum: yes."]),
    ("lasting: models", ["| model | half gone ↑ | kept ↑ |", "| --- | --- | --- |",
                         "| mix | 12.3 [5.0, > 80] | 0.500 [0.400, 0.600] |",
                         "| moe | > 80 [60.1, > 80] | 0.900 [0.800, 1.000] |",
                         "| none |  |  |"]),
    ("lasting: declared; group=kept; else=not better", [
        "| row | against | score | difference | p | p corrected | verdict |", "| --- | --- | --- | --- | --- | --- | --- |",
        "| moe | mix | kept ↑ | +0.400 [0.200, 0.600] | 0.010 | 0.020 | better |",
        "| none | mix | kept ↑ | -0.100 [-0.300, 0.100] | 0.400 | 0.400 | not better |"]),
    ("lasting: declared; group=kept", [
        "| row | against | score | difference | p | p corrected | verdict |", "| --- | --- | --- | --- | --- | --- | --- |",
        "| moe | mix | kept ↑ | +0.400 [0.200, 0.600] | 0.010 | 0.020 | better |",
        "| none | mix | kept ↑ | -0.100 [-0.300, 0.100] | 0.400 | 0.400 | no difference |"]),
    ("board: sentences; name=lasting", [
        "Gone after > 80 [60.1, > 80] against 12.3; keeps +.400 [.200, .600] (p .020)."]),
    ("board: sentences; name=right", [
        "- .500 of .750 [.700, .800], so +.250 [.100, .400] (p unknown); 7 s, {no}.", "Another one.",
        "-.100 [-.200, .000], p .080"]),
])
def test_a_block_is_what_the_report_says(page, capsys, words, lines):
    path = page(words, "| old |\n")
    with pytest.raises(SystemExit) as stop:
        study_tables.main(["--check"])
    assert stop.value.code == 2
    assert "docs/page.md: is old; run python scripts/study_tables.py" in capsys.readouterr().err
    assert "| old |" in path.read_text()
    study_tables.main([])
    assert path.read_text() == f"before\n<!-- made from {words} -->\n" + "\n".join(lines) + "\n<!-- end -->\nafter\n"
    study_tables.main(["--check"])


@pytest.mark.parametrize(("words", "said"), [
    ("bord: models", "allowed files: answers, attacks, board, lasting, other, sweep; allowed kinds: models, seeds, "),
    ("board: model", "allowed files: answers, attacks, board, lasting, other, sweep; allowed kinds: models, seeds, "),
    ("board: models; rows=c", "c is not in board.json"),
    ("board: models; without=dice", "dice is not in board.json"),
    ("board: models; columns=mc1", "mc1 is not in board.json"),
    ("board: declared; group=none", "none is not in board.json"),
    ("board: costs; columns=money", "money is not in board.json"),
    ("board: findings; starts=Nothing", "Nothing is not in board.json"),
    ("sweep: section; title=Conclusion", "Conclusion is not in sweep.json"),
    ("sweep: section; title=rows; rows=λ = 2", "λ = 2 is not in sweep.json"),
    ("board: sentences; name=wrong", "wrong is not in board.json"),
    ("board: sentences; name=row", "span|auc|none is not in board.json"),
    ("board: sentences; name=score", "cell|nll|base is not in board.json"),
    ("board: sentences; name=pair", "diff|auc|base|x is not in board.json"),
    ("board: sentences; name=group", "p|merges|auc|x|base is not in board.json"),
    ("board: sentences; name=file", "gone.json is not in board.json"),
])
def test_what_is_not_there_is_named_and_nothing_is_written(page, capsys, words, said):
    path = page(words)
    before = path.read_text()
    with pytest.raises(SystemExit) as stop:
        study_tables.main([])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert path.read_text() == before
