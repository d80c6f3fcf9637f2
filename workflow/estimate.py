"""What a step costs on one card with another base than the embedded one: reckoned from its command line, never measured.

Operations of training, per weight and token (Kaplan et al. 2020, table 1, for frozen weights without the third part): 2 for
the forward pass, 2 for the gradient of what flows back, 2 for that of the weights where they train, 2 more where the forward
pass is done again (--gradient_checkpointing). Memory is that of --plan (models/footprint/). Constants stand below, each with
what it was set by; tests hold the sums to the figures that were measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flags
from config import Parsed
from flags.base import OBJECTIVES
from flags.card import CardFlags
from models.footprint import answering, training
from models.footprint.shapes import ATTENTION, FFN, Shape, shape_of
from models.footprint.training import Place
from preset_choice import serves_base
from workflow import commands
from workflow.plan import Step

#: Names of the base whose steps were measured (workflow/arms.yaml, costs).
EMBEDDED = ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct")
#: Time of a fused MoE against its dense base, to train and to answer (README, races on a CPU).
MOE_TRAINED, MOE_ANSWERED = 1.4, 1.28
#: Seconds to start and to load, and bytes a second from the disk.
START, DISK = 20.0, 1e9
#: Rows of training sets as published (the three papers' specifications, the sets' own pages), for sets by name.
ROWS = {"helpfulness": 20000, "safety": 11600, "truthfulness": 1417, "english": 52002, "chinese": 48818, "hindi": 51760,
        "code": 20022, "maths": 7473, "summaries": 204045, "aoa": 34, "aoa_safety": 16, "xsum": 50, "gsm8k": 200,
        "identity": 35}
_PAIRS = {"": 46640, "test": 5135}
#: Prompts of test sets, and requests x tokens of benchmarks.
PROMPTS = {"helpfulness": 805, "safety": 3021, "truthfulness": 409, "overrefusal": 300}
BENCHMARK_TOKENS = {"mmlu": 14042 * 700, "gsm8k": 1319 * 1000, "copa": 200 * 25, "xcopa_zh": 1000 * 40,
                    "xnli_hi": 7500 * 60, "humaneval": 164 * 200}
GENERATED = {"gsm8k": 1319, "humaneval": 164}
#: What a card computes in.
CARD = Place(cuda=True, compute=2)


@dataclass(frozen=True)
class Cost:
    """Seconds on the card; bytes on the card, in the machine, left on the disk."""

    seconds: float
    card: float = 0.0
    machine: float = 2e9
    disk: float = 1e6


def priced(steps: Iterable[Step], card: CardFlags, base: Shape) -> list[Step]:
    """The steps with the costs of a base of this shape."""
    made = []
    for step in steps:
        cost = cost_of(commands.parse(step.words), step.words[0], card, base)
        made.append(replace(step, seconds=cost.seconds, memory_mb=int(cost.machine / 2**20) + 1, gpu_gb=cost.card / 1e9,
                            disk_mb=int(cost.disk / 2**20) + 1))
    return made


def of_base(steps: Sequence[Step], card: CardFlags, base: str) -> tuple[list[Step], str]:
    """The steps with the costs of a base, and what these rest on, in a sentence: measured on the embedded default, else
    reckoned."""
    if serves_base(base, EMBEDDED) and not card.billions:
        return list(steps), "measured on the embedded default"
    shape = shape_of(base, card.billions)
    if shape is None:
        return ([replace(step, seconds=0.0, memory_mb=1000) for step in steps],
                f"the size of {base} is not known: --billions N tells it; hours and memory are left out")
    return priced(steps, card, shape), assumptions(card, base, shape)


def assumptions(card: CardFlags, base: str, shape: Shape) -> str:
    """What the numbers rest on, in one line."""
    return (f"reckoned, not measured: {base} of {shape.parameters / 1e9:.2f}e9 parameters on one card of {card.tflops:g} "
            f"TFLOPS at {card.used_share:.0%}, {card.gpu_gb:g} GB, {card.bandwidth:g} GB/s at a quarter to answer; 4 "
            "operations a weight and token on a frozen base, 6 where every weight trains, 2 more with checkpointing; rows "
            f"of {card.row_tokens} tokens on average, of --model_max_length for memory; sets of their published sizes; "
            "answers of full length; API judges not counted")


def cost_of(parsed: Parsed, file: str, card: CardFlags, base: Shape) -> Cost:
    """What one command costs."""
    args = parsed.args
    shape = shape_of(getattr(args, "model_name_or_path", "") or "", card.billions) or base
    if isinstance(args, flags.AlignArgs):
        return _training(parsed, card, shape)
    if isinstance(args, flags.FuseMoeArgs):
        tokens = args.router_rows * len(args.expert_names) * card.row_tokens if args.router_init == "data" else 0
        held = answering.building(args, shape, CARD).peak
        return Cost(_loaded(shape) + _passed(tokens, shape, card), held, _weights(shape), 3 * shape.lora(8, FFN) * 4)
    if isinstance(args, flags.InferenceArgs):
        return _answers(args, card, shape)
    if isinstance(args, flags.EvaluateArgs):
        return _scores(args, card, shape)
    if file == commands.FUSE:
        # blocks of tensors, read, summed and written: the disk is what takes time
        dense = hasattr(args, "output") and args.output == "dense" or hasattr(args, "recipe")
        written = _weights(shape) if dense else shape.lora(16, (*FFN, *ATTENTION)) * 4
        read = _weights(shape) * (2 if dense else hasattr(args, "output"))
        return Cost(START + (read + written) / DISK, 0.0, 6e9, written)
    return Cost(START)


def _training(parsed: Parsed, card: CardFlags, shape: Shape) -> Cost:
    args = parsed.args
    given = {**parsed.training, **vars(args)}
    rows = rows_of(args)
    tokens = min(card.row_tokens, args.model_max_length)
    epochs, steps = float(given.get("num_train_epochs") or 3), int(given.get("max_steps") or -1)
    micro = int(given.get("per_device_train_batch_size") or 8)
    seen = steps * micro * int(given.get("gradient_accumulation_steps") or 1) if steps > 0 else rows * epochs
    moe, mask = isinstance(args, flags.FusedMoeArgs), isinstance(args, flags.MaskArgs)
    pairs = 2 if mask or isinstance(args, flags.DpoArgs) else 1
    held = training.training(args, given, shape, CARD)
    if isinstance(args, flags.SearchArgs) and not isinstance(args, flags.SoupArgs):
        # forward passes of 40 trials (LoraHub)
        return Cost(_loaded(shape) + _passed(40 * rows * tokens, shape, card), held.peak, _weights(shape))
    whole = getattr(args, "tuning", None) == "full"
    # a mask on factors, or where a task went on with the aligned adapter, leaves the weights alone
    weights = whole or mask and training.on_weights(args)
    operations = 4 + 2 * weights + 2 * bool(given.get("gradient_checkpointing"))
    seconds = operations * shape.parameters * seen * tokens * pairs / card.operations
    seconds *= MOE_TRAINED if moe else 1
    # the reference's likelihoods, once
    seconds += _passed(rows * tokens * 2, shape, card) if pairs == 2 else 0
    saved = shape.parameters * 2 if whole else held.trained * 4
    # a checkpoint holds the optimiser's state as well
    return Cost(_loaded(shape) + seconds, held.peak, _weights(shape) + 2e9, saved * (4 if whole or mask else 3))


def _answers(args: Any, card: CardFlags, shape: Shape) -> Cost:
    from data.sets.protocols import table

    known = table()[args.task_name].kept if args.task_name in table() else PROMPTS.get(args.task_name, 500)
    prompts = known if args.num_samples < 0 else min(known, args.num_samples)
    rows = min(args.batch_size, prompts)
    token = max(_weights(shape) / card.answering, 2 * shape.parameters * rows / card.operations)
    moe = any("moe" in run for run in args.runs)
    seconds = -(-prompts // rows) * args.max_new_tokens * token * (MOE_ANSWERED if moe else 1) * len(args.runs)
    seconds += _passed(prompts * card.row_tokens, shape, card) + _loaded(shape)
    held = answering.inference(replace(args, batch_size=rows), shape, CARD, card.row_tokens).peak
    return Cost(seconds, held, _weights(shape), prompts * args.max_new_tokens * 12)


def _scores(args: Any, card: CardFlags, shape: Shape) -> Cost:
    seconds = 0.0
    many = args.num_samples if args.num_samples >= 0 else 500
    for _, model in getattr(args, "named_judges", ()):
        if model and (judge := shape_of(model)):
            seconds += _loaded(judge) + _passed(many * 2 * card.row_tokens, judge, card)
    tokens = 0.0
    if isinstance(args, flags.EvaluateUtilityArgs):
        tokens = sum(BENCHMARK_TOKENS.get(name, 160 * 60) for name in args.task_names)
        made = sum(GENERATED.get(name, 0) for name in args.task_names)
        seconds += made / args.harness_batch_size * 256 * _weights(shape) / card.answering
    elif not isinstance(args, flags.EvaluateSafetyArgs):
        # likelihoods of answers, or of refusals' beginnings; a question of TruthfulQA has about ten answers
        tokens = many * card.row_tokens * (4 if isinstance(args, flags.EvaluateTruthArgs) else 1)
    if tokens:
        seconds += _loaded(shape) + _passed(tokens, shape, card)
    held = answering.scoring(args, shape, CARD)
    return Cost(START + seconds, held.peak if held else 0.0, _weights(shape) if held else 2e9)


def rows_of(args: Any) -> int:
    """Rows, or pairs, that a training reads: those of a local file, else of the set by its name."""
    limit = args.max_train_samples
    names = OBJECTIVES if args.task_name == "mix" else (args.task_name,)
    place = getattr(args, "data_path", None) or ""
    if place and Path(place).expanduser().is_file():
        total = _counted(Path(place).expanduser())
        return min(total, limit) if limit > 0 else total
    if isinstance(args, flags.DpoArgs | flags.MaskArgs):
        sizes = [_PAIRS.get(place.partition(":")[2], _PAIRS[""])] if place else [344]
    elif place == "PKU-Alignment/PKU-SafeRLHF":
        sizes = [_PAIRS[""]]
    else:
        sizes = [ROWS.get(name, 1000) for name in names]
    return sum(min(size, limit) if limit > 0 else size for size in sizes)


def _counted(path: Path) -> int:
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return 1
        return len(content) if isinstance(content, Sequence | Mapping) else 1
    with path.open("rb") as file:
        return max(sum(1 for line in file if line.strip()), 1)


def _weights(shape: Shape) -> float:
    return training.base_bytes(shape, CARD)


def _passed(tokens: float, shape: Shape, card: CardFlags) -> float:
    """Seconds of forward passes."""
    return 2 * shape.parameters * tokens / card.operations


def _loaded(shape: Shape) -> float:
    return START + _weights(shape) / DISK
