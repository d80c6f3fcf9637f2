"""Launched processes on one device: losses of steps beside a run without a launcher, checkpoints, answers of two.

    python -m benchmarks.gpu_check.processes --json processes.json                  # one GPU: NCCL, one process a launch
    python -m benchmarks.gpu_check.processes --device cpu --json processes.json     # gloo

A made-up Llama of two layers, three steps, LoRA (in bfloat16 too) and full tuning. Held to the run without a launcher, 1e-5
relative, in bfloat16 1e-3:

- DDP and FSDP2, each started by torchrun with one process, and FSDP2 as ``accelerate launch`` starts it;
- what a checkpoint of the second step goes on to: of the run without a launcher, and parts that FSDP2 wrote (torch's
  distributed checkpoint), read by FSDP2 and by DDP.

And the answers of two processes on the one device, which meet over gloo, are the file of one, byte for byte.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_LORA = ("--lora_r", "8", "--lora_dropout", "0", "--dtype")
#: What is tuned -> its flags, and how far losses may be off; a base in bfloat16 below a LoRA in fp32 is what FSDP2 mixes.
KINDS = {"LoRA": ((*_LORA, "float32"), 1e-5), "LoRA, bf16": ((*_LORA, "bfloat16"), 1e-3),
         "full": (("--tuning", "full", "--dtype", "float32"), 1e-5)}
STEPS, SAVED = 3, 2
#: As accelerate launch --config_file scripts/accelerate/fsdp2.yaml sets them.
_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
#: Child -> (name of a run, tuning, parted by FSDP2, run whose checkpoint it goes on from), in their order.
RUNS: dict[str, tuple[tuple[str, str, bool, str], ...]] = {
    "alone": (*((f"alone, {kind}", kind, False, "") for kind in KINDS),
              ("alone, resumed, full", "full", False, "alone, full")),
    "launched": (*((f"DDP, {kind}", kind, False, "") for kind in KINDS),
                 *((f"FSDP2, {kind}", kind, True, "") for kind in KINDS),
                 *((f"FSDP2, resumed, {kind}", kind, True, f"FSDP2, {kind}") for kind in KINDS),
                 ("DDP from FSDP2's checkpoint, full", "full", False, "FSDP2, full")),
}
_ACCELERATE = "FSDP2 by accelerate launch, LoRA"


def _folder(home: Path, run: str) -> Path:
    """Where a run's results lie: no commas, which flags take for a list."""
    return home / re.sub(r"\W+", "_", run)


def words(home: Path, kind: str, out: Path, device: str) -> list[str]:
    """The command line of align_basemodel.py for a run."""
    return ["--moe_flag", "0", "--task_name", "dialogs", *KINDS[kind][0], "--preset", "own", "--model_name_or_path",
            str(home / "base"), "--data_path", str(home / "rows.jsonl"), "--output_dir", str(out), "--run_name", "run",
            "--device", device, "--threads", "1", "--model_max_length", "64",
            "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--gradient_checkpointing", "false",
            "--max_steps", str(STEPS), "--save_steps", str(SAVED), "--logging_steps", "1", "--learning_rate", "1e-3",
            "--lr_scheduler_type", "constant", "--warmup_steps", "0"]


def answering(home: Path, out: Path, device: str) -> list[str]:
    return ["--task_name", "helpfulness", "--cross_task", "base", "--data_path", str(home / "prompts.jsonl"),
            "--max_new_tokens", "16", "--batch_size", "4", "--model_name_or_path", str(home / "base"), "--device", device,
            "--dtype", "float32", "--threads", "1", "--output_dir", str(out)]


