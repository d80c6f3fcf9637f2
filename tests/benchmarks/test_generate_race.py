"""benchmarks/generate.py: every side gives every prompt the same text in fp32; tokens, memory and the limit are counted."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from pico import make_pico

from benchmarks import generate as race
from benchmarks import generate_sides as sides
from benchmarks import moe_sides
from data.records import Record
from models.moe.files import moe_layers

SIDES = ("hf", "static", "continuous", "pipeline", "lm-eval", "generate_batch")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A pico model in place of the embedded one, records in place of the embedded sets; returns its folder."""
    base = make_pico(tmp_path / "base", seed=3)
    # as where the race is started by its path
    for name, module in (("generate_sides", sides), ("moe_sides", moe_sides)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("runtime.short_waits", lambda: None)
    monkeypatch.setattr(moe_sides, "limits", lambda dtype, device: (1e9, 1e9))
    monkeypatch.setattr(sides, "base_path", lambda name: base)
    monkeypatch.setattr(sides, "load_records", lambda task, split: [
        Record(prompt=f"{task}: why do I bake {'bread ' * i}?", answer="", objective=0) for i in range(3)])
    return base


def start(monkeypatch, base, *words):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--model", str(base), "--threads", "1", "--pairs", "2", "--new", "5",
                                      *words])
    race.main()


def test_a_race_as_json(small, tmp_path, monkeypatch, capsys):
    file = tmp_path / "race.json"
    start(monkeypatch, small, "--prompts", "7", "--batches", "1,3", "--json", str(file))
    found = json.loads(file.read_text())
    assert [(row["batch"], row["side"]) for row in found["rows"]] == [(b, side) for b in (1, 3) for side in SIDES]
    assert found["outputs_equal"]
    assert found["dtype"] == "float32"
    for row in found["rows"]:
        assert (row["prompts"], row["same_text"]) == (7, 7)
        assert len(row["all"]) == 2
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["of_limit"] == pytest.approx(row["tokens_per_second"] / row["limit_tokens_per_second"])
        hf = next(r for r in found["rows"] if (r["batch"], r["side"]) == (row["batch"], "hf"))
        assert row["hf_is_faster"] == pytest.approx(sum(a / b for a, b in zip(row["all"], hf["all"], strict=True)) / 2)
    assert [row["bar"] for row in found["rows"][:6]] == [None, None, None, 5.0, 1.2, None]
    assert "| 3 | lm-eval |" in capsys.readouterr().out


def test_another_text_is_told(small, tmp_path, monkeypatch):
    file = tmp_path / "race.json"
    monkeypatch.setattr(sides, "one_by_one", lambda loaded, texts, new: lambda: ["something else"] * len(texts))
    start(monkeypatch, small, "--prompts", "3", "--batches", "2", "--sides", "pipeline", "--json", str(file))
    found = json.loads(file.read_text())
    assert [(row["side"], row["same_text"]) for row in found["rows"]] == [("hf", 3), ("pipeline", 0)]
    assert not found["outputs_equal"]


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_side_that_cannot_run_is_left_out_and_told(small, tmp_path, monkeypatch, capsys, rounds):
    """Before the race begins, or in its second round."""
    calls = []

    def failing():
        calls.append(1)
        if len(calls) > rounds:
            raise ImportError("no such kernel")
        return [""] * 3

    file = tmp_path / "race.json"
    monkeypatch.setattr(sides, "one_by_one", lambda loaded, texts, new: failing)
    start(monkeypatch, small, "--most", "1", "--batches", "3", "--sides", "pipeline,static", "--json", str(file))
    found = json.loads(file.read_text())
    assert [(row["side"], row.get("error"), row.get("prompts")) for row in found["rows"]] == [
        ("hf", None, 3), ("static", None, 3), ("pipeline", "ImportError: no such kernel", None)]
    assert found["outputs_equal"]
    assert "| 3 | pipeline | failed: ImportError: no such kernel |" in capsys.readouterr().out


def test_tokens_and_the_limit(small):
    loaded = sides.opened(SimpleNamespace(shape="embedded", model=str(small), device="cpu", dtype="float32", threads=1))
    texts = sides.prompts(loaded, 4)
    # one of each set before the second of any
    assert [text.split(": why")[0].rsplit("\n", 1)[-1] for text in texts] == list(sides.TASKS)
    assert sides.new_tokens(loaded, ["", "a long answer with many tokens in it"], 5) == 1 + 5
    weights = sum(p.numel() for p in loaded.model.parameters()) + sum(b.numel() for b in loaded.model.buffers())
    context = sum(len(loaded.tokenizer(text)["input_ids"]) for text in texts) / 4 + 2.5
    # two layers, two key heads of 8, keys and values, 4 bytes
    cached = 2 * 2 * 2 * 8 * 4 * context
    assert sides.limit(loaded, texts, 3, 5, gemm=1e30, bandwidth=1e6) == pytest.approx(
        3 * 1e6 / (4 * weights + 3 * cached), rel=0.01)
    assert sides.limit(loaded, texts, 3, 5, gemm=1e6, bandwidth=1e30) == pytest.approx(1e6 / (2 * weights), rel=0.01)


def test_memory_beyond_what_was_there():
    kept = torch.ones(10_000_000)
    found, peak = sides.peak_above(lambda: float(torch.ones(20_000_000).sum()), "cpu")
    assert found == 2 * float(kept.sum())
    assert 70e6 < peak < 130e6


@pytest.mark.parametrize("shape", ["7b", "7b-moe"])
def test_random_weights_at_a_shape(small, monkeypatch, shape):
    monkeypatch.setattr(sides, "SHAPE_7B", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                                            "num_attention_heads": 4, "num_key_value_heads": 4,
                                            "max_position_embeddings": 256, "initializer_range": 0.2})
    loaded = sides.opened(SimpleNamespace(shape=shape, device="cpu", dtype="float32"))
    assert len(moe_layers(loaded.model)) == (2 if shape == "7b-moe" else 0)
    texts = sides.prompts(loaded, 5)
    wanted = sides.ours(loaded, texts, "hf", 2, 5)()
    assert len(set(wanted)) > 1
    for name in SIDES[1:]:
        assert race._sides(loaded, texts, name, 2, 5)() == wanted, name


def test_growth_as_json_and_picture(small, tmp_path, monkeypatch):
    file = tmp_path / "growth.json"
    monkeypatch.setattr(race, "GROWTH", (1, 2, 4))
    start(monkeypatch, small, "--sides", "static", "--growth", str(file))
    found = json.loads(file.read_text())
    assert [point["batch"] for point in found["points"]] == [1, 2, 4]
    assert set(found["slopes"]) == {"hf", "static", "limit"}
    assert 0 <= found["slopes"]["limit"] <= 1
    assert file.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(("words", "said"), [(("--sides", "vllm"), "--sides vllm: no such side"),
                                             (("--batches", "0"), "at least 1")])
def test_what_is_wrong_is_said(small, monkeypatch, capsys, words, said):
    with pytest.raises(SystemExit) as stop:
        start(monkeypatch, small, *words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
