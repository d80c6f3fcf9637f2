"""Inference on two processes: the file of one process, byte for byte; nothing lost when one dies; one voice."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from launched import RAISED, launched
from pico import make_adapter

import inference
import manifest
from models.generation import hf
from models.generation.kept import keeping

RUNS = "base,one,one@0.5_two@0.5"


@pytest.fixture
def asked(pico, tmp_path):
    """Two adapters, 31 prompts in batches of 3, and a call (results folder, *flags) of inference.py."""
    for seed, name in enumerate(("one", "two")):
        make_adapter(pico, tmp_path / "whole" / "outputs" / name, seed=seed)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"How do I do thing {i}?{' x' * (i % 7)}", "response": "no",
                                        "is_safe": True}) + "\n" for i in range(31)))

    def call(folder, *flags):
        results = tmp_path / folder
        if not results.exists():
            shutil.copytree(tmp_path / "whole" / "outputs", results / "outputs")
        inference.main(["--task_name", "safety", "--data_path", str(rows), "--max_new_tokens", "6", "--batch_size", "3",
                        "--model_name_or_path", str(pico), "--dtype", "float32", "--threads", "1", "--cross_task", RUNS,
                        "--output_dir", str(results), *flags])
        return results / "inference" / "safety" / "test"
    return call


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("outputs_final.*")}


@pytest.mark.parametrize("flags", [(), ("--do_sample",)])
def test_two_processes_write_the_file_of_one(asked, tmp_path, flags):
    whole = files(asked("whole", *flags))
    assert len(whole) == 6
    seen = tmp_path / "seen"
    real = hf.answer_batch

    def noted(loaded, prompts, *rest):
        with seen.open("a") as file:
            file.write(f"{os.environ['RANK']} {loaded.name} {len(prompts)} {prompts[0]!r}\n")
        return real(loaded, prompts, *rest)

    hf.answer_batch, codes = noted, []
    try:
        codes, said = launched(lambda rank: asked("two", *flags))
    finally:
        hf.answer_batch = real
    assert codes == [0, 0], said
    folder = tmp_path / "two" / "inference" / "safety" / "test"
    assert files(folder) == whole
    # whole batches, each by one process, and both had a share
    lines = [line.split(" ", 1) for line in seen.read_text().splitlines()]
    assert len(lines) == len({batch for _, batch in lines}) == 3 * 11
    assert {rank for rank, _ in lines} == {"0", "1"}
    assert sum(int(batch.split(" ")[1]) for _, batch in lines) == 3 * 31
    # one voice, one line of the registry a run, nothing left behind
    assert "31 answers" in said[0]
    assert not said[1].strip()
    assert len(manifest.registry(tmp_path / "two")) == 3
    assert sorted(path.name for path in folder.iterdir()) == sorted({path.parts[0] for path in whole})
    # and found again by any number of processes
    stamps = [path.stat().st_mtime_ns for path in folder.rglob("outputs_final.*")]
    codes, said = launched(lambda rank: asked("two", *flags), 3)
    assert codes == [0] * 3
    assert said[0].count("already answered") == 3
    assert stamps == [path.stat().st_mtime_ns for path in folder.rglob("outputs_final.*")]


@pytest.mark.parametrize(("dies", "again"), [(0, 1), (1, 1), (1, 3)])
def test_a_process_that_dies_loses_its_batch_alone(asked, tmp_path, monkeypatch, dies, again):
    whole = files(asked("whole", "--cross_task", "one"))
    real = hf.answer_batch

    def killed(rank):
        count = []

        def answer(*args):
            count.append(1)
            if rank == dies and len(count) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        hf.answer_batch = answer
        asked("cut", "--cross_task", "one")

    codes, said = launched(killed)
    assert codes[dies] == -signal.SIGKILL
    assert codes[1 - dies]
    folder = tmp_path / "cut" / "inference" / "safety" / "test"
    assert not (folder / "cross_one").exists()
    kept = {number for path in folder.glob(".cross_one.answers*.jsonl") for line in path.read_text().splitlines()[1:]
            for number in json.loads(line)}
    # what the dead one had answered, and the other until it was told
    assert len(kept) >= 2
    answered = tmp_path / "answered"

    def noted(*args):
        with answered.open("a") as file:
            file.write("x")
        return real(*args)

    monkeypatch.setattr(hf, "answer_batch", noted)
    if again == 1:
        asked("cut", "--cross_task", "one")
    else:
        codes, said = launched(lambda rank: asked("cut", "--cross_task", "one"), again)
        assert codes == [0] * again, said
    assert files(folder) == whole
    assert len(answered.read_text()) == 11 - len(kept)
    assert [path.name for path in folder.iterdir()] == ["cross_one"]


@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_of_one_process_is_said_once(asked, monkeypatch, fails):
    def broken(rank):
        if rank == fails:
            monkeypatch.setattr(inference, "answer_all", lambda *_: 1 / 0)
        asked("broken", "--cross_task", "one")

    codes, said = launched(broken)
    assert codes[fails] == RAISED
    assert codes[1 - fails]
    assert "ZeroDivisionError" in said[fails]
    # the other one was waiting, and says nothing of its own
    assert "error" not in said[1 - fails].lower()


def test_an_error_of_all_is_said_once_before_and_after_they_meet(asked, monkeypatch):
    codes, said = launched(lambda rank: asked("out", "--cross_task", "nothing"))
    assert 2 in codes
    assert "".join(said).count("error: --cross_task: ") == 1
    codes, said = launched(lambda rank: asked("out", "--batch_size", "none"))
    assert codes[0] == 2
    assert said[0].count("error: --batch_size none") == 1
    assert not said[1].strip()
    codes, said = launched(lambda rank: asked("out", "--device_map", "auto"))
    assert "2 processes were started" in said[0]


def test_a_second_command_on_the_folder_waits_and_takes_what_is_there(asked, tmp_path, caplog, monkeypatch):
    done = asked("done", "--cross_task", "one")
    folder = tmp_path / "whole" / "inference" / "safety" / "test"
    monkeypatch.setattr(hf, "answer_batch", lambda *_: 1 / 0)
    with ThreadPoolExecutor() as pool:
        with keeping(folder / "cross_one"):
            second = pool.submit(asked, "whole", "--cross_task", "one")
            until = time.monotonic() + 120
            while "cross_one: another command is answering into this folder" not in caplog.text:
                assert time.monotonic() < until
                assert not second.done()
                time.sleep(0.02)
            shutil.copytree(done / "cross_one", folder / "cross_one")
        assert second.result() == folder
    assert files(folder) == files(done)
    assert [path.name for path in folder.iterdir()] == ["cross_one"]


def test_answers_that_a_kill_left_beside_finished_ones_are_removed(asked):
    folder = asked("whole", "--cross_task", "one")
    for name in (".cross_one.answers.jsonl", ".cross_one.answers.1.jsonl"):
        (folder / name).write_text("{}\n")
    # those of a command that is answering anew are its own
    with (folder / ".cross_one.answers.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        asked("whole", "--cross_task", "one")
        assert len(list(folder.iterdir())) == 3
    asked("whole", "--cross_task", "one")
    assert [path.name for path in folder.iterdir()] == ["cross_one"]


def test_a_lock_on_a_file_that_is_gone_does_not_count(tmp_path, monkeypatch):
    real, taken = fcntl.flock, []

    def late(file, how):
        real(file, how)
        if not taken:
            # the command before ended just now and took its file along
            taken.append(1)
            (tmp_path / ".run.answers.jsonl").unlink()

    monkeypatch.setattr(fcntl, "flock", late)
    with keeping(tmp_path / "run") as kept:
        assert kept.begin({"a": 1}) == set()
        kept.add(0, [{"index": 0}])
        assert len((tmp_path / ".run.answers.jsonl").read_text().splitlines()) == 2
