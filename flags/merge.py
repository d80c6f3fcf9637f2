"""Flags of models/fuse.py merge."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import DeviceFlags, HubFlags, Planned, RunFlags, SeedFlags, name_problems


@dataclass(frozen=True)
class MergeArgs(HubFlags, DeviceFlags, SeedFlags, RunFlags, Planned):
    """Merge full checkpoints into one, tensor by tensor, inside a memory promise.

    python models/fuse.py merge --recipe recipe.yml --run_name merged --memory_gb 4
    python models/fuse.py merge --method ties --base_model BASE --models A,B --parameters "density=0.2; weight=1,0.5"
    """

    heading, general = "Merge", False
    recipe: str = flag("", "YAML file, our own or mergekit's; empty: --method, --models and --parameters say it all")
    method: str = flag("", "how to merge, without a recipe; --parameters help lists the methods and their parameters")
    base_model: str = flag("", "what the models were fine-tuned from: a run, a folder, a hub name, or 'embedded'")
    models: str = flag("", "models to merge, commas: runs, folders, hub names; MODEL+ADAPTER: with a LoRA on it")
    parameters: str = flag("", "name=value pairs between ';', by comma for each model: \"density=0.2; weight=1,2\"; or help")
    out_dtype: str = flag("", "type of the result; empty: the base's",
                          choices=("", "float32", "bfloat16", "float16"))
    vocab: str = flag("", "where vocabularies differ: the base's tokens, all added tokens, or by index; empty: an error",
                      choices=("", "base", "union", "pad"))
    tied_heads: str = flag("", "where heads differ: as in the base, or a head of its own for all; empty: an error",
                           choices=("", "base", "untie"))
    memory_gb: float = flag(0.0, "promise: peak memory beyond the interpreter; 0: one worker per core", low=0)
    shard_gb: float = flag(5.0, "largest output file", low=1e-6)
    device: str = flag("auto", "auto, cpu: the CPU, which the disk cannot outrun; cuda: the graphics card",
                       choices=("auto", "cpu", "cuda"))
    dry_run: bool = flag(False, "print the plan and its cost, write nothing")
    run_name: str = flag("merged", "name of the result under results/outputs")

    @property
    def model_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.models.split(",") if name.strip())

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        if self.parameters.strip() == "help":
            return []
        if bool(self.recipe) == bool(self.method):
            found.append("--recipe and --method: give one of the two")
        if self.recipe and (self.models or self.base_model or self.parameters):
            found.append("--recipe: models, base and parameters stand in the recipe; drop the flags that repeat them")
        if self.method and not self.models:
            found.append("--models: name the models to merge, separated by commas")
        if len(set(self.model_names)) < len(self.model_names):
            found.append(f"--models {self.models}: the same model twice; give it once, with more weight")
        return found
