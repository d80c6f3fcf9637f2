"""Where the time of a training step goes on this machine, and its share of what a GEMM does in the same minute.

    python benchmarks/training_profile.py --json profile.json     # SFT and MoE tuning of the quickstart, one thread

The quickstart's own rows, model and losses, in the dtype that the machine computes in; the experts of the MoE are random,
which costs the same. Every round measures a GEMM of the FFN's shape, then a step of ``--rows`` rows, forward and backward:
virtual machines share their matrix units, and a GEMM of one minute says nothing about a step of another. Limit: 4
operations per weight and token, 4 in the output head per answer token, at the GEMM's speed of that round. After the rounds
one step is profiled: each operator's own time, by kind.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

#: Kind -> operators of torch that belong to it; what is in none is "other": Python, autograd, dispatch.
KINDS = {
    "products": ("mm", "addmm"),
    "attention": ("bmm", "baddbmm", "_softmax", "_softmax_backward_data", "_scaled_dot_product_flash_attention_for_cpu",
                  "_scaled_dot_product_flash_attention_for_cpu_backward"),
    "elementwise": ("mul", "mul_", "add", "add_", "sub", "sub_", "div", "div_", "silu", "silu_", "silu_backward", "neg",
                    "pow", "rsqrt", "exp", "exp_", "sigmoid", "lerp", "addcmul", "addcmul_", "where", "masked_fill",
                    "masked_fill_", "threshold_backward"),
    "copies": ("copy_", "cat", "fill_", "zero_", "index", "index_select", "index_add_", "index_put_", "gather", "scatter_",
               "empty_strided", "empty", "embedding"),
    "sums": ("sum", "mean", "amax", "logsumexp", "_log_softmax", "_log_softmax_backward_data", "nll_loss_forward",
             "nll_loss_backward"),
}


def kind_of(operator: str) -> str:
    """The kind of an operator as the profiler names it, e.g. ``aten::mm``."""
    name = operator.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() if name in names), "other")


def objective(kind: str, rows: int) -> tuple[Callable[[], float], int, int, int]:
    """(a step, its tokens, its answer tokens, operations at the limit) of ``sft`` or ``moe`` on the embedded model."""
    import torch

    from config import parse
    from data.collate import pad_rows
    from flags import AlignArgs
    from models.base.loading import base_path, load_base, load_tokenizer
    from models.base.placement import compute_dtype
    from models.moe.files import install
    from models.moe.layer import TuningConfig
    from training.answers import AnswerModel, predicting_places
    from training.moe import MoeLoss, prepare
    from training.samples import training_rows
    from training.sft import to_train

    device = torch.device("cpu")
    words = {"sft": ["--moe_flag", "0", "--task_name", "helpfulness"],
             "moe": ["--moe_flag", "1", "--gate_loss_weight", "0.1", "--helpfulness_weight", "0.001",
                     "--safety_weight", "0.001", "--truthfulness_weight", "0.001"]}[kind]
    args = parse(AlignArgs, words).args
    base, dtype = base_path("embedded", None), compute_dtype(args.dtype, device)
    tokenizer = load_tokenizer(base)
    drawn = sorted(training_rows(args, tokenizer, base)[0], key=lambda row: len(row["input_ids"]))
    # from the middle: the rows of a common step
    middle = (len(drawn) - rows) // 2
    batch = pad_rows(drawn[middle:middle + rows], tokenizer.pad_token_id, None)
    if kind == "sft":
        model = to_train(base, args, dtype, device)
        loss = AnswerModel(model, dtype)
    else:
        model = load_base(base, dtype, device)
        shape, generator = model.config, torch.Generator().manual_seed(0)
        sides = {"gate": (shape.hidden_size, shape.intermediate_size), "up": (shape.hidden_size, shape.intermediate_size),
                 "down": (shape.intermediate_size, shape.hidden_size)}
        rank = 16  # the quickstart's experts
        factors = [{name: (torch.randn(3, rank, into, generator=generator) * into**-0.5,
                           torch.randn(3, out, rank, generator=generator) * 0.02) for name, (into, out) in sides.items()}
                   for _ in range(shape.num_hidden_layers)]
        routers = [torch.randn(3, shape.hidden_size, generator=generator) * 0.02 for _ in factors]
        model = install(model, factors, routers, args.expert_topk)
        tuning = TuningConfig(args.lora_r, args.lora_alpha, args.lora_dropout)
        prepare(model, args, tuning, tuning if args.attention_lora else None)
        loss = MoeLoss(model, dtype, ("helpfulness", "safety", "truthfulness"), args)
    loss.train()
    tuned = [p for p in loss.parameters() if p.requires_grad]

    def step() -> float:
        for parameter in tuned:
            parameter.grad = None
        start = time.perf_counter()
        parts = loss(**batch, predicting=predicting_places(batch["labels"]))
        total = parts["lm"] / parts["tokens"] + sum(0.001 * value.sum() for name, value in parts.items()
                                                    if name.startswith(("gate", "drift")))
        total.backward()
        return time.perf_counter() - start

    tokens = int(batch["attention_mask"].sum())
    answers = int((batch["labels"] != -100).sum())
    body = sum(p.numel() for name, p in model.named_parameters()
               if p.ndim == 2 and "layers." in name and not p.requires_grad)
    head = model.get_output_embeddings().weight.numel()
    return step, tokens, answers, 4 * (body * tokens + head * answers)


def gemm_speed(rows: int) -> float:
    """Operations per second of (rows, 576) x (576, 1536) in bfloat16, each of 30 times with other weights, as layers are."""
    import torch

    x = torch.randn(rows, 576).bfloat16()
    weights = [torch.randn(1536, 576).bfloat16() for _ in range(30)]
    with torch.no_grad():
        x @ weights[0].T
        start = time.perf_counter()
        for weight in weights:
            x @ weight.T
        return len(weights) * 2 * rows * 576 * 1536 / (time.perf_counter() - start)


def profiled(step: Callable[[], float]) -> dict[str, float]:
    """Kind of operator -> its share of a step's own time; "other" is what no operator of these kinds took."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    shares = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profile.key_averages():
        shares[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(shares.values())
    return {kind: value / total for kind, value in shares.items()}


def measure(kind: str, rows: int, rounds: int) -> dict[str, Any]:
    """What the table shows of an objective."""
    step, tokens, answers, operations = objective(kind, rows)
    step()
    step()
    found = []
    for _ in range(rounds):
        gemm, seconds = gemm_speed(tokens), step()
        found.append({"gemm_flops": gemm, "seconds": seconds, "of_limit": operations / gemm / seconds})
    return {"objective": kind, "tokens": tokens, "answer_tokens": answers, "rounds": found,
            "tokens_per_second": tokens / statistics.median(row["seconds"] for row in found),
            "of_limit": statistics.median(row["of_limit"] for row in found), "shares": profiled(step)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| | tokens/s | GEMM, GFLOP/s, least to most | of the limit | " + " | ".join(rows[0]["shares"]) + " |",
             "|" + "---|" * (4 + len(rows[0]["shares"]))]
    for row in rows:
        speeds = sorted(found["gemm_flops"] / 1e9 for found in row["rounds"])
        shares = " | ".join(f"{share:.0%}" for share in row["shares"].values())
        lines.append(f"| {row['objective']} | {row['tokens_per_second']:.0f} | {speeds[0]:.0f} to {speeds[-1]:.0f} | "
                     f"{row['of_limit']:.0%} | {shares} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", default="sft,moe", help="some of these: %(default)s")
    parser.add_argument("--rows", type=int, default=4, help="of a micro-batch (default: 4, the preset's)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="default: 1, as one of the quickstart's two lanes")
    parser.add_argument("--json", type=Path, help="write it here too")
    args = parser.parse_args(argv)
    kinds = args.objectives.split(",")
    if set(kinds) - {"sft", "moe"}:
        parser.error("--objectives: of sft, moe")
    from runtime import keep_freed_memory, short_waits

    short_waits()
    keep_freed_memory()  # both as align_basemodel.py does
    import torch

    torch.set_num_threads(args.threads)
    rows = [measure(kind, args.rows, args.rounds) for kind in kinds]
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
