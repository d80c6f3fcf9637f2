"""The offline judges against labelled answers, two passes of labels against each other: a report of its own, and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import manifest
from data import escaped
from data.readers.label_files import LABELS, Labelled, read_labels
from evaluator.reporting.findings import Line
from evaluator.scoring import labelled
from evaluator.statistics.kappa import Kappa, kappa_of

#: What each judge finds in an answer.
FINDS = {"keyword": "declines", "published": "declines", "coherence": "broken", "fitted": "harmful"}
_BY = {"ppi": "prediction-powered", "rogan-gladen": "Rogan-Gladen", "labels": "labels alone"}


def write(place: str, path: Path, seed: int) -> Path:
    """Measure the judges on a file of labels and write path (Markdown) and its JSON; returns the first.

    Raises:
        UserError: no such file, or a fault in it.
    """
    rows = read_labels(place, "--labels")
    found, agreed = labelled.measured(rows, seed), passes(rows, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(path.with_suffix(".json"), {"labels": place, "answers": len(rows), "seed": seed, "judges": found,
                                                    "passes": [item.as_dict() for item in agreed]})
    path.write_text("\n".join(markdown(rows, found, agreed)) + "\n", encoding="utf-8")
    return path


def passes(rows: Sequence[Labelled], seed: int) -> list[Kappa]:
    """Cohen's kappa of the first and the second pass, for each label that both gave; its interval draws whole prompts."""
    found = []
    for label in LABELS:
        both = [row for row in rows if all(label in labels for labels in row.passes)]
        if both:
            first, second = ([row.passes[i][label] for row in both] for i in (0, 1))
            # several models' answers to one prompt are no independent draws; a row without a name is a prompt of its own
            groups = [f"{row.set} {row.id or number}" for number, row in enumerate(both)]
            found.append(kappa_of(first, second, groups, seed, (label, "first", "second")))
    return found


def markdown(rows: Sequence[Labelled], found: Mapping[str, Any], agreed: Sequence[Kappa]) -> list[str]:
    """The report as lines."""
    runs = sorted({row.run for row in rows if row.run})
    of = f" of {', '.join(runs)}" if runs else ""
    lines = ["# Judges against labelled answers", "",
             f"{len(rows)} labelled answers{escaped.markdown(of)}. Sensitivity: of the answers that are labelled yes, the "
             "share that the judge finds; specificity: of the others, the share that it lets pass. Intervals: Wilson.", "",
             "| judge | finds what | set | sensitivity | n | specificity | n |", "|---|---|---|---|---|---|---|"]
    for judge, sets in found.items():
        for name, errors in sets.items():
            cells = [cell for part in ("sensitivity", "specificity") for cell in (
                (_interval(errors[part]), str(errors[part]["n"])) if part in errors else ("", "0"))]
            lines.append(f"| {judge} | {FINDS[judge]} | {escaped.markdown(name)} | {' | '.join(cells)} |")
    if agreed:
        lines += ["", "## The two passes", "",
                  "Cohen's kappa; intervals: bootstrap over prompts.", "",
                  "| label | kappa | both yes | only first | only second | both no |", "|---|---|---|---|---|---|"]
        lines += [f"| {k.task} | {k.said} | {k.both} | {k.only_a} | {k.only_b} | {k.neither} |" for k in agreed]
    return lines


def _interval(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


def own_note(own: Mapping[str, Any]) -> list[str]:
    """The judges' errors on the labelled answers that are kept with the code, as a note of a report; none without them."""
    if not own:
        return []
    parts = [f"{judge} ({FINDS[judge]}) " + ", ".join(f"{part} {_interval(sets['all'][part])}"
             for part in ("sensitivity", "specificity") if part in sets["all"]) for judge, sets in own["judges"].items()]
    return [f"- Judges against {own['answers']} labelled answers of the embedded models: {'; '.join(parts)}."]


def corrected_notes(lines: Sequence[Line]) -> list[str]:
    """What --labels made of each row's rates: the corrected values and how they were made, or why they stand as they are."""
    notes: dict[str, dict[str, list[str]]] = {}
    for line in lines:
        for item in line.found:
            for name, how in item.details.get("judges", {}).get("labels", {}).items():
                # labels are named beside the score that they correct; score files name it with this ending
                named = (f"{name}_corrected", f"{name}.corrected")
                score = next((item.scores[key] for key in named if key in item.scores), None)
                said = f"{_interval(score)}, {_BY[how['correction']]}, {how['labelled']} labels" if score else \
                    f"uncorrected, {how.get('why', '')}"
                # one reason that holds for many rows is said once
                notes.setdefault(name, {}).setdefault(said, []).append(line.label)
    parts = {name: [f"{', '.join(rows)} {said}" for said, rows in found.items()] for name, found in notes.items()}
    return [f"- {name}, corrected by labels: {'; '.join(found)}." for name, found in parts.items()]
