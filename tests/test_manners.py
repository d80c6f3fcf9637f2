"""What commands say on the screen: --quiet and --verbose, lines for people, a last screen, nothing else."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import sys
import warnings

import pytest
from runs import align, common, write_data

import align_basemodel
import config
import console
import errors
import flags
import manifest
from flags import AlignArgs, EvaluateSafetyArgs
from flags.base import VerbosityFlags

FEW = ("--moe_flag", "0", "--max_steps", "2")
MOE_LOG = {"loss": 1.5234, "grad_norm": 0.7109, "learning_rate": 2.667e-05, "loss_lm": 1.4, "loss_gate": 0.9,
           "loss_share_right": 0.712, "loss_drift_safety": 0.0123, "epoch": 2}
DPO_LOG = {"loss": 0.6512, "grad_norm": 3.0, "learning_rate": 1e-4, "rewards/margins": 0.12, "rewards/accuracies": 0.75,
           "logps/chosen": -31.0}


@pytest.fixture
def log(monkeypatch):
    """The root logger, whose level is put back, as all is that ``set_up`` changes."""
    root = logging.getLogger()
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in ("", *console.NOISE)}
    for name in (*console._SILENCE, console.STEP):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with warnings.catch_warnings():
        yield root
    for logger, level in levels.items():
        logger.setLevel(level)
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def alone(log):
    """The same without a handler, as in a process of its own; pytest adds its own behind the fixtures."""
    def clear():
        monkeypatch.setattr(log, "handlers", [])
        return log

    with pytest.MonkeyPatch.context() as monkeypatch:
        yield clear


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("command", flags.COMMANDS, ids=lambda command: command.__name__)
def test_every_command_has_both(command):
    assert VerbosityFlags in command.beside()


@pytest.mark.parametrize("words", [("--quiet",), ("--verbose", "true"), ("--quiet=false",)])
def test_they_make_no_other_run_and_are_no_settings(words, capsys):
    plain, said = (config.parse(AlignArgs, ["--moe_flag", "0", *more]) for more in ((), words))
    assert said.args == plain.args
    assert said.args.settings({}) == plain.args.settings({})
    assert said.given == plain.given
    # the line about the preset comes before any log is set up
    assert capsys.readouterr().err.count("preset embedded") == (1 if words == ("--quiet",) else 2)


def test_both_together_are_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        align_basemodel.main(["--quiet", "--verbose"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --quiet, --verbose: one says less, the other more; give one of the two\n"


def test_what_has_no_effect_is_said_unless_quiet(caplog):
    words = ["--task_name", "cross_x", "--model_name", "QAModeration"]
    config.parse(EvaluateSafetyArgs, [*words, "--quiet"])
    assert not caplog.records
    config.parse(EvaluateSafetyArgs, words)
    assert "--model_name: has no effect here" in caplog.text


@pytest.mark.parametrize(("logs", "said"), [
    ({"loss": 0.7739, "grad_norm": 0.7109, "learning_rate": 2.667e-05, "loss_lm": 0.7739, "epoch": 2},
     "step 3/80  loss 0.774  grad 0.71  lr 2.7e-05"),
    (MOE_LOG, "step 3/80  loss 1.52 (language model 1.4, gate 0.9, right expert 71 %, drift of safety 0.0123)  grad 0.71  "
              "lr 2.7e-05"),
    (DPO_LOG, "step 3/80  loss 0.651 (margin 0.12, chosen preferred 75 %)  grad 3  lr 0.0001"),
    ({"eval_loss": 1.381, "eval_runtime": 2.0, "eval_gate": 0.5}, "step 3/80  validation loss 1.38 (gate 0.5)"),
    ({"train_runtime": 77.2, "train_loss": 1.417}, "")])
def test_a_log_line_of_a_training_is_for_people(logs, said):
    from training.tracking.progress import line

    assert line(logs, 3, 80) == said


def test_the_validation_of_the_weights_that_are_kept_is_no_steps(caplog):
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from training.tracking.progress import Progress

    told, rest = Progress("task"), (TrainingArguments(), TrainerState(global_step=4, max_steps=4), TrainerControl())
    with caplog.at_level("INFO"):
        told.on_log(*rest, logs={"eval_loss": 6.2})
        told.on_train_end(*rest)
        told.on_log(*rest, logs={"eval_loss": 6.1})
    assert [record.getMessage() for record in caplog.records] == ["step 4/4  validation loss 6.2"]


def test_a_training_tells_steps_and_a_last_screen(pico, data, tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.chdir(config.ROOT)
    with caplog.at_level("INFO"):
        align(pico, tmp_path, data, "safety", *FEW)
    out, err = capfd.readouterr()
    assert "{'" not in out + err + caplog.text
    assert "\x1b" not in out + err
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split("  ")[0] for line in lines if line.startswith("step ")] == ["step 1/2", "step 2/2"]
    head, *rows = out.splitlines()
    assert head == "safety: an expert, trained"
    named = [re.match(r"  (lies in|\w+) +", row) for row in rows]
    assert len({match.end() for match in named}) == 1, "aligned"
    cells = {match[1]: row[match.end():] for match, row in zip(named, rows, strict=True)}
    assert list(cells) == ["loss", "trained", "took", "lies in", "next"]
    assert "mean of 2 steps" in cells["loss"]
    assert "GB of memory" in cells["took"]
    assert cells["lies in"] == str(tmp_path / "outputs" / "safety")
    card = (tmp_path / "outputs" / "safety" / "README.md").read_text(encoding="utf-8")
    assert "[More Information Needed]" not in card
    assert f"base_model: {json.dumps(str(pico))}" in card
    # it can be copied: the same base, folder and preset
    program, file, *words = shlex.split(cells["next"])
    parsed = config.parse(flags.InferenceArgs, words)
    assert (program, file) == ("python", "inference.py")
    assert (parsed.args.task_name, parsed.args.runs) == ("safety", ("safety",))
    assert (parsed.args.model_name_or_path, parsed.args.results) == (str(pico), tmp_path)


@pytest.mark.parametrize(("base", "called"), [("mine", "base"), ("results/outputs/fused_dense", "fused_dense")])
def test_a_run_on_rows_of_ones_own_is_scored_beside_its_base_next(base, called, monkeypatch):
    monkeypatch.chdir(config.ROOT)
    parsed = config.parse(AlignArgs, ["--moe_flag", "0", "--task_name", "dialogs", "--data_path", "rows.jsonl", "--run_name",
                                      "task", "--model_name_or_path", base])
    assert align_basemodel._next(parsed) == ["evaluator/evaluate.py", "--models", f"{called},task", "--suite", "safety",
                                             "--model_name_or_path", base]


def test_quiet_leaves_the_place_alone_and_the_run_is_the_same(pico, data, tmp_path, log, capfd):
    align(pico, tmp_path, data, "safety", *FEW, "--quiet")
    place = tmp_path / "outputs" / "safety"
    assert capfd.readouterr() == (f"{place}\n", "")
    assert not {"quiet", "verbose"} & manifest.read(place)["config"].keys()
    stamp = place.stat().st_ino
    log.setLevel(logging.WARNING)
    align(pico, tmp_path, data, "safety", *FEW, "--verbose")
    assert capfd.readouterr().out == f"{place}: already trained\n"
    assert place.stat().st_ino == stamp


def test_quiet_still_says_what_is_wrong(tmp_path, log, capfd):
    with pytest.raises(SystemExit) as stop:
        align_basemodel.main([*common(tmp_path / "nowhere", tmp_path), *FEW, "--task_name", "safety", "--quiet"])
    out, err = capfd.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert all(line.startswith("error: ") for line in err.splitlines())


def test_log_lines_go_to_stderr_and_leave_a_bar_whole(alone, capfd):
    from tqdm import tqdm

    alone()
    console.set_up()
    with tqdm(total=2, file=sys.stderr, ascii=True) as bar:
        bar.update(1)
        logging.getLogger("any").info("a line of %d words", 5)
    out, err = capfd.readouterr()
    assert out == ""
    assert "a line of 5 words" in [line.rpartition("\r")[2].strip() for line in err.splitlines()]


def test_noise_of_packages_is_left_out_but_for_verbose(alone, capfd):
    alone()
    noisy = logging.getLogger("matplotlib.font_manager")
    console.set_up()
    noisy.info("generated new fontManager")
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
    logging.getLogger("bitsandbytes").warning("something else")
    assert capfd.readouterr().err == "something else\n"
    for name in console.NOISE:
        logging.getLogger(name).setLevel(logging.NOTSET)
    console.set_up(VerbosityFlags(verbose=True))
    noisy.info("generated new fontManager")
    assert "generated new fontManager" in capfd.readouterr().err
    assert console.asked() == ["--verbose"]


def test_a_command_within_another_keeps_what_that_one_was_asked_for(alone):
    root = alone()
    console.set_up(VerbosityFlags(quiet=True))
    console.set_up(VerbosityFlags())
    assert (console.quiet(), console.hidden(), console.asked()) == (True, True, ["--quiet"])
    assert len(root.handlers) == 1


def test_other_processes_of_a_launch_tell_what_is_wrong_alone(alone):
    root = alone()
    console.set_up(speaks=False)
    assert (root.level, console.hidden(), console.quiet()) == (logging.WARNING, True, False)


@pytest.mark.parametrize(("terminal", "interval"), [(True, 0.1), (False, 10)])
def test_a_long_bar_in_a_file_is_a_line_now_and_then(alone, monkeypatch, terminal, interval):
    alone()
    console.set_up()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert console.bar() == {"disable": False, "mininterval": interval}


def test_results_and_what_to_try_next(alone, capfd, tmp_path, monkeypatch):
    alone()
    monkeypatch.chdir(config.ROOT)
    console.set_up()
    console.show_written("a table", [tmp_path / "a.md"])
    console.finish([tmp_path / "scores.json"], ["evaluator/report.py", "--runs", "a b"])
    with console.steps():
        console.advise(["inference.py"])
    assert capfd.readouterr() == (f"a table\nwritten: {tmp_path}/a.md\n", "next: python evaluator/report.py --runs 'a b'\n")
    assert console.STEP not in os.environ
    console.set_up(VerbosityFlags(quiet=True))
    console.show_written("a table", [tmp_path / "a.md"])
    console.finish([tmp_path / "scores.json"], ["evaluator/report.py"])
    console.show("told", "")
    assert capfd.readouterr() == (f"{tmp_path}/a.md\n{tmp_path}/scores.json\n", "")


@pytest.mark.parametrize(("folder", "file"), [(".", "evaluator/report.py"), ("evaluator", "report.py"),
                                              ("..", f"{config.ROOT}/evaluator/report.py")])
def test_a_command_line_works_where_one_stands(folder, file, monkeypatch):
    monkeypatch.chdir(config.ROOT / folder)
    assert console.shown(("evaluator/report.py", "--name", "a b")) == f"python {file} --name 'a b'"


def test_the_next_command_finds_the_same_place():
    def words(*given):
        return console.same(config.parse(AlignArgs, ["--moe_flag", "0", *given]), "model_name_or_path", "output_dir")

    assert words() == []
    assert words("--seed", "3") == []
    assert words("--output_dir", "here", "--model_name_or_path", "mine") == ["--model_name_or_path", "mine", "--output_dir",
                                                                            "here"]
    assert words("--preset", "h3fusion") == ["--preset", "h3fusion"]


@pytest.mark.parametrize(("words", "runs"), [
    (["--task_name", "raw,cross_mix"], "base,mix"), (["--task_name", "cross_mix", "--checkpoint_number", "4"], "mix_4"),
    (["--answers", "mine.csv"], "mine"), (["--task_name", "cross_mix", "--aligned_flag", "0"], "base")])
def test_scores_are_put_into_a_table_next(words, runs):
    assert config.parse(EvaluateSafetyArgs, words).args.table == ("evaluator/report.py", "--runs", runs)


def test_costs_are_for_people():
    assert console.cost(7.25, 1200) == "7.2 s, 1.3 GB of memory"
    assert console.cost(77.2, 1800) == "1 min 17 s, 1.9 GB of memory"
    assert console.cost(7500, 100) == "2 h 5 min, 0.1 GB of memory"


def test_an_error_line_is_written_like_any_other(capsys):
    errors.write_line("one")
    assert capsys.readouterr().err == "one\n"
