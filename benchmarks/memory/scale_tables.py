"""The tables of docs/scale.md: what every stage of the three systems holds at 1B, 7B, 13B and 70B, by --plan.

    python -m benchmarks.memory.scale_tables            # print them
    python -m benchmarks.memory.scale_tables --write    # and put them into docs/scale.md

Reckoned in seconds, without torch and without a model: bases are known by name (models/footprint/shapes.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from functools import cache

import config
from config import ROOT, Parsed
from flags import AlignArgs, InferenceArgs
from models.footprint.command import held_whole, per_device
from models.footprint.fitting import more_devices

PAGE = ROOT / "docs" / "scale.md"
#: A results folder without runs: the experts that lie in results/ have ranks of their own, and plans read them.
NO_RUNS = str(ROOT / "benchmarks" / "no_runs")
BEGIN, END = "<!-- begin: benchmarks/memory/scale_tables.py -->", "<!-- end -->"
#: Size -> base of that size.
BASES = {"1B": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "7B": "meta-llama/Llama-2-7b-hf", "13B": "meta-llama/Llama-2-13b-hf",
         "70B": "meta-llama/Llama-2-70b-hf"}
#: Devices of the second number of a cell; memory of a device in GB for the last table.
DEVICES, CARD = 8, 80
_AGAIN = ("--gradient_checkpointing", "true")
_ONE = ("--per_device_train_batch_size", "1")
_EXPERT = ("--preset", "h3fusion", "--moe_flag", "0", "--task_name", "helpfulness")
_MOE = ("--preset", "h3fusion", "--moe_flag", "1")
_MASK = ("--method", "mask", "--tasks", "english", *_AGAIN, *_ONE)
_ON_WEIGHTS = ("--preset", "somf_tinyllama", *_MASK, "--mask_on", "weights", "--storage")
_NARROW = ("bfloat16", "--logit_dtype", "bfloat16")
_ADAPTER = ("--preset", "lora_fusion", "--moe_flag", "0", "--task_name", "aoa", "--data_path", "a.json")
#: System -> (stage, command line without its base).
SYSTEMS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "H3Fusion": (
        ("an expert, LoRA r 8 on the FFN, 8 x 300 tokens", _EXPERT),
        ("the same, `--gradient_checkpointing true`", (*_EXPERT, *_AGAIN)),
        ("tuning of the fused MoE, 8 x 300", _MOE),
        ("the same, `--gradient_checkpointing true`", (*_MOE, *_AGAIN)),
        ("answers, 16 prompts of 256 tokens, 512 new ones", ("inference.py", "--preset", "h3fusion")),
    ),
    "SOMF": (
        ("full tuning, 4 x 1024, checkpointing", ("--preset", "somf_tinyllama", "--moe_flag", "0", "--task_name", "safety",
                                                  "--tuning", "full", "--per_device_train_batch_size", "4")),
        ("DPO of LoRA r 256 on q and v, 1 pair of 2 x 1024", (
            "--preset", "somf_wizardlm", "--moe_flag", "0", "--method", "dpo", "--task_name", "safety", "--lora_r", "256",
            "--lora_targets", "q_proj,v_proj", "--model_max_length", "1024", *_AGAIN, *_ONE)),
        ("a mask on these factors, the same pair", (
            "--preset", "somf_wizardlm", *_MASK, "--aligned", "aligned", "--mask_on", "factors", "--model_max_length",
            "1024")),
        ("a mask on every weight, 1 pair, fp32", (*_ON_WEIGHTS, "float32")),
        ("the same, `--storage bfloat16 --logit_dtype bfloat16`", (*_ON_WEIGHTS, *_NARROW)),
        ("the same, `--storage bfloat16 --granularity block`", (*_ON_WEIGHTS, "bfloat16", "--granularity", "block")),
        ("the same, `--storage bfloat16 --granularity row`", (*_ON_WEIGHTS, "bfloat16", "--granularity", "row")),
    ),
    "LoRA fusion": (
        ("an adapter r 8 on q and v, 4 x 512, checkpointing", _ADAPTER),
        ("the same, `--base_quantization nf4`", (*_ADAPTER, "--base_quantization", "nf4")),
        ("a soup of two adapters, 4 x 512", ("--preset", "lora_fusion", "--moe_flag", "0", "--method", "soup", "--adapters",
                                             "task,safety", "--task_name", "dialogs", "--data_path", "a.json")),
        ("answers, 16 prompts of 256 tokens, 512 new ones", ("inference.py", "--preset", "lora_fusion", "--max_new_tokens",
                                                            "512", "--batch_size", "16")),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    if parser.parse_args(argv).write:
        PAGE.write_text(inserted(PAGE.read_text(encoding="utf-8"), markdown()), encoding="utf-8")
    else:
        print(markdown())


def inserted(page: str, tables: str) -> str:
    """The page with these tables between its marks."""
    return re.sub(f"{BEGIN}\n.*?{END}", lambda _: f"{BEGIN}\n{tables}\n{END}", page, flags=re.S)


@cache
def markdown() -> str:
    """All tables."""
    return "\n\n".join(["\n".join(_table(system)) for system in SYSTEMS] + ["\n".join(_strategies()), "\n".join(_devices())])


def plan(words: Sequence[str], base: str, strategy: str = "one", devices: int = 1) -> Parsed:
    """A command line with --plan, for a GPU that computes in bfloat16."""
    divided = () if devices == 1 else ("--plan_strategy", strategy, "--plan_devices", str(devices))
    command, rest = (InferenceArgs, words[1:]) if words[0] == "inference.py" else (AlignArgs, words)
    # what a preset says of other bases belongs to a run's own output
    with contextlib.redirect_stderr(io.StringIO()):
        return config.parse(command, [*rest, "--model_name_or_path", base, "--device", "cuda", "--dtype", "bfloat16",
                                      "--plan", "--output_dir", NO_RUNS, *divided])


def peak(words: Sequence[str], base: str, strategy: str = "one", devices: int = 1) -> float:
    """GB of each device."""
    return per_device(plan(words, base, strategy, devices)).peak / 1e9


def parted(words: Sequence[str]) -> bool:
    """Whether a stage's weights can be parted among devices."""
    return words[0] != "inference.py" and not held_whole(plan(words, BASES["7B"]).args)


