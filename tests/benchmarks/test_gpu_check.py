"""benchmarks/gpu_check: limits by hand, parts that fail or hang are told, the table says what failed and why."""

from __future__ import annotations

import argparse
import json
import os
import re
import time

import pytest
import torch

from benchmarks import made_up
from benchmarks.gpu_check import memory, processes, steps, suite, table
from benchmarks.gpu_check.place import SHAPES, SMALLER, Place, Shape
from models.footprint.shapes import shape_of


def test_the_large_shape_is_llama_2_7b():
    seven = SHAPES["7b"]
    # 6.74 B weights in all: body, head, as large an embedding
    assert seven.body + 2 * seven.head == pytest.approx(6.738e9, rel=1e-3)
    assert (seven.rows, seven.tokens, seven.batches) == (8, 300, (1, 32))
    # the plan counts both as it counts a base of that name
    assert seven.counted() == shape_of("meta-llama/Llama-2-7b-hf")
    assert SHAPES[SMALLER["7b"]].counted() == shape_of("TinyLlama/TinyLlama-1.1B-Chat-v1.0")


def test_limits_by_hand():
    shape = Shape(layers=2, hidden=4, width=6, heads=2, vocabulary=10, rows=1, tokens=4, pairs=1, prompt=2, rank=2,
                  batches=(1,), asked=3, new=2, steps=1)
    assert (shape.body, shape.head) == (2 * (4 * 16 + 3 * 24), 40)
    # 2 forwards and 2 back for every token, the head for answers alone
    assert shape.training_operations(7, 5) == 4 * (272 * 7 + 40 * 5)
    assert shape.training_operations(7, 5, every=True) == 6 * (272 * 7 + 40 * 5)
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
    # a fork for a CPU, one of a process that met no driver for a GPU; neither asks for the device itself
    assert steps.apart(max, 2, 7, device=device, limit_s=120) == 7


def _lines(tmp_path, monkeypatch, apart, **more):
    """What ``steps.run`` writes where a part's process is ``apart``."""
    monkeypatch.setattr(steps, "apart", apart)
    args = argparse.Namespace(device="cuda", shape="7b", json=tmp_path / "steps.json",
                              **({"limit_s": 60.0, "total_s": float("inf")} | more))
    found = steps.run(args, ("SFT", "DPO"))
    assert json.loads(args.json.read_text()) == found
    return found


def test_parts_start_otherwise_where_a_library_met_the_driver(tmp_path, monkeypatch):
    starts = []

    def apart(function, *words, device, limit_s, start):
        starts.append(start)
        if not start:
            raise RuntimeError("RuntimeError: Cannot re-initialize CUDA in forked subprocess. To use CUDA with ...")
        return (1e15, 1e12, "a card") if function is steps.speeds else [STEP | {"part": words[0]}]

    found = _lines(tmp_path, monkeypatch, apart)
    assert starts == ["", "spawn", "spawn", "spawn"]
    assert (found["device"], [row["part"] for row in found["rows"]]) == ("a card", ["SFT", "DPO"])


def test_parts_are_measured_without_a_gemm_and_told_where_no_time_is_left(tmp_path, monkeypatch):
    def apart(function, *words, device, limit_s, start):
        if function is steps.speeds:
            raise RuntimeError("OutOfMemoryError: 80 GiB")
        assert limit_s <= 20
        monkeypatch.setattr(steps, "LEAST", 60)
        return [STEP | {"part": words[0], "of_limit": 0.0}]

    found = _lines(tmp_path, monkeypatch, apart, total_s=20.0)
    assert [(row["part"], row["error"]) for row in found["rows"]] == [
        ("GEMM and bandwidth", "OutOfMemoryError: 80 GiB"), ("SFT", None),
        ("DPO", "not run: the parts before it took the 20 s of all")]
    rows = table.steps(found)
    assert [row["of the limit"] for row in rows] == [None] * 4  # no GEMM, no limit
    assert f"torch {torch.__version__.partition('+')[0]}" in rows[0]["measured"]


