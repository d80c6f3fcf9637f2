"""Extract a LoRA from a full fine-tune: tuned - base, per linear layer. The command behind ``models/fuse.py extract``."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from tqdm import tqdm

import console
import manifest
from errors import UserError
from flags import ExtractArgs
from models.adapters.files import CONFIG, complete_targets, vllm_note, write_adapter
from models.base.families import Family, family_of
from models.base.folders import TENSORS
from models.base.loading import base_path
from models.base.placement import set_up_torch
from models.checkpoints.fingerprints import fingerprint
from models.checkpoints.matched import matched
from models.checkpoints.reader import Checkpoint, TensorInfo
from models.operators.low_rank import Fused, low_rank, squared_norm

log = logging.getLogger(__name__)
RESIDUALS = "residuals.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
#: Values per read: enough to keep the disk busy, little beside a layer.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class SharedTensors:
    """The tensors of two checkpoints, by what a LoRA can hold of them.

    Args:
        linear: weights of linear layers that both have: what a LoRA can hold.
        other: everything else that both have, in equal shapes.
        reshaped: everything else that only one has, or has in another shape.
    """

    linear: list[str]
    other: list[str]
    reshaped: list[str]


def extract(args: ExtractArgs) -> str:
    """Compare the two checkpoints and write ``results/outputs/RUN``: adapter and residuals; returns what to say."""
    target = args.results / "outputs" / args.run_name
    if not args.overwrite and manifest.finished(target, asdict(args)):
        return f"{target}: already extracted"
    device, _ = set_up_torch(args)
    folders = base_path(args.model_name_or_path, args.cache_dir, use=TENSORS), _tuned_folder(args)
    if target.resolve() in [folder.resolve() for folder in folders]:
        raise UserError(f"--run_name {args.run_name}: {target} is an input; choose another name")
    with ExitStack() as stack:
        base, tuned = (stack.enter_context(Checkpoint.open(folder)).plain() for folder in folders)
        family = family_of(SimpleNamespace(**base.config))
        base, tuned = under_names_of(family, base, tuned)
        tensors = match(base, tuned, family)
        # found before the work starts: a tuned norm or embedding means that no LoRA is the whole change
        left_out = changed_others(base, tuned, tensors)
        if left_out and not args.ignore_other:
            raise UserError(f"--tuned {args.tuned}: {len(left_out)} tensors changed that no LoRA can hold: "
                            f"{', '.join(left_out[:8])}{' ...' if left_out[8:] else ''}; --ignore_other leaves their change "
                            "out of the adapter")
        with manifest.writing(target, "extract", asdict(args), overwrite=args.overwrite) as run:
            # module by module: one dense difference stands in memory at a time
            modules = factors(base, tuned, tensors.linear, args.fixed_rank, args.energy, args.seed, device)
            if not modules:
                raise UserError(f"--tuned {args.tuned}: no linear layer differs from --model_name_or_path "
                                f"{args.model_name_or_path}; there is nothing to extract")
            # all linear layers and not those that changed: short names in target_modules may match no others
            known = [name.removesuffix(".weight") for name in tensors.linear]
            rank = write_adapter(run.folder, {m: f.pair for m, f in modules.items()}, complete_targets(modules, known),
                                 {"task_type": "CAUSAL_LM", "base_model_name_or_path": args.model_name_or_path})
            run.parents.append(str(folders[1]))
            run.inputs.update(base=fingerprint(folders[0]), tuned=fingerprint(folders[1]))
            run.metrics.update(rank=rank, modules=len(modules), unchanged=len(known) - len(modules),
                               left_out=len(left_out), **_residuals(modules, left_out, run.folder))
    manifest.register(args.results, {"kind": "run", "command": "extract", "run": args.run_name, "seed": args.seed,
                                     **run.metrics})
    m = run.metrics
    return (f"{target}: {len(modules)} modules, rank {rank}, residual {m['residual']:.2%} of the change's norm (worst: "
            f"{m['worst_module']}, {m['worst_residual']:.2%}; all in {RESIDUALS})"
            + (f"; {len(left_out)} other changed tensors left out" if left_out else "") + vllm_note(rank))


def _tuned_folder(args: ExtractArgs) -> Path:
    run = args.results / "outputs" / args.tuned
    if "/" not in args.tuned and run.is_dir():
        if (run / CONFIG).is_file():
            raise UserError(f"--tuned {args.tuned}: {run} holds a LoRA adapter already; cut its rank with models/fuse.py "
                            "adapters --method svd")
        return run
    try:
        return base_path(args.tuned, args.cache_dir, use=TENSORS)
    except UserError as error:
        raise UserError(*(p.replace("--model_name_or_path", "--tuned") for p in error.problems)) from None


def _residuals(modules: Mapping[str, Fused], left_out: Sequence[str], folder: Path) -> dict[str, float | str]:
    """Write the residual of each module; returns the whole one and the worst."""
    rows = [{"module": m, "rank": f.pair[0].shape[0], "norm": f.norm, "residual": f.error} for m, f in modules.items()]
    manifest.write_json(folder / RESIDUALS, {"left_out": left_out, "modules": rows})
    worst = max(rows, key=lambda row: row["residual"])
    lost, whole = (sum(v**2 for v in values) for values in zip(*((f.norm * f.error, f.norm) for f in modules.values()),
                                                               strict=True))
    return {"residual": (lost / whole) ** 0.5, "worst_module": worst["module"], "worst_residual": worst["residual"]}


def under_names_of(family: Family, base: Checkpoint, tuned: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints by the names that an adapter's modules have; either may be saved from a class without a head.

    Raises:
        UserError: they are different architectures.
    """
    both = {"--model_name_or_path": base, "--tuned": tuned}
    layers = f"{family.layers}."
    # names are the first one's: that one comes first whose names are the family's
    order = sorted(both, key=lambda name: not any(tensor.startswith(layers) for tensor in both[name].tensors))
    found, notes = matched({name: both[name] for name in order})
    for note in notes:
        log.info("note: %s", note)
    prefix = family.layers.rpartition(".")[0]
    if not any(tensor.startswith(layers) for tensor in found[order[0]].tensors):
        # neither has the prefix that a class with a head puts before its base's names
        found = {name: replace(c, tensors={f"{prefix}.{tensor}": info for tensor, info in c.tensors.items()})
                 for name, c in found.items()}
    return found["--model_name_or_path"], found["--tuned"]


