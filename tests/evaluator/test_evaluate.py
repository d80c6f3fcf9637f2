"""Several models in one command: the scores of the single commands, no model's failure another's, all errors at once."""

import fnmatch
import json
import shlex
import shutil

import pytest
from pico import make_pico

import config
import inference
import models.runs
from evaluator import (
    evaluate,
    evaluate_helpfulness,
    evaluate_refusal,
    evaluate_safety,
    evaluate_truth_and_info,
    evaluate_utility,
    report,
)
from evaluator.judges import fitted, keyword
from evaluator.scoring import suites
from evaluator.scoring.named_models import Model
from evaluator.statistics.axes import AXES, DISCRIMINATION
from flags import InferenceArgs, ReportArgs
from flags.base import PROTOCOLS
from flags.evaluate_models import SUITE_NAMES, EvaluateModelsArgs

COMMANDS = {f"evaluator/{module.__name__.rpartition('.')[2]}.py": module for module in (
    evaluate_safety, evaluate_refusal, evaluate_helpfulness, evaluate_truth_and_info, evaluate_utility, report)}
COMMANDS["inference.py"] = inference
SCORED = ("--num_samples", "5", "--dtype", "float32", "--device", "cpu")
SMALL = (*SCORED, "--max_new_tokens", "6", "--batch_size", "8")


