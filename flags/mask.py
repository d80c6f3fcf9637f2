"""Groups of flags of align_basemodel.py --method mask: the mask itself, and the anchor that keeps the tasks' skill."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from config import flag
from flags.base import Flags

#: Twins of models/mask: this floor cannot import it; a test holds them together.
RULES = ("single", "task_arithmetic", "ties", "dare", "average")
GRANULARITIES = ("element", "row", "block", "head", "layer", "rank")
RESCALES = ("none", "tensor", "detached", "global", "expected")
EXCLUDABLE = ("embeddings", "norms", "head")
#: Values of --optim that mean AdamW, which logits in bfloat16 train with (models/mask/optimiser.py).
ROUNDED_AS = ("adamw_torch_fused", "adamw_torch")
#: Those whose moments several processes share out: their states are tensors by parameter.
SHARED_OUT = ROUNDED_AS
#: Decay of a moment from which on its rounding would be more than a twentieth of it: 2^-9 / sqrt(2 (1 - beta)) at 0.999.
MOST_BETA = 0.999


@dataclass(frozen=True)
class MaskFlags(Flags):
    """What is masked, how a mask is drawn, and what its loss compares with (SOMF)."""

    heading = "Mask"
    aligned: str = flag("", "the aligned model, where it is not --model_name_or_path itself: a run or folder")
    tasks: str = flag("", "what was tuned from the aligned model: runs or folders of adapters or full models, commas")
    trust_base: bool = flag(False, "take the user's word where nothing records what a task was tuned from")
    merge_rule: str = flag("", "how several task vectors become one; empty: there is one", choices=("", *RULES))
    merge_lambda: float | None = flag(None, "factor on the merged task vectors; empty: 0.3, ties 0.4; one task: 1")
    ties_density: float = flag(0.2, "ties: share of each task vector that is kept", low=0)
    dare_drop: float = flag(0.2, "dare: share of entries that is dropped, redrawn with every pass", low=0)
    mask_on: str = flag("auto", "weights: theta_i - theta_s (B A for LoRA); factors: A and B, as published; auto: factors "
                                "where tasks went on with the aligned adapter, else weights",
                        choices=("auto", "weights", "factors"))
    granularity: str = flag("element", "what shares a logit; layer: one per tensor; rank: one per singular component of a "
                                       "LoRA change", choices=GRANULARITIES)
    mask_block: int = flag(64, "block: consecutive entries of a row that share a logit", low=1)
    rescale: str = flag("tensor", "what a mask is divided by: its mean over the tensor (published), without gradient "
                                  "through it (detached), over all tensors, the mean of sigmoid(s), or nothing",
                        choices=RESCALES)
    mask_exclude: str = flag("embeddings,norms,head", "kinds of tensors whose task vector stays whole; none: mask "
                                                      "everything, as published")
    temperature: float = flag(0.5, "of the binary Concrete draws", low=1e-3)
    final_temperature: float | None = flag(None, "anneal to this, geometrically over the steps; empty: constant", low=1e-3)
    mask_init: float = flag(0.0, "logit that every entry starts from; 0: kept with probability 0.5")
    straight_through: bool = flag(False, "zeros and ones in the forward pass, the soft mask's slope in the backward pass")
    mask_draws: int = flag(1, "masks per micro-batch; their gradients are averaged", low=1)
    antithetic: bool = flag(False, "draw masks in pairs u, 1 - u; needs an even --mask_draws")
    reference: str = flag("aligned", "DPO's reference: aligned, task (the tuned model), merge (the unmasked fusion), or "
                                     "random_mask (published: a random p = 0.5 mask, redrawn with every pass)",
                          choices=("aligned", "task", "merge", "random_mask"))
    keep_prior: float = flag(0.5, "share of entries that --keep_weight pulls the mask to", low=0)
    keep_weight: float = flag(0.0, "weight of KL(mask || Bernoulli(--keep_prior)), mean over entries", low=0)
    storage: str = flag("float32", "masks on weights: type of live weights, their base and task vectors; bfloat16 rounds "
                                   "small task vectors away", choices=("float32", "bfloat16"))
    logit_dtype: str = flag("float32", "type of logits and their optimiser state; bfloat16: AdamW, rounded stochastically",
                            choices=("float32", "bfloat16"))

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.tasks.split(",") if name.strip())

    @property
    def excluded(self) -> tuple[str, ...]:
        names = tuple(name.strip() for name in self.mask_exclude.split(",") if name.strip())
        return () if names == ("none",) else names

    def problems(self) -> list[str]:
        names, found = self.task_names, super().problems()
        if not names:
            found.append("--tasks: name what was tuned from the aligned model, separated by commas")
        if len(set(names)) < len(names):
            found.append(f"--tasks {self.tasks}: the same model twice; give it once")
        if len(names) > 1 and self.merge_rule in ("", "single"):
            found.append(f"--merge_rule: {len(names)} tasks need one of {', '.join(RULES[1:])}")
        if unknown := [name for name in self.excluded if name not in EXCLUDABLE]:
            found.append(f"--mask_exclude {','.join(unknown)}: not known; allowed: {', '.join(EXCLUDABLE)}, or none")
        if self.merge_lambda is not None and (self.merge_rule == "average" or len(names) == 1 and self.merge_rule != "dare"):
            found.append(f"--merge_lambda {self.merge_lambda}: has no effect on "
                         f"{'an average' if self.merge_rule == 'average' else 'one task'}; drop it")
        if not 0 < self.ties_density <= 1:
            found.append(f"--ties_density {self.ties_density}: must be in (0, 1]")
        if self.dare_drop >= 1:
            found.append(f"--dare_drop {self.dare_drop}: must be below 1")
        if self.granularity == "rank" and self.merge_rule == "ties" and len(names) > 1:
            found.append("--granularity rank --merge_rule ties: components of different tasks share no entries whose signs "
                         "could be compared; use task_arithmetic, dare or average")
        if self.antithetic and self.mask_draws % 2:
            found.append(f"--antithetic: draws come in pairs; --mask_draws {self.mask_draws} is odd, use "
                         f"{self.mask_draws + 1}")
        if self.keep_weight and not 0 < self.keep_prior < 1:
            found.append(f"--keep_prior {self.keep_prior}: must be in (0, 1)")
        if self.reference == "task" and len(names) > 1:
            found.append(f"--reference task: there are {len(names)} tasks; use merge, the unmasked fusion")
        return found


def narrow_logit_problems(args: MaskFlags, learning_rate: float, training: Mapping[str, Any]) -> list[str]:
    """What logits in bfloat16 cannot be trained with, so that no run ends where it began."""
    if args.logit_dtype != "bfloat16":
        return []
    said, found = "--logit_dtype bfloat16", []
    if (name := str(training.get("optim") or ROUNDED_AS[0])) not in ROUNDED_AS:
        found.append(f"--optim {name}: rounds to the nearest, which loses most steps with {said}; allowed: "
                     f"{', '.join(ROUNDED_AS)} (AdamW, rounded stochastically), or --logit_dtype float32")
    for flag_name in ("adam_beta1", "adam_beta2"):
        beta = training.get(flag_name)
        if isinstance(beta, float | int) and beta > MOST_BETA:
            found.append(f"--{flag_name} {beta:g}: so slow a moment is more rounding than gradient with {said}; allowed: "
                         f"up to {MOST_BETA:g}, or --logit_dtype float32")
    if (start := abs(args.mask_init)) and 0 < learning_rate < (least := _apart(start) / 64):
        found.append(f"--learning_rate {learning_rate:g}: bfloat16 has no number within {_apart(start):g} of --mask_init "
                     f"{args.mask_init:g}, and 64 such steps are less with {said}; allowed: {least:.2g} and more, an init "
                     "nearer to 0, or --logit_dtype float32")
    return found


def _apart(value: float) -> float:
    """The distance of bfloat16's numbers (8 bits) around a number above 0."""
    return 2.0 ** (math.frexp(value)[1] - 8)


@dataclass(frozen=True)
class AnchorFlags(Flags):
    """Samples of the tasks themselves, beside the safety pairs."""

    heading = "Anchor"
    anchor: str = flag("none", "keep the tasks' skill on their own samples: sft (their answers) or kl (their model)",
                       choices=("none", "sft", "kl"))
    anchor_tasks: str = flag("", "data of the anchor, one name per entry of --tasks, e.g. english,maths")
    anchor_path: str | None = flag(None, "files of the anchor's data: english=FILE,maths=FILE; empty: --data_source")
    anchor_weight: float = flag(0.1, "weight of the anchor's loss", low=0)
    anchor_samples: int = flag(256, "samples per task", low=1)
    anchor_batch_size: int = flag(4, "samples per micro-batch", low=1)

    @property
    def anchor_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.anchor_tasks.split(",") if name.strip())

    def problems(self) -> list[str]:
        found = super().problems()
        if self.anchor == "none" and self.anchor_names:
            found.append(f"--anchor_tasks {self.anchor_tasks}: add --anchor sft or kl, or drop it")
        return found
