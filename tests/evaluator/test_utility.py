"""evaluate_utility: benchmarks through lm-eval on small local files of our own, and probes, on pico models."""

from __future__ import annotations

import json

import pytest
from pico import make_adapter

import manifest
from data.records import Choice
from data.sets import probes
from data.sets.probes import Problem
from evaluator import evaluate_utility, report
from evaluator.scoring import code_sandbox, engine, harness
from evaluator.statistics import comparison

COPA = [{"premise": f"The dog number {i} sailed.", "choice1": "It took a boat.", "choice2": "It baked bread.",
         "question": "cause" if i % 2 else "effect", "idx": i, "label": i % 2} for i in range(6)]
GSM = [{"question": f"What is {i} and {i}?", "answer": f"Add them.\n#### {2 * i}"} for i in range(8)]
CODE = [{"task_id": f"X/{i}", "prompt": "def add(a, b):\n", "entry_point": "add", "canonical_solution": "    return a + b\n",
         "test": "def check(f):\n    assert f(1, 2) == 3\n"} for i in range(3)]


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    (folder / "gsm8k").mkdir(parents=True)
    (folder / "mmlu").mkdir()
    (folder / "copa").mkdir()
    lines = {"copa.jsonl": COPA, "copa/train.jsonl": COPA, "gsm8k/train.jsonl": GSM, "gsm8k/test.jsonl": GSM[:4],
             "mmlu/dev.jsonl": [], "mmlu/test.jsonl": []}
    for subject in ("anatomy", "virology"):
        for split, n in (("dev", 5), ("test", 3)):
            lines[f"mmlu/{split}.jsonl"] += [{"question": f"{subject} {i}?", "choices": ["a", "b", "c", "d"],
                                              "answer": i % 4, "subject": subject} for i in range(n)]
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def small_probes(monkeypatch):
    """Probes of made-up rows, nothing fetched."""
    def rows(name, limit=-1):
        if probes.PROBES[name].kind == "number":
            return [Problem(f"How many are {i} and {i}?", str(2 * i), f"p{i}") for i in range(4)]
        return [Choice(f"Which is {i}?", ("this", "that one", "none"), (0, 1, 0), 1, f"{name}-{i}") for i in range(6)]
    monkeypatch.setattr(probes, "rows", rows)


@pytest.fixture
def run(pico, tmp_path):
    def call(*words, folder="raw", results=None):
        results = results or tmp_path / "results"
        evaluate_utility.main(["--task_name", folder, "--output_dir", str(results), "--model_name_or_path", str(pico),
                               "--dtype", "float32", "--device", "cpu", "--threads", "1", *map(str, words)])
        return results / "scores" / folder
    return call


def read(folder, name="copa"):
    path = folder / f"evaluate_utility.{name}.json"
    rows = [json.loads(line) for line in path.with_suffix(".rows.jsonl").read_text().splitlines()]
    return json.loads(path.read_text()), rows


def read_all(folder, *names):
    """Scores, details and rows of several tasks together."""
    scores, details, rows = {}, {}, []
    for name in names:
        found, lines = read(folder, name)
        assert set(found["scores"]) == {name}
        scores, details, rows = scores | found["scores"], details | found["utility"], rows + lines
    return {"scores": scores, "utility": details}, rows


def fails(run, capsys, *words, **options):
    with pytest.raises(SystemExit) as stop:
        run(*words, **options)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_local_benchmarks(run, data_dir, tmp_path):
    folder = run("--tasks", "copa,mmlu,gsm8k", "--data_dir", data_dir, "--num_fewshot", 1)
    found, rows = read_all(folder, "copa", "mmlu", "gsm8k")
    assert [found["scores"][name]["n"] for name in ("copa", "mmlu", "gsm8k")] == [6, 6, 4]
    for name, score in found["scores"].items():
        mine = [row["values"][name] for row in rows if row["set"] == name]
        assert score["value"] == pytest.approx(sum(mine) / len(mine))
        assert score["low"] <= score["value"] <= score["high"]
        assert "lm-eval 0." in score["definition"]
    assert "filter strict-match" in found["scores"]["gsm8k"]["definition"]
    assert set(found["utility"]["gsm8k"]["other_filters"]) == {"flexible-extract"}
    assert {row["category"] for row in rows if row["set"] == "mmlu"} == {"mmlu_anatomy", "mmlu_virology"}
    # by hand: the better of both answers is the one that lm-eval counts
    for row in rows:
        if row["set"] == "copa":
            i = int(row["id"].removeprefix("copa-"))
            assert row["values"]["copa"] == int((row["logprobs"][1] > row["logprobs"][0]) == (COPA[i]["label"] == 1))
    assert [row["command"] for row in manifest.registry(tmp_path / "results")] == [
        "evaluate_utility.copa", "evaluate_utility.mmlu", "evaluate_utility.gsm8k"]


