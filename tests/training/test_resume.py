"""Interrupted runs: every method goes on as if nothing had been, broken checkpoints are passed over, words are obeyed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from methods import METHODS, make_place, train, weights
from runs import common
from transformers import Trainer

import align_basemodel
import manifest

SAVES = ("--max_steps", "6", "--save_steps", "2", "--validation_share", "0.25")


@pytest.fixture(autouse=True)
def _lines(caplog):
    caplog.set_level("INFO")


@pytest.fixture(scope="module")
def place(pico, tmp_path_factory):
    return make_place(pico, tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def cut(pico, place, tmp_path_factory):
    """An sft run that was killed in its sixth step: checkpoints 2 and 4."""
    return killed(pico, place, tmp_path_factory.mktemp("cut") / "results", "sft", 5, *SAVES)


def killed(pico, place, out, kind, at, *words):
    step = Trainer.training_step

    def dies(self, *args, **kwargs):
        if self.state.global_step == at:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", dies)
        with pytest.raises(KeyboardInterrupt):
            train(pico, place, out, kind, *words)
    return out


def copy(cut, tmp_path):
    shutil.copytree(cut, tmp_path / "results")
    return tmp_path / "results", tmp_path / "results" / "checkpoints" / "sft_run"


@pytest.mark.parametrize("kind", METHODS)
def test_a_killed_run_ends_as_the_uninterrupted_one(pico, place, tmp_path, kind):
    """Weights, losses, tokens, the mean loss; also where a log line spans the kill (each third step, saved each second)."""
    words = (*SAVES, "--logging_steps", "3", "--eval_strategy", "steps", "--eval_steps", "2")
    whole = train(pico, place, tmp_path / "whole", kind, *words)
    resumed = train(pico, place, killed(pico, place, tmp_path / "cut", kind, 5, *words), kind, *words)
    assert len(whole["history"]) == 2
    assert resumed["history"] == whole["history"]
    for name in ("train_loss", "steps", "tokens", "validation_loss", "zero_masks"):
        assert resumed.get(name) == whole.get(name), name
    evals = [[{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k and "time" not in k}
              for entry in run["validation_history"]] for run in (whole, resumed)]
    assert evals[0] == evals[1]
    assert len(evals[0]) == 3
    one, two = weights(tmp_path / "whole", kind), weights(tmp_path / "cut", kind)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_that_was_killed_behind_its_last_step_trains_no_more(pico, place, tmp_path, kind):
    """In the middle of an epoch transformers would take the next step of it."""
    words = ("--max_steps", "5", "--save_steps", "2")
    whole = train(pico, place, tmp_path / "whole", kind, *words)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    run, = (tmp_path / "cut" / "checkpoints").iterdir()
    state = json.loads((run / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["epoch"] % 1
    shutil.rmtree(tmp_path / "cut" / "outputs" / run.name)
    again = train(pico, place, tmp_path / "cut", kind, *words)
    assert (again["steps"], again["history"], again["train_loss"]) == (5, whole["history"], whole["train_loss"])
    one, two = weights(tmp_path / "whole", kind), weights(tmp_path / "cut", kind)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_loss_is_checked_in_a_resumed_run_too(pico, cut, place, tmp_path, monkeypatch, capsys):
    from training.answers import AnswerModel

    out, _ = copy(cut, tmp_path)
    forward = AnswerModel.forward
    monkeypatch.setattr(AnswerModel, "forward", lambda self, **inputs: {
        name: value * (float("nan") if name == "lm" else 1) for name, value in forward(self, **inputs).items()})
    with pytest.raises(SystemExit) as stop:
        train(pico, place, out, "sft", *SAVES)
    assert stop.value.code == 2
    assert "the loss became nan at step 5" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["dpo", "mask"])
def test_a_loss_of_pairs_that_is_no_number_stops_the_run(pico, place, tmp_path, kind, monkeypatch, capsys):
    from training.dpo import SafeDPOTrainer

    loss = SafeDPOTrainer._compute_loss
    monkeypatch.setattr(SafeDPOTrainer, "_compute_loss", lambda self, *args: loss(self, *args) * (
        float("inf") if self.state.global_step == 2 else 1))
    with pytest.raises(SystemExit):
        train(pico, place, tmp_path, kind, "--max_steps", "4")
    assert "the loss became inf at step 3" in capsys.readouterr().err


def test_no_checkpoint_of_broken_weights_is_kept(pico, place, tmp_path, monkeypatch, capsys):
    step = torch.optim.AdamW.step

    def breaks(self, *args, **kwargs):
        done = step(self, *args, **kwargs)
        self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return done

    monkeypatch.setattr(torch.optim.AdamW, "step", breaks)
    with pytest.raises(SystemExit):
        train(pico, place, tmp_path, "sft", "--max_steps", "1")
    assert "no longer finite at step 1" in capsys.readouterr().err
    assert not list((tmp_path / "checkpoints" / "sft_run").glob("checkpoint-*"))


def _no_state(folder):
    (folder / "trainer_state.json").unlink()


def _cut_weights(folder):
    file = folder / "trainable.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _no_optimizer(folder):
    (folder / "optimizer.safetensors").unlink()


def _half_json(folder):
    file = folder / "trainer_state.json"
    file.write_text(file.read_text()[:50])


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _no_rng(folder):
    (folder / "rng_0.safetensors").unlink()


@pytest.mark.parametrize("damage", [_no_state, _cut_weights, _no_optimizer, _half_json, _empty, _no_rng])
def test_a_broken_newest_checkpoint_is_passed_over(pico, cut, place, tmp_path, caplog, damage):
    out, folder = copy(cut, tmp_path)
    damage(folder / "checkpoint-4")
    found = train(pico, place, out, "sft", *SAVES)
    assert found["steps"] == 6
    (line,) = [message for message in caplog.messages if "passed over" in message]
    assert str(folder / "checkpoint-4") in line
    assert f"resuming from {folder / 'checkpoint-2'}" in caplog.messages
    assert [path.name for path in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-6"]


def test_where_no_checkpoint_is_whole_the_run_starts_anew(pico, cut, place, tmp_path, caplog):
    out, folder = copy(cut, tmp_path)
    for number in (2, 4):
        _no_state(folder / f"checkpoint-{number}")
    assert train(pico, place, out, "sft", *SAVES)["steps"] == 6
    assert any("no checkpoint is whole; training starts anew" in message for message in caplog.messages)


def _resumed_at(caplog):
    return [message.rpartition("/")[2] for message in caplog.messages if message.startswith("resuming from")]


@pytest.mark.parametrize(("word", "at"), [("true", ["checkpoint-4"]), ("false", []), ("2", ["checkpoint-2"]),
                                          (None, ["checkpoint-4"])])
def test_resume_from_checkpoint_is_obeyed(pico, cut, place, tmp_path, caplog, word, at):
    out, folder = copy(cut, tmp_path)
    flag = [] if word is None else ["--resume_from_checkpoint", str(folder / "checkpoint-2") if word == "2" else word]
    found = train(pico, place, out, "sft", *SAVES, *flag)
    assert _resumed_at(caplog) == at
    assert found["steps"] == 6


@pytest.mark.parametrize("kind", ["mask", "dpo", "moe"])
def test_a_checkpoint_of_another_run_starts_one(pico, place, tmp_path, kind):
    """Two steps more from another run's checkpoint: the weights differ from it, and from a run that started at the base."""
    train(pico, place, tmp_path / "a", kind, "--max_steps", "2", "--save_steps", "2")
    first = tmp_path / "a" / "checkpoints" / f"{kind}_run" / "checkpoint-2"
    found = train(pico, place, tmp_path / "b", kind, "--max_steps", "4", "--resume_from_checkpoint", str(first))
    assert found["steps"] == 4
    train(pico, place, tmp_path / "c", kind, "--max_steps", "4")
    one, two = weights(tmp_path / "b", kind), weights(tmp_path / "c", kind)
    assert all(torch.equal(one[name], two[name]) for name in one), "two and two steps are not four"


