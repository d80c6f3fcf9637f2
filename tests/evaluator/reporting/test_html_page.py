"""The HTML page without a browser: one file, small, the same bytes again, text that stays text, the report's own data."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from html_report import HOSTILE, QUOTED, RUNS, SHARES, Page, fill, write

import config
import manifest
from config import ROOT
from data import escaped
from evaluator import report
from evaluator.reporting.html import page as html_page
from evaluator.statistics import metrics
from flags import EvaluateSafetyArgs, ReportArgs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "results"
    fill(folder)
    return folder


@pytest.fixture(scope="module")
def page(results):
    return Page(write(results, "--format", "md,json"))


def raw(results, name="t"):
    return (results / "report" / f"{name}.html").read_text(encoding="utf-8")


def test_the_data_are_the_json_report(results, page):
    assert page.data("report") == json.loads((results / "report" / "t.json").read_text(encoding="utf-8"))


def test_other_formats_are_what_they_are_without_a_page(results, page):
    names = ("md", "csv", "tex", "json")
    report.main(["--runs", RUNS, "--output_dir", str(results), "--name", "u", "--title", "t", "--format",
                 "md,csv,latex,json"])
    write(results, "--title", "t", "--format", "md,csv,latex,json", name="v")
    assert [(results / "report" / f"u.{name}").read_bytes().replace(b"u.png", b"v.png") for name in names] == \
        [(results / "report" / f"v.{name}").read_bytes() for name in names]


def test_the_same_input_gives_the_same_bytes(results, page):
    again = subprocess.run(
        [sys.executable, "evaluator/report.py", "--runs", RUNS, "--output_dir", str(results), "--name", "w", "--title", "t",
         "--html"], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    here = os.getcwd()
    try:
        os.chdir(ROOT)
        write(results, "--title", "t", name="x")
    finally:
        os.chdir(here)
    assert raw(results, "w") == raw(results, "x")


def test_the_page_is_one_small_file_that_asks_for_nothing(results, page):
    text = raw(results)
    assert len(text.encode()) < 1_000_000
    policy = page.named("meta", **{"http-equiv": "Content-Security-Policy"})[0][1]["content"]
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for name, (tag, attributes) in {"script-src": ("script", {"type": None}), "style-src": ("style", {})}.items():
        inside = [element[2] for element in page.named(tag, **attributes)]
        digests = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in inside]
        assert [f"'sha256-{digest}'" for digest in digests] == [rules[name]]
    for name, attributes, _ in page.elements:
        # no event of an element, no style of its own (the policy forbids both), links within the page alone
        assert not [key for key in attributes if key.startswith("on") or key in ("style", "src", "srcset", "action")], name
        assert attributes.get("href", "#").startswith("#")
    assert not re.search(r"url\(|@import", page.named("style")[0][2])
    assert {name for name, _, _ in page.elements} & {"iframe", "object", "embed", "link", "base", "form", "img"} == set()


def test_what_strangers_wrote_is_text(results, page):
    text = raw(results)
    assert "<script>alert" not in text
    assert "<!--" not in text.replace("<!doctype", "")
    assert len(page.named("script")) == 3
    assert not page.named("b", onmouseover="x")
    # the words are there as they were written, without the mark that turns the direction of writing
    answers = [element[2] for element in page.named("p", class_="answer")]
    assert f"moe answers {HOSTILE}".replace("\u202e", "") in answers
    assert [row[0] for row in page.table("board")[1:]][3].startswith(QUOTED)
    assert page.named("th", **{"data-score": "safe_refusal"})[0][1]["title"] == f"share {HOSTILE}".replace("\u202e", "")
    assert escaped.html(QUOTED) in text


def test_the_table_holds_the_scores_their_intervals_and_ranks(page):
    rows = page.table("board")
    assert [title.replace("\xa0", " ") for title in rows[0]] == ["model", "refusal ↑", "over-refusal ↓",
                                                                  "refusal − over-refusal ↑"]
    for row, (run, (refused, _)) in zip(rows[1:], SHARES.items(), strict=True):
        low, high = metrics.wilson(round(refused * 60), 60)
        assert row[1].startswith(f"{refused:.3f}[{low:.3f}, {high:.3f}]"), run
    # the closest pair differs on six prompts, all one way: p 0.031, the largest of six, so Holm leaves it as it is
    assert [row[1].rpartition("rank ")[2] for row in rows[1:]] == ["4", "1", "3", "2"]
    # none against three of sixty is no difference
    assert [row[2].rpartition("rank ")[2] for row in rows[1:]] == ["1–2", "4", "3", "1–2"]
    ranks = page.data("page")["ranks"]
    assert ranks["safe_refusal"] == [[4, 4], [1, 1], [3, 3], [2, 2]]
    # a cell is tinted where its row may be the first
    first = sum(low == 1 for of in ranks.values() for low, _ in of)
    assert len(page.named("td", class_="top")) == first


def test_the_bars_lie_where_the_numbers_say(page):
    dots = [element for element in page.named("circle", class_="dot")]
    # 56 pixels, three of them free on either side, from 0 to 1
    assert float(dots[0][1]["cx"]) == pytest.approx(3 + 50 * 0.1, abs=0.05)
    spans = page.named("rect", class_="span")
    low, high = metrics.wilson(6, 60)
    assert float(spans[0][1]["x"]) == pytest.approx(3 + 50 * low, abs=0.05)
    assert float(spans[0][1]["width"]) == pytest.approx(50 * (high - low), abs=0.11)


def test_differences_and_findings_are_those_of_the_report(results, page):
    data = page.data("report")
    text = page.named("section", id="differences")[0][2]
    for item in data["differences"]:
        assert f"{item['value']:+.3f}" in text
    found = page.named("section", id="findings")[0][2]
    assert len(data["findings"]["sentences"]) > 3
    for sentence in data["findings"]["sentences"]:
        assert escaped.plain(sentence.removeprefix("- ")) in escaped.plain(found)


def test_categories_with_few_prompts_are_counted_together(page):
    text = page.named("section", id="categories")[0][2]
    tables = [element for element in page.elements if element[0] == "caption" and "refusal of" in element[2]]
    assert [caption[2] for caption in tables] == ["overrefusal: refusal of harmless prompts ↓",
                                                  "safety: refusal of harmful prompts ↑"]
    assert "few" not in re.sub("fewer", "", text)
    # prompts 0 to 2 are "few"; base refuses the first six, so 3 and 5 of the 29 odd ones
    low, high = metrics.wilson(2, 29)
    assert f"{2 / 29:.3f}[{low:.3f}, {high:.3f}]" in text
    assert "others3" in text


def test_answers_stand_beside_their_verdicts_and_harmful_ones_in_a_fold(results, page):
    folds = page.named("details", class_="harmful")
    assert [fold[2].startswith("safety: harmful prompts") for fold in folds] == [True]
    assert not [fold for fold in folds if "open" in fold[1]]
    cards = [element[2] for element in page.named("div", class_="card")]
    assert len(cards) == 2 * 3 * len(SHARES)
    for card in cards:
        assert ("keyword: refuses" in card) == (" refuses " in card.split("keyword")[0])
        assert ("fitted: harmful" in card) == ("keyword: does not refuse" in card)
    few = Page(write(results, "--answers", "0", name="none"))
    assert not few.named("div", class_="card")


def test_the_same_prompts_are_drawn_whatever_rows_there_are(results, page):
    fewer = Page(write(results, runs="base,mix", name="fewer"))
    ids = [[element[2] for element in some.named("p", class_="prompt")] for some in (page, fewer)]
    assert ids[0] == ids[1]


def test_a_page_that_grows_too_large_is_refused(results, monkeypatch, capsys):
    monkeypatch.setattr(html_page, "MOST_BYTES", 10_000)
    with pytest.raises(SystemExit) as stop:
        write(results, "--answers", "20", name="large")
    assert stop.value.code == 2
    assert "--answers 20: the HTML page would be" in capsys.readouterr().err
    assert not (results / "report" / "large.html").exists()


def test_the_commands_remake_a_run_from_its_beginnings(page):
    part = page.data("page")["runs"][3][0]
    assert part["make"] == ["python align_basemodel.py --task_name safety", "python models/llama_moe.py", shlex.join(
        ["python", "align_basemodel.py", "--moe_flag", "1", "--report_to", manifest.HIDDEN])]
    assert "hf_aaa" not in json.dumps(part)
    assert part["total_seconds"] == 420
    assert part["answers"] == {"safety": "python inference.py --task_name safety",
                               "overrefusal": "python inference.py --task_name overrefusal"}
    words = part["scores"]["evaluate_safety"].split()
    assert words[:2] == ["python", "evaluator/evaluate_safety.py"]
    args = config.parse(EvaluateSafetyArgs, words[2:]).args
    assert (args.folders, args.num_samples) == (("cross_moe",), 60)
    costs = {cost["name"]: cost["values"] for cost in page.data("page")["costs"]}
    assert costs == {"all_seconds": [None, 100, None, 420]}


def test_costs_that_were_asked_for_are_columns(results):
    args = config.parse(ReportArgs, ["--runs", "base,moe", "--output_dir", str(results), "--html"]).args
    content = report.gather(args)
    told = {"base": {"seconds": 0, "stored": 0}, "moe": {"seconds": 1234.4, "stored": 5_535_360, "active": None}}
    page = Page(html_page.html_page(content, {**report._more(content), "costs": told}))
    rows = page.table("board")
    assert [title.replace("\xa0", " ") for title in rows[0][-2:]] == ["seconds to make ↓", "stored beside the base, M ↓"]
    assert [row[-2:] for row in rows[1:]] == [["0", "0.0"], ["1,234", "5.5"]]
    assert {cost["name"]: cost["values"] for cost in page.data("page")["costs"]} == {
        "seconds": [0, 1234.4], "stored": [0, 5.53536]}


def test_every_file_of_the_page_is_short():
    for path in html_page.FOLDER.iterdir():
        if path.is_file():
            assert len(path.read_text(encoding="utf-8").splitlines()) < 400, path.name
    assert {path.name for path in html_page.FOLDER.glob("*.js")} == set(html_page.SCRIPTS)


def test_no_script_writes_html():
    for name in html_page.SCRIPTS:
        text = (html_page.FOLDER / name).read_text(encoding="utf-8")
        assert not re.search(r"(inner|outer|Adjacent)HTML|document\.write|eval\(|new Function|fetch\(|XMLHttp|import\(",
                             text)
