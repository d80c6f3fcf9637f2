"""Flags of workflow/paper_tables.py and of evaluator/paper_table.py."""

from __future__ import annotations

from dataclasses import dataclass

from config import flag
from flags.base import ResultsFlags, name_problems
from flags.evaluate import PAPERS, REPORT_FORMATS, format_names, format_problems
from flags.graph import GraphFlags


@dataclass(frozen=True)
class PaperTablesArgs(GraphFlags):
    """The tables of a paper made anew, its numbers beside ours: in miniature, or as published with the paper's preset.

    bash scripts/paper_tables.sh --paper lora_fusion --table lambda_sweep
    """

    heading, general = "Tables of a paper", False
    paper: str = flag("", "whose tables", choices=PAPERS)
    table: str = flag("", "number (of the list, not of the paper) or name of the table, commas; all: every one; empty or "
                          "help: list them")
    track: str = flag("", "which of the paper's ways to run; empty: that of --preset's name, else the one in miniature")
    only: str = flag("", "these arms alone, with what they need, commas; empty: all of the table")
    seeds: str = flag("42", "seeds, commas: every arm is made and scored with each; the papers had one")
    files: str = flag("", "files of yours that a published track needs: NAME=FILE, commas")
    judge_model: str = flag("", "model that API judges of safety ask in place of the paper's; empty: the paper's")
    judge_base_url: str = flag("", "OpenAI-compatible endpoint that these judges ask, up to /v1; empty: OpenAI's; one on "
                                   "this machine needs no key")
    name: str = flag("", "everything goes to NAME below --output_dir; empty: PAPER_TRACK")

    @property
    def asked(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(word.strip() for word in self.table.split(",") if word.strip()))

    @property
    def named_files(self) -> dict[str, str]:
        pairs = (item.partition("=") for item in self.files.split(",") if item.strip())
        return {name.strip(): place.strip() for name, _, place in pairs}

    def problems(self) -> list[str]:
        found = name_problems("--name", self.name or None)
        if not self.paper:
            found.append(f"--paper: name one; allowed: {', '.join(PAPERS)}")
        found += [f"--files {name}: needs the form NAME=FILE" for name, place in self.named_files.items() if not place]
        return [*found, *super().problems()]


@dataclass(frozen=True)
class PaperTableArgs(ResultsFlags):
    """Write one table of a paper: our scores and the published numbers in columns beside each other.

    python evaluator/paper_table.py --spec results/somf_somf/workflow/safety_catqa.json --roots results/somf_somf/seed_42
    """

    heading, general = "Table of a paper", False
    spec: str = flag("", "which run and score stands in which cell: a JSON file that workflow/paper_tables.py writes")
    roots: str = flag("", "results folders, one per seed, commas; empty: --output_dir")
    name: str = flag("", "results/report/NAME; empty: the table's name")
    format: str = flag("md,csv,latex,html,json", f"what is written, commas: {', '.join(REPORT_FORMATS)}")

    @property
    def formats(self) -> tuple[str, ...]:
        return format_names(self.format)

    def problems(self) -> list[str]:
        found = [*name_problems("--name", self.name or None), *format_problems(self.format, REPORT_FORMATS)]
        return [*found, *([] if self.spec else ["--spec: name the file of the table"]), *super().problems()]
