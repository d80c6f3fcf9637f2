"""What --plan says beside what a command holds: every training and answers, a step or two of the real one, on made-up rows.

    python -m benchmarks.memory.planned                       # a Llama of a few thousand weights, a minute on one core
    python -m benchmarks.memory.planned --base embedded       # the 135M model; resident memory too
    python -m benchmarks.memory.planned --base FOLDER --device cuda --only sft,moe

Measured are the bytes that torch's allocator gave out at the highest point of a whole command, loading included (on a GPU
``max_memory_allocated``), beside the plan without the process itself; ``resident`` is the growth of the process beyond its
libraries, in a run of its own. Rows are as long as --tokens, so that the plan's longest row is there. Exit code 1 where a
plan is off by more than 15 %.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Share by which a plan may be off.
BAR = 0.15
#: Objective -> what is said beside base, batch and data.
CASES: dict[str, tuple[str, ...]] = {
    "sft": ("--moe_flag", "0", "--task_name", "dialogs", "--lora_r", "8"),
    "sft checkpointing": ("--moe_flag", "0", "--task_name", "dialogs", "--lora_r", "8", "--gradient_checkpointing", "true"),
    "full": ("--moe_flag", "0", "--task_name", "dialogs", "--tuning", "full"),
    "dpo": ("--moe_flag", "0", "--method", "dpo", "--task_name", "safety", "--lora_r", "8"),
    "moe": ("--moe_flag", "1", "--task_name", "safety", "--lora_r", "8", "--gate_loss_weight", "0.1"),
    "soup": ("--moe_flag", "0", "--method", "soup", "--adapters", "helpfulness,safety", "--task_name", "dialogs"),
    "search": ("--moe_flag", "0", "--method", "search", "--adapters", "helpfulness,safety", "--task_name", "dialogs"),
    "mask on factors": ("--method", "mask", "--aligned", "helpfulness", "--tasks", "later"),
    "mask on weights": ("--method", "mask", "--mask_on", "weights", "--aligned", "helpfulness", "--tasks", "later"),
    "answers": ("inference.py", "--task_name", "helpfulness", "--cross_task", "base", "--max_new_tokens", "32"),
}
_PAIRS = ("dpo", "mask on factors", "mask on weights")
_LIBRARIES = ("training.sft", "training.dpo", "training.moe", "training.mask", "training.soup", "models.generation.hf")
_EXPERTS = ("helpfulness", "safety", "truthfulness")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="", help="embedded, a folder or a hub name; empty: a made-up Llama")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rows", type=int, default=4, help="rows a pass")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of every row")
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps: in the second there are moments")
    parser.add_argument("--only", default="", help=f"commas: {', '.join(CASES)}")
    parser.add_argument("--json", help="write the rows here too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--resident", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measured(json.loads(args.measure), args.device, args.resident)))
        return
    names = [name.strip() for name in args.only.split(",") if name.strip()] or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"--only {', '.join(unknown)}: not known; allowed: {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as home:
        rows = compared(Path(home), args, names)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2), encoding="utf-8")
    sys.exit(any(abs(row["off"]) > BAR for row in rows))


def compared(home: Path, args: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each objective, printed as it comes."""
    base = args.base or str(made_up(home / "base"))
    make_inputs(home, base, args, names)
    rows = []
    print("| training | plan, GB | tensors, GB | plan off by | resident, GB |\n|---|---|---|---|---|", flush=True)
    for name in names:
        words = command_line(name, home, base, args)
        plan = planned(words, args.tokens)
        found = _in_a_process(words, args.device)
        grown = _in_a_process(words, args.device, True)["resident"] if args.base and args.device == "cpu" else None
        rows.append({"training": name, "plan": plan, "tensors": found["tensors"], "off": plan / found["tensors"] - 1,
                     "resident": grown})
        print(f"| {name} | {plan / 1e9:.4f} | {found['tensors'] / 1e9:.4f} | {rows[-1]['off']:+.1%} | "
              f"{f'{grown / 1e9:.3f}' if grown else ''} |", flush=True)
    return rows


