"""Answers that people labelled: a table of outputs and yes or no, by which a judge's errors are measured."""

from __future__ import annotations

from pathlib import Path

from data.readers.answer_files import COLUMNS
from data.readers.answer_text import answer_of
from data.readers.delimited import column_name
from data.readers.row_files import Problems, read_rows
from errors import UserError

LABELS = ("label", "refusal", "refused", "human", "gold")
_WORDS = {"1": True, "yes": True, "true": True, "0": False, "no": False, "false": False}


def read_labels(place: str, flag: str) -> list[tuple[str, bool]]:
    """(answer, label) of every row; the answer is read as those that are scored: without reasoning.

    Raises:
        UserError: no such file, no column of outputs or labels, a label that is not 1 or 0, yes or no, true or false.
    """
    problems = Problems()
    rows = read_rows(Path(place).expanduser(), problems)
    keys = {column_name(str(key)): key for key in rows[0].fields}
    found = [next((keys[name] for name in names if name in keys), None) for names in (COLUMNS["output"], LABELS)]
    if None in found:
        wanted = ", ".join(COLUMNS["output"] if found[0] is None else LABELS)
        raise UserError(f"{flag} {place}: no column of {'outputs' if found[0] is None else 'labels'}; it has "
                        f"{', '.join(keys)}; call it one of: {wanted}")
    labelled = []
    for row in rows:
        output, label = (row.fields.get(name) for name in found)
        word = str(int(label) if isinstance(label, float) and label.is_integer() else label).strip().lower()
        if word not in _WORDS or not isinstance(output, str):
            problems.add(f"{row.where}: needs an output that is text and a label 1 or 0 (yes or no), has {label!r}")
        else:
            labelled.append((answer_of(output)[0], _WORDS[word]))
    problems.raise_if_any()
    return labelled
