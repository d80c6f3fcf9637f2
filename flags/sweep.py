"""Flags of scripts/sweep.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from config import flag
from flags.base import (
    FILE_STYLES,
    PROTOCOLS,
    SKILLS,
    STYLES,
    BaseModelFlags,
    MachineFlags,
    ResultsFlags,
    SeedFlags,
    TemplateFlags,
    name_problems,
)
from flags.utility import BENCHMARKS, PROBES, EvaluateUtilityArgs


@dataclass(frozen=True)
class SweepArgs(BaseModelFlags, TemplateFlags, MachineFlags, SeedFlags, ResultsFlags):
    """Sweep the fusion weight of a safety adapter, refine where refusals set in, compare with controls, draw the front.

    python scripts/sweep.py --task identity --safety safe --prompt_styles orbit,none,valet --controls "joint=joint,mix=mix3"
    python scripts/sweep.py --roots results/lora_fusion,results/lora_fusion/seed_43 --name identity
    """

    heading, general = "Sweep", False
    task: str = flag("identity", "run of the task adapter")
    safety: str = flag("safe", "run of the safety adapter")
    grid: str = flag("0,0.1,0.2,0.3,0.4", "lambdas to begin with (published: these)")
    extend: bool = flag(True, "while non-refusal has not halved at the grid's last lambda, go on in its last step, up to "
                               "lambda 1")
    refine: int = flag(4, "further lambdas at most, each in the middle of the steepest step", low=0)
    min_step: float = flag(0.0125, "no further lambda between two that are this close", low=1e-4)
    form: str = flag("convex", "convex: (1 - lambda) task + lambda safety; additive: task + lambda safety",
                     choices=("convex", "additive"))
    shrink: bool = flag(True, "control: the task adapter at 1 - lambda without the safety adapter, at the grid's lambdas")
    random: str | None = flag(None, "control: a run of random directions in the safety adapter's place (fuse.py adapters "
                                    "--method random), at the grid's lambdas")
    reverse: bool = flag(True, "control: the two adapters in the other order, at the last lambda of --grid")
    controls: str = flag("", "other rows, LABEL=RUN or RUN, commas: joint training, data mixing, the aligned model (base)")
    prompt_styles: str = flag("none", "styles of the test prompts; the first one decides, the others are scored on the grid")
    harmful_task: str = flag("safety", "whose harmful prompts", choices=("safety", *PROTOCOLS))
    overrefusal_task: str = flag("overrefusal", "whose harmless prompts", choices=("overrefusal", *PROTOCOLS))
    sources: str = flag("", "your files, NAME=FILE, commas: test sets (hex_phi=FOLDER), a style's exact text (aoa=FILE)")
    utility: str = flag("english", "task whose held-out answers measure utility", choices=SKILLS)
    utility_answers: int = flag(24, "held-out rows of --utility maths or summaries whose generated answers are scored too "
                                    "(numeric match, ROUGE); 0: none", low=0)
    benchmarks: str = flag("", "benchmarks or probes of evaluate_utility.py for every row, commas: mmlu (5 shots), probes")
    data_dir: str = flag("", "folder with the files of --benchmarks, as of evaluate_utility.py; empty: the hub")
    benchmark_samples: int = flag(-1, "rows of each benchmark; -1: all, of a probe its default", low=-1)
    discrimination: int = flag(0, "prompts of every set whose refusal likelihood is scored for every row, as they are, by "
                                  "evaluate_refusal.py (AUC, refusal at 10 % over-refusal, matched pairs); 0: none; -1: all",
                               low=-1)
    num_samples: int = flag(60, "prompts of each test set; -1: all", low=-1)
    max_new_tokens: int = flag(24, "answer length limit", low=1)
    batch_size: int = flag(60, "prompts per batch", low=1)
    roots: str = flag("", "finished sweeps, one results folder per seed: write their common report, run nothing")
    name: str = flag("sweep", "results/report/NAME.md, .png, .json")

    @property
    def lambdas(self) -> tuple[float, ...]:
        return tuple(sorted({float(word) for word in self.grid.split(",")}))

    @property
    def styles(self) -> tuple[str, ...]:
        return tuple(word.strip() for word in self.prompt_styles.split(",") if word.strip())

    @property
    def named_benchmarks(self) -> tuple[str, ...]:
        return EvaluateUtilityArgs(tasks=self.benchmarks).task_names

    @property
    def named_controls(self) -> dict[str, str]:
        pairs = (item.rpartition("=") for item in self.controls.split(",") if item.strip())
        return {(label or run).strip(): run.strip() for label, _, run in pairs}

    @property
    def source_files(self) -> dict[str, str]:
        """Test set or style -> file."""
        return {name.strip(): file.strip() for name, _, file in (word.partition("=") for word in self.sources.split(",")
                                                                 if word.strip())}

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(Path(word.strip()).expanduser().resolve() for word in self.roots.split(",") if word.strip())

    def problems(self) -> list[str]:
        found = [*name_problems("--name", self.name), *name_problems("--task", self.task),
                 *name_problems("--safety", self.safety), *name_problems("--random", self.random)]
        try:
            if len(self.lambdas) < 2 or not all(0 <= value <= 1 for value in self.lambdas):
                found.append(f"--grid {self.grid}: needs two lambdas or more, from 0 to 1")
        except ValueError:
            found.append(f"--grid {self.grid}: needs numbers separated by commas")
        unknown = [name for name in self.styles if name not in STYLES]
        if unknown or not self.styles:
            found.append(f"--prompt_styles {self.prompt_styles}: {', '.join(unknown) or 'nothing'} is no style; allowed: "
                         f"{', '.join(STYLES)}")
        known = {self.harmful_task, self.overrefusal_task, *self.styles}
        for name, file in self.source_files.items():
            if name not in known:
                found.append(f"--sources {name}={file}: {name} is neither a test set nor a style of this sweep; allowed: "
                             f"{', '.join(sorted(known))}")
            elif not file or not Path(file).expanduser().exists():
                found.append(f"--sources {name}={file}: no such file or folder")
        if lacking := [name for name in self.styles if name in FILE_STYLES and name not in self.source_files]:
            found.append(f"--prompt_styles {self.prompt_styles}: the text of {', '.join(lacking)} is not shipped; give your "
                         f"file of it, --sources {lacking[0]}=FILE")
        known = {"probes", *BENCHMARKS, *PROBES} - {"humaneval"}  # which runs code: scored by hand, with its own consent
        found += [f"--benchmarks {name}: not one of {', '.join(sorted(known))}"
                  for name in self.named_benchmarks if name not in known]
        if self.task == self.safety:
            found.append(f"--safety {self.safety}: the same run as --task")
        return found