@pytest.fixture
def folders(tmp_path, make_adapter):
    """Two whole models of one last name, and an adapter of the first."""
    first, second = (make_pico(tmp_path / where / "model", seed=seed) for where, seed in (("a", 1), ("b", 2)))
    return first, second, make_adapter(first, tmp_path / "adapted", seed=3)


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Steps run inside this process, with a judge that needs no data; returns their command lines."""
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: fitted.HarmJudge(
        lambda rows: [0.1 + 0.8 * (len(row) % 2) for row in rows],
        {"auc": 0.7, "auc_rated": 0.7, "missed": 0.2, "false_alarms": 0.2, "protocol": "made up"}))
    monkeypatch.setattr(fitted, "version", lambda seed: "made up")
    monkeypatch.setattr(keyword, "keyword_error", dict)
    done = []

    def execute(words):
        done.append(words)
        try:
            COMMANDS[words[0]].main(list(words[1:]))
        except SystemExit as error:
            return int(error.code), "a user's error"
        except RuntimeError as error:
            return 1, str(error)
        return 0, ""

    monkeypatch.setattr(evaluate, "execute", execute)
    return done


def run(tmp_path, named, *more, suite="safety"):
    evaluate.main(["--models", named, "--suite", suite, "--output_dir", str(tmp_path / "results"), *SMALL, *more])
    return tmp_path / "results"


def answers(results, task, sub):
    lines = (results / "inference" / task / "test" / sub / "outputs_final.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def scores(results, sub, command="evaluate_safety"):
    content = json.loads((results / "scores" / sub / f"{command}.json").read_text())
    rows = (results / "scores" / sub / f"{command}.rows.jsonl").read_text()
    return content["scores"], rows


def places(results):
    return sorted(entry.name for entry in (results / "outputs").iterdir())


def test_a_folders_scores_are_those_of_the_single_commands(tmp_path, folders, capsys):
    first, second, adapter = folders
    results = run(tmp_path, f"mine={first},{second},adapted={adapter}", "--lite", suite="safety,help")
    alone = tmp_path / "alone"
    shutil.copytree(adapter, alone / "outputs" / "x")
    where = ["--model_name_or_path", str(first), "--output_dir", str(alone)]
    for which, sub in ((["--aligned_flag", "0"], "raw"), (["--cross_task", "x"], "cross_x")):
        for task in ("safety", "overrefusal"):
            inference.main(["--task_name", task, *which, *where, *SMALL])
        evaluate_safety.main(["--task_name", sub, *where, *SCORED, "--lite"])
        evaluate_helpfulness.main(["--task_name", sub, *where, *SCORED, "--lite"])
    mine, its_adapter = (next(p for p in places(results) if p.startswith(f"{name}-") and
                              (results / "outputs" / p).resolve() == folder.resolve())
                         for name, folder in (("model", first), ("adapted", adapter)))
    for place, sub in ((mine, "raw"), (its_adapter, "cross_x")):
        assert answers(results, "safety", f"cross_{place}") == answers(alone, "safety", sub)
        for command in ("evaluate_safety", "evaluate_helpfulness"):
            assert scores(results, f"cross_{place}", command) == scores(alone, sub, command)
    assert scores(results, f"cross_{mine}", "evaluate_helpfulness") != scores(alone, "cross_x", "evaluate_helpfulness")
    printed = capsys.readouterr().out
    assert "| mine |" in printed
    assert "against mine: model " in printed, "the second folder's last name is its label"


def test_the_suite_refusal_needs_no_answers(tmp_path, folders, steps):
    results = run(tmp_path, f"mine={folders[0]},other={folders[1]}", suite="refusal")
    assert [words[0] for words in steps] == ["evaluator/evaluate_refusal.py"] * 2 + ["evaluator/report.py"]
    assert not (results / "inference").exists()
    page = (results / "report" / "evaluate.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| model |"))
    assert head.count("refusal AUC") == 3
    assert "refusal ↑" not in head.replace("over-refusal ↑", "")
    assert "against mine" in page


def test_two_folders_of_one_name_have_two_places_and_labels(tmp_path, folders):
    first, second, _ = folders
    results = run(tmp_path, f"{first},{second}")
    assert len(places(results)) == 2
    assert all(name.startswith("model-") for name in places(results))
    page = (results / "report" / "evaluate.md").read_text()
    assert all(f"| {name} |" in page for name in places(results))
    # the models are not one: their answers differ
    one, two = (answers(results, "safety", f"cross_{name}") for name in places(results))
    assert [row["rendered"] for row in one] == [row["rendered"] for row in two]
    assert [row["output"] for row in one] != [row["output"] for row in two]


def test_what_is_finished_is_not_done_again(tmp_path, folders, monkeypatch):
    results = run(tmp_path, f"mine={folders[0]}")
    before = {path: path.stat().st_mtime_ns for path in (*results.glob("inference/**/*.jsonl"), *results.glob("scores/*/*"))}

    def never(*_):
        raise AssertionError("a finished model is not loaded again")

    monkeypatch.setattr(models.runs, "load_run", never)
    run(tmp_path, f"mine={folders[0]}")
    assert before
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_models_failure_is_told_and_the_others_go_on(tmp_path, folders, monkeypatch, caplog, make_adapter, steps):
    caplog.set_level("INFO")
    results, load = tmp_path / "results", models.runs.load_run
    for name, seed in (("good", 4), ("bad", 5)):
        make_adapter(folders[0], results / "outputs" / name, seed=seed)

    def load_run(name, args):
        if name == "bad":
            raise RuntimeError("out of memory")
        return load(name, args)

    monkeypatch.setattr(models.runs, "load_run", load_run)
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "base,bad,good", "--model_name_or_path", str(folders[0]))
    assert caught.value.code == 1
    assert "1 of 3 models failed" in caplog.text
    assert "bad: python" in caplog.text.replace(str(config.ROOT), "")
    assert "exit code 1; out of memory" in caplog.text
    assert "left out of the table: bad" in caplog.text
    page = (results / "report" / "evaluate.md").read_text()
    assert "| good |" in page
    assert "| base |" in page
    assert "| bad |" not in page
    # nothing half-written looks finished, and nobody scored what was never answered
    assert not (results / "inference" / "safety" / "test" / "cross_bad").exists()
    assert not (results / "scores" / "cross_bad").exists()
    # it was tried with the others, then by itself
    tried = [words[words.index("--cross_task") + 1] for words in steps if words[0] == "inference.py" and "safety" in words]
    assert tried == ["base,bad,good", "base", "bad", "good"]
    monkeypatch.setattr(models.runs, "load_run", load)
    run(tmp_path, "base,bad,good", "--model_name_or_path", str(folders[0]))
    assert "| bad |" in (results / "report" / "evaluate.md").read_text()


def test_a_table_that_fails_is_a_failure(tmp_path, folders, monkeypatch):
    monkeypatch.setattr(report, "write", lambda args: (_ for _ in ()).throw(RuntimeError("no table")))
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, f"mine={folders[0]}")
    assert caught.value.code == 1


def test_all_errors_come_at_once_before_anything_runs(tmp_path, folders, capsys, steps):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, f"nope,e={tmp_path / 'empty'},m={folders[0]},m={folders[1]}", "--base", "q",
            "--data_path", "catqa=missing.json", "--judges", "guard=/no/such/folder,truth=x", suite="catqa")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    for part in ("--models nope: neither a run of", "needs config.json and *.safetensors", "the same label as m=",
                 "--base q: none of the models", "missing.json: no such file", "--judges truth: answers 'truth'",
                 "no such folder"):
        assert part in said
    assert not steps
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("flags", "said"), [
    (["--suite", "safty"], "no such suite (did you mean safety?); known: safety, truth, help, utility, all, refusal"),
    (["--suite", ","], "--suite: name at least one"),
    (["--models", ""], "--models: name the models"),
    (["--suite", "alpacaeval_50"], "only judges score its answers; add --judges (pairwise or reward or api-preference)"),
    (["--judges", "fitted-safer"], "compares with the base model's answers; add base to --models"),
    (["--data_path", "xstest=a.csv"], "no suite of --suite safety answers xstest"),
    (["--data_path", "a.csv"], "--data_path a.csv: needs SET=FILE"),
    (["--format", "xls"], "xls is no format"),
    (["--models", "x="], "--models x=: names no model"),
])
def test_errors(tmp_path, folders, capsys, steps, flags, said):
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, f"mine={folders[0]}", *flags)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert not steps


def test_a_model_without_a_chat_template_is_told_before_it_answers(tmp_path, folders, capsys, steps):
    (folders[0] / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit):
        run(tmp_path, f"mine={folders[0]}")
    assert "--template chat: this tokenizer has no chat template; use --template alpaca" in capsys.readouterr().err
    assert not steps
    run(tmp_path, f"mine={folders[0]}", "--template", "alpaca")
    place = places(tmp_path / "results")[0]
    assert answers(tmp_path / "results", "safety", f"cross_{place}")[0]["rendered"].startswith("Below is an instruction")


def test_a_dry_run_prints_command_lines_and_runs_none(tmp_path, folders, capsys, steps, monkeypatch):
    monkeypatch.chdir(config.ROOT)
    named = f"a b={folders[0]},adapted={folders[2]},far=org/name"
    results = run(tmp_path, named, "--dry_run", "--judges", "keyword,fitted", "--seed", "7", "--published",
                  "h3fusion", "--format", "md,csv", "--backend", "static", suite="safety,xstest")
    assert not steps
    assert not results.exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"mkdir -p {results}/outputs"
    assert lines[1] == f"ln -sfn {folders[0]} {results}/outputs/model-{lines[1].rpartition('-')[2]}"
    assert "org--name" in lines[3]
    commands = [shlex.split(line) for line in lines if line.startswith("python ")]
    flags = {"inference.py": InferenceArgs, "evaluator/evaluate_safety.py": evaluate_safety.EvaluateSafetyArgs,
             "evaluator/evaluate_refusal.py": evaluate_refusal.EvaluateRefusalArgs, "evaluator/report.py": ReportArgs}
    for _, file, *words in commands:
        made = config.parse(flags[file], words).args
        if file != "evaluator/report.py":
            assert (made.seed, made.num_samples, made.dtype) == (7, 5, "float32")
        if file == "inference.py":
            assert (made.max_new_tokens, made.batch_size, made.backend) == (6, 8, "static")
        if file == "evaluator/evaluate_safety.py":
            assert made.judges == "keyword,fitted"
    tasks = [words[words.index("--task_name") + 1] for _, file, *words in commands if file == "inference.py"]
    # both models of one base together, the other one by itself
    assert tasks == [task for task in ("safety", "overrefusal", "xstest_unsafe", "xstest") for _ in range(2)]
    assert (made.against, made.published, made.formats) == ("a b", "h3fusion", ("md", "csv"))
    # what the suite safety scores without answers is asked for by name: a report shows it to nobody else
    assert set(DISCRIMINATION) <= set(made.more_columns) & set(made.score_patterns)
    assert sum(file == "evaluator/evaluate_refusal.py" for _, file, *_ in commands) == 2


def test_a_hub_model_is_linked_to_its_snapshot(tmp_path, folders, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(folders[1]))
    results = run(tmp_path, "far=org/some.name")
    assert set(asked) == {"org/some.name"}
    assert places(results) == ["org--some.name"]
    assert (results / "outputs" / "org--some.name").resolve() == folders[1].resolve()
    # its snapshot moved: the link follows, and what was answered with the old one is not taken for the new one's
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folders[0]))
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, "far=org/some.name")
    assert caught.value.code == 1
    assert (results / "outputs" / "org--some.name").resolve() == folders[0].resolve()


def test_a_run_is_answered_on_its_own_base(tmp_path, folders, make_adapter, steps):
    folder = make_adapter(folders[0], tmp_path / "results" / "outputs" / "mine", seed=4)
    content = json.loads((folder / "manifest.json").read_text()) | {"config": {"model_name_or_path": str(folders[0])}}
    (folder / "manifest.json").write_text(json.dumps(content))
    # by its name, and by its folder
    run(tmp_path, "mine")
    run(tmp_path, str(folder))
    bases = {words[words.index("--model_name_or_path") + 1] for words in steps if "report" not in words[0]}
    assert bases == {str(folders[0])}
    assert places(tmp_path / "results") == ["mine"]
    assert {words[words.index("--cross_task") + 1] for words in steps if words[0] == "inference.py"} == {"mine"}


def test_how_models_are_named(tmp_path, folders, make_adapter):
    from evaluator.scoring.named_models import read

    make_adapter(folders[0], tmp_path / "outputs" / "one")
    named = f"base,one,A={tmp_path / 'outputs' / 'one'},one@0.6_two@0.4,x=org/name,{folders[2]}"
    found, problems = read(EvaluateModelsArgs(models=named, output_dir=str(tmp_path)), base_given=False)
    assert [(model.label, model.in_report, model.sub) for model in found][:5] == [
        ("base", "base", "raw"), ("one", "one", "cross_one"), ("A", "one", "cross_one"),
        ("one@0.6_two@0.4", "one@0.6_two@0.4", "cross_one@0.6_two@0.4"), ("x", "org--name", "cross_org--name")]
    assert found[5].label == "adapted"
    assert found[5].base == str(folders[0]), "as PEFT records it"
    # the run and its folder are one model
    assert problems == [f"--models A={tmp_path / 'outputs' / 'one'}: the same model as one=one; name it once"]
    other, _ = read(EvaluateModelsArgs(models=named, output_dir=str(tmp_path), model_name_or_path="b"), base_given=True)
    assert {model.base for model in other} == {"b", "org/name"}


def test_the_preset_is_that_of_the_models(folders, caplog):
    caplog.set_level("INFO")
    args, _, preset = evaluate.prepare(["--models", str(folders[0]), "--dry_run"])
    assert (args.max_new_tokens, args.batch_size, preset) == (512, 16, "")
    assert "preset own: no model of --models is on the base of the preset embedded" in caplog.text
    args, _, preset = evaluate.prepare(["--models", str(folders[0]), "--dry_run", "--preset", "embedded"])
    assert (args.max_new_tokens, args.batch_size, preset) == (32, 50, "embedded")


def test_every_suite_is_made_of_command_lines_that_exist():
    assert set(suites.SUITES) == set(SUITE_NAMES)
    from evaluator.scoring.named_models import Model

    flags = {"inference.py": InferenceArgs, **{name: getattr(module, next(
        kind for kind in dir(module) if kind.startswith("Evaluate") and kind.endswith("Args")))
        for name, module in COMMANDS.items() if "evaluate" in name}}
    for name in SUITE_NAMES:
        args = EvaluateModelsArgs(models="base", suite=name, judges="truth=embedded,info=embedded,pairwise=embedded,keyword")
        planned = evaluate.steps(args, [Model("base", "base", "", "embedded")], "")
        assert planned
        for step in planned:
            file, *words = step.words(step.models)
            config.parse(flags[file], words)
        assert any(not step.task for step in planned)
        # a set that is answered is also scored
        read = {task for step in planned for task in step.needs}
        assert {step.task for step in planned if step.task} == read
        assert name not in PROTOCOLS or name in read


@pytest.mark.parametrize(("suite", "score"), [
    ("xstest", "xstest_unsafe,xstest.balance"), ("catqa", "catqa,overrefusal.balance"),
    ("or_bench_hard", "safety,or_bench_hard.balance")])
def test_a_published_sets_suite_shows_its_balance(suite, score):
    args = ReportArgs(scores=suites.columns(EvaluateModelsArgs(models="base", suite=suite)))
    assert any(fnmatch.fnmatchcase(score, pattern) for pattern in args.score_patterns)


def test_a_suites_columns_are_scores_of_the_report():
    known = {*(axis.score for axis in AXES), *DISCRIMINATION}
    plain = {name for suite in ("safety", "truth", "help") for name in suites.SUITES[suite].columns if "*" not in name}
    assert plain <= known
    assert "safe_refusal" in suites.columns(EvaluateModelsArgs(models="base", suite="all", columns="harm_rate"))
    assert suites.columns(EvaluateModelsArgs(models="base", suite="help", columns="harm_rate")).endswith(",harm_rate")


def test_each_judge_goes_to_the_command_that_asks_its_question():
    args = EvaluateModelsArgs(models="base", suite="all", judges="keyword,truth=t,info=i,pairwise=p,fitted-safer")
    given = {part.command: suites.judges_of(part, args) for part in suites.parts(args)}
    assert given == {"evaluate_safety": "keyword,fitted-safer", "evaluate_refusal": "",
                     "evaluate_truth_and_info": "truth=t,info=i",
                     "evaluate_helpfulness": "pairwise=p", "evaluate_utility": ""}
    needed = {part.command: suites.answered(part, args) for part in suites.parts(args)}
    assert needed["evaluate_truth_and_info"] == ("truthfulness",)
    assert suites.answered(suites.parts(EvaluateModelsArgs(models="base", suite="truth"))[0],
                           EvaluateModelsArgs(models="base", suite="truth")) == ()


def test_a_step_is_a_process_whose_last_words_are_kept(monkeypatch, capfd):
    monkeypatch.undo()
    assert evaluate.execute(("inference.py", "--task_name", "nope")) == (
        2, next(line for line in capfd.readouterr().err.splitlines() if line.startswith("error: --task_name nope")))
    assert evaluate.execute(("inference.py", "--help")) == (0, "")


@pytest.mark.parametrize(("outcome", "code", "said"), [
    (KeyboardInterrupt(), 130, "interrupted; what is finished is kept, and the same command goes on from there"),
    ({"the table": "why"}, 1, "no model, but the table failed")])
def test_how_a_command_ends_that_did_not_finish(tmp_path, monkeypatch, caplog, outcome, code, said):
    def run(*_):
        if isinstance(outcome, KeyboardInterrupt):
            raise outcome
        return outcome

    monkeypatch.setattr(evaluate, "prepare", lambda words: (
        EvaluateModelsArgs(models="base", output_dir=str(tmp_path)), [Model("base", "base", "", "embedded")], ""))
    monkeypatch.setattr(evaluate, "run", run)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([])
    assert stop.value.code == code
    assert said in caplog.text
