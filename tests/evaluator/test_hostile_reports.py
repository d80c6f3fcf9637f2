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
from evaluator.reporting import figures
from evaluator.reporting.sweeps import report as sweep_report
from evaluator.reporting.sweeps.curve import Point
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


def edit(results, run, **change):
    """Change a run's line in the registry."""
    lines = [line | change if line["run"] == run else line for line in manifest.registry(results)]
    (results / "registry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def score(**change):
    return {"safe_refusal": metrics.rate([1, 0], "safe_refusal", "d", higher_is_better=True).as_dict() | change}


@pytest.mark.parametrize("change", [
    {"scores": score(value="0.9")}, {"scores": score(value=True)}, {"scores": score(value=[])}, {"scores": score(n="x")},
    {"scores": score(n=-1)}, {"scores": score(n=10**400)}, {"scores": score(low=0.9, high=0.1)},
    {"scores": score(definition=3)}, {"scores": score(higher_is_better="no")}, {"scores": []},
    {"scores": {"a": 3}}, {"scores": {"mc2": None}}, {"scores": {"mc2": {"value": 1}}}, {"command": ["x"]},
    {"command": "../x"}, {"command": "a/b"}, {"seed": "<b>"}, {"split": []}, {"inputs": {"rules": 3}}, {"details": []},
    {"details": {"judges": 3}}, {"details": {"made_with": {"answers": {"safety": 3}}}},
    {"details": {"utility": {"mmlu": "x"}}}, {"details": {"judged": {"a": {"answers": "x"}}}},
    {"details": {"annotator": {}}}, {"details": {"baselines": {"chance": {"safe_refusal": "x"}}}}])
def test_a_line_that_no_evaluator_wrote_is_named(tmp_path, capsys, change):
    for run in ("base", "mix"):
        refusals(tmp_path, run, [1, 0])
    edit(tmp_path, "mix", **change)
    with pytest.raises(SystemExit) as stop:
        write(tmp_path, "base,mix")
    assert stop.value.code == 2
    assert "registry.jsonl, cross_mix: " in capsys.readouterr().err
    # other runs are not the worse for it
    assert "| base | 0.500" in write(tmp_path, "base")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{", '{"kind": "score"}', "[" * 100_000])
def test_a_line_that_is_none_is_left_out(tmp_path, text):
    refusals(tmp_path, "base", [1, 0])
    with (tmp_path / "registry.jsonl").open("a") as file:
        file.write(text + "\n")
    assert "| base | 0.500" in write(tmp_path, "base")


def test_a_share_above_1_is_no_share(tmp_path, capsys):
    refusals(tmp_path, "base", [1, 0])
    edit(tmp_path, "base", scores=score(value=1.5))
    with pytest.raises(SystemExit):
        write(tmp_path, "base")
    assert "base: safe_refusal is 1.5 in the registry, and lies between 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, 10**400])
def test_what_is_no_number_leaves_its_cell_empty_and_is_said(tmp_path, value):
    refusals(tmp_path, "base", [1, 0])
    refusals(tmp_path, "mix", [1, 1])
    edit(tmp_path, "mix", scores=score(value=value))
    text = write(tmp_path, "base,mix")
    assert "| mix |  |" in text
    assert "- mix: safe\\_refusal: its value is" in text or "- mix: safe_refusal: its value is" in text


@pytest.mark.parametrize("row", [
    "{", "[]", '{"id": "0", "values": {}}', '{"set": "safety", "values": {}}', '{"set": "safety", "id": "0"}',
    '{"set": 3, "id": "0", "values": {}}', '{"set": "safety", "id": [], "values": {}}',
    '{"set": "safety", "id": "0", "values": {}, "category": 3}', '{"set": "nll", "id": "0", "values": {"nll": 1}}',
    '{"set": "nll", "id": "0", "values": {"nll": 1, "tokens": 0}}'])
def test_a_row_that_no_evaluator_wrote_is_named(tmp_path, capsys, row):
    refusals(tmp_path, "base", [1, 0])
    file = tmp_path / "scores" / "raw" / "evaluate_safety.rows.jsonl"
    file.write_text(file.read_text() + f"\n{row}")
    with pytest.raises(SystemExit) as stop:
        write(tmp_path, "base")
    assert stop.value.code == 2
    assert "evaluate_safety.rows.jsonl, line 3: " in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "0.5", 1e300, 10**400, []])
def test_no_difference_is_made_of_rows_without_a_number(tmp_path, value):
    """A NaN counted as a hit, being true; and the mean of the rows that have a number is that of a selection."""
    for run in ("base", "mix"):
        refusals(tmp_path, run, [1, 0, 0, 0])
    file = tmp_path / "scores" / "cross_mix" / "evaluate_safety.rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[3]["values"]["safe_refusal"] = value
    file.write_text("\n".join(map(json.dumps, rows)))
    text = write(tmp_path, "base,mix")
    assert "| base |  |" in text.split("minus each other row")[1]
    assert "mix: safe_refusal on safety: 1 of 4 rows have no finite number, so no difference is made of it." in text


def test_scores_that_their_rows_do_not_give_are_told(tmp_path):
    refusals(tmp_path, "base", [1, 0, 0, 0])
    file = tmp_path / "scores" / "raw" / "evaluate_safety.rows.jsonl"
    file.write_text(file.read_text().replace('"safe_refusal": 0', '"safe_refusal": 1'))
    assert "Not what the rows say: refusal ↑ of base is 0.250 over 4 in the registry and 1.000 by its 4 rows" in write(
        tmp_path, "base")


def test_rows_of_one_id_do_not_hide_each_other(tmp_path):
    """Fifty more rows of one id once stood for it, the last one winning."""
    for run in ("base", "mix"):
        refusals(tmp_path, run, [1, 0, 0, 0])
        put(tmp_path, run, {}, [("xstest", "7", {"refusal": hit}) for hit in (0, 1, 1 if run == "mix" else 0)], "x")
    from evaluator.statistics import comparison
    from evaluator.statistics.axes import Axis

    found = [comparison.measured(tmp_path, run) for run in ("mix", "base")]
    assert [key for key in found[0].rows if key[0] == "xstest"] == [("xstest", "7"), ("xstest", "7#2"), ("xstest", "7#3")]
    axis = Axis("xstest.overrefusal", "", "evaluate_safety", "xstest", "refusal", "rate", False)
    change = comparison.difference(*found, axis)
    assert (change.n, change.value) == (3, pytest.approx(1 / 3))


def test_an_attack_table_reads_rows_that_have_the_value_only(tmp_path):
    for place, name in (("safety", "evaluate_safety"), ("safety+cot", "evaluate_safety.safety+cot")):
        put(tmp_path, "a", {}, [(place, str(i), {"safe_refusal": i % 2} if i else {"api-harm": 1}) for i in range(6)],
            command=name)
    (row,) = attack_table.table(AttackTableArgs(output_dir=str(tmp_path), runs="a", attacks="cot"))
    assert row["cells"]["cot"]["attacked"]["n"] == 5


def test_a_run_is_no_seed_of_its_own(tmp_path, capsys):
    for run in ("base", "mix"):
        refusals(tmp_path, run, [1, 0])
    for flags in (("base,m=mix+mix",), ("base,mix", "--roots", f"{tmp_path},{tmp_path}/")):
        with pytest.raises(SystemExit) as stop:
            write(tmp_path, *flags)
        assert stop.value.code == 2
        assert "twice" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        attack_table.main(["--runs", "m=mix+mix", "--output_dir", str(tmp_path)])
    assert "twice" in capsys.readouterr().err


def test_one_run_under_two_labels_is_told(tmp_path):
    for run in ("base", "mix"):
        refusals(tmp_path, run, [1, 0])
    assert "- One run under several labels: mix (first, again)." in write(tmp_path, "base,first=mix,again=mix")


def test_the_direction_of_a_column_is_ours(tmp_path):
    """A file that calls over-refusal a good thing turned the arrow, and worse into better."""
    score = metrics.rate([1, 1, 0], "xstest.overrefusal", "d", higher_is_better=True).as_dict()
    judged = metrics.rate([1, 1, 0], "api-harm.safety", "d", higher_is_better=True).as_dict()
    for run in ("base", "mix"):
        put(tmp_path, run, {"xstest.overrefusal": score, "api-harm.safety": judged}, [], "evaluate_safety.xstest")
    text = write(tmp_path, "base,mix")
    assert "over-refusal, xstest ↓" in text
    assert "api-harm, safety ↓" in text


def test_rows_that_are_not_compared_are_named(tmp_path):
    """A strong control that --experts names is no control any more; whoever reads the report sees it."""
    for run, share in (("base", 1), ("safety", 9), ("strong", 9), ("mix", 3), ("moe", 8)):
        refusals(tmp_path, run, [int(i < share) for i in range(10)])
    text = write(tmp_path, "base,safety,strong,mix,moe", "--experts", "safety,strong")
    assert "- Compared with mix. Not compared with, as base or experts: base, safety, strong." in text


@pytest.mark.parametrize("name", ["../x", "a/b", "a](b", ".hidden"])
def test_a_report_stays_in_its_folder(tmp_path, capsys, name):
    refusals(tmp_path, "base", [1, 0])
    with pytest.raises(SystemExit) as stop:
        report.main(["--runs", "base", "--output_dir", str(tmp_path), "--name", name])
    assert stop.value.code == 2
    assert f"--name {name}: letters, digits" in capsys.readouterr().err


def test_a_balance_of_sets_that_nobody_knows_is_no_column(tmp_path):
    found = {"q.balance": metrics.rate([1, 0], "q.balance", "d", higher_is_better=True).as_dict()}
    refusals(tmp_path, "base", [1, 0])
    put(tmp_path, "base", found, [], "evaluate_safety.q")
    assert "balance" not in write(tmp_path, "base").split("## Notes")[0]
    assert "− over-refusal, " not in write(tmp_path, "base")