@pytest.mark.parametrize(("make", "flags", "said"), [
    (None, ["--resume_from_checkpoint", "true"], "holds no whole checkpoint"),
    (None, ["--resume_from_checkpoint", "/nowhere/checkpoint-7"], "no such folder"),
    (_no_optimizer, ["--resume_from_checkpoint", "OWN"], "optimizer.safetensors missing"),
])
def test_what_cannot_be_resumed_is_refused(pico, cut, place, tmp_path, capsys, make, flags, said):
    out = tmp_path / "results"
    if make:
        out, folder = copy(cut, tmp_path)
        make(folder / "checkpoint-4")
        flags = [flag.replace("OWN", str(folder / "checkpoint-4")) for flag in flags]
    with pytest.raises(SystemExit) as stop:
        train(pico, place, out, "sft", *SAVES, *flags)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("moment", ["save_optimizer", "save_rng"])
def test_a_kill_while_a_checkpoint_is_written_leaves_none(pico, place, tmp_path, monkeypatch, moment):
    def dies(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"training.checkpoints.{moment}", dies)
        with pytest.raises(KeyboardInterrupt):
            train(pico, place, tmp_path / "r", "sft", *SAVES)
    folder = tmp_path / "r" / "checkpoints" / "sft_run"
    assert [path.name for path in folder.iterdir() if "checkpoint" in path.name] == [".checkpoint-2.partial"]
    train(pico, place, tmp_path / "r", "sft", *SAVES)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "checkpoint-6", "settings.json"]


