"""The graph on SLURM: words of snakemake's executor, what a step asks for, jobs that a killed start left in the queue."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from config import ROOT
from errors import UserError
from workflow.plan import Step

log = logging.getLogger(__name__)
PROFILE = ROOT / "workflow" / "profiles" / "slurm" / "config.yaml"
#: Of a job beside its command: the snakemake that runs it there, in MiB (two processes, measured: 190).
OVERHEAD_MB = 400
#: Seconds that cancelled jobs may take to be gone: SLURM's own KillWait is 30.
GONE = 300


def asked(theirs: Sequence[str]) -> bool:
    """Whether snakemake's words ask for SLURM, themselves or in a profile file."""
    return "slurm" in _values(theirs, "--executor", "-e") or any(
        _executor(Path(path)) == "slurm" for path in _values(theirs, "--profile", "--workflow-profile"))


def _values(theirs: Sequence[str], *flags: str) -> list[str]:
    """What follows these flags, as ``--flag VALUE`` or ``--flag=VALUE``."""
    pairs = [(word, after) for word, after in zip(theirs, theirs[1:], strict=False) if "=" not in word]
    pairs += [tuple(word.split("=", 1)) for word in theirs if "=" in word]
    return [value for flag, value in pairs if flag in flags]


def _executor(path: Path) -> str | None:
    files = [path] if path.is_file() else [path / name for name in ("profile.yaml", "config.yaml")]
    for file in filter(Path.is_file, files):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return content.get("executor") if isinstance(content, dict) else None
    return None


def words(theirs: Sequence[str], folder: Path) -> list[str]:
    """What goes in front of snakemake's words: our profile, the jobs' name, who tells how they end.

    Args:
        folder: of the workflow; its jobs bear its name.

    Raises:
        UserError: the executor's package or SLURM itself is not here.
    """
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        raise UserError("--executor slurm: snakemake's executor for it is not installed; pip install -r requirements.txt")
    if _run("sinfo", "--version").returncode:
        raise UserError("--executor slurm: sinfo does not answer here; start this on a login node of the cluster, or try a "
                        "node of your own: bash scripts/slurm_node.sh")
    made = ["--profile", str(PROFILE), "--slurm-jobname-prefix", job_name(folder)]
    # without an accounting database sacct is there and knows nothing
    if not _values(theirs, "--slurm-status-command") and _run("sacct", "-n", "-X", "-S", "now").returncode:
        made += ["--slurm-status-command", "squeue"]
    return made


def job_name(folder: Path) -> str:
    """What the names of a workflow's jobs begin with."""
    return f"abf_{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:10]}"


def cancel_orphans(folder: Path) -> int:
    """End the jobs that a start of this workflow left in the queue when it was killed; returns how many there were.

    Nobody would hear of their end, and their steps are about to be submitted again. A step that was under way goes on from
    its last checkpoint. The caller holds the workflow's lock: no living start has jobs.

    Raises:
        UserError: they do not go.
    """
    left = _jobs(folder)
    if not left:
        return 0
    log.info("%d jobs of an earlier start are still in the queue: cancelled; their steps go on from where they are",
             len(left))
    end = time.monotonic() + GONE
    while jobs := _jobs(folder):
        if time.monotonic() > end:
            raise UserError(f"jobs of an earlier start do not end: {', '.join(jobs)}; scancel them, then run this again")
        _run("scancel", *jobs)
        time.sleep(1)
    return len(left)


def _jobs(folder: Path) -> list[str]:
    told = _run("squeue", "--me", "--noheader", "--format=%i %j")
    if told.returncode:
        raise UserError(f"squeue: {told.stderr.strip() or 'no answer'}; jobs of an earlier start cannot be told; try again")
    rows = [line.split(maxsplit=1) for line in told.stdout.splitlines()]
    return [row[0] for row in rows if len(row) == 2 and row[1].startswith(job_name(folder))]


def _run(*line: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(line, 1, "", str(error))


def resources(step: Step, card_gb: float) -> dict[str, int]:
    """What a job asks SLURM for: MiB of memory, minutes, GPUs.

    Args:
        card_gb: memory of a card; a step that takes more asks for several.
    """
    return {"memory_mb": math.ceil(step.memory_mb * 1.25) + OVERHEAD_MB,
            # four times as long as measured: a cluster ends what takes longer
            "minutes": max(10, math.ceil(step.seconds * 4 / 60)), "gpus": math.ceil(step.gpu_gb / card_gb)}
