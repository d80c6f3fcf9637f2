"""Training prompts that are, or nearly are, test prompts: found, reported and left out.

Exact: equal after case, punctuation and white space are folded. Near: TF-IDF weighted character n-grams (3 to 5 in words)
with a cosine of at least a threshold. Reports hold ids and figures, never the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.readers.dialog_files import read_prompts
from data.records import normalise
from data.sets import embedded

#: Training prompts whose cosines with all test prompts exist at one time as a dense table.
_BATCH = 512


@dataclass(frozen=True)
class Found:
    """A training prompt that is too close to a test prompt.

    Args:
        id: of the training prompt.
        test: the test set, row: the number of its prompt there.
        cosine: 1 for an exact duplicate.
    """

    id: str
    test: str
    row: int
    kind: str
    cosine: float


@dataclass(frozen=True)
class Report:
    """What decontamination did."""

    checked: int
    near: float
    sets: dict[str, int]
    found: tuple[Found, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON values: counts by set and kind, then each prompt that was left out."""
        counts = {name: {kind: sum(f.test == name and f.kind == kind for f in self.found) for kind in ("exact", "near")}
                  for name in self.sets}
        return {"checked": self.checked, "threshold": self.near, "test_prompts": self.sets, "left_out": counts,
                "rows": [asdict(f) | {"cosine": round(f.cosine, 3)} for f in self.found]}


def prompts_to_avoid(files: Sequence[Path]) -> dict[str, list[str]]:
    """Every prompt that is tested on: the embedded sets that carry texts, and the user's files by name.

    HHH and TruthfulQA are kept out by hash in any case (``data/sets/held_out.txt``).
    """
    sets = {"strongreject": [r.prompt for r in embedded.records("safety", "test", True)],
            "overrefusal": [r.prompt for r in embedded.records("overrefusal", "test", True)],
            "alpaca": [r.prompt for r in embedded.records("helpfulness", "test", True)]}
    return sets | {str(file.name): read_prompts(file) for file in files}


def clean(prompts: Mapping[str, str], tests: Mapping[str, Sequence[str]], near: float) -> tuple[list[str], Report]:
    """The ids of prompts that are in no test set, in order, and what was left out.

    Args:
        prompts: id -> text.
        tests: name -> test prompts.
        near: least cosine of a near duplicate.
    """
    exact = {normalise(text): (name, row) for name, texts in tests.items() for row, text in enumerate(texts)}
    held_out = embedded.held_out_hashes()
    # exact first: a duplicate must not be reported as merely near
    leaks: dict[str, Found] = {}
    for id, text in prompts.items():
        if normalise(text) in exact:
            leaks[id] = Found(id, *exact[normalise(text)], "exact", 1.0)
        elif embedded.prompt_hash(text) in held_out:
            leaks[id] = Found(id, "held_out", -1, "exact", 1.0)
    for id, close in _nearest(prompts, tests).items():
        if id not in leaks and close.cosine >= near:
            leaks[id] = close
    sizes = {name: len(texts) for name, texts in tests.items()} | {"held_out": len(held_out)}
    kept = [id for id in prompts if id not in leaks]
    return kept, Report(len(prompts), near, sizes, tuple(leaks[id] for id in prompts if id in leaks))


def _nearest(prompts: Mapping[str, str], tests: Mapping[str, Sequence[str]]) -> dict[str, Found]:
    """The closest test prompt of every prompt."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    places = [(name, row) for name, texts in tests.items() for row in range(len(texts))]
    if not places or not prompts:
        return {}
    # normalised as for the exact test: a comma must not move a cosine
    mine = [normalise(text) for text in prompts.values()]
    theirs = [normalise(text) for texts in tests.values() for text in texts]
    # fitted on both sides: a weight must count how rare an n-gram is among all prompts
    model = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit([*mine, *theirs])
    right, ids = model.transform(theirs).T.tocsr(), list(prompts)
    closest: dict[str, Found] = {}
    for start in range(0, len(mine), _BATCH):
        # rows are normalised, so products are cosines
        cosines = (model.transform(mine[start : start + _BATCH]) @ right).toarray()
        for id, best, value in zip(ids[start:], cosines.argmax(1), cosines.max(1), strict=False):
            test, row = places[best]
            closest[id] = Found(id, test, row, "near", float(value))
    return closest