def match(base: Checkpoint, tuned: Checkpoint, family: Family) -> SharedTensors:
    """Sort the tensors by what a LoRA can hold.

    Raises:
        UserError: a linear layer that only one has, or has in another shape or no float type.
    """
    names = "|".join((*family.projections, *family.attention))
    # projections by the family's names; a head or an embedding is a matrix too, but PEFT treats it apart
    linear = re.compile(rf"{re.escape(family.layers)}\.\d+\.(.+\.)?({names})\.weight")
    tensors, problems = SharedTensors([], [], []), []
    for name in sorted(base.tensors.keys() | tuned.tensors.keys()):
        infos = [info for checkpoint in (base, tuned) if (info := checkpoint.tensors.get(name))]
        equal = len(infos) == 2 and infos[0].shape == infos[1].shape
        if not linear.fullmatch(name):
            (tensors.other if equal else tensors.reshaped).append(name)
        elif equal and all(info.dtype in _FLOATS and len(info.shape) == 2 for info in infos):
            tensors.linear.append(name)
        else:
            kinds = [f"{info.dtype} {list(info.shape)}" if (info := checkpoint.tensors.get(name)) else "absent"
                     for checkpoint in (base, tuned)]
            problems.append(f"--tuned: {name}: {kinds[1]}, but {kinds[0]} in the base; give the base that it was tuned from")
    if not tensors.linear and not problems:
        problems.append(f"--tuned: no weights of linear layers ({family.layers}.*: {names}) in both models")
    if problems:
        raise UserError(*problems[:20])
    return tensors


def factors(base: Checkpoint, tuned: Checkpoint, names: Sequence[str], rank: int | None, energy: float | None, seed: int,
            device: torch.device) -> dict[str, Fused]:
    """Module -> low-rank change and its residual; modules that did not change are left out."""
    changes = {}
    for name in tqdm(names, "extract", disable=console.hidden() or None):
        change = difference(base, tuned, name).to(device)
        # frozen layers are equal to the last bit: no rank is spent on them
        if change.any():
            nearest = low_rank(change, rank, energy, seed)
            changes[name.removesuffix(".weight")] = replace(nearest, pair=tuple(t.cpu() for t in nearest.pair))
    return changes


def difference(base: Checkpoint, tuned: Checkpoint, name: str) -> Tensor:
    """tuned - base of a tensor, fp32, read by blocks.

    Raises:
        UserError: it holds NaN or infinity.
    """
    infos = [checkpoint.tensors[name] for checkpoint in (base, tuned)]
    change = torch.empty(prod(infos[0].shape))
    # fp32 minus fp32 of two 16-bit values is exact where they are within a factor of 2 (Sterbenz)
    for first, values in _blocks(base, tuned, infos):
        torch.sub(values[1].float(), values[0].float(), out=change[first:first + len(values[0])])
    change = change.view(infos[0].shape)
    # one number in fp64 tells it for the whole matrix
    if not torch.isfinite(squared_norm(change)):
        raise UserError(f"{infos[1].file} or {infos[0].file}: {name} holds NaN or infinity; save the checkpoint again")
    return change


def changed_others(base: Checkpoint, tuned: Checkpoint, tensors: SharedTensors) -> list[str]:
    """Names of the tensors beside the linear layers that differ in any value, shape or presence."""
    changed = list(tensors.reshaped)
    for name in tensors.other:
        infos = [checkpoint.tensors[name] for checkpoint in (base, tuned)]
        # compared in fp32: a change of storage type alone is none
        if any(not torch.equal(one.float(), two.float()) for _, (one, two) in _blocks(base, tuned, infos)):
            changed.append(name)
    return sorted(changed)


def _blocks(base: Checkpoint, tuned: Checkpoint, infos: Sequence[TensorInfo]) -> Iterator[tuple[int, list[Tensor]]]:
    """(first flat index, values of both) in equal blocks; the values live until the next step."""
    size = prod(infos[0].shape)
    buffers = [torch.empty(min(_BLOCK, size) * (info.nbytes // max(size, 1)), dtype=torch.uint8) for info in infos]
    for first in range(0, size, _BLOCK):
        count = min(_BLOCK, size - first)
        yield first, [checkpoint.read(info, first, count, buffer)
                      for checkpoint, info, buffer in zip((base, tuned), infos, buffers, strict=True)]
