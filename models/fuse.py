"""Fuse models: full checkpoints, LoRA adapters, a LoRA out of a full fine-tune, tuned models with their aligned one; export.

    python models/fuse.py merge --recipe recipe.yml --run_name merged
    python models/fuse.py adapters --adapters helpfulness,safety,truthfulness --run_name average
    python models/fuse.py extract --tuned merged --rank 16 --run_name extracted
    python models/fuse.py export raw_moe --layout mixtral
    python models/fuse.py gather results/checkpoints/safety/checkpoint-100
    python models/fuse.py realign --model_name_or_path ALIGNED --tasks english --method wise_ft --parameters "alpha=0.5"
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import config
import console
import preset_choice
import runtime
from errors import exit_on_user_error, fits
from flags import ExtractArgs, FuseAdaptersArgs, sub_commands
from flags.export import ExportArgs, GatherArgs, ImportArgs
from flags.memory import smaller
from flags.merge import MergeArgs
from flags.realign import RealignArgs
from models.footprint.planned import planned
from models.run_folders import ADAPTER

log = logging.getLogger(__name__)
#: Sub-command -> its flags, and the function that carries it out: (flags) -> what to tell the person. Loaded when called.
COMMANDS: dict[str, tuple[type, str]] = {
    "merge": (MergeArgs, "models.merging.merge:merge"),
    "adapters": (FuseAdaptersArgs, "models.adapters.fuse:fuse_adapters"),
    "extract": (ExtractArgs, "models.adapters.extract:extract"),
    "realign": (RealignArgs, "models.realign.realign:realign"),
    "export": (ExportArgs, "models.export.export:export"),
    "import": (ImportArgs, "models.export.read_back:import_moe"),
    "gather": (GatherArgs, "models.export.gather:gather"),
}
#: Layout of an export -> what serves it, of its folder and name.
SERVED = {**dict.fromkeys(("dense", "mixtral", "qwen3_moe"), "transformers serve {0}"),
          "gguf": "llama-server -m {0}/{1}.gguf"}


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        name, words = sub_commands.chosen({name: command for name, (command, _) in COMMANDS.items()}, argv, __doc__,
                                          "python models/fuse.py adapters --help")
        command, place = COMMANDS[name]
        parsed = config.parse(command, words)
        args = parsed.args
        if parsed.plan and hasattr(args, "dry_run"):
            # their budget is reckoned from the headers of their inputs
            promise = parsed.plan.plan_gb * 1e9 / 2**30
            args = dataclasses.replace(args, dry_run=True, **({"memory_gb": promise} if promise else {}))
        elif planned(parsed, print):
            return
        console.set_up(parsed.verbosity)
        runtime.collect_rarely()
        module, _, function = place.partition(":")
        with fits(smaller(args)):
            said = getattr(importlib.import_module(module), function)(args)
        console.show(said)
        run = getattr(args, "name", None) or args.run_name
        target = args.results / "outputs" / run
        # a plan names no folder
        if not said.startswith(f"{target}: "):
            return
        if isinstance(args, ExportArgs):
            # an exported model is for other programs
            if program := SERVED.get(args.layout):
                log.info("next: %s", program.format(shlex.quote(str(target)), run))
        else:
            same = console.same(parsed, "model_name_or_path", "output_dir", "cache_dir")
            console.advise(["inference.py", "--task_name", "safety", "--cross_task", run, *_base_of(target, parsed), *same])


def _base_of(folder: Path, parsed: config.Parsed) -> list[str]:
    """The flag for the base of a fused adapter, where no flag said it and the next command would take another."""
    if "model_name_or_path" in parsed.given or not (folder / ADAPTER).is_file():
        return []
    named = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    words = ["--model_name_or_path", str(named)]
    return words if named and preset_choice.choose(words).name == preset_choice.OWN_PRESET else []


if __name__ == "__main__":
    main()
