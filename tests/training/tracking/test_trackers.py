"""Losses of every objective reach the tracker, and the training does not notice; without the package a sentence says so."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from methods import METHODS, make_place
from methods import train as run_method

import config
import manifest
from errors import UserError
from flags import AlignArgs
from flags.optimiser import trackers_of
from training.tracking import trackers

#: What each objective must tell, beside its loss.
PARTS = {"sft": ["train/loss_lm"], "full": ["train/loss_lm"], "dpo": ["train/rewards/margins"],
         "mask": ["train/rewards/margins"], "moe": ["train/loss_lm", "train/loss_gate", "train/loss_drift_helpfulness"],
         "soup": ["train/loss_lm"]}
SECRET = "hf_" + "a1B2" * 6


@pytest.fixture(scope="module")
def place(pico, tmp_path_factory):
    return make_place(pico, tmp_path_factory.mktemp("tracked"))


def train(pico, place, out, kind, *words):
    """The folder of the finished run."""
    run_method(pico, place, out, kind, *words)
    return out / "outputs" / f"{kind}_run"


class Notes(trackers.Tracker):
    """Keeps what it is told, and draws from every source of chance as a careless tracker would."""

    made: list[Notes] = []

    def __init__(self, name, settings, folder):
        import random

        import numpy as np
        import torch

        random.random(), np.random.rand(), torch.rand(1)
        self.name, self.settings, self.folder, self.told, self.closed = name, settings, folder, [], None
        Notes.made.append(self)

    def write(self, values, step):
        self.told.append((step, dict(values)))

    def close(self, failed):
        self.closed = failed


@pytest.fixture
def notes(monkeypatch):
    """wandb stands for a tracker that keeps notes; no package is needed."""
    import flags.optimiser

    monkeypatch.setattr(flags.optimiser, "find_spec", lambda name: object())
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Notes)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(Notes, "made", [])
    return Notes.made


@pytest.mark.parametrize("kind", METHODS)
def test_every_objective_tells_its_losses_and_trains_the_same(pico, place, tmp_path, kind, notes):
    plain = train(pico, place, tmp_path / "plain", kind, "--max_steps", "2")
    told = train(pico, place, tmp_path / "told", kind, "--max_steps", "2", "--report_to", "wandb", "--hub_model_id", SECRET)
    weights = METHODS[kind][1]
    assert (told / weights).read_bytes() == (plain / weights).read_bytes()
    histories = [manifest.read(folder)["metrics"]["history"] for folder in (plain, told)]
    assert [entry["loss"] for entry in histories[0]] == [entry["loss"] for entry in histories[1]]
    tracker, = notes
    assert (tracker.name, tracker.closed) == (told.name, False)
    losses = [(step, values["train/loss"]) for step, values in tracker.told if "train/loss" in values]
    assert losses == [(entry["step"], entry["loss"]) for entry in histories[1]]
    assert len(losses) == 2
    seen = {name for _, values in tracker.told for name in values}
    assert seen >= {*PARTS[kind], "train/learning_rate", "train/grad_norm"}
    # settings as they are recorded, without secrets
    assert tracker.settings["seed"] == 7
    assert tracker.settings["training_arguments"]["max_steps"] == 2
    assert tracker.settings["training_arguments"]["hub_model_id"] == manifest.HIDDEN
    assert SECRET not in json.dumps(tracker.settings)


def test_who_is_told_makes_no_other_run(pico, place, tmp_path, capsys, notes):
    train(pico, place, tmp_path, "sft", "--max_steps", "1")
    train(pico, place, tmp_path, "sft", "--max_steps", "1", "--report_to", "wandb")
    assert "already trained" in capsys.readouterr().out
    assert not notes


def test_other_processes_tell_nothing(pico, place, tmp_path, notes, monkeypatch):
    class Trainer:
        def add_callback(self, tracker):
            raise AssertionError("only the first process tells")

    args = config.parse(AlignArgs, ["--moe_flag", "0", "--task_name", "safety", "--output_dir", str(tmp_path)]).args
    monkeypatch.setattr(manifest, "is_main", lambda: False)
    with trackers.tracking(Trainer(), args, {"report_to": "wandb"}):
        pass
    assert not notes


def test_a_training_that_fails_closes_its_tracker_as_failed(tmp_path, notes):
    trainer = type("Trainer", (), {"add_callback": lambda self, tracker: None})()
    args = config.parse(AlignArgs, ["--moe_flag", "0", "--task_name", "safety", "--output_dir", str(tmp_path)]).args
    with pytest.raises(RuntimeError), trackers.tracking(trainer, args, {"report_to": ["wandb"]}):
        raise RuntimeError("out of memory")
    assert [tracker.closed for tracker in notes] == [True]


@pytest.mark.parametrize(("asked", "named"), [
    ("tensorboard,wandb", ("tensorboard", "wandb")), (["wandb"], ("wandb",)), ("none", ()), (None, ()),
    ("wandb, wandb", ("wandb",)),
])
def test_trackers_that_are_asked_for(asked, named):
    assert trackers_of({"report_to": asked}) == named


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_without_the_package_the_error_names_the_extra(name, monkeypatch):
    import flags.optimiser

    monkeypatch.setattr(flags.optimiser, "find_spec", lambda package: None)
    with pytest.raises(UserError) as caught:
        config.parse(AlignArgs, ["--moe_flag", "0", "--task_name", "safety", "--report_to", name])
    problem, = caught.value.problems
    assert problem == f"--report_to {name}: {name} is not installed; run pip install -e .[{name}], or use none"
    extras = (config.ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    assert f"\n{name} = [" in extras


@pytest.mark.parametrize(("mode", "key", "fine"), [
    ("online", "", False), ("online", "k" * 40, True), ("offline", "", True), ("disabled", "", True)])
def test_wandbs_key_comes_from_the_environment(mode, key, fine, monkeypatch):
    import flags.optimiser

    monkeypatch.setattr(flags.optimiser, "find_spec", lambda package: object())
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", key)
    words = ["--moe_flag", "0", "--task_name", "safety", "--report_to", "wandb"]
    if fine:
        config.parse(AlignArgs, words)
        return
    with pytest.raises(UserError) as caught:
        config.parse(AlignArgs, words)
    assert "WANDB_API_KEY is not set; export it, or export WANDB_MODE=offline" in caught.value.problems[0]


def test_tensorboard_reads_back_what_was_told(pico, place, tmp_path, capsys):
    """With the package its event file; on a machine without it the error, by the same command line."""
    words = ("--max_steps", "2", "--report_to", "tensorboard", "--hub_model_id", SECRET)
    if not find_spec("tensorboard"):
        with pytest.raises(SystemExit) as caught:
            train(pico, place, tmp_path, "moe", *words)
        assert caught.value.code == 2
        assert "run pip install -e .[tensorboard], or use none" in capsys.readouterr().err
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(pico, place, tmp_path, "moe", *words)
    file, = (tmp_path / "tracking" / folder.name).glob("*/events.*")
    events = EventAccumulator(str(file)).Reload()
    history = manifest.read(folder)["metrics"]["history"]
    for name in ("loss", "loss_lm", "loss_gate"):
        told = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert told == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in history]
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"gate_loss_weight": 0.1' in text
    assert SECRET not in file.read_bytes().decode("utf-8", "replace")


def test_wandb_keeps_an_offline_run(pico, place, tmp_path, capsys, monkeypatch):
    """With the package the folder of an offline run; without it the error, by the same command line."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ("--max_steps", "2", "--report_to", "wandb", "--hub_model_id", SECRET)
    if not find_spec("wandb"):
        with pytest.raises(SystemExit) as caught:
            train(pico, place, tmp_path, "sft", *words)
        assert caught.value.code == 2
        assert "run pip install -e .[wandb], or use none" in capsys.readouterr().err
        return
    plain = train(pico, place, tmp_path / "plain", "sft", *words[:2])
    folder = train(pico, place, tmp_path / "told", "sft", *words)
    file, = (tmp_path / "told" / "tracking").glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"train/loss_lm" in content
    assert folder.name.encode() in content
    assert SECRET.encode() not in content
    assert (folder / "adapter_model.safetensors").read_bytes() == (plain / "adapter_model.safetensors").read_bytes()
