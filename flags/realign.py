"""Flags of models/fuse.py realign."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import BaseModelFlags, MachineFlags, Planned, RunFlags, SeedFlags, name_problems

#: Rows of METHODS and RULES (models/realign/methods.py); a test holds them together.
REALIGN_METHODS = ("merge", "mask", "random_mask", "magnitude", "wise_ft", "dare", "resta", "safe_lora", "safe_merge")
REALIGN_RULES = ("", "task_arithmetic", "ties", "dare", "average")


@dataclass(frozen=True)
class RealignArgs(BaseModelFlags, MachineFlags, SeedFlags, RunFlags, Planned):
    """Realign models that were tuned from an aligned one: theta_aligned + what a method leaves of their task vectors.

    python models/fuse.py realign --model_name_or_path results/outputs/aligned --tasks english --method mask --mask m1
    python models/fuse.py realign --tasks english,maths --rule ties --method magnitude --parameters "kept=0.5"
    """

    heading, general = "Realignment", False
    aligned: str = flag("", "the aligned model, where it is an adapter on --model_name_or_path: a run or folder; empty: "
                            "--model_name_or_path is the aligned model")
    tasks: str = flag("", "what was tuned from the aligned model: runs or folders of adapters or full models, commas")
    method: str = flag("merge", "merge: the task vectors as they are; --parameters help explains them all",
                       choices=REALIGN_METHODS)
    parameters: str = flag("", "name=value pairs between ';' for the method: \"alpha=0.5\"; or help")
    rule: str = flag("", "how several task vectors become one; empty: there is one", choices=REALIGN_RULES)
    rule_parameters: str = flag("", "name=value pairs for the rule: \"lambda=0.4; density=0.2\"; empty: SOMF's")
    mask: str = flag("", "--method mask: the run of the trained mask; random_mask: the same mask at random places")
    readout: str = flag("", "of a trained mask: soft, hard, expected (empty), threshold[:LOGIT], top:SHARE, average[:DRAWS]")
    unaligned: str = flag("", "resta, safe_lora, safe_merge: the model before its alignment: run, folder, hub name")
    safe: str = flag("", "safe_merge: a safety-tuned model: run or folder")
    output: str = flag("dense", "dense: a checkpoint; adapter: a LoRA on --model_name_or_path", choices=("dense", "adapter"))
    rank: int | None = flag(None, "--output adapter: rank, with its error printed; empty: no loss, where the method allows",
                            low=1)
    out_dtype: str = flag("", "type of a checkpoint's weights; empty: the aligned model's",
                          choices=("", "float32", "bfloat16", "float16"))
    shard_gb: float = flag(5.0, "largest output file", low=1e-6)
    trust_base: bool = flag(False, "take the user's word where nothing records what a model was tuned from")
    run_name: str = flag("realigned", "name of the result under results/outputs")

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.tasks.split(",") if name.strip())

    def problems(self) -> list[str]:
        found = name_problems("--run_name", self.run_name)
        if self.parameters.strip() == "help":
            return []
        if self.device == "cuda":
            found.append("--device cuda: realign computes on the CPU, weight by weight as they come from the disk; drop it")
        if self.dtype != "auto":
            found.append(f"--dtype {self.dtype}: sums are float32; drop it (the result's type is --out_dtype)")
        names = self.task_names
        masked = self.method == "mask" or (self.method == "random_mask" and bool(self.mask))
        if not names and not masked:
            found.append("--tasks: name what was tuned from the aligned model, separated by commas")
        if len(set(names)) < len(names):
            found.append(f"--tasks {self.tasks}: the same model twice; give it once")
        if len(names) > 1 and not self.rule and not masked:
            found.append(f"--rule: {len(names)} tasks need one of {', '.join(filter(None, REALIGN_RULES))}")
        if masked:
            found += [f"--{name} {value}: stands in the mask's own manifest; drop it" for name, value in (
                ("rule", self.rule), ("rule_parameters", self.rule_parameters), ("parameters", self.parameters)) if value]
            if not self.mask:
                found.append("--mask: name the run of the trained mask (align_basemodel.py --method mask)")
        if self.mask and self.method not in ("mask", "random_mask"):
            found.append(f"--mask {self.mask}: {self.method} reads none; drop it, or use --method mask or random_mask")
        if self.readout and not self.mask:
            found.append(f"--readout {self.readout}: belongs to a trained mask; add --mask")
        needs = {"resta": ("unaligned",), "safe_lora": ("unaligned",), "safe_merge": ("unaligned", "safe")}
        for name, value in (("unaligned", self.unaligned), ("safe", self.safe)):
            needed = name in needs.get(self.method, ())
            if needed and not value:
                found.append(f"--{name}: {self.method} needs it; see --help")
            if value and not needed:
                found.append(f"--{name} {value}: {self.method} reads none; drop it")
        if self.output == "dense" and self.rank:
            found.append(f"--rank {self.rank}: a checkpoint has none; add --output adapter or drop it")
        if self.output == "adapter" and self.out_dtype:
            found.append(f"--out_dtype {self.out_dtype}: an adapter is float32; drop it")
        return found