def test_the_best_checkpoint_is_found_again_in_a_moved_folder(pico, place, tmp_path):
    words = ("--max_steps", "6", "--validation_share", "0.25", "--eval_strategy", "steps", "--eval_steps", "2",
             "--load_best_model_at_end", "--greater_is_better", "true")
    killed(pico, place, tmp_path / "old", "sft", 5, *words)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = train(pico, place, tmp_path / "new", "sft", *words)
    whole = train(pico, place, tmp_path / "whole", "sft", *words)
    assert moved["best_step"] == whole["best_step"] == 2
    assert moved["validation_loss"] == whole["validation_loss"]


def test_the_reference_is_found_again_only_where_it_is_the_same(pico, place, tmp_path, monkeypatch):
    from training.dpo import SafeDPOTrainer

    scored = []
    ask = SafeDPOTrainer._reference_logps
    monkeypatch.setattr(SafeDPOTrainer, "_reference_logps", lambda self, *args: scored.append(1) or ask(self, *args))
    monkeypatch.setattr("trl.trainer.dpo_trainer.hash_module", lambda module: pytest.fail("the whole model was hashed"))
    shutil.copytree(place / "outputs", tmp_path / "outputs")

    def run(name, *flags):
        before = len(scored)
        align_basemodel.main([*METHODS["dpo"][0], "--data_path", str(place / "data" / "pairs.jsonl"),
                              *common(pico, tmp_path), "--max_steps", "1", "--run_name", name, *flags])
        return len(scored) - before

    assert run("first") == 1
    assert run("other_name") == 0
    assert run("rate", "--learning_rate", "0.5", "--lora_r", "2", "--seed", "9", "--beta", "0.3") == 0
    assert run("length", "--model_max_length", "48") == 1
    assert run("template", "--template", "alpaca") == 1
    assert run("adapter", "--init_adapter", "one") == 1
    assert run("again", "--init_adapter", "one") == 0
    assert run("bfloat16", "--dtype", "bfloat16") == 1
    assert run("fewer", "--max_train_samples", "5") == 1
    first, other = (manifest.read(tmp_path / "outputs" / name)["metrics"]["history"] for name in ("first", "other_name"))
    assert first == other
    assert {path.suffix for path in (tmp_path / "cache" / "reference").iterdir()} == {".safetensors"}


def test_settings_say_nothing_of_a_switch(pico, cut, place, tmp_path):
    out, folder = copy(cut, tmp_path)
    train(pico, place, out, "sft", *SAVES, "--resume_from_checkpoint", "true")
    # the same run, finished: without the switch too
    config = json.loads((out / "outputs" / "sft_run" / "manifest.json").read_text())["config"]
    assert "resume_from_checkpoint" not in config["training_arguments"]
