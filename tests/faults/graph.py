"""The leaderboard's graph under kills: the whole of it at a random moment, or its head alone, while snakemake runs on."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from faults import state
from faults.trials import Outcome
from faults.victims import Place

import config


class Graph:
    """Three steps on the experts of a place, the third of the first two."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.folder = folder / "graph"
        self.folder.mkdir(parents=True)
        parts = ",".join(str(place.results / "outputs" / name) for name in ("helpfulness", "safety"))
        fuse = "models/fuse.py adapters --report false"
        arms = {"one": {"make": f"{fuse} --adapters {parts} --weights 0.5,0.5 --run_name one"},
                "two": {"make": f"{fuse} --adapters {parts} --weights 0.2,0.8 --run_name two"},
                "total": {"needs": ["one", "two"], "make": f"{fuse} --adapters one,two --run_name total"}}
        body = {"arms": {name: {"kind": "merge", "cost": "fuse", **arm} for name, arm in arms.items()},
                "costs": {"fuse": {"seconds": 5, "memory_mb": 500}}}
        (self.folder / "arms.yaml").write_text(yaml.safe_dump(body))
        self.out = self.folder / "leaderboard" / "seed_7"
        begin = time.monotonic()
        self._run(check=True)
        self.seconds = time.monotonic() - begin
        self.calm = self._files()

    def _words(self) -> list[str]:
        return [sys.executable, "-m", "workflow.leaderboard", "--arms", str(self.folder / "arms.yaml"), "--seeds", "7",
                "--output_dir", str(self.folder), "--", "--cores", "1"]

    def _start(self) -> subprocess.Popen:
        # a group of its own: head, snakemake and the step under way
        return subprocess.Popen(self._words(), cwd=config.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                preexec_fn=os.setpgrp)

    def _run(self, check: bool = False) -> tuple[int, str]:
        process = self._start()
        said = process.communicate()[0]
        assert not check or process.returncode == 0, said[-3000:]
        return process.returncode, said

    def _files(self) -> dict[str, str]:
        return {name: found for name, found in state.files(self.out).items() if name.startswith("outputs/")}

    def kill(self, times: int, seed: int) -> Outcome:
        """SIGKILL to all of it, and every third time to its head alone."""
        outcome, luck = Outcome("kill -9", "leaderboard graph"), random.Random(f"{seed} graph")
        self._anew()
        for number in range(1, times + 1):
            process = self._start()
            time.sleep(luck.random() * self.seconds)
            if number % 3:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            process.wait()
            process.stdout.close()
            outcome.times += 1
            outcome.wrong += [f"kill {number}: {problem}" for problem in state.half_done(self.out, self.calm)]
            if self._files() == self.calm:
                outcome.whole += 1
                self._finish(outcome)
                self._anew()
        self._finish(outcome)
        return outcome

    def _finish(self, outcome: Outcome) -> None:
        code, said = self._run()
        end = time.monotonic() + 600
        # the head alone was killed: what it started holds its lock until it is done
        while code == 2 and "another run of this graph is under way" in said and time.monotonic() < end:
            time.sleep(1)
            code, said = self._run()
        if code:
            outcome.wrong.append(f"the same command again ends with {code}: {said[-1500:]}")
        elif (now := self._files()) != self.calm:
            differ = [name for name in self.calm.keys() | now.keys() if self.calm.get(name) != now.get(name)]
            outcome.wrong.append(f"at the end: other bytes: {', '.join(sorted(differ))}")
        outcome.wrong += [f"at the end: {name}: left lying about" for name in state.hidden(self.out)]

    def _anew(self) -> None:
        shutil.rmtree(self.folder / "leaderboard")
