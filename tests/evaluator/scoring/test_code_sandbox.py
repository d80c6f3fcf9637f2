from __future__ import annotations

import os
import time

import pytest

from evaluator.scoring import code_sandbox


def run(program, seconds=2, memory=256):
    return code_sandbox.run(program, seconds, memory)


def test_a_right_and_a_wrong_program():
    program = "from typing import List\nimport math\ndef add(a, b):\n    return a {} b\nassert add(2, 3) == 5"
    assert run(program.format("+")).passed
    assert run(program.format("-")).status == "AssertionError"
    assert run("def broken(:").status == "SyntaxError"


def test_an_infinite_loop_ends_at_its_cpu_limit():
    start = time.monotonic()
    assert run("while True: pass", seconds=1).status == "timeout"
    assert time.monotonic() - start < 15


def test_a_sleeper_ends_at_the_wall_clock():
    start = time.monotonic()
    assert run("import time\ntime.sleep(60)", seconds=1).status == "timeout"
    assert time.monotonic() - start < 15


def test_a_memory_hog_gets_a_memory_error():
    assert run("x = bytearray(2 << 30)").status == "MemoryError"
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))").status == "MemoryError"


@pytest.mark.parametrize("how", [
    "open({!r}, 'w').write('x')", "import os\nos.open({!r}, os.O_CREAT | os.O_WRONLY)",
    "import os\nos.mkdir({!r})", "import os\nopen('a', 'w').close()\nos.rename('a', {!r})",
    "import pathlib\npathlib.Path({!r}).touch()",
    "import os\nfd = os.open(os.path.dirname({0!r}), os.O_RDONLY)\n"
    "os.open('outside', os.O_CREAT | os.O_WRONLY, dir_fd=fd)", "import os\nos.symlink({!r}, 'b')\nopen('b', 'w')"])
def test_nothing_is_written_outside_the_folder(tmp_path, how):
    target = tmp_path / "outside"
    assert run(how.format(str(target))).status == "PermissionError"
    assert not target.exists()


def test_an_existing_file_outside_stays(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("whole")
    assert run(f"import os\nos.remove({str(kept)!r})").status == "PermissionError"
    assert run(f"open({str(kept)!r}, 'r+').truncate(0)").status == "PermissionError"
    assert kept.read_text() == "whole"


def test_its_own_folder_is_writable_up_to_a_limit():
    assert run("open('mine', 'w').write('x' * 100)\nassert open('mine').read() == 'x' * 100").passed
    assert not run("open('mine', 'wb').write(b'x' * (3 << 20))").passed


@pytest.mark.parametrize("program", [
    "import socket", "import socket\nsocket.socket()", "import os\nos.system('true')", "import os\nos.fork()",
    "import subprocess\nsubprocess.run(['true'])", "import ctypes", "import urllib.request",
    "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "import os\nos.kill(os.getppid(), 9)"])
def test_sockets_processes_and_its_own_limits_are_refused(program):
    assert run(program).status == "PermissionError"


@pytest.mark.parametrize("program", [
    "import os\nos._exit(0)", "import os\nos.write(1, b'passed')\nos._exit(0)",
    "import sys\nprint('passed')\nsys.exit(0)", "raise KeyboardInterrupt",
    "import __main__\n__main__.verdict('passed')", "import __main__\n__main__.job['token']"])
def test_ending_early_is_not_passing(program):
    assert not run(program + "\nassert False").passed


def test_it_sees_neither_our_environment_nor_our_packages(monkeypatch):
    monkeypatch.setenv("A_SECRET_KEY", "x")
    assert run("import os\nassert 'A_SECRET_KEY' not in os.environ").passed
    assert run("import torch").status == "ModuleNotFoundError"


def test_its_prints_are_thrown_away():
    assert run("for i in range(100000): print('x' * 100)").passed


def test_its_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("open('left', 'w').write('x')").passed
    assert os.listdir(tmp_path) == []


def test_a_system_without_limits_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(code_sandbox.UserError, match="process limits"):
        code_sandbox.check()
