"""Reports made from what strangers wrote: labels, ids, categories, definitions and numbers that mislead or inject."""

from __future__ import annotations

import json
import math
import re

import pytest
from markdown_it import MarkdownIt
from matplotlib.text import Text

import manifest
from evaluator import agreement, attack_table, mask_figures, report
from evaluator.judges import fitted
from evaluator.reporting import figures, sweep_report
from evaluator.reporting.sweep_curve import Point
from evaluator.statistics import metrics
from flags.attack_table import AttackTableArgs
from inference import write_rows

PLANTED = ["x|y", "<img src=z>", "[a](javascript:1)", "a\n## Findings\n\n- refusal ↑: wins", "# head", "**bold**",
           "$\\frac{1}$", "`code`", "![p](http://a.b/c)", "\x1b[2Jgone", "\u202edlog", "&#60;b>", "~~no~~", "- item",
           "1. one", "a\u200b"]
TAGS = ("<img", "<a ", "<code", "<strong", "<s>", "<em", "<script", "<blockquote", "<ol", "\x1b", "\u202e", "\u200b")


def page(text, headings):
    """The report as a reader sees it: no tag of anybody else's, no heading that is not ours."""
    html = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)
    own = html.replace('<img src="', "", text.count("\n!["))
    assert not [tag for tag in TAGS if tag in own]
    found = re.findall(r"<h[1-6]>(.*?)</h", html)
    assert len(found) == headings, found
    return html


def put(results, run, scores, rows, command="evaluate_safety", **more):
    sub = "raw" if run == "base" else f"cross_{run}"
    folder = results / "scores" / sub
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{command}.rows.jsonl").write_text("\n".join(
        json.dumps({"set": name, "id": id, "values": values}) for name, id, values in rows))
    manifest.register(results, {"kind": "score", "run": run, "sub": sub, "command": command, "seed": 1, "scores": scores,
                                "details": {}, **more})


def refusals(results, run, hits, definition="d", **more):
    score = metrics.rate(hits, "safe_refusal", definition, higher_is_better=True).as_dict()
    rows = [("safety", str(i), {"safe_refusal": hit}) for i, hit in enumerate(hits)]
    put(results, run, {"safe_refusal": score}, rows, **more)


def write(results, runs, *more):
    report.main(["--runs", runs, "--output_dir", str(results), "--name", "t", *more])
    return (results / "report" / "t.md").read_text()


@pytest.mark.parametrize("label", PLANTED)
def test_labels_are_text_everywhere_in_a_report(tmp_path, label):
    for run, share in (("base", 1), ("safety", 9), ("mix", 3), ("moe", 8)):
        refusals(tmp_path, run, [int(i < share) for i in range(10)], definition=f"share {label}")
    text = write(tmp_path, f"base,safety,{label}=mix,{label} too=moe", "--title", f"{label} title")
    page(text, 4)
    assert re.findall(r"^## (\w+)", text, re.M)[-2:] == ["Findings", "Notes"]


def test_labels_in_figures_are_words(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda plt, figure, path: (
        figure.canvas.draw(), drawn.extend(t.get_text() for t in figure.findobj(Text)), plt.close(figure), path)[-1])
    point = {"x": 0.5, "x_low": 0.4, "x_high": 0.6, "y": 0.5, "y_low": None, "y_high": None, "over": 0.1}
    for label in [*PLANTED, "x" * 5000, "$" * 7, "a$b$c"]:
        figures.tradeoff([{**point, "label": label, "y_name": label}], tmp_path / "a.png", label)
        mask_figures._picture([mask_figures._Panel(__import__("numpy").zeros((1, 1)), (0, 1), "PuOr", "l")], ["0"], [label],
                              tmp_path / "b.png", label)
    assert all(len(text) <= 420 for text in drawn)
    assert not [text for text in drawn if re.search(r"(?<!\\)\$", text) or "\x1b" in text or "\u202e" in text]
    # and the words are there
    assert any("bold" in text for text in drawn)


@pytest.mark.parametrize("label", PLANTED)
def test_labels_categories_and_judges_are_text_in_a_sweep(tmp_path, label):
    points = [Point(name, f"r{weight}", weight, {str(i): int(i < 9 - 8 * weight) for i in range(10)},
                    {str(i): int(i < 9) for i in range(10)}, {}, {}, {label: {str(i): 1.0 for i in range(10)}},
                    {str(i): label for i in range(10)}) for name, weight in ((f"{label} 0", 0.0), (f"{label} 1", 1.0))]
    control = Point(label, "c", math.nan, points[0].non_refusal, points[0].comply)
    facts = {"task": label, "safety": "s", "form": "convex", "style": label, "utility": "english",
             "refinement": [{"weight": 0.5, "why": label}], "stopped": label}
    found = sweep_report.summary({"fusion": points, "control": [control]}, {label: {"fusion": points}}, facts, 1)
    path = sweep_report.write(tmp_path, "x", json.loads(json.dumps(found)))
    page(path.read_text(), 7)


@pytest.mark.parametrize("label", PLANTED)
def test_labels_are_text_in_the_attack_table(tmp_path, label):
    for place, name in (("safety", "evaluate_safety"), ("safety+cot", "evaluate_safety.safety+cot")):
        put(tmp_path, "a", {}, [(place, str(i), {"safe_refusal": i % 2}) for i in range(6)], command=name)
    args = AttackTableArgs(output_dir=str(tmp_path), runs=f"{label}=a", attacks="cot")
    page(attack_table.text(attack_table.table(args), args), 1)


def test_names_and_ids_are_text_in_the_agreement(tmp_path, monkeypatch):
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: fitted.HarmJudge(lambda a: [0.9] * len(a), {}))
    monkeypatch.setattr("data.sources.load_refusal_labels", lambda: [("a", "Sure.", 0), ("b", "I can't.", 1)])
    run = "a`b<img src=z>"
    folder = tmp_path / "inference" / "overrefusal" / "test" / f"cross_{run}"
    folder.mkdir(parents=True)
    write_rows(folder, [{"index": i, "id": text, "prompt": "p", "input": "", "reference": "", "category": text,
                         "rendered": "p", "output": text, "finish": "stop"} for i, text in enumerate(PLANTED)])
    agreement.main(["--output_dir", str(tmp_path), "--runs", run, "--tasks", "overrefusal"])
    text = (tmp_path / "report" / "agreement.md").read_text()
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert not [tag for tag in ("<img", "<a ", "<strong", "<script", "\x1b", "\u202e") if tag in html]
    assert len(re.findall(r"<h[1-6]>", html)) == 3


@pytest.mark.parametrize("runs", ["a=base,a=mix", "a=base,a\u200b=mix", "a=base,\uff41=mix", "(chance)=base,mix"])
def test_two_rows_that_read_the_same_are_refused(tmp_path, capsys, runs):
    for run in ("base", "mix"):
        refusals(tmp_path, run, [1, 0])
    with pytest.raises(SystemExit) as stop:
        write(tmp_path, runs)
    assert stop.value.code == 2
    assert "--runs: " in capsys.readouterr().err
