"""A real SLURM of one node for tests, by scripts/slurm_node.sh: its queue, its jobs, its controller restarted."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import config

SCRIPT = config.ROOT / "scripts" / "slurm_node.sh"


def needed() -> None:
    """Without SLURM the test is skipped; in CI, which installs it (.ci/run), it fails."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if all(shutil.which(tool, path=path) for tool in ("munged", "slurmctld", "slurmd", "sbatch")):
        return
    why = "needs SLURM: apt-get install -y slurm-wlm munge (Debian), or the like"
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


def until(true: Callable[[], Any], seconds: float = 240) -> Any:
    """Wait for what becomes true; returns it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "nothing came of it"
        time.sleep(0.1)
    return found


class Node:
    """One node of two cores, everything below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "CPUS": "2",
                            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def script(self, word: str) -> None:
        done = subprocess.run(["bash", str(SCRIPT), word, str(self.folder)], env=self.environment, capture_output=True,
                              text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def ask(self, *words: str) -> str:
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60, check=True).stdout

    def jobs(self, state: str = "all") -> list[str]:
        """Numbers of the jobs in these states, commas between."""
        return self.ask("squeue", "--noheader", f"--states={state}", "--format=%i").split()


@contextlib.contextmanager
def node(folder: Path) -> Iterator[Node]:
    """A node that runs while the block does."""
    needed()
    here = Node(folder)
    try:
        here.script("start")
        yield here
    finally:
        here.script("stop")
