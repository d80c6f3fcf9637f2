"""The pages about one's own model and data, run as a reader runs them: in order, on a pico base and made-up rows."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil

import pytest
from pico import make_pico
from runs import align, build_moe, write_data
from safetensors.torch import load_file, save_file
from test_docs import fences, ours

import config
from evaluator import evaluate
from evaluator.judges import fitted, keyword

#: What makes a command small: behind its own flags, so that these win.
_ALL = ("--dtype", "float32", "--device", "cpu", "--seed", "7")
_SCORED = ("--num_samples", "12")
SMALL = {
    "align_basemodel": (*_ALL, "--max_steps", "2", "--warmup_steps", "0", "--gradient_accumulation_steps",
                        "1", "--model_max_length", "256"),
    "models.llama_moe": (*_ALL, "--router_rows", "2"),
    "data.safety_sets": ("--size", "8"),
    "evaluator.evaluate": (*_ALL, *_SCORED, "--max_new_tokens", "2", "--lite"),
    "scripts.sweep": (*_ALL, *_SCORED, "--grid", "0,0.4", "--extend", "false", "--refine", "0", "--shrink", "false",
                      "--reverse", "false", "--max_new_tokens", "2", "--discrimination", "24", "--utility_answers", "0"),
}
#: Files that the pages name.
FILES = ("rows.jsonl", "helpful.json", "safety.jsonl", "truth.jsonl")


def fine_tuned(base, folder, factor):
    """A copy of a model whose FFN is scaled: what a fine-tune of the layers changes, and no more."""
    shutil.copytree(base, folder)
    file = folder / "model.safetensors"
    tuned = {key: value * factor if "mlp" in key else value for key, value in load_file(file).items()}
    save_file(tuned, file, {"format": "pt"})
    return str(folder)


@pytest.fixture
def reader(long_pico, tmp_path, monkeypatch):
    """Runs one line of a page; returns the results folder."""
    data = write_data(tmp_path / "data")
    rows = [json.dumps({"prompt": f"Say {i}.", "response": f"Here is {i}."}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    files = (str(tmp_path / "rows.jsonl"), data["helpfulness"], data["safety"], data["truthfulness"])
    monkeypatch.setattr(fitted, "harm_judge", lambda seed: fitted.HarmJudge(
        lambda answers: [0.1] * len(answers),
        {"auc": 0.7, "auc_rated": 0.7, "missed": 0.2, "false_alarms": 0.2, "protocol": "made up"}))
    monkeypatch.setattr(fitted, "version", lambda seed: "made up")
    monkeypatch.setattr(keyword, "keyword_error", dict)
    out = tmp_path / "results"
    places = {**dict(zip(FILES, files, strict=True)), "results/": f"{out}/", "BASE": str(long_pico),
              "FOLDER_A": fine_tuned(long_pico, tmp_path / "a", 1.1), "FOLDER_B": fine_tuned(long_pico, tmp_path / "b", 0.9)}

    def start(module, words):
        importlib.import_module(module).main(list(words))

    def step(words):
        start(words[0].removesuffix(".py").replace("/", "."), words[1:])
        return 0, ""

    monkeypatch.setattr(evaluate, "execute", step)

    def read(line):
        place, _, command = line.removesuffix("; cd ..").rpartition("; ")
        for name, there in places.items():
            command = command.replace(name, there)
        module, rest = ours(tuple(shlex.split(command)))
        module = f"{place.removeprefix('cd ')}.{module}" if place else module
        start(module, [*rest, *SMALL.get(module, ()), "--output_dir", str(out)])
        return out

    return read


def lines(page):
    """The python lines of a page's fences."""
    return [line for block in fences(page) for line in block if "python " in line and not line.startswith(".venv")]


def test_five_commands_make_a_safe_model_and_a_table(reader):
    own = [line for line in lines("README.md") if "BASE" in line or "safety_sets" in line or "task,safe" in line]
    five = [line for line in own if "RUN" not in line and "ties" not in line and not line.endswith("--share 0.4")][:5]
    assert [line.split()[1] for line in five] == ["-m", "align_basemodel.py", "align_basemodel.py", "models/fuse.py",
                                                  "evaluator/evaluate.py"]
    for line in five:
        out = reader(line)
    table = (out / "report" / "evaluate.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in ("base", "task", "safe", "fused"))
    # the how-to on a GPU has the same five
    assert set(five) <= set(lines("docs/howto/gpu.md"))


def test_every_way_to_make_it_safe_again(reader):
    for line in lines("docs/howto/own-data.md"):
        out = reader(line)
    made = {path.name for path in (out / "outputs").iterdir() if not path.name.startswith(".")}
    assert made >= {"task", "task_stopped", "safe", "fused", "realigned", "mask_task", "masked", "raw_moe"}
    assert (out / "report" / "sweep.md").is_file()


def test_merges_as_the_page_has_them(reader, adapters, tmp_path):
    out = tmp_path / "results"
    shutil.copytree(adapters / "outputs", out / "outputs")
    base = make_pico(tmp_path / "made")
    for times, name in enumerate(("base", "helpful", "harmless", "honest")):
        fine_tuned(base, out / "outputs" / name, 1 + 0.01 * times)
    written = [line for line in lines("docs/howto/merge.md") if "export" not in line and "FOLDER" not in line]
    for line in lines("docs/howto/merge.md"):
        if "FOLDER" in line:
            reader(line)
    table = (out / "report" / "evaluate.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in ("base", "a", "b", "both"))
    assert len(written) == 3
    for line in written:
        reader(line)
    # the last line of the page exports a sum of adapters on the base that they were trained on
    assert {"ties", "ties_lora", "extracted"} <= {path.name for path in (out / "outputs").iterdir()}


def test_exports_as_the_page_has_them(pico, reader, tmp_path):
    data, out = write_data(tmp_path / "trained_on"), tmp_path / "results"
    build_moe(pico, out, data)
    gammas = [word for name in ("helpfulness", "safety", "truthfulness") for word in (f"--{name}_weight", "0.001")]
    align(pico, out, data, "mix", "--moe_flag", "1", "--gate_loss_weight", "0.1", *gammas)
    for line in lines("docs/howto/serve.md"):
        # a pico model's tokenizer is none that llama.cpp knows; tests/models/export has one
        if "gguf" not in line:
            reader(f"{line} --model_name_or_path {pico}")
    made = {path.name for path in (out / "outputs").iterdir()}
    moe = "mix_moe_reg_00010_00010_00010_gate_01000"
    assert {f"{moe}_mixtral", f"{moe}_peft", "safety_dense", "again"} <= made


def test_scores_of_the_answers_that_the_page_has(reader, tmp_path, monkeypatch, caplog):
    page = "docs/howto/compare-models.md"
    text = (config.ROOT / page).read_text(encoding="utf-8")
    for name, rows in zip(("answers.csv", "harmless.csv"), re.findall(r"```csv\n(.*?)```", text, re.S), strict=True):
        (tmp_path / name).write_text(rows, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    reader(next(line for line in lines(page) if "--overrefusal_answers" in line))
    said = "\n".join(record.getMessage() for record in caplog.records)
    written = text.partition("It says:")[2].split("```")[1]
    rates = [[line for line in block.splitlines() if line.startswith("  ")] for block in (said, written)]
    assert len(rates[0]) == 9
    assert rates[0] == rates[1]
