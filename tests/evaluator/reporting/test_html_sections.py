"""Sections of the HTML page that need more than scores: a paper's columns, curves, heat-maps."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml
from html_report import Page, fill, train, write

from config import ROOT
from errors import UserError
from evaluator.reporting.findings import Line
from evaluator.reporting.html.curves import Curves, Point, _picture, read_curves, ticks
from evaluator.reporting.html.elements import data_block, tag, words
from evaluator.reporting.html.published_columns import PLACES, paper_columns
from evaluator.reporting.published_numbers import papers, published

CURVES = {"title": "harmful tuning", "x": {"title": "steps"}, "y": {"title": "refusal", "higher_is_better": True}, "lines": [
    {"label": "tuned <MoE>", "points": [{"x": 0, "value": 0.9, "low": 0.8, "high": 1.0},
                                        {"x": 80, "value": 0.3, "low": None}]},
    {"label": "naive mix", "points": [{"x": 0, "value": 0.7}, {"x": 80, "value": 0.1}]}], "notes": ["Half are gone at 40."]}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sections") / "results"
    fill(folder)
    return folder


def section(page, id):
    return next((element[2] for element in page.named("section", id=id)), None)


def test_what_is_not_there_has_no_section(results):
    page = Page(write(results, runs="base,mix"))
    assert [element[1]["id"] for element in page.named("section")] == [
        "leaderboard", "fronts", "differences", "findings", "categories", "answers", "runs", "notes"]
    assert [link[1]["href"] for link in page.named("a") if link[1]["href"].startswith("#") and link[2] == "Router"] == []


def test_a_papers_numbers_stand_beside_its_method_with_their_marks(results):
    page = Page(write(results, "--published", "h3fusion", runs="base,naive mix=mix,tuned MoE=moe"))
    rows = page.table("board")
    at = next(i for i, title in enumerate(rows[0]) if "Harmlessness, WR" in title)
    assert rows[0][at].startswith("published")
    assert [row[at] for row in rows[1:]] == ["", "", "59.86[unverified]"]
    # the mark is explained, and the whole table stands below
    text = section(page, "published")
    assert "[unverified]: from an automatic index" in text
    assert "model-merging approaches" in text


def test_every_place_of_a_papers_columns_is_in_its_tables():
    labels = ("base", "tuned MoE", "aligned", "english SFT", "SOMF expected", "SOMF hard", "DARE", "RESTA", "lambda 0",
              "lambda 0.4", "raw MoE")
    lines = [Line(label, label, ()) for label in labels]
    shown = {name: paper_columns(name, published(name), lines) for name in papers()}
    assert [len(shown[name]) for name in papers()] == [4, 4, 4]
    sweep = next(column for column in shown["lora_fusion"] if "harmfulness_rate" in column.title)
    wanted = published("lora_fusion").tables["lambda_sweep"]
    assert [cell.value if cell else None for cell in sweep.cells] == [
        wanted.cell("base model", column="harmfulness_rate").value, *[None] * 7,
        wanted.cell("0", column="harmfulness_rate").value, wanted.cell("0.4", column="harmfulness_rate").value, None]
    for name, places in yaml.safe_load(PLACES.read_text(encoding="utf-8")).items():
        for place in places:
            table = published(name).tables[place["table"]]
            down, across = {" / ".join(key) for key in table.rows}, set(table.columns)
            methods, shown = (down, across) if place["methods"] == "rows" else (across, down)
            assert set(place["show"]) <= shown
            # one list of methods may serve two tables, of which one has them all
            assert set(place["ours"]) <= methods or any(other["ours"] == place["ours"] for other in places if other != place)


def test_curves_are_drawn_with_their_numbers(results, tmp_path):
    file = tmp_path / "durability.json"
    file.write_text(json.dumps(CURVES))
    page = Page(write(results, "--curves", str(file), runs="base,mix"))
    text = section(page, "curves")
    assert "harmful tuning" in text
    assert "tuned <MoE>00.900 [0.800, 1.000]" in text
    assert "Half are gone at 40." in text
    lines = [element for element in page.named("path", class_="curve")]
    spots = [[tuple(map(float, spot.split())) for spot in line[1]["d"][1:].split("L")] for line in lines]
    # four points: right of each other, and lower where the value is
    assert [len(line) for line in spots] == [2, 2]
    assert spots[0][0][0] == spots[1][0][0] < spots[0][1][0]
    (_, a), (_, b), (_, c), (_, d) = (*spots[0], *spots[1])
    assert (b - a) / (d - c) == pytest.approx(0.6 / 0.6, abs=0.01)
    assert len(page.named("line", class_="whisker")) == 1


def test_names_of_curves_stand_in_the_order_of_their_ends():
    ends = {"high": 0.9, "low": 0.1, "middle": 0.89, "lower": 0.09, "lowest": 0.0}
    drawn = _picture(Curves("t", "x", "y", {name: [Point(0, 0.5, 0.5, 0.5), Point(1, end, end, end)]
                                            for name, end in ends.items()}))
    places = {name: float(re.search(rf'y="([\d.]+)">{name}<', str(drawn)).group(1)) for name in ends}
    ordered = sorted(places, key=places.get)
    assert ordered == ["high", "middle", "low", "lower", "lowest"]
    assert all(places[b] - places[a] >= 14 for a, b in zip(ordered, ordered[1:], strict=False))


def test_the_file_of_curves_in_the_docs_is_one(tmp_path):
    text = (ROOT / "docs" / "howto" / "compare-models.md").read_text(encoding="utf-8").split("\n## The page\n")[1]
    file = tmp_path / "c.json"
    file.write_text(text.split("```json\n")[1].split("```")[0])
    curves, = read_curves(file)
    assert curves.up == "refusal ↑"
    assert [point.value for point in curves.lines["tuned MoE"]] == [0.85, 0.1]


def test_a_sweeps_report_gives_its_curves(tmp_path):
    def score(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 9}

    rows = [{"label": f"lambda {at}", "run": f"r{at}", "group": "fusion", "weight": at, "non_refusal": score(1 - at),
             "compliance": score(0.9), "nll": score(2.0)} for at in (0.0, 0.5, 1.0)]
    rows.append(rows[0] | {"label": "joint", "group": "control", "weight": None})
    cliff = {"half": 0.4, "low": 0.3, "high": 0.5, "drop": 0.6, "bracket": [0.0, 0.5]}
    found = {"rows": rows, "styles": {}, "compared": [], "cliff": cliff, "seed": 1, "task": "aoa", "safety": "safe",
             "form": "convex", "style": "none", "utility": "english"}
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(found))
    curves = read_curves(file)
    assert [curve.up for curve in curves] == ["non-refusal of harmful prompts ↓", "compliance with harmless prompts ↑",
                                              "NLL of the task ↓"]
    assert [(point.x, point.value) for point in curves[0].lines["fusion"]] == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert list(curves[0].lines) == ["fusion"]
    assert curves[0].notes == ("Non-refusal is half of what it was at lambda 0.4000.",)
    # refusal by likelihood, where the sweep was scored by it
    file.write_text(json.dumps(found | {"rows": [row | {"refusal_auc": score(0.8)} for row in rows[:2]] + rows[2:]}))
    last = read_curves(file)[-1]
    assert last.up == "AUC of refusal by likelihood ↑"
    assert [(point.x, point.value) for point in last.lines["fusion"]] == [(0.0, 0.8), (0.5, 0.8)]


@pytest.mark.parametrize(("content", "said"), [
    (None, "no such file"), ("{", "not valid JSON"), ("[]", "not a file of curves"),
    (json.dumps(CURVES | {"lines": [{"label": "a", "points": [{"x": "0", "value": 1}]}]}), "not a file of curves"),
    (json.dumps(CURVES | {"x": "steps"}), "not a file of curves"),
    (json.dumps({"cliff": 1}), "no report of scripts/sweep.py")])
def test_a_file_of_another_shape_is_refused(tmp_path, content, said):
    file = tmp_path / "c.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=said):
        read_curves(file)


def test_router_shares_are_drawn_layer_by_layer(results):
    shares = np.array([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    (results / "observation").mkdir(exist_ok=True)
    np.save(results / "observation" / "safety_moe.npy", shares)
    np.save(results / "observation" / "safety_other.npy", shares)
    (results / "outputs" / "moe" / "moe_config.json").write_text(json.dumps({"experts": ["help<ful", "safe"]}))
    page = Page(write(results, runs="base,tuned=moe"))
    assert "tuned on safety prompts" in section(page, "routers")
    assert "other" not in section(page, "routers")
    picture = page.named("svg", class_="heat")[0]
    assert "help<ful 0.58, safe 0.42" in picture[1]["aria-label"]
    cells = [element for element in page.named("rect") if "fill-opacity" in element[1]]
    strengths = [0.05 + 0.95 * share for share in shares.T.ravel()]
    assert [float(cell[1]["fill-opacity"]) for cell in cells] == pytest.approx(strengths, abs=0.006)
    assert cells[3][2] == "0, safe: 0.750"


def test_masks_are_drawn_by_module_and_layer(results):
    folder = results / "masks" / "seeds"
    folder.mkdir(parents=True)
    grid = {"q_proj": {"0": {"kept": 0.5, "entropy": 1.0}, "10": {"kept": 0.9, "entropy": 0.2}}, "v_proj": {
        "2": {"kept": 0.1, "entropy": 0.3}}}
    facts = {"grid": grid, "whole": {"kept": 0.5, "entropy": 0.5}}
    (folder / "masks.json").write_text(json.dumps({"masks": {"mask_a": facts}}))
    page = Page(write(results, runs="base,mix"))
    text = section(page, "masks")
    assert "mask_a: share kept" in text
    titles = [element[2] for element in page.named("title")[1:]]
    assert titles[:3] == ["0, q_proj: 0.500", "10, q_proj: 0.900", "2, v_proj: 0.100"]
    # somebody else's file under that name draws nothing and stops nothing
    (folder / "masks.json").write_text('{"masks": {"mask_a": {"grid": 3}}}')
    assert section(Page(write(results, runs="base,mix")), "masks") is None


def test_damaged_files_draw_nothing_and_stop_nothing(tmp_path):
    fill(tmp_path, n=10)
    (tmp_path / "observation").mkdir()
    (tmp_path / "observation" / "safety_moe.npy").write_bytes(b"no array")
    np.save(tmp_path / "observation" / "truth_moe.npy", np.array(["a", "b"]))
    (tmp_path / "outputs" / "later").mkdir()
    (tmp_path / "outputs" / "moe" / "manifest.json").write_text(json.dumps({
        "command_line": [1, None], "parents": [{}, 3], "seconds": "fast", "metrics": [], "packages": {"torch": {}},
        "inputs": 5}))
    answers = tmp_path / "inference" / "safety" / "test" / "cross_moe" / "outputs_final.jsonl"
    lines = answers.read_text().splitlines()
    rows = [{"id": f"safety-{i}", "prompt": ["a", 1], "output": "half \ud800 pair", "category": {"a": 1}} for i in range(10)]
    answers.write_text("\n".join([*map(json.dumps, rows), lines[0][:20], "[]", '{"id": 1}', "x" * 10]))
    page = Page(write(tmp_path, "--answers", "20", runs="raw,moe,not yet=later"))
    assert section(page, "routers") is None
    assert "half ? pair" in section(page, "answers")
    parts = page.data("page")["runs"]
    assert [parts[0][0]["kind"], parts[2][0].get("kind")] == ["base", "other"]
    assert parts[1][0]["make"] == ["python 1 None"]
    assert "seconds" not in parts[1][0]


def test_a_run_whose_parents_go_in_a_circle_ends(results):
    train(results, "one", ["align_basemodel.py"], parents=["outputs/two"])
    train(results, "two", ["inference.py"], parents=["outputs/one"])
    page = Page(write(results, runs="base,one,mix"))
    assert page.data("page")["runs"][1][0]["make"] == ["python inference.py", "python align_basemodel.py"]


def test_elements_escape_what_is_not_theirs():
    assert tag("a", "<b>", tag("i", "x & y"), None, [1, "'"], title='"', data_x=None, hidden=True, class_="k") == \
        '<a title="&quot;" hidden class="k">&lt;b&gt;<i>x &amp; y</i>1&#x27;</a>'
    block = data_block("d", {"</script><!--": "\u2028&"})
    assert block.count("<") == 2
    assert json.loads(Page(block).named("script")[0][2]) == {"</script><!--": "\u2028&"}
    assert words(r"a \| b\\c \[x\](y)") == r"a | b\c [x](y)"


def test_ticks_are_round():
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(-3.2, 83.2) == [0.0, 20.0, 40.0, 60.0, 80.0]
