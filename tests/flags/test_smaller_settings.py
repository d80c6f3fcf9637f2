"""Memory that runs out ends a command with the settings that need less; other errors keep their traceback."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from errors import UserError, exit_on_user_error, fits, out_of_memory
from flags.memory import smaller


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which is told by its name."""


CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:132] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
                   "allocate 70368744177664 bytes. Error code 12 (Cannot allocate memory)")


@pytest.mark.parametrize("error", [CPU, MemoryError(), OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
                                   OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError("std::bad_alloc")])
def test_memory_that_ran_out_is_told_whatever_said_so(error):
    assert out_of_memory(error)
    with pytest.raises(UserError, match=r"^out of memory \(.+\): try --batch_size 8 \(now 16\)$"), \
            fits(["--batch_size 8 (now 16)"]):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("memory"), OSError(errno.ENOENT, "no file")])
def test_another_error_is_left_alone(error):
    assert not out_of_memory(error)
    with pytest.raises(type(error)) as raised, fits(["--batch_size 8"]):
        raise error
    assert raised.value is error


def test_torchs_own_source_line_is_left_out():
    with pytest.raises(UserError) as raised, fits([]):
        raise CPU
    assert str(raised.value).startswith("out of memory (can't allocate memory: you tried to allocate 70368744177664 bytes")


def test_a_command_without_such_settings_ends_in_a_sentence_too(capsys):
    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        raise MemoryError
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: out of memory (MemoryError): end other programs, or take a machine with more\n"


@pytest.mark.parametrize(("number", "words"), [(errno.EDQUOT, "your quota is used up"), (errno.EFBIG, "grow that large"),
                                               (errno.ENOSPC, "the disk is full")])
def test_limits_of_disks_are_told_also_where_a_library_put_them_into_words(number, words, capsys):
    for error in (OSError(number, "x", "FILE"), Exception(f"I/O error: x (os error {number})")):
        with pytest.raises(SystemExit) as stopped, exit_on_user_error():
            raise error
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err


def test_training_trades_rows_for_steps_first():
    args = SimpleNamespace(base_quantization=None, dtype="float32", model_max_length=2048)
    training = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    assert smaller(args, training) == [
        "--per_device_train_batch_size 4 --gradient_accumulation_steps 4 (as many rows a step as now)",
        "--gradient_checkpointing true", "--base_quantization nf4", "--dtype bfloat16", "--model_max_length 1024 (now 2048)"]


def test_what_is_smallest_already_is_not_offered():
    args = SimpleNamespace(base_quantization="nf4", dtype="bfloat16", batch_size=1)
    assert smaller(args, {"per_device_train_batch_size": 1, "gradient_checkpointing": True}) == []


def test_a_merge_is_offered_a_smaller_promise():
    assert smaller(SimpleNamespace(memory_gb=0.0)) == ["--memory_gb 1"]
    assert smaller(SimpleNamespace(memory_gb=3.0)) == ["--memory_gb 1.5"]
