"""Verdicts and limits of a confined program; what attackers tried is in tests/evaluator/sandbox/test_sandbox_attacks.py."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluator.scoring import code_sandbox

ROOT = Path(code_sandbox.__file__).resolve().parents[2]
LACK = code_sandbox.missing()
#: The same probe makes the command refuse; ``test_a_system_that_confines_nothing_is_refused`` then asserts that it does.
confined = pytest.mark.skipif(bool(LACK), reason=f"not confined here: {LACK}")
TEST = "def check(candidate):\n    assert candidate(2, 3) == 5\n"


def run(answer, test=TEST, prompt="def add(a, b):\n", *, seconds=3, memory=256, unsafe=bool(LACK)):
    return code_sandbox.run(prompt, answer, test, "add", seconds, memory, unsafe=unsafe)


def gives(value, test):
    """The outcome of a test of a function that returns one value."""
    return run(f"    return {value}\n", f"def check(candidate):\n    assert {test.format('candidate(0, 0)')}\n")


@pytest.mark.parametrize("unsafe", [pytest.param(False, marks=confined), True])
def test_a_right_and_a_wrong_program(unsafe):
    assert run("    return a + b\n", unsafe=unsafe) == code_sandbox.Outcome(True, "passed")
    assert run("    return a - b\n", unsafe=unsafe).status == "AssertionError"
    assert run("    return (a\n", unsafe=unsafe).status == "SyntaxError"
    assert run("    return c\n", unsafe=unsafe).status == "NameError"
    assert run("    pass\nadd = None\n", unsafe=unsafe).status == "TypeError"


def test_helpers_of_the_prompt_serve_the_tests():
    prompt = "def twice(x):\n    return 2 * x\n\ndef add(a, b):\n    \"\"\"The sum.\"\"\"\n"
    test = ("import random\ndef check(candidate):\n    x = random.randint(0, 9)\n"
            "    assert candidate(twice(x), 1) == 2 * x + 1\n")
    assert run("    return a + b\n", test, prompt).passed


@pytest.mark.parametrize(("value", "test"), [
    ("[1, (2, {3: {4}}), None, 'é\\ud800']", "{} == [1, (2, {{3: {{4}}}}), None, 'é\\ud800']"),
    ("10 ** 5000", "{} == 10 ** 5000"), ("float('inf')", "{} == float('inf')"), ("1j", "{} == 1j"), ("True", "{} is True"),
    ("iter('ab')", "tuple({}) == ('a', 'b')"), ("range(3)", "list({}) == [0, 1, 2]"), ("b'\\0'", "{} == bytes(1)"),
    ("__import__('fractions').Fraction(1, 2)", "{} == .5"), ("__import__('decimal').Decimal('2.0')", "{} == 2"),
    ("{1: 2}.keys()", "{} == {{1}}"), ("{1: 2}.items()", "sorted({}) == [(1, 2)]"),
    ("__import__('collections').Counter('aa')", "{} == {{'a': 2}}"), ("__import__('re').match('a', 'a')", "{}")])
def test_results_cross_as_what_they_are(value, test):
    assert gives(value, test).passed
    assert gives("'another'", test if "==" in test or "is" in test else "not {}").status == "AssertionError"


def test_an_object_that_equals_everything_equals_nothing_here():
    always = "    __eq__ = lambda self, other: True\n"
    assert run(f"    return Same()\nclass Same:\n{always}").status == "AssertionError"
    assert run(f"    return Number(5)\nclass Number(int):\n{always}").passed
    assert run(f"    return Number(4)\nclass Number(int):\n{always}").status == "AssertionError"


def test_a_crash_is_no_timeout():
    assert run("    __import__('ctypes').string_at(0)\n").status == "ended"
    assert run("    __import__('os')._exit(3)\n").status == "ended"


def test_the_order_of_sets_is_no_chance():
    """A program that lists a set passes or fails, but not the one today and the other tomorrow."""
    value = "[hash('a'), *{'alpha', 'beta', 'gamma', 'delta', 'epsilon'}]"
    code = "import json; print(json.dumps([hash('a'), *{'alpha', 'beta', 'gamma', 'delta', 'epsilon'}]))"
    seeded = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": "0"}, capture_output=True, text=True).stdout
    assert run(f"    return {value}\n", f"def check(candidate):\n    assert candidate(0, 0) == {seeded}\n").passed


def test_errors_cross_by_name():
    test = ("def check(candidate):\n    try:\n        candidate(0, 0)\n    except {}:\n        return\n    assert False\n")
    assert run("    raise ValueError('x')\n", test.format("ValueError")).passed
    assert run("    raise ValueError('x')\n", test.format("KeyError")).status == "ValueError"


def test_a_test_that_passes_functions_is_an_error_not_a_failure():
    with pytest.raises(code_sandbox.UserError, match="test of add cannot be run: the test passes a function"):
        run("    return a + b\n", "def check(candidate):\n    candidate(len, [max])\n")


def test_an_infinite_loop_ends_at_its_cpu_limit():
    start = time.monotonic()
    assert run("    while True: pass\n", seconds=1).status == "timeout"
    assert time.monotonic() - start < 20


def test_a_sleeper_ends_at_the_wall_clock():
    start = time.monotonic()
    assert run("    __import__('time').sleep(60)\n", seconds=1).status == "timeout"
    assert time.monotonic() - start < 20


def test_a_memory_hog_gets_a_memory_error():
    assert run("    bytearray(2 << 30)\n").status == "MemoryError"
    assert run("    x = []\n    while True: x.append(bytearray(1 << 20))\n").status == "MemoryError"


@confined
def test_its_own_folder_is_writable_up_to_a_limit():
    assert run("    open('mine', 'w').write('x' * 100)\n    return len(open('mine').read()) - 95\n").passed
    assert run("    open('mine', 'wb').write(b'x' * (3 << 20))\n").status in ("OSError", "ended", "timeout")


def test_it_sees_neither_our_environment_nor_our_packages(monkeypatch):
    monkeypatch.setenv("A_SECRET_KEY", "x")
    assert run("    import os\n    return 5 * ('A_SECRET_KEY' not in os.environ)\n").passed
    assert run("    import torch\n").status == "ModuleNotFoundError"


def test_its_prints_are_thrown_away():
    assert run("    for i in range(10000): print('x' * 100)\n    return a + b\n").passed


def test_a_system_without_limits_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(code_sandbox.UserError, match="process limits"):
        code_sandbox.check(unsafe=True)


def test_a_system_that_confines_nothing_is_refused(monkeypatch):
    if not LACK:
        monkeypatch.setattr(code_sandbox, "missing", lambda: "namespaces (unshare): Operation not permitted")
    with pytest.raises(code_sandbox.UserError, match="does not confine .*user namespaces.*--unsafe_code yes"):
        code_sandbox.check()
    code_sandbox.check(unsafe=True)


@confined
@pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare command to build a system without user namespaces")
def test_a_kernel_without_user_namespaces_is_seen():
    code = "from evaluator.scoring import code_sandbox as c; print(c.missing())"
    done = subprocess.run(["unshare", "--user", "--map-root-user", "sh", "-c",
                           f"echo 0 > /proc/sys/user/max_user_namespaces && exec '{sys.executable}' -c '{code}'"],
                          cwd=ROOT, capture_output=True, text=True)
    assert "namespaces (unshare): No space left on device" in done.stdout, done.stderr


@confined
def test_a_probe_that_fails_says_why(monkeypatch):
    program = "import no_such_library\ndef f(x):\n    return x + 1\n"
    monkeypatch.setitem(code_sandbox._PROBE, "program", program)
    assert "is not readable for other users" in code_sandbox.missing.__wrapped__()
    monkeypatch.setitem(code_sandbox._PROBE, "program", "def f(x): return 0\n")
    assert code_sandbox.missing.__wrapped__() == "a trivial program ended with AssertionError"


@confined
def test_a_step_that_fails_at_run_time_is_an_error_not_a_failure(monkeypatch):
    monkeypatch.setattr(code_sandbox, "_FILE_BYTES", 1 << 70)
    with pytest.raises(code_sandbox.Refused, match="too large"):
        run("    return a + b\n")


@confined
def test_six_tasks_of_human_eval_as_their_authors_solved_them():
    """They take helpers, random numbers, floats, nested lists, long strings and text across."""
    from data.sets import probes

    rows = {row["task_id"]: row for row in probes.human_eval()}
    for number in (1, 32, 38, 53, 87, 113):
        row = rows[f"HumanEval/{number}"]
        assert code_sandbox.run(row["prompt"], row["canonical_solution"], row["test"], row["entry_point"], 5, 512).passed
        assert not code_sandbox.run(row["prompt"], "    return None\n", row["test"], row["entry_point"], 5, 512).passed
