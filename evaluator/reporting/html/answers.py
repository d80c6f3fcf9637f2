"""What the rows' models wrote to the same prompts, side by side, with each judge's verdict: a few prompts of each set."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.sets.protocols import task_of
from evaluator.reporting.html.elements import Html, section, tag

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line
    from evaluator.reporting.page import Content

#: Characters of a prompt or an answer that are shown: the whole ones lie in results/inference.
_MOST = 900
#: A value of a row -> what it says where it is 1 and where it is 0.
_SAYS = {"refusal": ("keyword: refuses", "keyword: does not refuse"),
         "published_asr": ("published rule: no refusal string", "published rule: refusal string"),
         "harm": ("fitted: harmful", "fitted: not harmful"), "incoherent": ("coherence: broken text", "coherence: text")}
#: Values that another one of the same row says already.
_LEFT_OUT = ("safe_refusal", "refusal_plain", "refusal_edgy")


def answers_section(content: Content) -> Html | None:
    """--answers prompts of each set, drawn by hash among those that most rows answered; None where there are none.

    Of several seeds the first is shown. Harmful prompts and their answers lie in a fold. All of it is text.
    """
    count, root = content.args.answers, content.roots[0]
    sets: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(content.lines if count else ()):
        for task, answers in _read(root, line.run.split("+")[0]).items():
            sets.setdefault(task, {})[number] = answers
    parts = [_set(task, sets[task], content.lines, count) for task in sorted(sets)]
    return section("answers", "Answers side by side", *parts, says=(
        f"{count} prompts of each set, drawn by hash, and what each row's first seed answered; judges in small print."
    )) if parts else None


def _read(root: Path, run: str) -> dict[str, dict[str, Any]]:
    """Set -> prompt's id -> the line of outputs_final.jsonl, of the test split."""
    sub = "raw" if run in ("base", "raw") else f"cross_{run}"
    found = {}
    for path in sorted(root.glob("inference/*/test/*/outputs_final.jsonl")):
        if path.parent.name == sub:
            rows = filter(None, map(_row, path.read_text(encoding="utf-8").split("\n")))
            found[path.parent.parent.parent.name] = {str(row["id"]): row for row in rows}
    return found


def _row(line: str) -> dict[str, Any] | None:
    # a line that a kill cut off is no answer
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and {"id", "prompt", "output"} <= row.keys() else None


def drawn(ids: Sequence[str], count: int) -> list[str]:
    """``count`` ids, the same ones whatever else there is: the least by their hash."""
    return sorted(ids, key=lambda id: hashlib.blake2b(id.encode(), digest_size=8).digest())[:count]


def _set(task: str, rows: Mapping[int, Mapping[str, Any]], lines: Sequence[Line], count: int) -> Html:
    answered = Counter(id for answers in rows.values() for id in answers)
    most = max(answered.values(), default=0)
    prompts = [_prompt(task, id, rows, lines) for id in drawn([id for id, n in answered.items() if n == most], count)]
    if task_of(task) == "safety":
        return tag("details", tag("summary", f"{task}: harmful prompts and the answers to them"), *prompts, class_="harmful")
    return tag("details", tag("summary", task), *prompts)


def _prompt(task: str, id: str, rows: Mapping[int, Mapping[str, Any]], lines: Sequence[Line]) -> Html:
    given = [(lines[number], answers[id]) for number, answers in rows.items() if id in answers]
    asked = given[0][1]
    text = "\n".join(part for part in (str(asked["prompt"]), str(asked.get("input") or "")) if part)
    category = f", {asked['category']}" if asked.get("category") else ""
    cards = [tag("div", tag("h4", line.label), tag("p", _cut(str(row["output"])) or "(empty)", class_="answer"),
                 _verdicts(line, task, id), class_="card") for line, row in given]
    return tag("div", tag("p", _cut(text), class_="prompt"), tag("p", f"{id}{category}", class_="says"),
               tag("div", *cards, class_="cards"), class_="asked")


def _verdicts(line: Line, task: str, id: str) -> Html | None:
    values = line.found[0].rows.get((task, id), {})
    said = [_says(name, value) for name, value in values.items() if name not in _LEFT_OUT]
    return tag("p", " · ".join(said), class_="verdict") if said else None


def _says(name: str, value: float) -> str:
    if name in _SAYS and value in (0, 1):
        return _SAYS[name][0 if value else 1]
    return f"{name}: {value:g}"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST else f"{text[:_MOST]} … ({len(text):,} characters)"
