"""Train one expert, the naive mix, the fused MoE, or a mask on task vectors.

    python align_basemodel.py --moe_flag 0 --task_name safety
    python align_basemodel.py --moe_flag 0 --task_name safety --method dpo
    python align_basemodel.py --moe_flag 1 --expert_topk 2 --gate_loss_weight 0.01
    python align_basemodel.py --moe_flag 0 --task_name dialogs --data_path few.jsonl --method soup --adapters identity,safe
    python align_basemodel.py --method mask --aligned aligned --tasks english,maths --merge_rule ties

Writes results/outputs/RUN (adapter or fused model, tokenizer, manifest.json). The same command again does nothing when
the run is finished and resumes from its last checkpoint when it is not.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence

import config
import manifest
from errors import exit_on_user_error, fits
from flags import AlignArgs, DpoArgs, ExpertArgs, FusedMoeArgs, MaskArgs, SearchArgs, SoupArgs
from flags.memory import smaller
from models.footprint.planned import planned

#: Objective -> the module that trains it; flags/align.py says which words choose the objective.
TRAINERS: dict[type[AlignArgs], str] = {
    FusedMoeArgs: "training.moe", ExpertArgs: "training.sft", DpoArgs: "training.dpo", MaskArgs: "training.mask",
    SoupArgs: "training.soup", SearchArgs: "training.soup"}


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(AlignArgs, argv)
        if planned(parsed, print):
            return
        args: AlignArgs = parsed.args
        # of the processes of a launch one tells how it goes; all tell what is wrong
        logging.basicConfig(level=logging.INFO if manifest.is_main() else logging.WARNING, format="%(message)s")
        config.short_waits()
        config.keep_freed_memory()
        settings = args.settings(parsed.training)
        target = args.results / "outputs" / args.name
        if not args.overwrite and manifest.finished(target, settings):
            if manifest.is_main():
                print(f"{target}: already trained")
            return
        with fits(smaller(args, parsed.training)), \
                manifest.writing(target, "align_basemodel", settings, overwrite=args.overwrite) as run:
            # torch is imported only now
            importlib.import_module(TRAINERS[type(args)]).train(args, parsed.training, run)
        if manifest.is_main():
            _finish(args, run)


def _finish(args: AlignArgs, run: manifest.Run) -> None:
    shown = {k: v for k, v in run.metrics.items() if k not in ("history", "validation_history")}
    manifest.register(args.results, {"kind": "run", "command": "align_basemodel", "run": args.name, "seed": args.seed,
                                     **shown})
    print(f"{args.results / 'outputs' / args.name}: " + ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()))


if __name__ == "__main__":
    main()
