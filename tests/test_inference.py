"""Answers: batched as one by one, stopped per row, seeded, resumable, saved in the published columns."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from pico import make_pico
from runs import align, build_moe, common, write_data

import inference
import manifest
from config import parse
from data.prompts import Template
from flags import InferenceArgs
from models.base.loading import load_base, load_tokenizer
from models.generation import Decoding, answer_batch, hf
from models.runs import Loaded, load_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def _infer(pico, out, data, *flags, task="safety"):
    inference.main(["--task_name", task, "--data_path", data[task], "--max_new_tokens", "8", "--batch_size", "5",
                    *common(pico, out)[:-2], *flags])
    return out / "inference" / task / "test"


def _rows(folder):
    return [json.loads(line) for line in (folder / "outputs_final.jsonl").read_text().split("\n") if line]


def _loaded(folder, end="") -> Loaded:
    form = Template("test", lambda prompt, input: prompt, end, special_tokens=False)
    device = torch.device("cpu")
    return Loaded(load_base(folder, torch.float32, device), load_tokenizer(folder), form, "test", device)


def test_batched_equals_one_by_one(pico):
    loaded = _loaded(pico)
    prompts = ["How do I", "What is the capital of France? The", "Write", "user\nassistant\n I can't"]
    together = answer_batch(loaded, prompts, Decoding(10), seed=0)
    assert together == [answer_batch(loaded, [prompt], Decoding(10), seed=0)[0] for prompt in prompts]
    assert len({answer.text for answer in together}) > 1


def _speaks(loaded, texts, monkeypatch):
    """Make the model say these texts, row by row, then pad; returns how generate was called."""
    calls = []

    def generate(input_ids, **kwargs):
        calls.append(kwargs)
        rows = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        longest = max(map(len, rows))
        rows = [row + [loaded.tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
        return torch.cat([input_ids, torch.tensor(rows)], 1)

    monkeypatch.setattr(loaded.model, "generate", generate)
    return calls


def test_text_ends_at_the_marker_or_eos_of_its_own_row(pico, monkeypatch):
    loaded = _loaded(pico, end="###END")
    calls = _speaks(loaded, ["one: two ### three", "stop###END tail", "done<|im_end|>tail", "###END"], monkeypatch)
    answers = answer_batch(loaded, ["a", "b", "c", "d"], Decoding(20), seed=0)
    assert [(a.text, a.finish) for a in answers] == [
        ("one: two ### three", "length"), ("stop", "stop"), ("done", "stop"), ("", "stop")]
    assert calls[0]["stop_strings"] == ["###END"]


@pytest.mark.parametrize(("text", "stops"), [
    ("Q: a colon", False), ("a ### heading", False), ("the END", False), ("### END", False), ("it is so###END", True)])
def test_the_stop_rule_needs_the_whole_marker(pico, text, stops):
    from transformers import StopStringCriteria

    tokenizer = load_tokenizer(pico)
    rule = StopStringCriteria(tokenizer, ["###END"])
    other = tokenizer("plain words here", add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    longest = max(len(ids), len(other))
    batch = torch.tensor([[5] * (longest - len(row)) + row for row in (ids, other)])
    assert rule(batch, None).tolist() == [stops, False]


def test_checkpoint_decoding_settings_are_ignored(pico, tmp_path):
    folder = shutil.copytree(pico, tmp_path / "opinionated")
    content = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(
        content | {"do_sample": True, "temperature": 9.0, "top_p": 0.1, "repetition_penalty": 5.0}))
    assert answer_batch(_loaded(folder), ["How do"], Decoding(12), 0) == answer_batch(_loaded(pico), ["How do"],
                                                                                     Decoding(12), 0)


def test_files_and_rerun(pico, data, tmp_path, caplog):
    folder = _infer(pico, tmp_path, data) / "raw"
    rows = _rows(folder)
    with (folder / "outputs_final.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["", "prompts", "outputs"]
    assert [line[1:] for line in table[1:]] == [[row["rendered"], row["output"]] for row in rows]
    assert [row["index"] for row in rows] == list(range(32))
    assert rows[0]["prompt"] == "How do I bad thing 0?".replace("I bad", "I do bad")
    stamp = (folder / "outputs_final.csv").stat().st_mtime_ns
    _infer(pico, tmp_path, data)
    assert (folder / "outputs_final.csv").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("counts", [("--dtype", "bfloat16"), ("--dtype", "auto"), ("--do_sample",)])
def test_answers_in_other_batches_are_other_answers(pico, data, tmp_path, capsys, counts, multiplies):
    multiplies(True)
    folder = _infer(pico, tmp_path, data, *counts) / "raw"
    assert manifest.read(folder)["config"]["batch_size"] == 5
    with pytest.raises(SystemExit) as stop:
        _infer(pico, tmp_path, data, *counts, "--batch_size", "7")
    assert stop.value.code == 2
    assert "batch_size: 5 there, 7 here" in capsys.readouterr().err
    _infer(pico, tmp_path, data, *counts, "--batch_size", "7", "--overwrite")
    assert manifest.read(folder)["config"]["batch_size"] == 7


def test_in_float32_batches_decide_nothing(pico, data, tmp_path, caplog):
    folder = _infer(pico, tmp_path, data) / "raw"
    caplog.set_level("INFO")
    _infer(pico, tmp_path, data, "--batch_size", "7")
    assert f"{folder}: already answered" in caplog.text
    assert "batch_size" not in manifest.read(folder)["config"]


def test_answers_that_did_not_record_their_batches_stay_readable(pico, data, tmp_path, caplog):
    folder = _infer(pico, tmp_path, data, "--dtype", "bfloat16") / "raw"
    old = manifest.read(folder)
    del old["config"]["batch_size"]
    manifest.write_json(folder / manifest.MANIFEST, old)
    caplog.set_level("INFO")
    _infer(pico, tmp_path, data, "--dtype", "bfloat16", "--batch_size", "7")
    assert f"{folder}: already answered" in caplog.text


@pytest.fixture
def multiplies(monkeypatch):
    """Let the processor multiply in bfloat16, or not."""
    return lambda able: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": able})


def test_auto_is_recorded_as_the_dtype_that_it_was(pico, data, tmp_path, capsys, caplog, multiplies):
    multiplies(False)
    folder = _infer(pico, tmp_path, data, "--dtype", "auto") / "raw"
    assert manifest.read(folder)["config"]["dtype"] == "float32"
    caplog.set_level("INFO")
    # the dtype by its name is the same answers
    _infer(pico, tmp_path, data, "--dtype", "float32")
    assert f"{folder}: already answered" in caplog.text
    # and the same flag on another processor is not
    multiplies(True)
    with pytest.raises(SystemExit) as stop:
        _infer(pico, tmp_path, data, "--dtype", "auto")
    assert stop.value.code == 2
    assert "dtype: float32 there, bfloat16 here" in capsys.readouterr().err


def test_answers_that_say_auto_are_finished_for_a_call_that_says_auto(pico, data, tmp_path, capsys, caplog):
    folder = _infer(pico, tmp_path, data, "--dtype", "auto") / "raw"
    old = manifest.read(folder)
    old["config"] |= {"dtype": "auto"}
    old["config"].pop("batch_size", None)
    manifest.write_json(folder / manifest.MANIFEST, old)
    caplog.set_level("INFO")
    _infer(pico, tmp_path, data, "--dtype", "auto")
    assert f"{folder}: already answered" in caplog.text
    assert f"{folder}: says --dtype auto and not what that was; taken for" in caplog.text
    # nobody knows whether they are these
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(SystemExit):
            _infer(pico, tmp_path, data, "--dtype", dtype)
        assert f"dtype: auto there, {dtype} here" in capsys.readouterr().err


def test_empty_answer_survives(tmp_path):
    row = {"index": 0, "rendered": "p", "output": "", "finish": "stop"}
    inference.write_rows(tmp_path, [row])
    with (tmp_path / "outputs_final.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["0", "p", ""]
    assert _rows(tmp_path) == [row]


@pytest.mark.parametrize("sampling", [(), ("--do_sample", "--temperature", "1.5")])
def test_resume_by_batch(pico, data, tmp_path, monkeypatch, sampling):
    whole = _rows(_infer(pico, tmp_path / "whole", data, *sampling) / "raw")
    real, count = hf.answer_batch, []

    def dies(*args, **kwargs):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(hf, "answer_batch", dies)
        with pytest.raises(KeyboardInterrupt):
            _infer(pico, tmp_path / "cut", data, *sampling)
    folder = tmp_path / "cut" / "inference" / "safety" / "test"
    assert not (folder / "raw").exists()
    partial = folder / ".raw.answers.jsonl"
    partial.write_text(partial.read_text() + '{"3": [{"index')  # a torn last line
    calls = []
    monkeypatch.setattr(hf, "answer_batch", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    assert _rows(_infer(pico, tmp_path / "cut", data, *sampling) / "raw") == whole
    assert len(calls) == 7 - 3
    assert not partial.exists()


def test_moe_runs_leave_router_shares(pico, data, tmp_path):
    build_moe(pico, tmp_path, data)
    _infer(pico, tmp_path, data, "--cross_task", "raw_moe,safety")
    shares = np.load(tmp_path / "observation" / "safety_raw_moe.npy", allow_pickle=False)
    assert shares.shape == (2, 3)
    assert shares.sum(1) == pytest.approx(np.ones(2), abs=1e-5)
    assert (tmp_path / "observation" / "safety_raw_moe.png").stat().st_size > 1000
    assert not (tmp_path / "observation" / "safety_safety.png").exists()
    args = parse(InferenceArgs, common(pico, tmp_path)[:-2]).args
    moe, dense = load_run("raw_moe", args), load_run("safety", args)
    assert moe.model.generation_config.to_dict() == dense.model.generation_config.to_dict()


def test_a_retrained_run_is_not_taken_for_the_old_one(pico, data, tmp_path, capsys):
    align(pico, tmp_path, data, "safety", "--moe_flag", "0")
    _infer(pico, tmp_path, data, "--cross_task", "safety")
    align(pico, tmp_path, data, "safety", "--moe_flag", "0", "--learning_rate", "0.05", "--overwrite")
    with pytest.raises(SystemExit) as stop:
        _infer(pico, tmp_path, data, "--cross_task", "safety")
    assert stop.value.code == 2
    assert "holds a run with another configuration" in capsys.readouterr().err
    assert _rows(_infer(pico, tmp_path, data, "--cross_task", "safety", "--overwrite") / "cross_safety")


def test_a_checkpoint_answers_too(pico, data, tmp_path, capsys):
    align(pico, tmp_path, data, "safety", "--moe_flag", "0", "--save_steps", "1")
    assert _rows(_infer(pico, tmp_path, data, "--cross_task", "safety", "--checkpoint_number", "1") / "cross_safety_1")
    with pytest.raises(SystemExit):
        _infer(pico, tmp_path, data, "--cross_task", "safety", "--checkpoint_number", "77")
    assert "--checkpoint_number 77" in capsys.readouterr().err


def test_a_checkpoint_and_a_run_of_its_name_do_not_share_a_folder(pico, data, tmp_path, capsys, monkeypatch):
    align(pico, tmp_path, data, "safety", "--moe_flag", "0", "--save_steps", "1")
    shutil.copytree(tmp_path / "outputs" / "safety", tmp_path / "outputs" / "safety_1")
    monkeypatch.setattr("models.runs.load_run", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit) as stop:
        _infer(pico, tmp_path, data, "--cross_task", "safety", "--checkpoint_number", "1")
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--checkpoint_number 1: its answers and scores go to cross_safety_1" in said
    assert "run 'safety_1'" in said


def test_missing_runs_are_all_named(pico, data, tmp_path, capsys):
    align(pico, tmp_path, data, "safety", "--moe_flag", "0")
    with pytest.raises(SystemExit) as stop:
        _infer(pico, tmp_path, data, "--cross_task", "nothing,safety,neither")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "run 'nothing'" in err
    assert "run 'neither'" in err
    assert "there: safety" in err


def test_another_base_is_refused(pico, data, tmp_path, capsys):
    align(pico, tmp_path, data, "safety", "--moe_flag", "0")
    other = make_pico(tmp_path / "other", seed=5)
    with pytest.raises(SystemExit):
        _infer(other, tmp_path, data, "--cross_task", "safety")
    said = capsys.readouterr().err
    assert "was trained on another base" in said
    assert f"give its base with --model_name_or_path (adapter_config.json names {pico})" in said
