"""What lies in a results folder: every run once, its origin checked against the files, paired differences, no secret."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from reported import fill, hits, put

import config
import manifest
from evaluator import registry
from evaluator.statistics import paired_rates

TOKEN = "hf_" + "a1B2" * 6


@pytest.fixture
def results(tmp_path):
    """Two adapters, what was made of them, answers and scores; a run that is gone and a link."""
    folder = tmp_path / "results"

    def make(run, inputs=None, **settings):
        weights = f"weights of {run}".encode()
        with manifest.writing(folder / "outputs" / run, settings.pop("command", "align_basemodel"),
                              {"model_name_or_path": "embedded", "seed": 7, **settings}) as out:
            (out.folder / "adapter_model.safetensors").write_bytes(weights)
            (out.folder / "adapter_config.json").write_text("{}")
            out.inputs.update(inputs or {})
            out.parents += [str(folder / "outputs" / name) for name in inputs or {} if name != "base"]
        manifest.register(folder, {"kind": "run", "command": "align_basemodel", "run": run, "seed": 7})
        return manifest.sha256(folder / "outputs" / run / "adapter_model.safetensors")

    one = make("safety", method="sft", learning_rate=1e-3, training_arguments={"hub_token": TOKEN, "warmup_steps": 5})
    two = make("help|ful", method="dpo", learning_rate=1e-4)
    make("average", {"base": "v2-0", "safety": one, "help|ful": two}, command="fuse adapters", method="cat")
    answers = folder / "inference" / "safety" / "test" / "cross_safety"
    with manifest.writing(answers, "inference", {"model": one[:16], "run": "safety"}) as out:
        out.metrics["prompts"] = 100
    put(folder, "safety", refusal=hits(0.9), over=hits(0.4), seed=7)
    put(folder, "average", refusal=hits(0.6), over=hits(0.1), seed=7)
    put(folder, "base", refusal=hits(0.1), over=hits(0.0), seed=7)
    manifest.register(folder, {"kind": "run", "command": "merge", "run": "lost", "seed": 7})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (folder / "outputs" / "far").symlink_to(tmp_path / "elsewhere")
    return folder


def run(results, *words):
    registry.main([*words, "--output_dir", str(results)])


def as_json(results, capsys, *words):
    run(results, *words, "--format", "json")
    return json.loads(capsys.readouterr().out)


def test_list_has_every_run_once_with_its_kind(results, capsys):
    found = {row["run"]: row for row in as_json(results, capsys, "list")}
    assert {name: row["kind"] for name, row in found.items()} == {
        "safety": "adapter", "help|ful": "adapter", "average": "adapter", "base": "base", "lost": "gone",
        "far": "full model (link)"}
    assert found["safety"]["method"] == "align_basemodel sft"
    assert found["safety"]["scores"] == {"safe_refusal": 0.9, "overrefusal": 0.4, "balance": pytest.approx(0.5)}
    assert (found["average"]["base"], found["average"]["seed"]) == ("embedded", 7)
    run(results, "list")
    page = capsys.readouterr().out
    assert "| safety | adapter | align_basemodel sft | embedded |" in page
    assert "safe_refusal 0.900, overrefusal 0.400, balance 0.500 |" in page
    assert "| help\\|ful |" in page
    assert f"6 runs in {results}" in page


@pytest.mark.parametrize(("asked", "names"), [
    ("kind=adapter,method=*dpo", ["help|ful"]), ("run=*e*y", ["safety"]), ("seed=7,kind=gone", ["lost"]), ("base=no*", []),
])
def test_a_filter_lets_through_what_it_names(results, capsys, asked, names):
    assert [row["run"] for row in as_json(results, capsys, "list", "--filter", asked)] == names


def test_show_tells_the_origin_and_whether_the_files_are_still_those(results, capsys):
    found = as_json(results, capsys, "show", "average")
    origin = {item["name"]: item for item in found["made_from"]}
    assert {name: item["state"] for name, item in origin.items()} == {
        "base": "not a folder here, not checked", "safety": "matches", "help|ful": "matches"}
    assert found["weights"] == {"adapter_model.safetensors": manifest.sha256(
        results / "outputs" / "average" / "adapter_model.safetensors")}
    scores = {item["score"]: item for item in found["scores"]}
    assert scores["safe_refusal"]["value"] == 0.6
    assert scores["safe_refusal"]["low"] < 0.6 < scores["safe_refusal"]["high"]
    shown = as_json(results, capsys, "show", "safety")
    assert shown["answers"] == [{"task": "safety", "split": "test", "date": shown["answers"][0]["date"], "prompts": 100,
                                 "weights": "matches"}]
    # trained again after all of this
    (results / "outputs" / "safety" / "adapter_model.safetensors").write_bytes(b"other weights")
    origin = {item["name"]: item["state"] for item in as_json(results, capsys, "show", "average")["made_from"]}
    assert (origin["safety"], origin["help|ful"]) == ("changed", "matches")
    assert as_json(results, capsys, "show", "safety")["answers"][0]["weights"] == "changed: made with other weights"
    run(results, "show", "average")
    page = capsys.readouterr().out
    assert "- safety " in page
    assert ": changed, " in page


def test_show_compares_a_scores_rows_with_their_hash(results, capsys):
    rows = results / "scores" / "cross_average" / "evaluate_safety.rows.jsonl"
    newest = [row for row in manifest.registry(results) if row.get("run") == "average" and row["kind"] == "score"][-1]
    assert {item["rows"] for item in as_json(results, capsys, "show", "average")["scores"]} == {"not recorded"}
    manifest.register(results, {**newest, "rows_sha256": manifest.sha256(rows)})
    assert {item["rows"] for item in as_json(results, capsys, "show", "average")["scores"]} == {"matches"}
    rows.write_text(rows.read_text() + "\n")
    assert {item["rows"] for item in as_json(results, capsys, "show", "average")["scores"]} == {"changed"}
    rows.unlink()
    assert {item["rows"] for item in as_json(results, capsys, "show", "average")["scores"]} == {"gone"}


def test_compare_has_the_settings_that_differ_and_paired_differences(results, capsys):
    found = as_json(results, capsys, "compare", "safety", "average")
    assert found["settings"]["learning_rate"] == [1e-3, None]
    assert found["settings"]["method"] == ["sft", "cat"]
    assert "seed" not in found["settings"]
    refusal = next(item for item in found["differences"] if item["column"] == "refusal ↑")
    # 30 of 100 prompts are refused by the first alone
    low, high = paired_rates.tango(0, 30, 100)
    assert (refusal["value"], refusal["low"], refusal["high"]) == pytest.approx((-0.3, low, high))
    assert (refusal["row"], refusal["against"], refusal["verdict"]) == ("average", "safety", "worse")
    assert refusal["p_holm"] >= refusal["p"]
    run(results, "compare", "safety", "average")
    page = capsys.readouterr().out
    assert f"| -0.300 [{low:.3f}, {high:.3f}] | < 0.001 |" in page


def test_export_writes_every_score_in_every_format(results, capsys):
    run(results, "export", "--format", "csv,json,latex,md")
    folder = results / "report"
    frame = pd.read_csv(folder / "scores.csv")
    wide = frame.pivot_table(index="run", columns="score", values="value")
    assert wide.loc["safety", "safe_refusal"] == 0.9
    assert sorted(wide.index) == ["average", "base", "safety"]
    rows = {row["run"]: row for row in json.loads((folder / "scores.json").read_text())["rows"]}
    assert rows["average"]["cells"]["overrefusal"]["value"] == 0.1
    assert "\\begin{tabular}" in (folder / "scores.tex").read_text()
    assert "| safety | 0.900 [" in (folder / "scores.md").read_text()
    assert capsys.readouterr().out.count("written: ") == 4


def test_no_secret_is_shown(results, capsys):
    path = results / "outputs" / "safety" / "manifest.json"
    made = json.loads(path.read_text())
    made["command_line"] = ["align_basemodel.py", "--hub_token", "plain-secret", "--judge_api_key=plain-secret", "--seed",
                            "7", "--data_path", "https://user:plain-secret@host/rows.jsonl", TOKEN]
    path.write_text(json.dumps(made))
    for words in (["list"], ["show", "safety"], ["compare", "safety", "average"]):
        for more in ([], ["--format", "json"]):
            run(results, *words, *more)
            said = capsys.readouterr().out
            assert TOKEN not in said
            assert "plain-secret" not in said
    assert manifest.public({"max_new_tokens": 5, "judge_key_variable": "MY_KEY", "hub_token": "x", "note": "the key"}) == {
        "max_new_tokens": 5, "judge_key_variable": "MY_KEY", "hub_token": "[hidden]", "note": "the key"}
    assert manifest.public(["--hub_token", "x", "y"]) == ["--hub_token", "[hidden]", "y"]


def test_damaged_lines_are_told_with_their_number_and_left_out(results, capsys, caplog):
    before = len(as_json(results, capsys, "list"))
    count = (results / "registry.jsonl").read_text().count("\n")
    with (results / "registry.jsonl").open("ab") as file:
        file.write(b'{"kind": "score", "run": "x", "scores": {"a": 5}}\n[1, 2]\n{"cut\n\xff\xfe\n' + b"[" * 100_000 + b"\n")
    caplog.clear()
    for words in (["list"], ["show", "average"], ["compare", "safety", "average"], ["export"]):
        run(results, *words)
        for number, why in enumerate(("a score without its run, command or numbers", "no JSON object", "cut off", "cut off",
                                      "cut off"), count + 1):
            assert f"registry.jsonl, line {number}: {why}, left out" in caplog.text
    capsys.readouterr()
    assert len(as_json(results, capsys, "list")) == before


def test_a_strangers_name_is_text(results, capsys):
    manifest.register(results, {"kind": "run", "command": "\x1b[2Jmerge\r<img src=x>", "run": "a|b", "seed": 7})
    run(results, "list")
    page = capsys.readouterr().out
    assert "\x1b" not in page
    assert "| a\\|b | gone | [2Jmerge \\<img src=x> |" in page


@pytest.mark.parametrize("wrong", ["x", 3, [1], {"a": 1}, None, True, 1.5])
def test_a_manifest_of_another_tool_ends_no_command(tmp_path, capsys, wrong):
    (folder := tmp_path / "outputs" / "odd").mkdir(parents=True)
    names = ("config", "inputs", "metrics", "packages", "parents", "command_line", "command", "finished", "seed", "seconds",
             "status", "machine")
    (folder / "manifest.json").write_text(json.dumps(dict.fromkeys(names, wrong)))
    for words in (["list"], ["show", "odd"], ["show", "odd", "--format", "json"], ["list", "--format", "json"],
                  ["compare", "odd", "odd"]):
        registry.main([*words, "--output_dir", str(tmp_path)])
        assert "odd" in capsys.readouterr().out


def test_a_damaged_manifest_ends_no_list(results, capsys):
    (results / "outputs" / "safety" / "manifest.json").write_text("[")
    found = {row["run"]: row for row in as_json(results, capsys, "list")}
    assert found["safety"]["kind"] == "adapter"
    run(results, "show", "safety")
    assert "nothing says how it was made" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    ([], "no sub-command: needs one of list, show, compare, export first"),
    (["delete"], "delete: needs one of list"),
    (["show"], "show: takes 1 name of runs before the flags, not 0"),
    (["compare", "safety"], "compare: takes 2 names of runs before the flags, not 1"),
    (["show", "nobody"], "run 'nobody': not in"),
    (["show", "../outputs"], "run '../outputs': not in"),
    (["list", "--filter", "colour=red"], "--filter colour: needs KEY=TEXT, KEY one of run, kind"),
    (["export", "--filter", "run=lost"], "no run that is asked for has a score"),
    (["export", "--format", "xls"], "xls is no format"),
])
def test_errors(results, capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        registry.main([*words, *(["--output_dir", str(results)] if len(words) else [])])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_no_torch_is_loaded(results):
    code = ("import sys; from evaluator import registry\nfor words in (['list'], ['show', 'average'], "
            "['compare', 'safety', 'average'], ['export']):\n    registry.main([*words, '--output_dir', sys.argv[1]])\n"
            "assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code, str(results)], cwd=config.ROOT, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_as_a_module_from_the_root_and_its_help(results):
    fill(results)
    done = subprocess.run([sys.executable, "-m", "evaluator.registry", "list", "--output_dir", str(results)],
                          cwd=config.ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "| moe |" in done.stdout
    assert done.returncode == 0


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    for number in range(400):
        (tmp_path / "outputs" / f"run-{number:03d}-{'x' * 150}").mkdir(parents=True)
    command = [sys.executable, "-m", "evaluator.registry", "list", "--output_dir", str(tmp_path)]
    # more than a pipe holds, and nobody reads on
    process = subprocess.Popen(command, cwd=config.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