def child(name: str, home: Path, device: str) -> None:
    """The runs of a process, one after the other; each one's losses, or why it has none, go to NAME.json as they come."""
    from runtime import short_waits

    short_waits()
    found: dict[str, Any] = {}
    for run, kind, parted, begun in RUNS[name]:
        out = _folder(home, run)
        try:
            if begun:
                kept = out / "checkpoints" / "run"
                shutil.copytree(_folder(home, begun) / "checkpoints" / "run", kept)
                shutil.rmtree(kept / f"checkpoint-{STEPS}")
            found[run] = losses_of(words(home, kind, out, device), parted)
        except BaseException as error:  # the runs after it have nothing to do with it
            traceback.print_exc()
            found[run] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        (home / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")
    if name == "alone":
        import inference

        inference.main(answering(home, home / "one", device))


def losses_of(line: Sequence[str], parted: bool) -> list[float]:
    """The losses of a training's steps in this process, which may have trained before."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer

    import align_basemodel

    for name, value in _FSDP.items():
        os.environ.pop(name, None)
        if parted:
            os.environ[name] = value
    # a launch has one training; the processes stay connected
    AcceleratorState._reset_state()
    GradientState._reset_state()
    losses: list[float] = []
    step = Trainer.training_step

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        losses.append(float(loss))
        return loss

    Trainer.training_step = recorded
    try:
        align_basemodel.main(list(line))
    finally:
        Trainer.training_step = step
    return losses


def launches(home: Path, device: str) -> dict[str, list[str]]:
    """Name -> command of every process that is started; none needs what another makes."""
    own = ["-m", "benchmarks.gpu_check.processes", "--device", device, "--home", str(home), "--child"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    port = str(_port())
    # a launch of two machines with a process each, which are this one: both have its first device
    nodes = {f"answers {rank}": [*run, "--nnodes", "2", "--node_rank", str(rank), "--master_port", port, "inference.py",
                                 *answering(home, home / "two", device)] for rank in range(2)}
    return {"alone": [sys.executable, *own, "alone"],
            "launched": [*run, "--master_port", str(_port()), *own, "launched"],
            "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                           "scripts/accelerate/fsdp2.yaml", "--num_processes", "1", "--main_process_port", str(_port()),
                           "align_basemodel.py", *words(home, "LoRA", _folder(home, _ACCELERATE), device)], **nodes}


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(home: Path, device: str, limit_s: float, together: bool) -> dict[str, str]:
    """Start every command; name -> why it failed, for those that did.

    Args:
        together: all at once, where there are cores for it; else one after the other, but for the two that answer.
    """
    # one machine, whatever its network says
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                        "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
                        "PYTHONUNBUFFERED": "1"}
    end, failed, running = time.monotonic() + limit_s, {}, {}
    commands = launches(home, device)
    for name, command in commands.items():
        with (home / f"{name}.log").open("w", encoding="utf-8") as out:
            running[name] = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=env,
                                             start_new_session=True)
        if not together and name not in ("answers 0",):
            failed |= _ended(home, running, end)
    return failed | _ended(home, running, end)


def _ended(home: Path, running: dict[str, subprocess.Popen[bytes]], end: float) -> dict[str, str]:
    failed = {}
    for name in list(running):
        process = running.pop(name)
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
            why = f"exit code {code}"
        except subprocess.TimeoutExpired:
            code, why = -1, "took too long"
            # with the workers of its launcher
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code:
            said = (home / f"{name}.log").read_text(encoding="utf-8", errors="replace")
            print(f"==== {name}: {why}\n{said[-3000:]}", flush=True)
            failed[name] = f"{why}: {reason(said)}"
    return failed


def reason(said: str) -> str:
    """The line of a log that tells why: the last one that names an error and is not a launcher's own report of it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [line for line in lines if ("Error" in line or line.startswith("error:")) and "ChildFailedError" not in line]
    return (telling or lines or ["it said nothing"])[-1][:300]


def rows(home: Path, failed: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each run: {"name", "measured", "error"}."""
    found: dict[str, Any] = {}
    for name in RUNS:
        file = home / f"{name}.json"
        found |= json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    made = []
    for name, runs in RUNS.items():
        for run_name, kind, _, begun in runs:
            got = found.get(run_name, failed.get(name, "was not reached"))
            want = found.get(f"alone, {kind}")
            # by itself: what the others are held to
            if run_name == f"alone, {kind}":
                want = got
            count = STEPS - SAVED if begun else STEPS
            made.append(_row(run_name, functools.partial(near, got, want, count, KINDS[kind][1])))
    made.append(_row(_ACCELERATE, lambda: near(
        failed.get("accelerate") or [_train_loss(home, _ACCELERATE)], [_train_loss(home, "alone, LoRA")], 1)))
    made.append(_row("answers of two processes", lambda: same_answers(home, failed)))
    return made


def _row(name: str, measure: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "measured": measure(), "error": None}
    except Exception as error:  # whatever it is, the other rows are told
        return {"name": name, "measured": "", "error": str(error) or type(error).__name__}


def near(got: Any, want: Any, count: int, most: float = 1e-5) -> str:
    """How near the last ``count`` losses are to those without a launcher.

    Raises:
        RuntimeError: too far, others in number, or there are none and why.
    """
    for losses in (got, want):
        if not isinstance(losses, list):
            raise RuntimeError(str(losses or "the run without a launcher gave no losses"))
    if len(got) != count or len(want) < count:
        raise RuntimeError(f"{len(got)} losses, not {count}")
    off = max((abs(a - b) / abs(b) for a, b in zip(got, want[-count:], strict=True)),
              key=lambda share: math.inf if math.isnan(share) else share)
    told = f"{count} loss{'es' if count > 1 else ''} within {off:.0e} of those without a launcher"
    if not off <= most:  # nor is NaN
        raise RuntimeError(f"{told}; at most {most:g}")
    return told


def _train_loss(home: Path, run: str) -> float:
    import manifest

    return manifest.read(_folder(home, run) / "outputs" / "run")["metrics"]["train_loss"]


def same_answers(home: Path, failed: dict[str, str]) -> str:
    """Says how many files are the same.

    Raises:
        RuntimeError: they differ, or are not there.
    """
    for name in ("alone", "answers 0", "answers 1"):
        if name in failed:
            raise RuntimeError(f"{name}: {failed[name]}")
    one, two = ({path.name: path.read_bytes() for path in sorted((home / which).rglob("outputs_final.*"))}
                for which in ("one", "two"))
    if not one or one.keys() != two.keys():
        raise RuntimeError(f"one process wrote {', '.join(one) or 'nothing'}, two {', '.join(two) or 'nothing'}")
    if odd := [name for name in one if one[name] != two[name]]:
        raise RuntimeError(f"{', '.join(odd)}: not the bytes of one process")
    return f"{len(one)} files, the bytes of one process"


def make_inputs(home: Path) -> None:
    """A base, rows and prompts."""
    from benchmarks.memory.planned import made_up

    made_up(home / "base")
    (home / "rows.jsonl").write_text("".join(json.dumps(
        {"prompt": f"Say {i}.", "completion": str(i * 7919) * (1 + i % 3)}) + "\n" for i in range(4 * STEPS)))
    (home / "prompts.jsonl").write_text("".join(json.dumps(
        {"prompt": f"What is {i}?{' x' * (i % 5)}", "completion": "no"}) + "\n" for i in range(18)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit_s", type=float, default=600, help="seconds for all of it (default: 600)")
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=tuple(RUNS), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.child, args.home, args.device)
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        make_inputs(home)
        failed = run(home, args.device, args.limit_s - (time.monotonic() - start), len(os.sched_getaffinity(0)) > 4)
        found = rows(home, failed)
    if args.json:
        args.json.write_text(json.dumps({"device": args.device, "seconds": time.monotonic() - start, "rows": found},
                                        indent=2) + "\n", encoding="utf-8")
    print(*(f"{row['name']}: {row['error'] or row['measured']}" for row in found), sep="\n")
    sys.exit(any(row["error"] for row in found))


if __name__ == "__main__":
    main()
