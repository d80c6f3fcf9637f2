"""One table, four formats: the same numbers in each, hostile labels as text, LaTeX that closes what it opens."""

import csv
import io
import json
import math
import re

import pandas as pd
import pytest
from reported import RUNS, fill, hits, put, write

from data.escaped import read_cell
from evaluator import report
from evaluator.reporting import against, formats
from evaluator.reporting.table import Column, Row, Table
from evaluator.statistics import metrics
from evaluator.statistics.comparison import Cell

NASTY = "=cmd|' /C calc'!A0 & 50% of $x_1 \\input{y} # ~^ <b>"


def nasty_table():
    cells = {"a": Cell(1 / 3, math.nan, math.nan, 7, (1 / 3,)), "b": Cell(-0.5, -0.75, -0.25, 7, (-0.5,))}
    columns = (Column("a", "a_1 ↑", True, "share & more"), Column("b", "change − λ", False, signed=True),
               Column("c", "absent", True))
    return Table("Title_1 \\ & co", columns, (Row(NASTY, "run_1", ("seed 1",), cells), Row("[x] *", "r", ("seed 1",), {})))


def read_latex(text):
    """The rows of a tabular as lists of cells; fails where TeX would stop or read something else."""
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 1
    body = text.split("\\toprule\n")[1].split("\\bottomrule")[0].replace("\\midrule\n", "")
    rows = []
    for line in body.strip().split("\n"):
        assert line.endswith(" \\\\")
        assert line.startswith("{"), "a bracket behind a line's end is read as its option"
        line, depth = line.removesuffix(" \\\\"), 0
        for mark in re.findall(r"\\[A-Za-z]+|\\.|[{}]", line):
            depth += {"{": 1, "}": -1}.get(mark, 0)
            assert depth >= 0
        assert depth == 0
        # what is left when every command and escaped sign is gone holds nothing that TeX acts on
        plain = re.sub(r"\$\\?[A-Za-z-]+\$|\\[A-Za-z]+(\{\})?|\\[{}$&#%_]", "", line)
        assert not set(plain) & set("$#%_^~\\<>")
        assert plain.isascii()
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)&", line)])
    return rows


def test_latex_is_whole_and_runs_nothing():
    text = formats.latex(nasty_table())
    head, first, second = read_latex(text)
    assert head == ["{model}", "a\\_1 $\\uparrow$", "change $-$ $\\lambda$", "absent"]
    assert first[1:] == ["0.333", "-0.500 {\\footnotesize [-0.750, -0.250]}", ""]
    assert second == ["{[x] *}", "", "", ""]
    assert "\\input" not in text
    assert "\\begin{tabular}{lrrr}" in text
    assert "\\caption{Title\\_1 \\textbackslash{} \\& co}" in text


def test_csv_reads_into_a_frame_and_a_spreadsheet_runs_nothing():
    text = formats.csv_text(nasty_table())
    frame = pd.read_csv(io.StringIO(text))
    assert list(frame.columns) == list(formats.CSV_COLUMNS)
    assert frame.value.tolist() == [1 / 3, -0.5], "every digit"
    assert frame.higher_is_better.tolist() == [True, False]
    assert frame.low.isna().tolist() == [True, False]
    assert text.splitlines()[1].startswith("'=cmd")
    assert {read_cell(label) for label in frame.model} == {NASTY}
    # one seed is its own row: it is not written a second time
    assert set(frame.level) == {"model"}


@pytest.mark.parametrize("label", ["a\rb", "a\nb", "a\r\nb", "\r=1", "\n=1", 'a,"b"', "\ufe66SUM(1)", "'-", "\u2028"])
def test_a_csv_line_ends_where_a_row_ends(label):
    cells = {"a": Cell(0.5, 0.25, 0.75, 4, (0.5,))}
    text = formats.csv_text(Table("t", (Column("a", label, True),), (Row(label, label, ("seed 1",), cells),)))
    (head, row) = csv.reader(io.StringIO(text, newline=""))
    assert head == list(formats.CSV_COLUMNS)
    assert [read_cell(row[at]) for at in (0, 1, 3)] == [label] * 3
    assert row[0][0] not in "=+-@\t\r\n\ufe66"
    assert row[4:] == ["True", "model", "", "0.5", "0.25", "0.75", "4"]


def test_json_has_every_digit_and_null_for_what_is_unknown():
    found = json.loads(formats.json_text(nasty_table(), {"more": [math.inf]}))
    assert found["rows"][0]["cells"]["a"] == {"value": 1 / 3, "low": None, "high": None, "n": 7, "per_seed": [1 / 3]}
    assert found["rows"][0]["label"] == NASTY
    assert found["columns"][0]["definition"] == "share & more"
    assert found["more"] == [None]


@pytest.fixture
def two_seeds(tmp_path):
    roots = [tmp_path / "one", tmp_path / "two"]
    for seed, root in enumerate(roots):
        fill(root, seed=seed + 1, shift=0.02 * seed)
    return roots


