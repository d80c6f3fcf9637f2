"""Papers' tables as arms and cells: every command parses, published numbers come from their file alone, errors say what."""

from __future__ import annotations

import json
import math
import os
import re
from functools import cache

import pytest
import yaml

import config
import flags
from errors import UserError
from evaluator import paper_table
from evaluator.reporting import beside
from evaluator.reporting.html.paper_page import paper_page
from evaluator.reporting.published_numbers import published
from workflow import commands, estimate, leaderboard, paper_arms, paper_tables, plan

PAGE = (config.ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
WAYS = [(paper, track) for paper in paper_arms.papers() for track in paper_arms.tracks(paper)]
numbers = cache(published)


@cache
def way_of(paper, track):
    return paper_arms.read(paper, track, all_files=True)


def args_of(*words):
    return config.parse(flags.PaperTablesArgs, words).args


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-that-asks-nobody")


@pytest.mark.parametrize(("paper", "track"), WAYS)
def test_every_table_plans_and_every_command_parses(paper, track, key, tmp_path):
    """On the embedded default and on each published preset: steps in order, results under the folders that cells read."""
    way = way_of(paper, track)
    known = numbers(paper).tables
    assert list(known) == [name for name in way.tables if name in known]
    scored = way.scored(list(way.tables))
    steps = plan.steps(way.table, list(scored), (42,), tmp_path, preset=way.preset, scored=scored)
    made = set()
    for step in steps:
        assert set(step.needs) <= made, step.name
        made.add(step.makes)
        parsed = commands.parse(step.words)
        assert parsed.preset == way.preset
        if step.words[0] == "align_basemodel.py":
            assert step.makes == parsed.args.results / "outputs" / parsed.args.name / "manifest.json"
        elif step.words[0].startswith("models/"):
            assert step.makes == parsed.args.results / "outputs" / parsed.args.run_name / "manifest.json"
    assert len(made) == len(steps)
    for cell in way.cells(list(way.tables)):
        arm, endpoint = way.table.arms[cell.arm], way.table.endpoints[cell.measure.endpoint]
        assert tmp_path / "seed_42" / endpoint.makes.format(run=arm.run, folder=arm.folder) in made
    # a cell is made or says why not
    assert all(cell.why or cell.measure for table in way.tables.values() for row in table.rows.values()
               for cell in row.values())
    # docs/reproduce.md tells what all of it takes
    steps, _ = estimate.of_base(steps, args_of("--paper", paper), plan.base_of(way.preset))
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{paper}` | `{track}` |"))
    hours, card, disk = (re.match(r"[\d.]*", cell.strip())[0] for cell in row.split("|")[3:6])
    lanes = leaderboard.lanes_of(steps)
    assert float(hours) == pytest.approx(sum(step.seconds for step in steps) / 3600 / lanes, rel=0.1, abs=0.06)
    assert float(card or 0) == pytest.approx(max(step.gpu_gb for step in steps), rel=0.05)
    assert float(disk) == pytest.approx(sum(step.disk_mb for step in steps) / 1024, rel=0.1, abs=0.06)


@pytest.mark.parametrize(("paper", "track"), WAYS)
def test_rows_and_columns_are_the_published_ones(paper, track):
    for name, theirs in numbers(paper).tables.items():
        ours = way_of(paper, track).tables[name]
        assert [row for row in ours.rows if row in theirs.rows] == list(theirs.rows)
        assert ours.columns[:len(theirs.columns)] == theirs.columns
        assert ours.keys == theirs.keys


def test_published_cells_come_from_their_file_alone(monkeypatch, tmp_path):
    """No score at all: our half is empty with a reason, theirs is the file's, and a table it lacks has none."""
    # read and checked once each, not once a table
    monkeypatch.setattr(beside, "published", numbers)
    for paper, track in WAYS:
        way = way_of(paper, track)
        for name in way.tables:
            args = args_of("--paper", paper, "--output_dir", str(tmp_path))
            spec = paper_tables.spec(args, way, name, list(way.table.arms), tmp_path)
            assert not any("published" in cell for row in spec["rows"] for cell in row["cells"].values())
            table = beside.table(spec, {})
            theirs = numbers(paper).tables.get(name)
            for key, cells in table.rows.items():
                for column, (own, their) in cells.items():
                    assert own.value is None
                    assert own.why
                    assert their == (theirs.rows.get(key, {}).get(column) if theirs else None)
            assert table.theirs == (theirs.columns if theirs else ())
            assert ("no numbers of" in " ".join(table.notes)) == (theirs is None)


def put(root, run, command, scores, rows):
    """A score file, its rows and its line of the registry, as an evaluator leaves them."""
    import manifest

    folder = root / "scores" / f"cross_{run}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{command}.rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = {"kind": "score", "run": run, "sub": f"cross_{run}", "command": command, "split": "test", "seed": 42,
            "scores": scores, "rows_sha256": manifest.sha256(path), "inputs": {}, "details": {}}
    manifest.register(root, line)


def spec_of(cells, **more):
    return {"paper": "lora_fusion", "table": "lambda_sweep", "title": "a | title", "keys": ["safety_weight"],
            "columns": ["mmlu", "harmfulness_rate", "gpt4_score"], "notes": ["In miniature."],
            "rows": [{"key": [name], "cells": one} for name, one in cells.items()]} | more


def test_scaled_turned_and_by_category(tmp_path):
    rows = [{"set": "mmlu_probe", "id": str(i), "category": "ab"[i % 2], "prompt_hash": f"h{i}",
             "values": {"mmlu_probe": int(i < 3)}} for i in range(4)]
    score = {"value": 0.75, "low": 0.3, "high": 0.95, "n": 4, "definition": "share right", "higher_is_better": True}
    put(tmp_path, "identity", "evaluate_utility.mmlu_probe", {"mmlu_probe": score}, rows)
    cell = {"run": "identity", "score": "mmlu_probe", "category": "", "scale": 1, "offset": 0, "title": "probe ↑", "why": ""}
    spec = spec_of({"0": {"mmlu": cell, "harmfulness_rate": cell | {"scale": -100, "offset": 100},
                          "gpt4_score": cell | {"category": "b"}},
                    "0.1": {"mmlu": cell | {"run": "nobody"}, "harmfulness_rate": {"why": "no data"},
                            "gpt4_score": cell | {"category": "none such"}}})
    args = config.parse(flags.PaperTableArgs, ["--spec", "x", "--roots", str(tmp_path)]).args
    table = paper_table.gather(spec, args)
    first, second = table.rows[("0",)], table.rows[("0.1",)]
    own, their = first["mmlu"]
    assert (own.value, own.low, own.high, own.n) == (0.75, 0.3, 0.95, 4)
    assert (their.value, their.mark) == (0.421, "unverified")
    turned = first["harmfulness_rate"][0]
    assert [turned.value, turned.low, turned.high] == pytest.approx([25, 5, 70])
    # rows 1 and 3 of category b: one of two is right
    assert (first["gpt4_score"][0].value, first["gpt4_score"][0].n) == (0.5, 2)
    assert second["mmlu"][0].why == "not scored"
    assert second["harmfulness_rate"][0].why == "no data"
    assert second["gpt4_score"][0].why == "no prompt of the category none such"
    # two seeds, one of them not scored: no mean over the other alone
    (tmp_path / "other").mkdir()
    both = config.parse(flags.PaperTableArgs, ["--spec", "x", "--roots", f"{tmp_path},{tmp_path / 'other'}"]).args
    assert paper_table.gather(spec, both).rows[("0",)]["mmlu"][0].why == "scored with 1 of 2 seeds"
    page, data = beside.markdown(table), json.loads(beside.json_text(table))
    assert "| 0 | 0.750 [0.300, 0.950] | 0.421 [unverified] |" in page
    assert "- Mark unverified: digitised" in page
    assert "mmlu: not scored; harmfulness_rate: no data" in page
    assert data["rows"][1]["cells"]["mmlu"]["ours"]["value"] is None
    assert data["rows"][1]["cells"]["harmfulness_rate"]["published"] == {"value": None, "mark": ""}
    assert math.isnan(second["mmlu"][0].low)
    html = paper_page(table)
    assert "<h1>a | title</h1>" in html
    assert "default-src &#x27;none&#x27;" in html or "default-src 'none'" in html
    assert "<script" not in html
    assert r"\toprule" in beside.latex(table)
    paths = paper_table.write(table, tmp_path / "report" / "t", args.formats)
    assert [path.name for path in paths] == ["t.md", "t.csv", "t.tex", "t.html", "t.json"]


def test_tables_are_listed_and_wrong_ones_refused(capsys):
    for words in ([], ["--table", "help"]):
        paper_tables.main(["--paper", "somf", *words])
        shown = capsys.readouterr().out
        assert "  3  safety_catqa: safety after one task, CATQA" in shown
        # what is made is counted, and what is not says why
        assert "15 of 50 cells made here: 25 empty: of another track: --track somf_tinyllama; 5 empty: no rows" in shown
        assert "tracks: somf, somf_wizardlm (--preset somf_wizardlm), somf_tinyllama (--preset somf_tinyllama)" in shown
        assert "numbers of this list (they are not the paper's)" in shown
    way = paper_arms.read("somf", "somf")
    assert paper_tables.chosen(way, ["3", "aligned_models"]) == ["aligned_models", "safety_catqa"]
    assert paper_tables.chosen(way, ["all"]) == list(way.tables)
    with pytest.raises(UserError, match=r"--table safety_catq: no such table \(did you mean safety_catqa\?\); there: 1 al"):
        paper_tables.chosen(way, ["safety_catq"])
    with pytest.raises(UserError, match="--table 99: no such table"):
        paper_tables.chosen(way, ["99"])


@pytest.mark.parametrize(("words", "says"), [
    ([], "--paper: name one; allowed: h3fusion"),
    (["--paper", "smf"], "--paper smf: not known (did you mean somf?)"),
    (["--paper", "somf", "--preset", "h3fusion", "--table", "1"], "is no preset of somf's tables; allowed: somf"),
    (["--paper", "somf", "--track", "peft", "--table", "1"], "no such track of somf; allowed: somf, somf_wizardlm"),
    (["--paper", "somf", "--seeds", "1,1"], "--seeds 1,1: the same seed twice"),
    (["--paper", "somf", "--table", "1", "--only", "mask_ties"], "--only mask_ties: no cell of aligned_models is of it;"),
    (["--paper", "somf", "--table", "1", "--only", "alined"], "--only alined: no such arm (did you mean aligned?)"),
    (["--paper", "lora_fusion", "--preset", "lora_fusion", "--table", "1", "--files", "aoe=x"],
     "--files aoe: no file of this track (did you mean aoa?)"),
    (["--paper", "lora_fusion", "--preset", "lora_fusion", "--table", "1", "--files", "aoa=no/such.json"],
     "--files aoa=no/such.json: no such file; give the AOA task set"),
    (["--paper", "somf", "--table", "1", "--used_share", "2"], "--used_share 2.0: a share of the peak"),
])
def test_errors(words, says, capsys):
    with pytest.raises(SystemExit) as left:
        paper_tables.main([*words, "--dry_run"])
    assert left.value.code == 2
    assert says in capsys.readouterr().err


def test_without_files_and_keys_cells_say_so(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    way = paper_arms.read("lora_fusion", "lora_fusion")
    cells = way.tables["lambda_sweep"].rows[("0.4",)]
    # all that is missing at once
    assert cells["mmlu"].why.startswith("needs a file of yours: --files aoa=FILE")
    assert "--files aoa_safety=FILE" in cells["mmlu"].why
    assert way.tables["lambda_sweep"].rows[("base model",)]["mmlu"].measure.score == "mmlu"
    files = {}
    for name in ("aoa", "aoa_safety", "hex_phi", "xstest", "gsm8k"):
        files[name] = str(tmp_path / name)
        (tmp_path / name).write_text("x")
    cells = paper_arms.read("lora_fusion", "lora_fusion", files).tables["lambda_sweep"].rows[("0.4",)]
    assert not cells["mmlu"].why
    assert cells["gpt4_score"].why == "its judge needs a key: export OPENAI_API_KEY"


def test_without_the_helpful_rows_what_is_made_of_them_says_so(monkeypatch, tmp_path):
    """H3Fusion's helpful rows are not shipped: nothing that needs them is begun, however far down."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-that-asks-nobody")
    way = paper_arms.read("h3fusion", "h3fusion")
    rows = way.tables["models"].rows
    for row in ("helpful expert", "naive mix", "plain average", "raw MoE", "H3Fusion, λ 0.01"):
        assert rows[(row,)]["harm"].why.startswith("needs a file of yours: --files alpaca=FILE (the helpful rows"), row
    for row in ("base", "harmless expert", "honest expert"):
        assert not rows[(row,)]["harm"].why, row
    (tmp_path / "mine.json").write_text("[]")
    way = paper_arms.read("h3fusion", "h3fusion", {"alpaca": "mine.json"})
    scored = way.scored(["models"])
    words = {step.name: step.words for step in plan.steps(way.table, list(scored), (42,), tmp_path, preset=way.preset,
                                                          scored=scored)}
    assert "mine.json" in words["s42_helpfulness"]
    assert any(word.startswith("helpfulness=mine.json,safety=") for word in words["s42_gate_00100"])


@pytest.mark.parametrize(("paper", "track"), [way for way in WAYS if way[1] != next(iter(paper_arms.tracks(way[0])))])
def test_what_comes_from_the_hub_is_told(paper, track, key, tmp_path):
    """Base, judges, rows and prompts of a published track, as its commands name them."""
    from data.sets.protocols import table
    from data.sets.published import PUBLISHED

    way = way_of(paper, track)
    told = " ".join(way.hub)
    scored = way.scored(list(way.tables))
    named = {plan.base_of(way.preset)}
    for step in plan.steps(way.table, list(scored), (42,), tmp_path, preset=way.preset, scored=scored):
        args = commands.parse(step.words).args
        named |= {model for _, model in getattr(args, "named_judges", ()) if "/" in model}
        if isinstance(args, flags.InferenceArgs) and args.data_source == "published" and not args.data_path:
            named.add(str(table()[args.task_name].hub).partition(":")[0])
        elif isinstance(args, flags.AlignArgs):
            places = [one.rpartition("=")[2] for one in (args.data_path or "").split(",")]
            if places == [""]:
                places = [PUBLISHED[name, "train"] for name in getattr(args, "task_names", ()) or (args.task_name,)
                          if args.data_source == "published" and (name, "train") in PUBLISHED]
            named |= {place.partition(":")[0] for place in places if place.count("/") == 1 and not place.endswith("json")}
    assert not [name for name in named if name not in told]


def test_another_judge_takes_the_papers_place(monkeypatch, capsys, tmp_path):
    """Its model and address go to the commands; one on this machine needs no key; alpaca_eval keeps its own."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    local = ("mine", "http://127.0.0.1:8000/v1")
    way = paper_arms.read("somf", "somf_wizardlm", judge=local)
    assert way.table.endpoints["ps_catqa"].run.endswith(" --judge_model mine --judge_base_url http://127.0.0.1:8000/v1")
    assert not way.tables["safety_catqa"].rows[("PEFT", "SFT")]["zh"].why
    assert paper_arms.read("h3fusion", "h3fusion", judge=local).keys == {"win_rate": "OPENAI_API_KEY"}
    args = args_of("--paper", "somf", "--table", "3", "--judge_model", "mine")
    made = paper_tables.spec(args, way, "safety_catqa", [], tmp_path)
    assert made["notes"][-1] == "API judge of safety: mine, in place of the paper's."


def test_a_table_of_published_numbers_alone_says_so(capsys, tmp_path):
    with pytest.raises(SystemExit):
        paper_tables.main(["--paper", "lora_fusion", "--table", "qi_scores", "--dry_run", "--output_dir", str(tmp_path)])
    assert "plan: 1 table, 0 models, 1 seed, nothing to run: the published numbers alone\n" in capsys.readouterr().out


def test_files_that_are_wrong_say_what(tmp_path):
    body = yaml.safe_load((paper_arms.FOLDER / "lora_fusion.yaml").read_text())
    body["tables"]["gsm8k"]["rows"][0]["arm"] = "mathz"
    body["tables"]["lambda_sweep"]["rows"][0]["key"] = ["no such row"]
    body["tracks"]["embedded"]["mesures"] = {}
    (tmp_path / "lora_fusion.yaml").write_text(yaml.safe_dump(body))
    with pytest.raises(UserError) as wrong:
        paper_arms.read("lora_fusion", "embedded", folder=tmp_path)
    text = " ".join(wrong.value.problems)
    assert "no arm 'mathz'" in text
    assert "row no such row: not in the published table" in text
    assert "mesures: unknown (did you mean measures?)" in text
    with pytest.raises(UserError, match="no such paper"):
        paper_arms.read("nothing", "x", folder=tmp_path)


def test_the_dry_run_at_7b_tells_hours_of_a_card(key, capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        paper_tables.main(["--paper", "h3fusion", "--table", "models", "--preset", "h3fusion", "--dry_run", "--output_dir",
                           str(tmp_path)])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "align_basemodel.py --moe_flag 0 --task_name helpfulness --data_path data/alpaca_small.json --seed 42" in shown
    assert "empty: no command of this repository makes ensembles of outputs" in shown
    assert "hours of one card" in shown
    assert "needs a file of yours: --files alpaca=FILE (the helpful rows" in shown
    assert "from the hub: meta-llama/Llama-2-7b-hf: 13.5 GB, gated" in shown
    assert "reckoned, not measured: meta-llama/Llama-2-7b-hf of 6.74e9 parameters" in shown
    assert "measured on the embedded default" not in shown
    assert "evaluator/paper_table.py --spec" in shown
    assert not list(tmp_path.iterdir())


def test_a_plan_needs_no_key_and_says_which_are_missing(monkeypatch, capsys, tmp_path):
    """Where results would be made, cells without their judge's key are empty; a plan shows every command all the same."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(SystemExit) as left:
        paper_tables.main(["--paper", "somf", "--table", "3", "--preset", "somf_wizardlm", "--only", "chinese", "--dry_run",
                           "--output_dir", str(tmp_path)])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "needs a key of a judge: export OPENAI_API_KEY" in shown
    assert "evaluator/evaluate_safety.py --task_name cross_chinese --harmful_task catqa" in shown
    assert "cross_english" not in shown
    # the base's answers are judged against: planned although no cell is the base's
    assert shown.index("--cross_task base ") < shown.index("--cross_task chinese ")
    assert "OPENAI_API_KEY" not in os.environ