def _raises():
    from models.moe.kernel_sum import activation_name

    activation_name(lambda x: x.nowhere)


@pytest.mark.parametrize(("function", "words", "why"), [
    (int, ("x",), "ValueError: invalid literal for int"),
    # with the last line of ours that it went through
    (_raises, (), r"AttributeError: 'Tensor' object has no attribute 'nowhere' \(tests/benchmarks/test_gpu_check.py:\d+\)"),
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
GENERATED = {"batch": 32, "side": "continuous", "tokens_per_second": 900.0, "seconds": 2.0, "hf_is_faster": 1.25, "bar": 1.0,
             "same_text": 30, "prompts": 32, "peak_bytes": 2**31, "of_limit": 0.4}
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
    parts[0] |= {"plan_bytes": {"allocated": 33e9, "reserved": 36e9, "device": 37.5e9},
                 "held_bytes": {"allocated": 30e9, "reserved": 35e9, "device": 36e9}}
    parts[1] |= {"plan_bytes": {"allocated": 24e9, "reserved": 24e9, "device": 25.5e9},
                 "held_bytes": {"allocated": 20e9, "reserved": 21e9, "device": 22e9}}
    place = folder(tests=(0, "", {"passed": 2, "skipped": 0, "failed": [], "seconds": 3.2, "processes": 8}),
                   race_moe=(0, "", {"rows": [MOE]}),
                   steps=(0, "", {"device": "H100", "shape": "7b", "gemm_flops": 7e14, "bytes_per_second": 3e12,
                                  "versions": {"torch": "2.11.0", "triton": "3.6.0"}, "rows": parts}),
                   processes=(0, "", {"rows": [{"name": "DDP, full", "measured": "3 losses", "error": None}]}),
                   race_generate=(0, "", {"shape": "7b", "rows": [GENERATED, {"batch": 1, "side": "hf", "error": None}
                                                                  | GENERATED]}))
    with pytest.raises(SystemExit) as stop:
        table.main([str(place)])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said == (place / "gpu_check.md").read_text()
    for line in ("| tests |  | 2 passed, 0 skipped; 3 s, 8 processes |  |  |  |",
                 "| MoE layer | 4 tokens, forward | 2 ms, 1.50 x dense (bar 1.2), eager 2.00 x ours | 2,000 | 1.00 | 25% |",
                 "| versions |  | torch 2.11.0, triton 3.6.0 |  |  |  |",
                 "| limits | H100 | GEMM 700 TFLOP/s, copy 3000 GB/s |  |  |  |",
                 "| SFT, 7b |  | 2 s | 1,200 | 30.50 | 50% |",
                 "| generation, 7b | batch 32 | 2 s | 1,200 | 30.50 | 50% |",
                 "| DPO, embedded lengths, 7b |  | 2 s, 1.50 x TRL's pairs/s (bar 1.5) | 1,200 | 30.50 | 50% |",
                 "| processes | DDP, full | 3 losses |  |  |  |",
                 "| generation race, 7b | batch 32, continuous | 2 s, hf is 1.25 x faster (bar 1), same text 30 of 32 | "
                 "900 | 2.00 | 40% |",
                 # tensors, what is kept for them, and the device, each beside its own figure of the plan
                 "| SFT, 7b |  | 33.00 | 30.00 | +10.0% | yes | 36.00 | 35.00 | 37.50 | 36.00 | +4.2% |",
                 "| generation, 7b | batch 32 | 24.00 | 20.00 | +20.0% | NO | 24.00 | 21.00 | 25.50 | 22.00 | +15.9% |"):
        assert line in said
    assert said.rstrip().endswith("11 rows in 35 s; none failed")
    rows = json.loads((place / "gpu_check.json").read_text())["rows"]
    assert len(rows) == 11
    assert [row["held_bytes"]["reserved"] for row in rows if row.get("held_bytes")] == [35e9, 21e9]


@pytest.mark.parametrize(("name", "check", "why"), [
    ("tests", (1, "E  boom\n1 failed, 3 passed\n", None), "exit code 1: 1 failed, 3 passed"),
    ("tests", (1, "", {"passed": 2, "skipped": 0, "seconds": 3, "processes": 1, "failed": [
        {"test": "tests/a/test_b.py::test_c", "why": "CompilationError"}]}), "CompilationError"),
    ("processes", (1, "", {"rows": [{"name": "DDP", "measured": "", "error": "NCCL error"}]}), "NCCL error"),
    ("race_generate", (0, "", {"shape": "7b", "rows": [{"batch": 1, "side": "static", "error": "no nvcc"}]}), "no nvcc"),
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
    assert re.search("; 1 failed$", said, re.M)
    assert sum(row["failed"] for row in table.rows_of(place)) == 1


def test_the_log_of_what_failed_stands_behind_the_table(folder):
    place = folder(race_moe=(1, "10%\r20%\r30%\n\nTraceback\nRuntimeError: boom\n", None))
    with pytest.raises(SystemExit):
        table.main([str(place)])
    assert (place / "gpu_check.md").read_text().endswith(
        "\n## race_moe.log, its end\n\n```\n30%\nTraceback\nRuntimeError: boom\n```\n")


def test_a_check_for_which_no_time_was_left_is_told(tmp_path):
    (tmp_path / "ended.tsv").write_text("steps\t-\t270\t12\n")
    with pytest.raises(SystemExit) as stop:
        table.main([str(tmp_path)])
    assert stop.value.code == 1
    assert "failed: not run: 12 s were left, and it may take 270" in (tmp_path / "gpu_check.md").read_text()


def test_what_a_card_holds_is_told_apart(monkeypatch):
    for name, value in {"max_memory_allocated": 30, "max_memory_reserved": 36, "memory_reserved": 34}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (43, 80))
    # 37 are taken, 34 of them by the allocator, which had 36 at most
    found = memory.held(torch.device("cuda"))
    assert found == {"allocated": 30, "reserved": 36, "device": 39}
    row = memory.compared({"allocated": 33.0, "reserved": 36.0, "device": 39.0}, found)
    assert row["plan_off_by"] == pytest.approx({"allocated": 0.1, "reserved": 0.0, "device": 0.0})
    assert row["peak_gib"] == 30 / 2**30
    # of a CPU there is what the process had resident, which no figure of the plan is held to
    alone = memory.compared({"allocated": 33.0, "reserved": 36.0, "device": 39.0}, memory.held(torch.device("cpu")))
    assert alone["plan_off_by"] == {}
    assert alone["peak_gib"] > 0.05


def test_plans_of_parts_are_those_of_the_command(tmp_path):
    """What 7B parts are planned at, beside docs/scale.md."""
    place = Place(SHAPES["7b"], torch.device("cuda"), torch.bfloat16, None, tmp_path)
    words = ("--preset", "h3fusion", "--moe_flag", "0", "--task_name", "safety", "--per_device_train_batch_size", "8")
    plan = memory.planned(place.flags(*words), place)
    assert plan["device"] / 1e9 == pytest.approx(33.0, abs=0.3)
    assert plan["allocated"] < plan["reserved"] < plan["device"]
    answers = memory.planned(place.answering(32, ""), place, 128)
    experts = memory.planned(place.answering(32, "fused"), place, 128)
    # three experts of rank 8 on three matrices of every layer, in bfloat16
    assert experts["allocated"] - answers["allocated"] == 2 * 3 * 8 * 32 * 3 * (4096 + 11008)


VERBOSE = """tests/m/test_k.py::test_a[(2, 1) x] PASSED   [ 25%]
tests/m/test_k.py::test_b FAILED               [ 50%]
=========== short test summary info ===========
FAILED tests/m/test_k.py::test_b - triton.CompilationError: at 3:4
"""


def test_verdicts_are_read_off_what_pytest_says():
    assert suite.read(VERBOSE) == (
        {"tests/m/test_k.py::test_a[(2, 1) x]": "PASSED", "tests/m/test_k.py::test_b": "FAILED"},
        {"tests/m/test_k.py::test_b": "triton.CompilationError: at 3:4"})


def test_shares_of_the_tests_run_side_by_side_and_the_unfinished_are_named(monkeypatch, tmp_path):
    # a pytest of the shell: one verdict, then it sleeps where it got the second share
    script = 'echo "$1 PASSED [ 50%]"; case $1 in *b*) exec sleep 60 ;; esac'
    monkeypatch.setattr(suite, "_PYTEST", ("bash", "-c", f'shift 2; {script}', "-"))
    found = suite.run(["tests/x.py::a", "tests/x.py::b", "tests/x.py::c", "tests/x.py::d"], 2, 3.0)
    assert (found["passed"], found["processes"]) == (2, 2)
    assert {row["test"]: row["why"] for row in found["failed"]} == dict.fromkeys(
        ("tests/x.py::c", "tests/x.py::d"), "had not ended after 3 s")


@pytest.mark.parametrize(("got", "said"), [
    ([2.0, 1.5], "2 losses, not 3"), ([2.0, 1.5, 1.2 + 1e-3], "3 losses within 8e-04"), ("OSError: no", "OSError: no"),
    ([2.0, 1.5, float("nan")], "3 losses within nan"), (None, "the run without a launcher gave no losses")])
def test_losses_that_are_not_near_are_told(got, said):
    with pytest.raises(RuntimeError, match=said):
        processes.near(got, [2.0, 1.5, 1.2], 3)
    assert processes.near([1.2 + 1e-7], [2.0, 1.5, 1.2], 1) == "1 loss within 8e-08 of those without a launcher"


def test_rows_of_launched_runs(tmp_path, monkeypatch):
    """One launch failed, one run of another raised; all else is told."""
    monkeypatch.setattr(processes, "_train_loss", lambda home, run: 1.5)
    full = [2.0, 1.5, 1.2]
    (tmp_path / "alone.json").write_text(json.dumps({"alone, LoRA": full, "alone, full": full,
                                                     "alone, resumed, full": [1.2]}))
    (tmp_path / "launched.json").write_text(json.dumps({"DDP, LoRA": full, "DDP, full": "RuntimeError: NCCL"}))
    for side in ("one", "two"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "outputs_final.csv").write_text(side)
    found = {row["name"]: row["error"] for row in processes.rows(tmp_path, {"launched": "took too long: x"})}
    assert {name for name, error in found.items() if error is None} == {
        "alone, LoRA", "alone, full", "alone, resumed, full", "DDP, LoRA", "FSDP2 by accelerate launch, LoRA"}
    assert found["alone, LoRA, bf16"] == "was not reached"
    assert found["DDP, full"] == "RuntimeError: NCCL"
    assert found["FSDP2, resumed, full"] == "took too long: x"
    assert found["answers of two processes"] == "outputs_final.csv: not the bytes of one process"


def test_a_launchers_own_report_is_no_reason():
    said = "step 1\nerror: --device cuda: no GPU\nE1127 torch.distributed.elastic ...\nChildFailedError: \n  x FAILED\n"
    assert processes.reason(said) == "error: --device cuda: no GPU"
    assert processes.reason("") == "it said nothing"


def test_commands_of_a_launch(tmp_path):
    started = processes.launches(tmp_path, "cuda")
    both = [started[f"answers {rank}"] for rank in range(2)]
    assert [words[words.index("--node_rank") + 1] for words in both] == ["0", "1"]
    # they meet at one port; the other launches have theirs
    ports = [words[words.index("--master_port") + 1] for words in (*both, started["launched"])]
    assert ports[0] == ports[1] != ports[2]
    assert "scripts/accelerate/fsdp2.yaml" in started["accelerate"]
