"""benchmarks/gpu_check: limits by hand, parts that fail or hang are told, the table says what failed and why."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch

from benchmarks import made_up
from benchmarks.gpu_check import steps, table
from benchmarks.gpu_check.place import SHAPES, Place, Shape


def test_the_large_shape_is_llama_2_7b():
    seven = SHAPES["7b"]
    # 6.74 B weights in all: body, head, as large an embedding
    assert seven.body + 2 * seven.head == pytest.approx(6.738e9, rel=1e-3)
    assert (seven.rows, seven.tokens, seven.batches) == (8, 300, (1, 32))


def test_limits_by_hand():
    shape = Shape(layers=2, hidden=4, width=6, heads=2, vocabulary=10, rows=1, tokens=4, pairs=1, prompt=2, rank=2,
                  batches=(1,), asked=3, new=2, steps=1)
    assert (shape.body, shape.head) == (2 * (4 * 16 + 3 * 24), 40)
    # 2 forwards and 2 back for every token, the head for answers alone
    assert shape.training_operations(7, 5) == 4 * (272 * 7 + 40 * 5)
    # five prompts through all weights; then two steps: weights of 2 bytes, keys and values of 3 and of 4 places
    prompts, weights, places = 2 * 272 * 5 * 3 / 100, 2 * 312 * 2 / 10, 2 * 2 * 4 * 2 * 5 * (3 + 4) / 10
    assert shape.generation_seconds(5, 2, gemm=100, bandwidth=10) == pytest.approx(prompts + weights + places)


def test_a_made_up_base_never_ends_an_answer(tmp_path):
    shape = SHAPES["pico"]
    place = Place(shape, torch.device("cpu"), torch.bfloat16, made_up.tokenizer(shape.vocabulary), tmp_path)
    model = place.base()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logits = model(torch.tensor([place.drawn(9, 0)])).logits
    assert (logits[..., place.tokenizer.eos_token_id] == 0).all()
    # the same in every part
    assert torch.equal(model.lm_head.weight, place.base().lm_head.weight)
    assert [len(row["input_ids"]) for row in place.rows()] == [24] * 12
    assert all(min(row["input_ids"]) >= 3 for row in place.rows())


def test_a_made_up_tokenizer_takes_every_byte():
    tokenizer = made_up.tokenizer(384)
    ids = tokenizer.encode("naïve ≠ 中", add_special_tokens=False)
    assert tokenizer.decode(ids) == "naïve ≠ 中"
    assert len(ids) == len("naïve ≠ 中".encode())
    with pytest.raises(ValueError, match="a vocabulary of 258 has no place"):
        made_up.tokenizer(258)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_part_comes_back_from_its_process(device):
    # a fork for a CPU, a fresh process for a GPU; neither asks for the device itself
    assert steps.apart(max, 2, 7, device=device, limit_s=60) == 7


@pytest.mark.parametrize(("function", "words", "why"), [
    (int, ("x",), "ValueError: invalid literal for int"),
    (time.sleep, (60,), "took longer than 0.5 s"),
    (os._exit, (3,), "its process ended by itself, exit code 3"),
])
def test_a_part_that_fails_hangs_or_dies_is_told(function, words, why):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=why):
        steps.apart(function, *words, device="cpu", limit_s=0.5 if function is time.sleep else 30)
    assert time.monotonic() - start < 30


MOE = {"tokens": 4, "direction": "forward", "seconds": {"ours": 2e-3}, "ours_to_dense": 1.5, "bar_to_dense": 1.2,
       "best_backend": "eager", "backend_to_ours": 2.0, "peak_bytes": {"ours": 2**30}, "of_limit": 0.25,
       "outputs_equal": True, "error": 1e-3}
STEP = {"error": None, "seconds": 2.0, "tokens_per_second": 1200.0, "peak_gib": 30.5, "of_limit": 0.5}


@pytest.fixture
def folder(tmp_path):
    """Writes a folder as the script does: name -> (exit code, log, JSON)."""
    def write(**checks):
        for name, (_, log, content) in checks.items():
            (tmp_path / f"{name}.log").write_text(log)
            if content is not None:
                (tmp_path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
        ended = "".join(f"{name}\t{code}\t7\t75\n" for name, (code, _, _) in checks.items())
        (tmp_path / "ended.tsv").write_text(ended)
        return tmp_path
    return write


def test_the_table_of_a_good_run(folder, capsys):
    parts = [STEP | {"part": "SFT"}, STEP | {"part": "generation", "batch": 32},
             STEP | {"part": "DPO, embedded lengths", "pairs_per_second": 3.0},
             STEP | {"part": "DPO, embedded lengths, TRL", "pairs_per_second": 2.0}]
    place = folder(tests=(0, "..\n2 passed in 3 s\n\n", None), race_moe=(0, "", {"rows": [MOE]}),
                   steps=(0, "", {"device": "H100", "shape": "7b", "gemm_flops": 7e14, "bytes_per_second": 3e12,
                                  "rows": parts}),
                   race_generate=(0, "", {"rows": [{"batch": 32, "tokens_per_second": 900.0, "all": [1, 2]}]}))
    with pytest.raises(SystemExit) as stop:
        table.main([str(place)])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said == (place / "gpu_check.md").read_text()
    for line in ("| tests |  | 2 passed in 3 s |  |  |  |",
                 "| MoE layer | 4 tokens, forward | 2 ms, 1.50 x dense (bar 1.2), eager 2.00 x ours | 2,000 | 1.00 | 25% |",
                 "| limits | H100 | GEMM 700 TFLOP/s, copy 3000 GB/s |  |  |  |",
                 "| SFT, 7b |  | 2 s | 1,200 | 30.50 | 50% |",
                 "| generation, 7b | batch 32 | 2 s | 1,200 | 30.50 | 50% |",
                 "| DPO, embedded lengths, 7b |  | 2 s, 1.50 x TRL's pairs/s (bar 1.5) | 1,200 | 30.50 | 50% |",
                 "| generation race |  | batch 32, tokens_per_second 900 | 900 |  |  |"):
        assert line in said
    assert said.rstrip().endswith("8 rows in 28 s; none failed")
    assert len(json.loads((place / "gpu_check.json").read_text())["rows"]) == 8


@pytest.mark.parametrize(("name", "check", "why"), [
    ("tests", (1, "E  boom\n1 failed, 3 passed\n", None), "exit code 1: 1 failed, 3 passed"),
    ("race_mask", (124, "loss within 1e-6\n", None), "took longer than 75 s"),
    ("race_moe", (137, "", None), "took longer than 75 s"),
    ("race_moe", (0, "all well", None), "wrote no race_moe.json"),
    ("race_moe", (0, "", {"rows": [{"tokens": 1}]}), "race_moe.json is not what it should be (KeyError: 'seconds')"),
    ("race_moe", (0, "", {"rows": [MOE | {"outputs_equal": False, "error": 0.3}]}), "outputs differ by 3e-01"),
    ("steps", (1, "", {"device": "", "shape": "7b", "rows": [{"part": "DPO", "error": "OutOfMemoryError: 80 GiB"}]}),
     "OutOfMemoryError: 80 GiB"),
    # cut off after its first part, whose figures stay
    ("steps", (124, "", {"device": "", "shape": "7b", "rows": [STEP | {"part": "SFT"}]}), "took longer than 75 s"),
])
def test_a_check_that_failed_is_a_line_and_an_exit_code(folder, capsys, name, check, why):
    place = folder(**{name: check})
    with pytest.raises(SystemExit) as stop:
        table.main([str(place)])
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert f"failed: {why}" in said
    assert said.rstrip().endswith("1 failed")
    assert sum(row["failed"] for row in table.rows_of(place)) == 1
