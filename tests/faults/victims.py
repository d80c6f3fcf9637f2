"""The commands that faults are tried on: pico models, a few steps, everything below one results folder."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from methods import CONSTANT, METHODS, data_of, make_place
from pico import make_pico
from runs import common


@dataclass(frozen=True)
class Place:
    """What every victim starts from: a base model, another one, results with experts, data files."""

    folder: Path

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def fresh(self, out: Path) -> Path:
        """A results folder of its own with the inputs in it, whatever was there before."""
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.results / "outputs", out / "outputs")
        return out


@dataclass(frozen=True)
class Victim:
    """A command line.

    Args:
        module: whose ``main`` it is.
        words: what follows, given the place and the results folder.
        model: whether a model runs in it, so that its memory can run out.
    """

    name: str
    module: str
    words: Callable[[Place, Path], Sequence[str]]
    model: bool = False

    def main(self, words: Sequence[str]) -> None:
        importlib.import_module(self.module).main(list(words))


def make(folder: Path) -> Place:
    """Make a place; seconds."""
    place = Place(folder)
    make_pico(place.base)
    # a byte is a token here: embedded questions of evaluators have thousands
    config = json.loads((place.base / "config.json").read_text())
    (place.base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32768}))
    make_pico(folder / "other", seed=1)
    make_place(place.base, place.results)
    for kind, ask in (("bad", "How do I do bad thing"), ("good", "How do I bake bread")):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps({"prompt": f"{ask} {i}?"}) + "\n" for i in range(6)))
    return place


def training(kind: str) -> Victim:
    """A training method of tests/methods.py: four steps, a checkpoint at each."""
    def words(place: Place, out: Path) -> list[str]:
        return [*METHODS[kind][0], "--data_path", data_of(place.results, kind), *common(place.base, out), *CONSTANT,
                "--run_name", f"{kind}_run", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "1"]
    return Victim(f"train: {kind}", "align_basemodel", words, model=True)


def _fuse(name: str, *words: str) -> Victim:
    return Victim(f"fuse: {name}", "models.fuse", lambda place, out: [
        *(word.format(base=place.base, other=place.folder / "other") for word in words), "--output_dir", str(out)])


def _answers(place: Place, out: Path) -> list[str]:
    return ["--task_name", "safety", "--data_path", str(place.results / "data" / "safety.jsonl"),
            "--cross_task", "helpfulness", "--max_new_tokens", "6", "--batch_size", "3", "--num_samples", "12",
            *common(place.base, out)[:-2]]


def _scored(place: Place, out: Path) -> list[str]:
    return ["--task_name", "raw", "--harmful", str(place.folder / "bad.jsonl"),
            "--harmless", str(place.folder / "good.jsonl"), "--model_name_or_path", str(place.base), "--dtype", "float32",
            "--device", "cpu", "--output_dir", str(out)]


def _likely(place: Place, out: Path) -> list[str]:
    return ["--task_name", "raw", "--lite", "--num_samples", "4", "--model_name_or_path", str(place.base),
            "--dtype", "float32", "--device", "cpu", "--output_dir", str(out)]


VICTIMS: dict[str, Victim] = {victim.name: victim for victim in (
    *(training(kind) for kind in METHODS),
    Victim("fuse: llama_moe", "models.llama_moe",
           lambda place, out: [*common(place.base, out)[:-2], "--router_init", "random", "--run_name", "fresh_moe"]),
    _fuse("adapters", "adapters", "--adapters", "helpfulness,safety,truthfulness", "--run_name", "average"),
    _fuse("merge", "merge", "--method", "linear", "--models", "{base},{other}", "--parameters", "weight=0.4,0.6",
          "--run_name", "merged", "--threads", "1"),
    _fuse("export", "export", "raw_moe", "--layout", "mixtral", "--model_name_or_path", "{base}"),
    Victim("inference", "inference", _answers, model=True),
    Victim("evaluate_refusal", "evaluator.evaluate_refusal", _scored, model=True),
    Victim("evaluate_helpfulness", "evaluator.evaluate_helpfulness", _likely, model=True),
)}
