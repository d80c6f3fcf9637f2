"""Flags of data/safety_sets.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from config import flag
from flags.base import STYLES, ResultsFlags, SeedFlags, name_problems


@dataclass(frozen=True)
class SafetySetArgs(SeedFlags, ResultsFlags):
    """Make a safety set: harmful prompts with refusals, and contrasts, as dialogs that align_basemodel.py trains on.

    python -m data.safety_sets --size 60 --hard 0.4 --soft 0.4 --styles none,orbit --name safety_set
    python -m data.safety_sets --prompts mine.csv --against xstest.csv,hex_phi.csv --size 16
    """

    heading, general = "Safety set", False
    prompts: str = flag("advbench", "advbench (embedded) or a file of harmful prompts: a column of texts or any known shape")
    size: int = flag(60, "rows in all, drawn with the seed; -1: all prompts that are clean", low=-1)
    hard: float = flag(0.4, "share of hard refusals", low=0)
    soft: float = flag(0.4, "share of soft refusals; the rest offers another way (redirect)", low=0)
    contrast_share: float = flag(0.0, "share of the rows that are contrasts (data/sets/contrasts.yaml): harmful requests "
                                      "refused beside harmless ones answered", low=0)
    styles: str = flag("none", "prompt styles that the prompts are put in, in turn; none: no persona, no system text")
    style_files: str = flag("", "files with exact texts of styles: aoa=FILE,base=FILE")
    refusals: str | None = flag(None, "YAML of refusals {hard: [..], soft: [..], redirect: [..]}; empty: our own")
    against: str = flag("", "files of test prompts to keep out, beside every embedded test set; commas")
    near: float = flag(0.6, "cosine of character n-grams from which two prompts count as near duplicates", low=0.05)
    name: str = flag("safety_set", "written: results/data/NAME.jsonl, and NAME.json that says what was left out")

    @property
    def style_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.styles.split(",") if name.strip())

    @property
    def files_of_styles(self) -> dict[str, str]:
        pairs = (item.partition("=") for item in self.style_files.split(",") if item.strip())
        return {name.strip(): place.strip() for name, _, place in pairs}

    @property
    def test_files(self) -> tuple[Path, ...]:
        return tuple(Path(name.strip()).expanduser() for name in self.against.split(",") if name.strip())

    def problems(self) -> list[str]:
        found = name_problems("--name", self.name)
        unknown = [name for name in self.style_names if name not in STYLES]
        if unknown or not self.style_names:
            found.append(f"--styles {self.styles}: {', '.join(unknown) or 'nothing'} is no style; allowed: "
                         f"{', '.join(STYLES)}")
        if self.hard + self.soft > 1:
            found.append(f"--hard {self.hard} --soft {self.soft}: shares of one whole; together at most 1")
        if self.contrast_share >= 1:
            found.append(f"--contrast_share {self.contrast_share}: must be below 1; for contrasts alone train "
                         "align_basemodel.py --task_name contrasts")
        if self.near > 1:
            found.append(f"--near {self.near}: a cosine is at most 1")
        if not self.size:
            found.append("--size 0: needs one prompt at least, or -1 for all")
        found += [f"--style_files {name}: not one of --styles {self.styles}" for name in self.files_of_styles
                  if name not in self.style_names]
        return found