def command_line(name: str, home: Path, base: str, args: Any) -> list[str]:
    """The words of align_basemodel.py for an objective; of inference.py they begin with its name."""
    here = ("--preset", "own", "--model_name_or_path", base, "--device", args.device, "--dtype", args.dtype, "--threads",
            "1", "--output_dir", str(home), "--overwrite")
    if name == "answers":
        return [*CASES[name], "--data_path", str(home / "prompts.jsonl"), "--batch_size", str(args.rows), *here]
    data = home / ("pairs.jsonl" if name in _PAIRS else "rows.jsonl")
    # without a warm-up the first step changes something: experts that are equal are refused
    steps = () if name == "search" else (
        "--max_steps", str(args.steps), "--save_strategy", "no", "--gradient_accumulation_steps", "1", "--logging_steps",
        "1000", "--lr_scheduler_type", "constant")
    again = () if name == "search" or "--gradient_checkpointing" in CASES[name] else ("--gradient_checkpointing", "false")
    return [*CASES[name], *again, *steps, "--data_path", str(data), "--model_max_length", str(args.tokens),
            "--per_device_train_batch_size", str(args.rows), *here, "--run_name", "measured"]


def planned(words: Sequence[str], tokens: int) -> float:
    """Bytes of tensors that --plan tells for a command line and rows of so many tokens."""
    import config
    from flags import AlignArgs, InferenceArgs
    from models.footprint.command import per_device

    command, words = (InferenceArgs, words[1:]) if words[0] == "inference.py" else (AlignArgs, words)
    return per_device(config.parse(command, [*words, "--plan", "--plan_tokens", str(tokens)])).tensors


def measured(words: Sequence[str], device: str, resident: bool = False) -> dict[str, float]:
    """Run a command line here; bytes of tensors at the highest point, or growth of the process."""
    import torch

    import align_basemodel
    import inference

    run, words = (inference.main, words[1:]) if words[0] == "inference.py" else (align_basemodel.main, words)
    # libraries are no part of a run
    for name in _LIBRARIES:
        importlib.import_module(name)
    start = _resident("VmRSS")
    if resident or device == "cuda":
        run(words)
        grown = _resident("VmHWM") - start
        return {"resident": grown} if resident else {"tensors": float(torch.cuda.max_memory_allocated())}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(words)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return {"tensors": float(most)}


def _in_a_process(words: Sequence[str], device: str, resident: bool = False) -> dict[str, float]:
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-m", "benchmarks.memory.planned", "--device", device, "--measure",
                          json.dumps(words), *(["--resident"] if resident else [])], capture_output=True, text=True,
                         cwd=root, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get(
                             "PYTHONPATH", "")])})
    if run.returncode:
        sys.exit(f"error: {' '.join(words)}: {run.stderr.strip()[-600:]}")
    return json.loads(run.stdout.splitlines()[-1])


def _resident(key: str) -> float:
    """A line of the process' status in bytes: VmRSS, VmHWM (the most so far)."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))[1]) * 1024.0


def made_up(folder: Path) -> Path:
    """A Llama of two layers whose activations outweigh it, with a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from benchmarks.made_up import tokenizer as bytes_of

    tokenizer = bytes_of(384)
    shape = LlamaConfig(vocab_size=384, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
                        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                        pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_inputs(home: Path, base: str, args: Any, names: Sequence[str]) -> None:
    """Rows and pairs of digits, a token each, longer than any row; adapters and a fused MoE, of a step each."""
    draw = random.Random(0)

    def digits(count: int) -> str:
        return "".join(draw.choice("0123456789") for _ in range(count))

    long = 2 * args.tokens + 8
    for file, asked, keys in (("rows", 8, ("prompt", "completion")), ("pairs", 8, ("prompt", "chosen", "rejected")),
                              ("prompts", args.tokens - 16, ("prompt", "completion"))):
        lines = [json.dumps({key: digits(asked if key == "prompt" else long) for key in keys}) for _ in range(4 * args.rows)]
        (home / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    import align_basemodel
    from models import llama_moe

    needed = {"moe": _EXPERTS, "soup": _EXPERTS[:2], "search": _EXPERTS[:2], "mask on factors": (_EXPERTS[0], "later"),
              "mask on weights": (_EXPERTS[0], "later")}
    for name in dict.fromkeys(adapter for case in names for adapter in needed.get(case, ())):
        goes_on = ("--init_adapter", _EXPERTS[0]) if name == "later" else ("--seed", str(len(name)))
        words = command_line("sft", home, base, args)
        align_basemodel.main([*words[:-1], name, *goes_on, "--max_steps", "1", "--model_max_length", "64"])
    if "moe" in names:
        llama_moe.main(["--model_name_or_path", base, "--output_dir", str(home), "--device", args.device, "--dtype",
                        args.dtype, "--router_init", "random"])


if __name__ == "__main__":
    main()