def _table(system: str) -> Iterator[str]:
    yield f"**{system}**: GB of one device; of each of {DEVICES} under FSDP2, where weights can be parted\n"
    yield f"| stage | {' | '.join(BASES)} |"
    yield f"|---{'|---' * len(BASES)}|"
    for stage, words in SYSTEMS[system]:
        cells = []
        for base in BASES.values():
            each = f"; {peak(words, base, 'fsdp2', DEVICES):.0f}" if parted(words) else ""
            cells.append(f"{peak(words, base):.0f}{each}")
        yield f"| {stage} | {' | '.join(cells)} |"


def _strategies() -> Iterator[str]:
    stage, words = SYSTEMS["SOMF"][0]
    yield f"**Strategies**: {stage}, 7B, GB by part on each of {DEVICES} devices\n"
    whole = per_device(plan(words, BASES["7B"]))
    names = [name for name, size in whole.parts().items() if size or name == "communication"]
    yield f"| strategy | {' | '.join(names)} | peak |"
    yield f"|---{'|---' * (len(names) + 1)}|"
    for strategy, count in (("one", 1), *((name, DEVICES) for name in ("ddp", "zero2", "zero3", "fsdp2"))):
        held = per_device(plan(words, BASES["7B"], strategy, count))
        yield (f"| `{strategy}`{'' if count == 1 else f', {count}'} | "
               + " | ".join(f"{held.parts()[name] / 1e9:.1f}" for name in names) + f" | {held.peak / 1e9:.1f} |")


def _devices() -> Iterator[str]:
    yield f"**Devices of {CARD} GB** that a stage takes as it stands, by FSDP2 where weights can be parted, else by DDP\n"
    yield f"| stage | {' | '.join(BASES)} |"
    yield f"|---{'|---' * len(BASES)}|"
    for system, stages in SYSTEMS.items():
        for stage, words in (row for row in stages if row[1][0] != "inference.py"):
            cells = [_count(words, base) for base in BASES.values()]
            yield f"| {system}: {stage} | {' | '.join(cells)} |"


def _count(words: Sequence[str], base: str) -> str:
    if peak(words, base) <= CARD:
        return "1"
    found = more_devices(lambda name, count: peak(words, base, name, count), "fsdp2", 1, CARD, parted(words))
    return str(found[1]) if found else "more than 64" if parted(words) else "larger ones"


if __name__ == "__main__":
    main()
