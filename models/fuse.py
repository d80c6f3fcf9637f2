"""Fuse trained adapters into one, without their base model.

    python models/fuse.py --adapters helpfulness,safety,truthfulness --run_name average
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import config
import manifest
from commands import FuseAdaptersArgs
from errors import UserError, exit_on_user_error


def fuse(args: FuseAdaptersArgs, run: manifest.Run) -> None:
    """Read the adapters, fuse them, write a PEFT adapter (alpha = r, so scale 1) into the run folder."""
    from safetensors.torch import save_file

    from models.adapter_files import CONFIG, WEIGHTS, read_adapter
    from models.fusion import METHODS

    folders = [Path(n) if "/" in n else args.results / "outputs" / n for n in args.adapter_names]
    adapters = [read_adapter(folder, name) for folder, name in zip(folders, args.adapter_names, strict=True)]
    bases = {manifest.read(folder)["inputs"].get("base") for folder in folders}
    if len(bases) > 1:
        raise UserError(f"--adapters {args.adapters}: they were trained on different bases; fuse those of one base")
    modules = METHODS[args.method](adapters, args.adapter_weights)
    ranks = {a.shape[0] for a, _ in modules.values()}
    if len(ranks) > 1:
        raise UserError(f"--adapters {args.adapters}: they train different modules, so ranks would differ "
                        f"({sorted(ranks)}); fuse adapters of the same targets")
    (rank,) = ranks
    settings = adapters[0].config | {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "use_rslora": False,
                                     "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True}
    manifest.write_json(run.folder / CONFIG, settings)
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, run.folder / WEIGHTS, metadata={"format": "pt"})
    run.parents.extend(map(str, folders))
    run.inputs.update({adapter.name: adapter.sha256 for adapter in adapters}, base=bases.pop())
    run.metrics.update(adapters=len(adapters), rank=rank)


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        args: FuseAdaptersArgs = config.parse(FuseAdaptersArgs, argv).args
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        target = args.results / "outputs" / args.run_name
        if not args.overwrite and manifest.finished(target, asdict(args)):
            print(f"{target}: already fused")
            return
        with manifest.writing(target, "fuse", asdict(args), overwrite=args.overwrite) as run:
            fuse(args, run)
        manifest.register(args.results, {"kind": "run", "command": "fuse", "run": args.run_name, "seed": args.seed,
                                         **run.metrics})
        print(f"{target}: {run.metrics['adapters']} adapters, rank {run.metrics['rank']}")


if __name__ == "__main__":
    main()