def test_a_report_of_two_seeds_is_the_same_in_every_format(two_seeds, tmp_path):
    words = ["--roots", ",".join(map(str, two_seeds)), "--published", "h3fusion"]
    page = write(tmp_path, *words)
    alone = write(tmp_path, *words, "--format", "md,csv,latex,json")
    assert alone == page, "further formats change nothing of the page"
    folder = tmp_path / "report"
    data, frame = json.loads((folder / "t.json").read_text()), pd.read_csv(folder / "t.csv")
    rows = read_latex((folder / "t.tex").read_text())
    moe = next(row for row in data["rows"] if row["label"] == "tuned MoE")
    cell = moe["cells"]["safe_refusal"]
    assert moe["seeds"] == ["seed 1", "seed 2"]
    assert cell["per_seed"] == [0.85, 0.87]
    assert cell["value"] == pytest.approx(0.86)
    shown = f"{cell['value']:.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
    assert f"| tuned MoE | {shown} |" in page
    assert rows[-1][:2] == ["{tuned MoE}", shown.replace(" [", " {\\footnotesize [") + "}"]
    mine = frame[(frame.model == "tuned MoE") & (frame.score == "safe_refusal")]
    assert mine.level.tolist() == ["model", "seed", "seed"]
    assert mine.value.tolist() == [cell["value"], 0.85, 0.87]
    assert mine.seed.fillna("").tolist() == ["", "seed 1", "seed 2"]
    # differences and findings as data: the same numbers as in the sentences
    against_mix = next(d for d in data["differences"] if d["against"] == "naive mix" and d["column"] == "safe_refusal")
    assert f"{against_mix['value']:+.3f} [{against_mix['low']:.3f}, {against_mix['high']:.3f}]" in page
    declared = data["findings"]["comparisons"]
    assert {item["row"] for item in declared} == {"tuned MoE"}
    assert {item["against"] for item in declared} == {"plain average", "naive mix"}
    assert metrics.holm([item["p"] for item in declared]) == [item["p_holm"] for item in declared]
    assert data["findings"]["sentences"][0] in page
    assert data["published"]["tables"]


def test_every_row_against_one(tmp_path, capsys):
    fill(tmp_path)
    put(tmp_path, "alone", nll=[1.5] * 8)
    text = write(tmp_path, "--against", "naive mix", "--format", "md,json", runs=f"{RUNS},alone")
    assert "## Every other row minus naive mix, same prompts" in text
    assert "harmless is better (+0.350 [" in text
    assert "alone cannot be compared" in text
    data = json.loads((tmp_path / "report" / "t.json").read_text())
    declared = data["findings"]["comparisons"]
    assert {item["against"] for item in declared} == {"naive mix"}
    assert "naive mix" not in {item["row"] for item in declared}
    assert f"over these {len(declared)} comparisons" in text
    assert metrics.holm([item["p"] for item in declared]) == [item["p_holm"] for item in declared]
    assert capsys.readouterr().out.count("## Findings") == 1


def test_harm_before_the_correction_is_said(tmp_path):
    # worse by 8 of 100, p .008 alone; among many rows the correction takes it away
    put(tmp_path, "base", refusal=hits(0.58))
    put(tmp_path, "weak", refusal=hits(0.50))
    for i in range(12):
        put(tmp_path, f"same{i}", refusal=hits(0.58))
    text = write(tmp_path, "--against", "base", runs="base,weak," + ",".join(f"same{i}" for i in range(12)))
    assert "weak is worse, before the correction only (-0.080" in text
    assert "(1 more worse before the correction only)" in text


def test_scores_shown_alone(tmp_path, capsys):
    fill(tmp_path)
    text = write(tmp_path, "--scores", "safe_*,mc2")
    assert "| model | refusal ↑ | MC2 ↑ |" in text
    assert r"- Shown alone (--scores): safe\_*,mc2." in text
    assert "Not measured here" not in text
    with pytest.raises(SystemExit):
        write(tmp_path, "--scores", "nothing")
    assert "has a score among nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "said"), [
    (["--format", "xls"], "--format xls: xls is no format; allowed: md, csv, latex, json"),
    (["--format", ","], "--format ,: nothing is no format"),
    (["--against", "nobody"], "--against nobody: no row is called so; allowed: base, harmless"),
])
def test_errors(tmp_path, capsys, flags, said):
    fill(tmp_path)
    with pytest.raises(SystemExit) as caught:
        report.main(["--runs", RUNS, "--output_dir", str(tmp_path), *flags])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_only_what_was_asked_for_is_written(tmp_path):
    fill(tmp_path)
    report.main(["--runs", RUNS, "--output_dir", str(tmp_path), "--name", "t", "--format", "csv"])
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["t.csv"]


def test_one_row_is_shown_once(tmp_path, capsys):
    fill(tmp_path)
    report.main(["--runs", "base", "--output_dir", str(tmp_path), "--name", "t"])
    shown = capsys.readouterr().out
    assert shown.count("| model |") == 1
    assert "## Findings" not in shown


def test_the_reference_is_found_by_label_or_run():
    lines = [type("Line", (), {"label": "A", "run": "a"}), type("Line", (), {"label": "B", "run": "b"})]
    assert against.reference(lines, "A") is against.reference(lines, "a") is lines[0]
