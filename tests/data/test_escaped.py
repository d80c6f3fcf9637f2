"""Answers in tables and pages: shown as they are, run by nothing, and read back unchanged."""

from __future__ import annotations

import csv
import json

import pytest

import inference
from data import escaped
from data.readers.answer_files import read_answer_file
from evaluator.scoring import engine

HOSTILE = ["=HYPERLINK(\"http://a.b\")", "+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1+1", "\ufe621",
           "\ufe6bA", "\n=1", "'=1", "''=1",
           "'fine'", "'", "", "I can't, sorry.", "a\n=b, \"c\"", "- one\n- two"]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_cell_begins_a_formula_and_all_come_back(text):
    cell = escaped.csv_cell(text)
    assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\ufe62", "\ufe6b")
    assert escaped.read_cell(cell) == text
    assert cell == text or cell == f"'{text}"


def test_harmless_cells_and_numbers_are_left_alone():
    for cell in ("Sorry.", "'tis fine", "2 - 1", 7, -7, 0.5):
        assert escaped.csv_cell(cell) is cell


def test_answers_are_written_as_text_and_read_back(tmp_path):
    rows = [{"index": i, "rendered": text, "prompt": text or "p", "output": text} for i, text in enumerate(HOSTILE)]
    inference.write_rows(tmp_path, rows)
    with (tmp_path / "outputs_final.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))[1:]
    assert all(cell[:1] not in ("=", "+", "-", "@", "\t", "\r") for row in table for cell in row)
    # the JSONL holds them as they are; without it the table is read
    assert [json.loads(line)["output"] for line in (tmp_path / "outputs_final.jsonl").read_text().splitlines()] == HOSTILE
    (tmp_path / "outputs_final.jsonl").unlink()
    assert [row["output"] for row in engine.read_answers(tmp_path)] == HOSTILE
    asked = [row for row in rows if row["rendered"].strip()]
    inference.write_rows(tmp_path, asked)
    copy = (tmp_path / "outputs_final.csv").rename(tmp_path / "theirs.csv")
    assert [row["output"] for row in read_answer_file(str(copy), "--answers")] == [row["output"] for row in asked]


def test_a_table_of_somebody_else_keeps_its_apostrophes(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,answer\np,'-ing is a suffix\n")
    assert [row["output"] for row in read_answer_file(str(tmp_path / "a.csv"), "--answers")] == ["'-ing is a suffix"]


@pytest.mark.parametrize(("text", "shown"), [
    ("naive mix", "naive mix"), ("a_b a*b [0.1, 0.2] p < .05, x -> y", "a_b a*b [0.1, 0.2] p < .05, x -> y"),
    ("a|b", "a\\|b"), ("a\\|b", "a\\\\\\|b"), ("<img src=x onerror=y>", "\\<img src=x onerror=y>"),
    ("</td>", "\\</td>"), ("![x](http://a.b/c.png)", "![x\\](http://a.b/c.png)"), ("[x]: http://a.b", "[x\\]: http://a.b"),
    ("one\n| two |\r\nthree", "one \\| two \\| three"), ("`code`", "\\`code\\`"), ("a\u202eb", "ab"),
    ("a\\new", "a\\new"), ("mix_moe_reg_00010", "mix_moe_reg_00010"), ("_x_ a*b", "\\_x\\_ a*b"), ("**x**", "\\*\\*x\\*\\*"),
    ("~~x~~", "\\~\\~x\\~\\~"), ("$5", "$5"), ("$x$", "\\$x\\$"), ("&lt;b&#62;", "\\&lt;b\\&#62;"), ("R&D", "R&D"),
    ("\x1b[2Ja\u200bb\u00adc\x9b", "[2Jabc"), ("\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937")])
def test_markdown_keeps_harmless_text_and_makes_nothing_of_the_rest(text, shown):
    assert escaped.markdown(text) == shown


def test_markdown_cells_are_text_to_a_markdown_reader():
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    for text in ("<script>x</script>", "a|b\\|c", "![x](y)", "[x](javascript:y)", "`z`", "\\<b>", "<!-- x", "[a][b]"):
        page = reader.render(f"| h | i |\n|---|---|\n| {escaped.markdown(text)} | end |\n")
        assert page.count("<td>") == 2
        assert not any(tag in page for tag in ("<script", "<img", "<a ", "<code", "<b>", "<!--"))


@pytest.mark.parametrize("text", ["# x", "- y", "* y", "+ y", "1. z", "12) z", "> q", "~~~", "---", "===", "a\n## Findings",
                                  "**b**", "_i_", "~~s~~", "<img src=x>", "[a](javascript:1)", "`c`", "![a](b)", "&lt;b"])
def test_lines_and_items_are_plain_text_to_a_markdown_reader(text):
    from markdown_it import MarkdownIt

    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    for prefix, frame in (("", "<p>{}</p>\n"), ("- ", "<ul>\n<li>{}</li>\n</ul>\n")):
        if (prefix + text).startswith("- ") and not prefix:
            continue  # that is an item
        page = reader.render(escaped.line(prefix + text))
        assert page == frame.format(escaped.html(" ".join(text.split())).replace("&#x27;", "'"))


def test_a_name_between_backticks_cannot_end_them():
    assert escaped.code("a`b\n`<i>") == "`a'b '<i>`"


def test_html_and_latex():
    assert escaped.html("<b a='1'>\"&\u202e") == "&lt;b a=&#x27;1&#x27;&gt;&quot;&amp;"
    assert escaped.latex("50% of $x_1 & \\input{y}\n~^#<>|") == (
        r"50\% of \$x\_1 \& \textbackslash{}input\{y\} \textasciitilde{}\textasciicircum{}\#\textless{}\textgreater{}"
        r"\textbar{}")


def test_a_reports_cells_are_escaped():
    from evaluator.attack_table import text
    from evaluator.reporting.formats import markdown_lines
    from flags.attack_table import AttackTableArgs

    assert markdown_lines(["model"], [["<img src=x>|b\nc"]])[-1] == "| \\<img src=x>\\|b c |"
    cell = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    row = {"label": "a|b", "cells": {name: {"as_asked": cell, "attacked": cell, "change": cell}
                                     for name in AttackTableArgs(runs="a=b").named_attacks}}
    assert "| a\\|b | 10 |" in text([row], AttackTableArgs(runs="a=b"))
