"""runtime.py: threads that wait, memory that is kept, cycles that are looked for."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys

import pytest

import runtime
from config import ROOT


@pytest.mark.parametrize(("given", "found"), [
    ({}, ("passive", "1000")), ({"GOMP_SPINCOUNT": "5"}, ("passive", "5")),
    ({"OMP_WAIT_POLICY": "active"}, ("active", None))])
def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise(monkeypatch, given, found):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what short_waits sets is taken back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    runtime.short_waits()
    assert (os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT")) == found


def test_dead_cycles_are_looked_for_rarely():
    before = gc.get_threshold()
    try:
        runtime.collect_rarely()
        assert gc.get_threshold() == (20_000, *before[1:])
        assert gc.isenabled()
    finally:
        gc.set_threshold(*before)


FREED = """
import resource, sys
import numpy as np
import runtime
from config import ROOT
if sys.argv[1] == "keep":
    assert runtime.keep_freed_memory()
np.ones(25_000_000)  # 200 MB, freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(25_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept_for_the_next_step():
    bare = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    faults = {how: int(subprocess.run([sys.executable, "-c", FREED, how], cwd=ROOT, env=bare, capture_output=True,
                                      text=True, check=True).stdout) for how in ("keep", "give back")}
    # a page of 4 KB or of 2 MB: at least 100 faults for 200 MB that were given back
    assert faults["give back"] >= 5 * 100
    assert faults["keep"] < faults["give back"] / 10


def test_the_users_allocator_settings_stay(monkeypatch):
    class Libc:
        asked = []

        @staticmethod
        def mallopt(option, value):
            Libc.asked.append(option)
            return 1

    monkeypatch.setattr("ctypes.CDLL", lambda name: Libc)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert runtime.keep_freed_memory()
    assert Libc.asked == [-3]
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # no mallopt: not glibc
    assert not runtime.keep_freed_memory()
