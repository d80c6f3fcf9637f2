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

import logging
import sys
from collections.abc import Sequence

import config
import manifest
from errors import exit_on_user_error
from flags import AlignArgs, MaskArgs
from flags.align import FUSED
from flags.mask import wants_mask


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        words = sys.argv[1:] if argv is None else argv
        parsed = config.parse(MaskArgs if wants_mask(words) else AlignArgs, words)
        args: AlignArgs = parsed.args
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        config.short_waits()
        config.keep_freed_memory()
        settings = {**_settings(args), "training_arguments": parsed.training}
        target = args.results / "outputs" / args.name
        if not args.overwrite and manifest.finished(target, settings):
            print(f"{target}: already trained")
            return
        with manifest.writing(target, "align_basemodel", settings, overwrite=args.overwrite) as run:
            _trainer(args)(args, parsed.training, run)
        _finish(args, run)


def _settings(args: AlignArgs) -> dict:
    from dataclasses import asdict

    return asdict(args)


def _trainer(args: AlignArgs):
    """The training function of a command line; imports torch only now."""
    if args.moe_flag:
        from training.moe import train
    elif args.method == "mask":
        from training.mask import train
    elif args.method == "dpo":
        from training.dpo import train
    elif args.method in FUSED:
        from training.soup import train
    else:
        from training.sft import train
    return train


def _finish(args: AlignArgs, run: manifest.Run) -> None:
    shown = {k: v for k, v in run.metrics.items() if k != "history"}
    manifest.register(args.results, {"kind": "run", "command": "align_basemodel", "run": args.name, "seed": args.seed,
                                     **shown})
    print(f"{args.results / 'outputs' / args.name}: " + ", ".join(
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()))


if __name__ == "__main__":
    main()
