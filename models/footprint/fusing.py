"""What fusing files holds beside the interpreter: a tensor or a matrix at a time, and the factors of adapters.

``merge`` and ``export`` reckon their own budget from the headers of their inputs (models/merging/budget.py).
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from models.footprint.shapes import ATTENTION, FFN, Shape
from models.footprint.strategies import Footprint
from models.footprint.training import CONTEXT

#: Matrices in fp32 that a weight's step holds at most: base, tuned, their difference, and what its SVD or its mask makes.
_MATRICES = 6
#: Bytes a read takes (models/adapters/extract.py).
_BLOCK = (1 << 22) * 4


def adapters(args: Any) -> Footprint:
    """``fuse.py adapters``: every adapter's factors, the fused ones, and where entries are trimmed a core or a matrix."""
    read = [numbers(_folder(args.results, name)) for name in args.adapter_names]
    total, largest = sum(size for size, _ in read), max((most for _, most in read), default=0)
    # the fused adapter has all of their ranks unless one is given; sparse methods work on a whole change of a module
    dense = _MATRICES * largest if args.space == "dense" or args.compat == "peft" else 0
    return Footprint(total, 0, data=4.0 * total, activations=4.0 * total, passing=4.0 * dense + 4 * total / 10,
                     context=CONTEXT[False])


def matrices(args: Any, shape: Shape, rank: int, models: int) -> Footprint:
    """``extract``, ``realign``, ``import``: matrix by matrix, the factors of the result kept where it is an adapter.

    Args:
        rank: of an adapter that is written; 0: a checkpoint is.
        models: that are read side by side.
    """
    largest = max(shape.hidden * shape.intermediate, shape.vocabulary * shape.hidden)
    factors = 4.0 * shape.lora(rank, (*ATTENTION, *FFN)) if rank else 0.0
    return Footprint(shape.parameters, 0, activations=factors, passing=4.0 * (models + _MATRICES - 2) * largest + _BLOCK,
                     context=CONTEXT[False])


def numbers(folder: Path) -> tuple[int, int]:
    """(numbers of an adapter, entries of the largest change B A) by the header of its file; zeros where there is none."""
    try:
        with (folder / "adapter_model.safetensors").open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = {name: row["shape"] for name, row in header.items() if name != "__metadata__"}
        sides = {name.replace("lora_A", "lora_B"): shape[-1] for name, shape in shapes.items() if "lora_A" in name}
        return sum(map(prod, shapes.values())), max((shapes[name][0] * side for name, side in sides.items()), default=0)
    except (OSError, ValueError, LookupError, TypeError):
        return 0, 0


def _folder(results: Path, name: str) -> Path:
    return Path(name).expanduser() if "/" in name else results / "outputs" / name
