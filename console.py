"""What a command says on the screen: how loud it is, its bars, its last lines. Every command sets it up here.

stderr has what is told on the way: INFO is for people, DEBUG for who looks for a fault. stdout has the result. Nothing is
coloured. ``--quiet`` leaves errors and the result, or where it lies; ``--verbose`` adds DEBUG and what libraries say.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import errors
import manifest
from config import DEFAULT_PRESET, ROOT, Parsed
from preset_choice import OWN_PRESET

log = logging.getLogger(__name__)
#: Loggers of packages whose lines a user can do nothing about -> the level from which they are heard.
NOISE: dict[str, int] = {
    # peft imports it; it looks for a kernel that only its own 4-bit products would use
    "bitsandbytes.backends.cpu.ops": logging.ERROR,
    # its file's byte order, and a temporary name
    "gguf.gguf_writer": logging.WARNING,
    # once on every new machine
    "matplotlib.font_manager": logging.WARNING,
}
#: Warnings of packages of the same kind: (message, category). transformers' own attribute, which peft reads.
_NOISY_WARNINGS: tuple[tuple[str, type[Warning]], ...] = ((r".*is_gradient_checkpointing.*", FutureWarning),)
#: What makes packages silent, read when they are imported.
_SILENCE = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error"}
#: Set where a command is a step of another one, which says what to try next.
STEP = "ABF_STEP"


class _Lines(logging.Handler):
    """Lines on stderr that leave a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            errors.write_line(self.format(record))
        except Exception:
            self.handleError(record)


def set_up(asked: Any = None, *, speaks: bool = True) -> None:
    """Let the log go to stderr, as loud as was asked for. Call it before a library is imported.

    A command that runs within another one keeps what that one set up, unless it was asked for something itself.

    Args:
        asked: ``Parsed.verbosity``; None: neither quiet nor verbose.
        speaks: whether this process tells how it goes: of several of a launch one does. All tell what is wrong.
    """
    quiet, verbose = bool(asked and asked.quiet), bool(asked and asked.verbose)
    root, level = logging.getLogger(), logging.INFO if speaks else logging.WARNING
    if not root.handlers:
        handler = _Lines()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s" if verbose else "%(message)s"))
        root.addHandler(handler)
        root.setLevel(level)
    if quiet:
        root.setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")
        os.environ.update(_SILENCE)
    if verbose:
        root.setLevel(logging.DEBUG)
        warnings.simplefilter("default")
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
    mute()


def mute() -> None:
    """Leave out the lines of packages that mean nothing to a user (``NOISE``); not with --verbose."""
    if _verbose():
        return
    for name, level in NOISE.items():
        logging.getLogger(name).setLevel(level)
    for message, category in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)


def quiet() -> bool:
    """Whether results and errors alone are wanted."""
    return not logging.getLogger().isEnabledFor(logging.WARNING)


def _verbose() -> bool:
    return logging.getLogger().isEnabledFor(logging.DEBUG)


def asked() -> list[str]:
    """The flag that makes another command as loud as this one."""
    return ["--quiet"] if quiet() else ["--verbose"] if _verbose() else []


def hidden() -> bool:
    """Whether there are no progress bars: with --quiet, and in every process of a launch but the one that speaks."""
    return not logging.getLogger().isEnabledFor(logging.INFO)


def bar(shown: bool = True) -> dict[str, Any]:
    """tqdm's keywords for work of minutes to hours: in a file, where a bar cannot be redrawn, a line every ten seconds."""
    return {"disable": hidden() or not shown, "mininterval": 0.1 if sys.stderr.isatty() else 10}


def show(text: str, brief: str | None = None) -> None:
    """Print a result on stdout.

    Args:
        brief: what is printed instead with --quiet; empty: nothing; None: the text, which is short or was asked for.
    """
    text = brief if brief is not None and quiet() else text
    if not text:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # "| head" has read enough; the interpreter must not flush into the closed pipe again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_written(text: str, paths: Sequence[Path]) -> None:
    """Print a report and where it is written; with --quiet the files alone."""
    show("\n".join([text, *(f"written: {path}" for path in paths)]), "\n".join(map(str, paths)))


def finish(paths: Sequence[Path], following: Sequence[str] = ()) -> None:
    """End a command whose log has told of its files: with --quiet name them on stdout, else say what to try next."""
    if manifest.is_main():
        show("", "\n".join(map(str, paths)))
        advise(following)


def advise(words: Sequence[str]) -> None:
    """Say a command line to try next; a step of another command says none.

    Args:
        words: the command's file, relative to the repository, and its flags; empty: nothing is said.
    """
    if line := following(words):
        log.info("next: %s", line)


def following(words: Sequence[str]) -> str:
    """The line of a command to try next, to be copied; empty within another command."""
    return shown(words) if words and STEP not in os.environ else ""


def shown(words: Sequence[str]) -> str:
    """A command line of ours as it can be given in the current folder."""
    file = ROOT / words[0]
    near = os.path.relpath(file) if Path.cwd().is_relative_to(ROOT) else str(file)
    return shlex.join(["python", near, *words[1:]])


@contextlib.contextmanager
def steps() -> Iterator[None]:
    """Commands that run within the block, in this process or started by it, are steps of this one."""
    before = os.environ.get(STEP)
    os.environ[STEP] = "1"
    try:
        yield
    finally:
        os.environ.pop(STEP)
        if before is not None:
            os.environ[STEP] = before


def same(parsed: Parsed, *names: str) -> list[str]:
    """What a next command must be told to find the same base and folder: flags of the command line, a preset by name."""
    preset = ["--preset", parsed.preset] if parsed.preset not in (DEFAULT_PRESET, OWN_PRESET) else []
    given = [name for name in names if name in parsed.given]
    return [*preset, *(word for name in given for word in (f"--{name}", str(getattr(parsed.args, name))))]


def last_screen(head: str, rows: Mapping[str, str]) -> str:
    """What was made, and below it, aligned, what there is to know of it; rows without a value are left out."""
    width = max(map(len, rows))
    return "\n".join([head, *(f"  {name:<{width}}  {said}" for name, said in rows.items() if said)])


def cost(seconds: float, memory_mb: float) -> str:
    """Time and the peak of the process's memory, for people: 1 min 17 s, 1.9 GB of memory.

    Args:
        memory_mb: in MiB, as manifests have it.
    """
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    time = (f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s" if minutes else
            f"{whole} s" if whole >= 10 else f"{seconds:.1f} s")
    return f"{time}, {memory_mb * 2**20 / 1e9:.1f} GB of memory"
