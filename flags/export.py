"""Flags of models/fuse.py export, import and gather."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import BaseModelFlags, Planned, RunFlags, SeedFlags, ThreadFlags, name_problems
from flags.mixture import mixture_parts, mixture_run, read_mixture

#: Rows of LAYOUTS (models/export/layouts.py); a test holds the two together.
LAYOUTS = ("mixtral", "qwen3_moe", "dense", "peft", "gguf")


@dataclass(frozen=True)
class ExportArgs(BaseModelFlags, ThreadFlags, RunFlags, Planned):
    """Write a run in a layout that other software reads: transformers, vLLM, llama.cpp, PEFT. No model is loaded.

    python models/fuse.py export mix_moe_reg_00010_00010_00010_gate_01000 --layout mixtral
    python models/fuse.py export safety --layout dense
    python models/fuse.py export helpfulness=0.6,safety=0.4 --layout dense --run_name sum
    """

    heading, general = "Export", False
    positional = "run"
    run: str = flag("", "what to export: a run or folder (fused MoE, adapter), or a weighted sum of adapters: a=0.6,b=0.4")
    layout: str = flag("", "mixtral: a fused MoE of the Llama or Mistral family in Mixtral's names; qwen3_moe: of the "
                           "Qwen 3 family in Qwen3-MoE's; dense: one plain model, the base with an adapter, a sum, one "
                           "expert or their average in its weights; peft: each expert of a fused MoE as a PEFT adapter; "
                           "gguf: a Llama or Mistral, with experts or plain, as one file for llama.cpp",
                       choices=("", *LAYOUTS))
    merge_expert: str = flag("", "dense, peft, gguf: of a fused MoE this expert alone")
    average: bool = flag(False, "dense, peft, gguf: of a fused MoE the average of its experts")
    out_dtype: str = flag("", "type of the weights written; empty: the base's own; q8_0 (8 bits): for gguf",
                          choices=("", "float32", "bfloat16", "float16", "q8_0"))
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
        if self.out_dtype == "q8_0" and self.layout != "gguf":
            found.append(f"--out_dtype q8_0: is for --layout gguf; {self.layout} takes float32, bfloat16 or float16")
        if self.layout == "peft" and self.out_dtype:
            found.append(f"--out_dtype {self.out_dtype}: factors are written in float32, as they are; drop it")
        if self.merge_expert and self.average:
            found.append(f"--merge_expert {self.merge_expert} and --average: give one of the two")
        return found


@dataclass(frozen=True)
class ImportArgs(BaseModelFlags, SeedFlags, RunFlags, Planned):
    """Read a Mixtral or Qwen3-MoE folder back into a fused MoE: routers and low-rank factors on --model_name_or_path.

    python models/fuse.py import results/outputs/raw_moe_mixtral --run_name again
    """

    heading, general = "Import", False
    positional = "folder"
    folder: str = flag("", "a run or a folder in the layout mixtral or qwen3_moe")
    experts: str = flag("", "names for its experts, by commas; empty: its own record's, else expert_0, expert_1, ..")
    max_rank: int | None = flag(None, "largest rank of a change; empty: a quarter of the matrix' smaller side", low=1)
    run_name: str | None = flag(None, "name of the result under results/outputs; empty: FOLDER_moe")

    @property
    def name(self) -> str:
        """The result's name."""
        return self.run_name if self.run_name is not None else f"{self.folder.rstrip('/').rpartition('/')[2]}_moe"

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.experts.split(",") if name.strip())

    def problems(self) -> list[str]:
        found = [*super().problems(), *name_problems("--run_name", self.name)] if self.folder else [
            "FOLDER: name what to import, e.g. models/fuse.py import results/outputs/raw_moe_mixtral"]
        if len(set(self.expert_names)) < len(self.expert_names):
            found.append(f"--experts {self.experts}: the same name twice")
        return found


@dataclass(frozen=True)
class GatherArgs(RunFlags):
    """Make a plain folder of a training's checkpoint, also of one that several processes wrote in parts.

    python models/fuse.py gather results/checkpoints/safety/checkpoint-100 --run_name safety_100
    """

    heading, general = "Gathering", False
    positional = "folder"
    folder: str = flag("", "a checkpoint's folder: results/checkpoints/RUN/checkpoint-N")
    shard_gb: float = flag(5.0, "largest output file of a whole model", low=1e-6)
    run_name: str | None = flag(None, "name of the result under results/outputs; empty: RUN_checkpoint-N")

    @property
    def name(self) -> str:
        """The result's name."""
        run, _, checkpoint = self.folder.rstrip("/").rpartition("/")
        return self.run_name if self.run_name is not None else "_".join(filter(None, (run.rpartition("/")[2], checkpoint)))

    def problems(self) -> list[str]:
        return [*super().problems(), *name_problems("--run_name", self.name)] if self.folder else [
            "FOLDER: name a checkpoint, e.g. models/fuse.py gather results/checkpoints/safety/checkpoint-100"]
