"""--layout peft: the experts of a fused MoE as PEFT adapters. An expert's changes are summed by concatenating their factors.

    sum_i s_i B_i A_i = [s_1 B_1, s_2 B_2, ..] [A_1; A_2; ..]

which is exact; ranks add up. Attention's LoRA, which all experts share, is part of each adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import manifest
from errors import UserError
from flags.export import ExportArgs
from models.adapters.changed import Change
from models.adapters.files import CONFIG, WEIGHTS, complete_targets, vllm_note, write_adapter
from models.checkpoints.reader import INDEX
from models.export.companions import TEMPLATES, tokenizer_folder
from models.export.plan import picked
from models.export.sources import Source
from models.merging.merge import COMPANIONS
from models.operators.low_rank import Pair

#: An adapter in memory, and as the file that is being written.
_COPIES = 2


def problems(source: Source, args: ExportArgs) -> list[str]:
    """What keeps a source from being written as adapters."""
    if source.moe is None:
        what = ("a weighted sum of adapters: write one adapter with models/fuse.py adapters --weights" if source.weights
                else "an adapter already: PEFT and vLLM load its folder as it is" if source.common
                else "a plain model: draw a LoRA out of it with models/fuse.py extract")
        return [f"--layout peft: {source.name} is {what}"]
    need = _COPIES * max(_bytes(picked(source, replace(args, merge_expert=name))) for name in _names(source, args))
    if args.memory_gb and need > args.memory_gb * 2**30:
        return [f"--memory_gb {args.memory_gb}: an adapter is written whole, which takes {need / 2**30:.3f} GB here; give "
                f"{need / 2**30 + 0.005:.2f} or more"]
    return []


def write_adapters(source: Source, args: ExportArgs, run: manifest.Run) -> str:
    """Write every expert into a folder of its name, or the one that the flags pick into the run's; returns what to say."""
    names, ranks = _names(source, args), []
    for name in names:
        folder = run.folder if args.merge_expert or args.average else run.folder / name
        folder.mkdir(exist_ok=True)
        ranks.append(_write(source, picked(source, replace(args, merge_expert=name)), args, folder))
        if folder != run.folder:
            # our own commands ask an adapter's folder which base it belongs to
            manifest.write_json(folder / manifest.MANIFEST, {"status": "done", "command": "export", "parents": [
                str(source.folders[0])], "inputs": dict(source.hashes), "metrics": {"rank": ranks[-1]}})
    run.metrics.update(adapters=len(names), rank=max(ranks), layout=args.layout)
    return f"{len(names)} adapter(s) of rank {max(ranks)}{vllm_note(max(ranks))}"


def _names(source: Source, args: ExportArgs) -> list[str]:
    """Of the adapters; "" is the average."""
    return [""] if args.average else [args.merge_expert] if args.merge_expert else [e.name for e in source.experts]


def _bytes(changes: Mapping[str, Sequence[Change]]) -> int:
    return sum(4 * (change.a.size + change.b.size) for own in changes.values() for change in own)


def _write(source: Source, changes: Mapping[str, Sequence[Change]], args: ExportArgs, folder: Path) -> int:
    names = {info.name: name for name, info in source.tensors.items()}
    rows = {info.name: info.shape[0] for info in source.tensors.values()}
    modules = {names[tensor].removesuffix(".weight"): _joined(own, rows[tensor]) for tensor, own in changes.items()}
    known = [name.removesuffix(".weight") for name, info in source.tensors.items() if len(info.shape) == 2]
    given = args.model_name_or_path
    # a hub name as it is; PEFT looks a path up on the machine that wrote it
    base = str(source.base.folder) if given == "embedded" or Path(given).expanduser().is_dir() else given
    rank = write_adapter(folder, modules, complete_targets(modules, known),
                         {"task_type": "CAUSAL_LM", "base_model_name_or_path": base})
    spoken = tokenizer_folder(source)
    for file in (file for pattern in COMPANIONS for file in spoken.glob(pattern)):
        if file.is_file() and file.name not in (INDEX, CONFIG, WEIGHTS, "generation_config.json"):
            shutil.copyfile(file, folder / file.name)
    if (spoken / TEMPLATES).is_dir():
        shutil.copytree(spoken / TEMPLATES, folder / TEMPLATES)
    return rank


def _joined(changes: Sequence[Change], rows: int) -> Pair:
    """The sum of changes on one weight as one pair, fp32; scales go into B."""
    columns = [_placed(change, rows) for change in changes]
    pair = torch.cat([change.a.read() for change in changes]), torch.cat(columns, 1)
    if not all(torch.isfinite(factor).all() for factor in pair):
        raise UserError(f"{changes[0].a.info.file}: {changes[0].a.info.name} or its partner holds NaN or infinity; build or "
                        "tune the fused model again")
    return pair


def _placed(change: Change, rows: int) -> Tensor:
    """s B on all rows of the weight: Phi-3's up projection begins in the middle of one."""
    b = change.b.read() * change.scale
    if len(b) == rows:
        return b
    whole = b.new_zeros(rows, b.shape[1])
    whole[change.first_row:change.first_row + len(b)] = b
    return whole
