"""What a tuning step of the fused MoE holds, at any shape, counted without the memory: every tensor is a fake one.

    python benchmarks/memory/tuning_step.py        # Llama-2-7B, 8 x 300 tokens, with and without checkpointing
    python benchmarks/memory/tuning_step.py --layers 22 --hidden 2048 --intermediate 5632 --heads 32 --rows 4

The step is the project's own: its layers, its losses, AdamW. Counted are the bytes of all living tensors, as the reference
path makes them (models/moe/expert_sum.py); a GPU's kernels make fewer. What an allocator keeps beside them, a CUDA context
(0.5 GB) and the workspace of products come on top.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

_GIB = 2**30
#: Llama-2-7B, a batch of the published tuning.
DEFAULTS = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "vocabulary": 32000, "rank": 8, "rows": 8,
            "tokens": 300}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", help="write the rows here too")
    flags = vars(parser.parse_args(argv))
    place = flags.pop("json")
    # --help must not wait for torch
    from fake_step import Shape, moe_step

    shape, rows = Shape(**flags), []
    print(f"{shape}\n\n| checkpointing | weights, GiB | after a forward pass | after a step | peak |\n|---|---|---|---|---|")
    for checkpointing in (False, True):
        held = moe_step(shape, checkpointing)
        rows.append({"checkpointing": checkpointing, **asdict(held)})
        cells = " | ".join(f"{size / _GIB:.2f}" for size in asdict(held).values())
        print(f"| {'yes' if checkpointing else 'no'} | {cells} |", flush=True)
    if place:
        Path(place).write_text(json.dumps({"shape": asdict(shape), "rows": rows}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
