"""The faults: each is set upon a command, which then runs again undisturbed and must leave the bytes of a calm run."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from faults import children, state
from faults.victims import Place, Victim

import manifest


@dataclass
class Outcome:
    """What a fault came to.

    Args:
        times: how often it was set upon the command.
        whole: of these, how often the result was already whole and in its place.
        wrong: whatever broke the rule; empty is good.
        said: what the command told, where it is a message that counts.
    """

    fault: str
    command: str
    times: int = 0
    whole: int = 0
    wrong: list[str] = field(default_factory=list)
    said: str = ""


class Trial:
    """One command, its calm run, and faults upon it."""

    def __init__(self, victim: Victim, place: Place, folder: Path) -> None:
        self.victim, self.place = victim, place
        self.folder = folder / victim.name.replace(": ", "_")
        self.folder.mkdir(parents=True)
        self.log, self.out, counter = self.folder / "log", self.folder / "results", self.folder / "events"
        place.fresh(self.out)
        self.given = state.files(self.out)
        begin = time.monotonic()
        modules = self.folder / "modules"
        code = children.end(children.start(victim, place, self.out, self.log, children.watching(self.out, told=counter),
                                           modules))
        self.seconds = time.monotonic() - begin
        assert code == 0, f"{victim.name} fails undisturbed ({code}):\n{self.log.read_text()[-3000:]}"
        children.learn(modules)
        self.events = int(counter.read_text())
        self.calm, self.lines = state.files(self.out), state.lines(self.out)
        assert set(self.calm) - set(self.given), f"{victim.name} writes nothing"
        assert not state.hidden(self.out), state.hidden(self.out)
        self.grown = sum(path.stat().st_size for path in self._new())
        self.largest = max(path.stat().st_size for path in self._new())

    def _new(self) -> list[Path]:
        return [self.out / name for name in self.calm if name not in self.given]

    # ---- the rule

    def after(self, outcome: Outcome, when: str) -> None:
        """Behind a fault: what was there before is untouched, and nothing half-done looks done."""
        now = state.files(self.out)
        outcome.wrong += [f"{when}: {name}: lost or changed" for name in self.given if now.get(name) != self.given[name]]
        outcome.wrong += [f"{when}: {problem}" for problem in state.half_done(self.out, self.calm)]

    def to_the_end(self, outcome: Outcome) -> None:
        """The same command, undisturbed: the bytes of the calm run, and nothing left lying about."""
        begin = time.monotonic()
        code = children.run(self.victim, self.place, self.out, self.log)
        # what the calm run imported is there now: moments are drawn from the time that a command takes without
        self.seconds = min(self.seconds, max(time.monotonic() - begin, self.seconds / 4))
        if code:
            outcome.wrong.append(f"the same command again ends with {code}: {self.log.read_text()[-1500:]}")
            return
        now = state.files(self.out)
        outcome.wrong += [f"at the end: {name}: {'other bytes' if name in now else 'missing'}" for name in self.calm
                          if now.get(name) != self.calm[name]]
        outcome.wrong += [f"at the end: {name}: not in the calm run" for name in now if name not in self.calm]
        outcome.wrong += [f"at the end: {name}: left lying about" for name in state.hidden(self.out)]
        if lost := self.lines - state.lines(self.out):
            outcome.wrong.append(f"at the end: {len(lost)} lines of scores missing in {manifest.REGISTRY}")

    def finished(self) -> bool:
        """Whether the result is whole and in its place."""
        now = state.files(self.out)
        return all(now.get(name) == self.calm[name] for name in self.calm)

    # ---- faults

    def kill(self, times: int, seed: int) -> Outcome:
        """SIGKILL: in turn just before an operation on files, drawn from all of them, and at a moment drawn from all."""
        outcome, luck = Outcome("kill -9", self.victim.name), random.Random(f"{seed} {self.victim.name}")
        self.place.fresh(self.out)
        left = self.events
        while outcome.times < times:
            by_file = outcome.times % 2 == 0
            at = luck.randint(1, max(1, left))
            process = children.start(self.victim, self.place, self.out, self.log,
                                     children.watching(self.out, at) if by_file else None)
            if not by_file:
                time.sleep(luck.random() * self.seconds)
                os.kill(process, signal.SIGKILL)
            code = children.end(process)
            if code == -signal.SIGKILL:
                outcome.times += 1
                self.after(outcome, f"kill {outcome.times}")
            elif code:
                outcome.wrong.append(f"ends with {code}: {self.log.read_text()[-1500:]}")
                break
            if done := self.finished():
                outcome.whole += code == -signal.SIGKILL
            # a command that was resumed has fewer operations than the calm one: it ended before its turn came
            left = self.events if done else max(1, left // 2) if code == 0 else left
            if done and outcome.times < times:
                self.to_the_end(outcome)
                self.place.fresh(self.out)
        self.to_the_end(outcome)
        return outcome

    def refused(self, fault: str, set_up: Callable[[], None], words: Collection[str]) -> Outcome:
        """A fault that the command must answer with exit code 2 and a sentence."""
        outcome = Outcome(fault, self.victim.name, 1)
        self.place.fresh(self.out)
        code = children.run(self.victim, self.place, self.out, self.log, set_up)
        self._answered(outcome, code, words)
        self.after(outcome, "behind it")
        self.to_the_end(outcome)
        return outcome

    def _answered(self, outcome: Outcome, code: int, words: Collection[str]) -> None:
        # a progress bar may stand on the line before it
        said = re.findall(r"error: (.*)", self.log.read_text())
        outcome.said = said[-1] if said else ""
        if code != 2 or not any(word in outcome.said for word in words):
            outcome.wrong.append(f"ends with {code} and says: {self.log.read_text()[-1500:]}")

    def small_files(self) -> Outcome:
        """No file may grow beyond half of the largest that is written."""
        import resource

        def set_up() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.largest // 2, resource.RLIM_INFINITY))
        return self.refused("file size limit", set_up, ["may not grow that large"])

    def full_disk(self) -> Outcome:
        """A disk of its own that holds the inputs and a third of what is written; then it grows."""
        outcome = Outcome("disk full", self.victim.name, 1)
        room = self.folder / "disk"
        room.mkdir(exist_ok=True)

        def work() -> None:
            children.mount("tmpfs", room, "tmpfs", 0, "size=512m")
            self.out = self.place.fresh(room / "results")
            there = os.statvfs(room)
            held = (there.f_blocks - there.f_bfree) * there.f_frsize
            children.mount("tmpfs", room, "tmpfs", children.REMOUNT, f"size={held + self.grown // 3}")
            self._answered(outcome, children.run(self.victim, self.place, self.out, self.log), ["the disk is full", "free"])
            self.after(outcome, "behind it")
            children.mount("tmpfs", room, "tmpfs", children.REMOUNT, "size=512m")
            self.to_the_end(outcome)
            said.write_text(outcome.said)
            assert not outcome.wrong, "\n".join(outcome.wrong)

        said = self.folder / "said"
        said.write_text("")
        if problem := children.apart(work):
            outcome.wrong.append(problem)
        outcome.said = said.read_text()
        return outcome

    def read_only(self) -> Outcome:
        """The results folder is read-only: refused; a run that is finished there is still found to be so."""
        outcome = Outcome("read-only folder", self.victim.name, 1)
        self.place.fresh(self.out)

        def sealed(codes: Collection[int], words: Collection[str]) -> Callable[[], None]:
            def work() -> None:
                children.mount(str(self.out), self.out, "", children.BIND)
                children.mount("none", self.out, "", children.BIND | children.REMOUNT | children.READ_ONLY)
                code = children.run(self.victim, self.place, self.out, self.log)
                assert code in codes, f"ends with {code}: {self.log.read_text()[-1500:]}"
                said = self.log.read_text()
                assert any(word in said for word in words), said[-1500:]
            return work

        problems = [children.apart(sealed([2], ["Read-only file system", "the file system is read-only"]))]
        self.after(outcome, "behind it")
        self.to_the_end(outcome)
        problems.append(children.apart(sealed([0], ["already", "finished"])))
        outcome.wrong += filter(None, problems)
        return outcome

    def twice(self) -> Outcome:
        """The same command twice at once."""
        outcome = Outcome("two at once", self.victim.name, 2)
        self.place.fresh(self.out)
        logs = [self.log, self.log.with_name("log_2")]
        both = [children.start(self.victim, self.place, self.out, log) for log in logs]
        codes = [children.end(process) for process in both]
        told = [log.read_text() for log in logs]
        if not all(code == 0 or code == 2 and "another command finished this run" in text
                   for code, text in zip(codes, told, strict=True)):
            outcome.wrong.append(f"end with {codes}: {told[0][-1000:]} {told[1][-1000:]}")
        outcome.said = next((line for text in told for line in text.splitlines() if "waiting for it" in line), "")
        self.after(outcome, "behind it")
        self.to_the_end(outcome)
        return outcome

    def clock(self, seed: int) -> Outcome:
        """The wall clock jumps by years in both directions while the command runs."""
        outcome = Outcome("clock jumps", self.victim.name, 1)
        self.place.fresh(self.out)
        if code := children.run(self.victim, self.place, self.out, self.log, children.jumping(seed)):
            outcome.wrong.append(f"ends with {code}: {self.log.read_text()[-1500:]}")
        for path in self._new():
            if path.name == manifest.MANIFEST and not 0 <= (took := manifest.read(path.parent)["seconds"]) < 3600:
                outcome.wrong.append(f"{path.parent.name}: says that it took {took} seconds")
        self.after(outcome, "behind it")
        self.to_the_end(outcome)
        return outcome

    def memory(self, seed: int) -> Outcome:
        """The allocator refuses in the middle of the work; the message names a smaller setting."""
        at = random.Random(seed).randint(1, 3)
        outcome = self.refused("out of memory", children.starving(at), ["out of memory"])
        if " --" not in outcome.said:
            outcome.wrong.append(f"names no smaller setting: {outcome.said}")
        return outcome

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
