"""Flags of models/fuse.py export and import."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import BaseModelFlags, RunFlags, ThreadFlags, name_problems
from flags.mixture import mixture_parts, mixture_run, read_mixture

#: Rows of LAYOUTS (models/export/layouts.py); a test holds the two together.
LAYOUTS = ("mixtral", "dense")


@dataclass(frozen=True)
class ExportArgs(BaseModelFlags, ThreadFlags, RunFlags):
    """Write a run in a layout that other software reads: transformers, vLLM, llama.cpp, PEFT. No model is loaded.

    python models/fuse.py export mix_moe_reg_00010_00010_00010_gate_01000 --layout mixtral
    python models/fuse.py export safety --layout dense
    python models/fuse.py export helpfulness=0.6,safety=0.4 --layout dense --run_name sum
    """

    heading, general = "Export", False
    positional = "run"
    run: str = flag("", "what to export: a run or folder (fused MoE, adapter), or a weighted sum of adapters: a=0.6,b=0.4")
    layout: str = flag("", "mixtral: a fused MoE of the Llama or Mistral family in Mixtral's names; dense: one plain model, "
                           "the base with an adapter, a sum, one expert or their average in its weights",
                       choices=("", *LAYOUTS))
    merge_expert: str = flag("", "of a fused MoE this expert alone, as a plain model")
    average: bool = flag(False, "of a fused MoE the average of its experts, as a plain model")
    out_dtype: str = flag("", "type of the weights written; empty: the base's own",
                          choices=("", "float32", "bfloat16", "float16"))
    memory_gb: float = flag(0.0, "promise: peak memory beyond the interpreter; 0: one worker per core", low=0)
    shard_gb: float = flag(5.0, "largest output file", low=1e-6)
    dry_run: bool = flag(False, "print the plan and its cost, write nothing")
    run_name: str | None = flag(None, "name of the result under results/outputs; empty: RUN_LAYOUT")

    @property
    def name(self) -> str:
        """The result's name."""
        if self.run_name is not None:
            return self.run_name
        source = mixture_run(read_mixture(self.run)) if "=" in self.run else self.run.rstrip("/").rpartition("/")[2]
        picked = self.merge_expert or ("average" if self.average else "")
        return "_".join(filter(None, (source, picked, self.layout)))

    def problems(self) -> list[str]:
        found = []
        if not self.run:
            found.append("RUN: name what to export, e.g. models/fuse.py export raw_moe --layout mixtral")
        if not self.layout:
            found.append(f"--layout: is empty; allowed: {', '.join(LAYOUTS)}")
        try:
            read_mixture(self.run) if "=" in self.run else mixture_parts(self.run.rpartition("/")[2])
            found += name_problems("--run_name", self.name) if self.run else []
        except ValueError as error:
            found.append(f"RUN {self.run}: {error}")
        if self.merge_expert and self.average:
            found.append(f"--merge_expert {self.merge_expert} and --average: give one of the two")
        return found