def test_rows_drawn_by_hash_and_found_again(run, data_dir, caplog):
    caplog.set_level("INFO")
    words = ("--tasks", "copa", "--data_dir", data_dir, "--num_samples", 3)
    _, rows = read(run(*words))
    run(*words)
    assert "already scored" in caplog.text
    assert len(rows) == 3
    (data_dir / "copa.jsonl").write_text("".join(json.dumps({**row, "label": 0}) + "\n" for row in COPA))
    _, again = read(run(*words))
    assert again != rows


def test_no_data_and_no_hub_is_said_before_a_model_is_loaded(run, capsys, monkeypatch):
    monkeypatch.setattr("evaluator.scoring.engine.load", lambda *_: pytest.fail("a model was loaded"))
    said = fails(run, capsys, "--tasks", "copa,gsm8k")
    assert "copa/validation.parquet" in said
    assert "gsm8k/test.parquet (scored) and gsm8k/train.parquet (examples)" in said
    assert "--tasks probes" in said


def test_bad_local_files_are_explained(run, data_dir, capsys, tmp_path):
    (data_dir / "copa.jsonl").write_text(json.dumps({"premise": "x"}) + "\n")
    (data_dir / "gsm8k" / "train.jsonl").unlink()
    said = fails(run, capsys, "--tasks", "copa,gsm8k", "--data_dir", data_dir)
    assert "missing: choice1, choice2, question, label" in said
    assert "train.(jsonl|json|parquet) (examples)" in said
    assert "no such folder" in fails(run, capsys, "--tasks", "copa", "--data_dir", tmp_path / "nowhere")


def test_flags_are_checked_together(run, capsys):
    said = fails(run, capsys, "--tasks", "cop,humaneval")
    assert "did you mean copa?" in said
    assert "--allow_code_execution" in said


