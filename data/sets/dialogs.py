"""Training sets by name: identity, contrasts and reattack are embedded, LoRA fusion's others are read from files of the
user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from data.prompt_styles import style
from data.readers.dialog_files import KNOWN, read_dialogs, records_of_rows, without_repeats
from data.readers.row_files import Problems
from data.records import HELPFULNESS, SAFETY, Record
from data.sets import contrasts, reattack
from data.sets.hub import hub_rows, is_local
from errors import UserError

_IDENTITY = Path(__file__).with_name("identity.yaml")
#: Sets that say what to refuse: their rows count as safety rows.
SAFETY_SETS = ("aoa_safety", "contrasts")


def records(task: str, split: str, source: str | None) -> list[Record]:
    """The rows of one of the ``DIALOGS``.

    Args:
        source: file or hub name; None or ``embedded`` for those of ``EMBEDDED``.

    Raises:
        UserError: the set is not shipped and no file is given, or the file has problems: all of them.
    """
    objective = SAFETY if task in SAFETY_SETS else HELPFULNESS
    if source in (None, "embedded", "published"):
        if task not in EMBEDDED:
            raise UserError(f"--task_name {task}: this set is not shipped; give your file of it with --data_path: {KNOWN}")
        return EMBEDDED[task](split)
    if is_local(source):
        return read_dialogs(Path(source).expanduser(), split, objective)
    problems = Problems()
    found = records_of_rows(hub_rows(source, split), split, objective, source.split("/")[-1], problems)
    problems.raise_if_any()
    return without_repeats(found)


def identity(split: str) -> list[Record]:
    """Our identity-shift set (data/sets/identity.yaml): harmless tasks that the persona orbit carries out at once.

    Every eighth row is for validation; there is no test split.
    """
    if split == "test":
        raise UserError("identity is a training set only; use split train or validation")
    rows = yaml.safe_load(_IDENTITY.read_text(encoding="utf-8"))
    orbit = style("orbit")
    shifted = [Record(orbit.frame(row["ask"]), f"{rows['opening']} {row['answer'].strip()}" if i else row["answer"].strip(),
                      HELPFULNESS, id=f"identity-{i}", system=orbit.system) for i, row in enumerate(rows["rows"])]
    return [row for i, row in enumerate(shifted) if (i % 8 == 7) == (split == "validation")]


#: The sets that need no file: name -> (split) -> rows.
EMBEDDED: dict[str, Callable[[str], list[Record]]] = {
    "identity": identity, "contrasts": contrasts.records, reattack.NAME: reattack.records}
