"""One command at a time writes a run: the second waits, a kill drops the lock, ranks do not wait for each other."""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import signal
import threading
import time

import pytest

import locks
import manifest
from errors import UserError

CONFIG = {"seed": 1}
FORK = multiprocessing.get_context("fork")


def writes(target, begun, go):
    """A command in a process of its own: says when it has begun, ends when it is told to."""
    with manifest.writing(target, "test", CONFIG) as run:
        begun.touch()
        while not go.exists():
            time.sleep(0.01)
        (run.folder / "file").write_text("one")


@pytest.fixture
def writer(tmp_path):
    """(target, the process that writes it, the file that lets it end)."""
    # files and no events: a process that is killed while it waits for one blocks whoever sets it
    target, begun, go = tmp_path / "outputs" / "run", tmp_path / "begun", tmp_path / "go"
    process = FORK.Process(target=writes, args=(target, begun, go))
    process.start()
    while not begun.exists():
        assert process.is_alive()
        time.sleep(0.01)
    yield target, process, go
    go.touch()
    process.join()


def test_the_second_command_waits_and_finds_the_run_finished(writer, caplog):
    target, process, go = writer
    threading.Timer(0.5, go.touch).start()
    with caplog.at_level(logging.WARNING):
        assert manifest.finished(target, CONFIG)
    assert f"{target} is being written by process {process.pid} on " in caplog.text
    assert "waiting for it" in caplog.text


def test_two_that_began_at_once_lose_nothing(writer):
    target, process, go = writer
    threading.Timer(0.5, go.touch).start()
    # as if both had looked before either began: this one is told, and the other's run stays whole
    with pytest.raises(UserError, match="another command finished this run while this one waited"), \
            manifest.writing(target, "test", CONFIG) as run:
        (run.folder / "file").write_text("two")
    assert (target / "file").read_text() == "one"
    assert [path.name for path in target.parent.iterdir()] == ["run"]


def test_what_another_command_is_writing_is_not_cleared_away(writer):
    target, process, go = writer
    with pytest.raises(BlockingIOError), locks.lock_path(target).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (target.parent / ".run.partial").is_dir()


def test_the_lock_of_a_killed_command_keeps_nobody_out(writer):
    target, process, go = writer
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert locks.lock_path(target).exists()
    assert not manifest.finished(target, CONFIG)
    assert not locks.lock_path(target).exists()
    with manifest.writing(target, "test", CONFIG) as run:
        (run.folder / "file").write_text("two")
    assert sorted(path.name for path in target.parent.iterdir()) == ["run"]


def test_a_rank_does_not_wait_for_the_first(writer, monkeypatch):
    target, process, go = writer
    monkeypatch.setenv("RANK", "1")
    assert not manifest.finished(target, CONFIG)
    with manifest.writing(target, "test", CONFIG) as run:
        assert run.folder.name == ".run.partial.1"


def test_a_file_system_without_locks_is_no_error(tmp_path, monkeypatch):
    def none(file, kind):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with locks.alone(tmp_path / "run") as waited:
        assert not waited
    assert not list(tmp_path.iterdir())


def test_a_waiter_makes_a_new_lock_where_its_own_was_removed(tmp_path):
    target = tmp_path / "run"
    order = FORK.Queue()

    def one(name):
        with locks.alone(target):
            order.put((name, "in"))
            order.put((name, "out"))

    processes = [FORK.Process(target=one, args=(name,)) for name in range(5)]
    for process in processes:
        process.start()
    seen = [order.get(timeout=60) for _ in range(10)]
    for process in processes:
        process.join()
    # never two at once: what goes in comes out before the next goes in
    assert all(seen[i][0] == seen[i + 1][0] and (seen[i][1], seen[i + 1][1]) == ("in", "out") for i in range(0, 10, 2))
    assert not list(tmp_path.iterdir())