@pytest.fixture
def answers(data_dir, monkeypatch):
    """Let the model answer every prompt of HumanEval with one body."""
    (data_dir / "humaneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CODE))
    wrapped = harness.wrapped

    def all_say(body):
        def planted(loaded, batch_size):
            lm = wrapped(loaded, batch_size)
            lm.generate_until = lambda requests, **_: [body] * len(requests)
            return lm
        monkeypatch.setattr(harness, "wrapped", planted)
    return all_say


def humaneval(data_dir, *words):
    return ("--tasks", "humaneval", "--data_dir", data_dir, "--allow_code_execution", "--code_seconds", 1,
            "--num_samples", 2, *words)


@pytest.mark.parametrize(("body", "passes"), [("    return a + b\n", 1), ("    return a - b\n", 0),
                                              ("    while True: pass\n", 0), ("    import os; os._exit(0)\n", 0)])
@pytest.mark.parametrize("unsafe", ["no", "yes"])
def test_humaneval_runs_the_code_in_its_sandbox(run, data_dir, answers, body, passes, unsafe):
    if unsafe == "no" and (lack := code_sandbox.missing()):
        pytest.skip(f"not confined here, and refused: {lack}")
    answers(body)
    found, rows = read(run(*humaneval(data_dir, "--unsafe_code", unsafe)), "humaneval")
    assert found["scores"]["humaneval"]["value"] == passes
    assert "pass_at_1" in found["scores"]["humaneval"]["definition"]
    assert ("without confinement" in found["scores"]["humaneval"]["definition"]) == (unsafe == "yes")
    assert found["utility"]["humaneval"]["confined"] == (unsafe == "no")
    assert [row["output"] for row in rows] == [body, body]


def test_unsafe_code_makes_scores_of_its_own_and_no_other_task_anew(run, data_dir, answers, capsys):
    answers("    return a + b\n")
    folder = run(*humaneval(data_dir, "--unsafe_code", "yes", "--tasks", "humaneval,copa"))
    code, copa = (json.loads((folder / f"evaluate_utility.{name}.json").read_text()) for name in ("humaneval", "copa"))
    assert code["config"]["unsafe_code"] == "yes"
    assert "tests in a process of their own" in code["inputs"]["humaneval"]
    # as score files of before the flag have it
    assert "unsafe_code" not in copa["config"]


def test_humaneval_is_refused_where_nothing_confines_the_code(run, data_dir, capsys, monkeypatch):
    if not code_sandbox.missing():
        monkeypatch.setattr(code_sandbox, "missing", lambda: "namespaces (unshare): Operation not permitted")
    said = fails(run, capsys, *humaneval(data_dir))
    assert "does not confine the code that the model wrote (" in said
    assert "user namespaces" in said
    assert "--unsafe_code yes" in said


def test_probes_have_a_file_and_a_label_of_their_own(run, small_probes):
    folder = run("--tasks", "probes", "--max_new_tokens", 4)
    names = {path.name.split(".")[1] for path in folder.glob("evaluate_utility*.json")}
    assert names == {"mmlu_probe", "openbookqa_probe", "commonsenseqa_probe", "piqa_probe", "asdiv_probe"}
    found, rows = read_all(folder, *names)
    for name, score in found["scores"].items():
        assert name.endswith("_probe")
        assert "not the benchmark's score" in score["definition"]
    numbers = [row for row in rows if row["set"] == "asdiv_probe"]
    assert [row["wanted"] for row in numbers] == ["0", "2", "4", "6"]
    assert all(row["values"]["asdiv_probe"] == (row["read"] == row["wanted"]) for row in numbers)
    for row in rows:
        if "logprobs" in row:
            assert len(row["logprobs"]) == 3
    # chance beside every likelihood score, and beside no score of written answers
    chance = {name: json.loads((folder / f"evaluate_utility.{name}.json").read_text()).get("baselines") for name in names}
    assert chance.pop("asdiv_probe") is None
    assert all(kept == {"chance": {name: pytest.approx(1 / 3)}} for name, kept in chance.items())


def test_an_adapter_changes_the_scores_and_says_how_much(run, data_dir, adapters):
    words = ("--tasks", "copa", "--data_dir", data_dir)
    base, first = read(run(*words, results=adapters))
    tuned, second = read(run(*words, folder="cross_safety", results=adapters))
    assert "logit_change" not in base["utility"]
    assert tuned["utility"]["logit_change"] > 0.01
    assert [row["logprobs"] for row in first] != [row["logprobs"] for row in second]


def test_an_adapter_that_does_nothing_is_an_error(run, data_dir, pico, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    folder = make_adapter(pico, tmp_path / "results" / "outputs" / "idle")
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v * 0 if "lora_B" in k else v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    said = fails(run, capsys, "--tasks", "copa", "--data_dir", data_dir, folder="cross_idle")
    assert "changes no logit of the base model" in said


def test_a_fused_moe_goes_through_lm_eval(run, data_dir, pico, adapters):
    from models.llama_moe import main

    main(["--model_name_or_path", str(pico), "--output_dir", str(adapters), "--dtype", "float32", "--router_init", "random"])
    found, _ = read(run("--tasks", "copa,gsm8k", "--num_fewshot", 0, "--data_dir", data_dir, folder="cross_raw_moe",
                        results=adapters))
    assert found["scores"]["copa"]["n"] == 6
    assert found["utility"]["logit_change"] > 0


def counted(monkeypatch):
    """How often a model is loaded."""
    loads, real = [], engine.load
    monkeypatch.setattr(engine, "load", lambda *words: loads.append(1) or real(*words))
    return loads


def test_another_choice_of_tasks_overwrites_nothing_and_every_task_resumes_by_itself(run, data_dir, tmp_path, monkeypatch):
    loads, words = counted(monkeypatch), ("--data_dir", data_dir, "--num_fewshot", 1)
    folder = run("--tasks", "copa", *words)
    copa = read(folder, "copa")
    run("--tasks", "gsm8k", *words)
    assert read(folder, "copa") == copa
    assert len(loads) == 2
    # a flag of gsm8k alone, and two tasks of which one is there already
    run("--tasks", "copa,gsm8k,mmlu", *words, "--gsm8k_filter", "flexible-extract")
    assert read(folder, "copa") == copa
    assert read(folder, "gsm8k")[0]["utility"]["gsm8k"]["filter"] == "flexible-extract"
    # one model for both tasks that were left
    assert len(loads) == 3
    run("--tasks", "copa,mmlu", *words)
    assert len(loads) == 3
    commands = [row["command"] for row in manifest.registry(tmp_path / "results")]
    assert commands == [f"evaluate_utility.{name}" for name in ("copa", "gsm8k", "gsm8k", "mmlu")]
    found = comparison.measured(tmp_path / "results", "base")
    assert {name: score["n"] for name, score in found.scores.items()} == {"copa": 6, "gsm8k": 4, "mmlu": 6}


def test_fewer_rows_of_a_task_replace_the_older_ones(run, data_dir, tmp_path):
    run("--tasks", "copa", "--data_dir", data_dir)
    run("--tasks", "copa", "--data_dir", data_dir, "--num_samples", 3)
    found = comparison.measured(tmp_path / "results", "base")
    assert found.scores["copa"]["n"] == len(found.rows) == len(found.prompts) == 3


def test_a_killed_call_keeps_the_tasks_that_were_done(run, data_dir, monkeypatch):
    words, real = ("--tasks", "copa,mmlu", "--data_dir", data_dir, "--num_fewshot", 0), harness.run

    def cut(benchmark, *more):
        if benchmark.name == "mmlu":
            raise KeyboardInterrupt
        return real(benchmark, *more)

    monkeypatch.setattr(harness, "run", cut)
    with pytest.raises(KeyboardInterrupt):
        run(*words)
    done = []
    monkeypatch.setattr(harness, "run", lambda benchmark, *more: done.append(benchmark.name) or real(benchmark, *more))
    read_all(run(*words), "copa", "mmlu")
    assert done == ["mmlu"]


def test_a_mean_is_formed_for_rows_with_the_same_tasks_only(run, data_dir, tmp_path, adapters, capsys):
    words = ("--data_dir", data_dir, "--num_fewshot", 0)
    for folder, tasks in (("raw", "copa,mmlu"), ("cross_safety", "copa")):
        run("--tasks", tasks, *words, folder=folder, results=adapters)

    def write(runs):
        report.main(["--runs", runs, "--output_dir", str(adapters), "--name", "t"])
        text = (adapters / "report" / "t.md").read_text()
        summary = text.split("## Summary numbers")[1].split("\n## ")[0]
        return {line.split("|")[1].strip(): line.split("|")[2].strip() for line in summary.splitlines() if "|" in line}, text

    cells, text = write("base,safety")
    assert (cells["base"], cells["safety"]) == ("", "")
    assert "utility is left empty for base, safety: not the same tasks on the same rows. mmlu: n = 6, 0-shot" in text
    assert "not run (safety)" in text
    run("--tasks", "mmlu", *words, folder="cross_safety", results=adapters)
    cells, text = write("base,safety")
    assert cells["base"].startswith("0.")
    assert cells["safety"].startswith("0.")
    assert "left empty" not in text
    # other shots are another score
    run("--tasks", "mmlu", *words[:2], "--num_fewshot", 1, folder="cross_safety", results=adapters)
    cells, text = write("base,safety")
    assert (cells["base"], cells["safety"]) == ("", "")
    assert "1-shot" in text
    assert "copa:" not in text.split("left empty")[1].split("\n")[0]
    # and no row of it is paired with one that was asked without examples
    assert "safety and base on mmlu ↑ (6 of 6 rows)" in text
