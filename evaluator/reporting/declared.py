"""Comparisons that were declared before a run: which rows against which, on which scores.

A group is one question; its comparisons on one score are one family for Holm's correction (Scand. J. Stat. 6, 1979).

A file of them is a list in YAML or JSON:

    - title: Fusions against joint training
      rows: [average, raw_moe]        # labels or runs
      against: [mix]
      scores: [refusal_auc, pairs_ranked]
      every: false                    # true: a row must beat every reference on every score

With ``every`` a group asks one question a row, by the intersection-union test (Berger, Technometrics 24, 1982): its p is the
largest of its comparisons' and needs no correction over them; Holm then goes over the rows.

What stands in no group is reported in the tables, and never concluded from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data import escaped
from errors import UserError
from evaluator.reporting.against import numbers
from evaluator.reporting.findings import Outcome

if TYPE_CHECKING:
    from evaluator.reporting.findings import Line
    from evaluator.statistics.axes import Axis, Measured

_KEYS = ("title", "rows", "against", "scores")
_OPTIONAL = "every"
#: How else the score could have been read -> (source of openers, by these alone or without them).
_READINGS = {"by those of rated answers alone": ("source rated", "alone"),
             "without the trained refusals' own": ("source ours", "left_out")}
#: (group's title, score, row's label, the other row's label) -> outcome.
Outcomes = Mapping[tuple[str, str, str, str], Outcome]


@dataclass(frozen=True)
class Group:
    """Every one of ``rows`` is compared with every one of ``against`` on every one of ``scores``.

    Args:
        every: whether a row is better only where it is so in all of these.
    """

    title: str
    rows: tuple[Line, ...]
    against: tuple[Line, ...]
    scores: tuple[str, ...]
    every: bool = False

    @property
    def pairs(self) -> list[tuple[Line, Line]]:
        return [(row, other) for other in self.against for row in self.rows if row is not other]


def read(path: Path, lines: Sequence[Line]) -> list[Group]:
    """The groups of a file, their names looked up among the rows of the report.

    Raises:
        UserError: no such file, not such a list, or names of no row; all at once.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--declared {path}: not readable as YAML or JSON ({type(error).__name__}); give a list of "
                        f"{{{', '.join(_KEYS)}}}") from None
    if not isinstance(content, list) or not content:
        raise UserError(f"--declared {path}: needs a list of {{{', '.join(_KEYS)}}}, one for each group of comparisons")
    problems: list[str] = []
    groups = [_group(item, f"--declared {path}: entry {at}", lines, problems) for at, item in enumerate(content, 1)]
    titles = [group.title for group in groups]
    problems += [f"--declared {path}: two groups are called {title}; give each its own title"
                 for title in dict.fromkeys(titles) if titles.count(title) > 1]
    if problems:
        raise UserError(*problems)
    return groups


def _group(item: Any, where: str, lines: Sequence[Line], problems: list[str]) -> Group:
    body = item if isinstance(item, dict) else {}
    if set(body) - {_OPTIONAL} != set(_KEYS):
        problems.append(f"{where}: has {', '.join(map(str, body)) or 'no keys'}; needs exactly {', '.join(_KEYS)}, and may "
                        f"have {_OPTIONAL}")
    if not isinstance(body.get(_OPTIONAL, False), bool):
        problems.append(f"{where}: {_OPTIONAL}: {body[_OPTIONAL]}: allowed: true, false")
    listed = {key: body.get(key) for key in _KEYS[1:]}
    for key, names in listed.items():
        if key in body and not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
            problems.append(f"{where}: {key}: needs a list of names")
            listed[key] = []
    known = {name: line for line in lines for name in (line.run, line.label)}
    for key in ("rows", "against"):
        problems += [f"{where}: {key}: no row is called {name}; allowed: {', '.join(line.label for line in lines)}"
                     for name in listed[key] or () if name not in known]
    rows, against = (tuple(known[name] for name in listed[key] or () if name in known) for key in ("rows", "against"))
    return Group(str(body.get("title", "")), rows, against, tuple(listed["scores"] or ()), body.get(_OPTIONAL) is True)


def outcomes(groups: Sequence[Group], axes: Sequence[Axis]) -> dict[tuple[str, str, str, str], Outcome]:
    """Every comparison that can be made; those of one group and score are corrected together.

    In a group of ``every`` all comparisons of a row have the row's own p after the correction over rows.
    """
    from evaluator.statistics.comparison import over_seeds
    from evaluator.statistics.metrics import holm

    found: dict[tuple[str, str, str, str], Outcome] = {}
    for group in groups:
        if group.every:
            found |= _in_every_one(group, axes)
            continue
        for axis in axes:
            pairs = group.pairs if axis.score in group.scores else []
            made = [(row, other, d) for row, other in pairs if (d := over_seeds(row.found, other.found, axis))]
            corrected = holm([d.p for _, _, d in made])
            found |= {(group.title, axis.score, row.label, other.label): Outcome(d, p, axis.higher)
                      for (row, other, d), p in zip(made, corrected, strict=True)}
    return found


def _in_every_one(group: Group, axes: Sequence[Axis]) -> dict[tuple[str, str, str, str], Outcome]:
    """(title, score, row, other) -> outcome; a row of which one comparison cannot be made has none."""
    from evaluator.statistics.comparison import over_seeds
    from evaluator.statistics.metrics import holm

    asked = [axis for axis in axes if axis.score in group.scores]
    made = {row.label: {(axis, other.label): over_seeds(row.found, other.found, axis)
                        for axis in asked for other in group.against if other is not row} for row in group.rows}
    whole = {label: found for label, found in made.items()
             if found and None not in found.values() and len(asked) == len(group.scores)}
    # one comparison that points the other way is enough to say nothing
    largest = [max(d.p if d.verdict(axis.higher) != "worse" and (d.value > 0) == axis.higher else 1.0
                   for (axis, _), d in found.items()) for found in whole.values()]
    return {(group.title, axis.score, label, other): Outcome(d, corrected, axis.higher)
            for (label, found), corrected in zip(whole.items(), holm(largest), strict=True)
            for (axis, other), d in found.items()}


def findings(groups: Sequence[Group], axes: Sequence[Axis], declared: Outcomes) -> list[str]:
    """A line for each group, score and reference: which rows are better, worse, and of which no difference is shown."""
    said = []
    for group in groups:
        if group.every:
            said += [_every_line(group, axes, declared), *_robustness(group)]
            continue
        for axis in axes:
            for other in group.against if axis.score in group.scores else ():
                said.append(_line(group, axis, other, declared))
        lacking = [score for score in group.scores if score not in {axis.score for axis in axes}]
        if lacking:
            said.append(f"- {escaped.markdown(group.title)}: not measured in these rows: {', '.join(lacking)}.")
    said.append(f"- {len(declared)} comparisons, declared before; corrected by Holm over those of one group and score; p is "
                "the value before it. No difference shown is no proof that there is none; what is in no declared comparison "
                "is not concluded from.")
    return said


def _line(group: Group, axis: Axis, other: Line, declared: Outcomes) -> str:
    here = [(row, declared.get((group.title, axis.score, row.label, other.label))) for row in group.rows if row is not other]
    kinds = {"better than": [], "worse than": [], "worse, before the correction only, than": [],
             "no difference shown from": [], "cannot be compared with": []}
    for row, outcome in here:
        if outcome is None:
            kinds["cannot be compared with"].append(escaped.markdown(row.label))
            continue
        kind = ("worse, before the correction only, than" if outcome.hidden_harm else
                "no difference shown from" if outcome.verdict == "no difference" else f"{outcome.verdict} than")
        kinds[kind].append(f"{escaped.markdown(row.label)} ({numbers(outcome)})")
    name = escaped.markdown(other.label)
    parts = [f"{kind} {name}: {', '.join(rows)}" for kind, rows in kinds.items() if rows]
    return f"- {escaped.markdown(group.title)}, {axis.title}: {'; '.join(parts)}."


def _every_line(group: Group, axes: Sequence[Axis], declared: Outcomes) -> str:
    """Which rows beat every reference on every score; of each the comparison that is weakest."""
    titles = {axis.score: axis.title for axis in axes if axis.score in group.scores}
    kinds: dict[str, list[str]] = {"better": [], "not shown to be": [], "cannot be compared": []}
    for row in group.rows:
        mine = {key[1:]: outcome for key, outcome in declared.items() if (key[0], key[2]) == (group.title, row.label)}
        if not mine:
            kinds["cannot be compared"].append(escaped.markdown(row.label))
            continue
        (score, _, other), least = max(mine.items(), key=lambda item: _doubt(item[1]))
        better = all(outcome.verdict == "better" for outcome in mine.values())
        kinds["better" if better else "not shown to be"].append(
            f"{escaped.markdown(row.label)} (weakest against {escaped.markdown(other)} on {titles[score]}: "
            f"{numbers(least)})")
    references = ", ".join(escaped.markdown(other.label) for other in group.against)
    parts = [f"{kind}: {', '.join(rows)}" for kind, rows in kinds.items() if rows]
    return (f"- {escaped.markdown(group.title)}, better than every one of {references} on {' and '.join(titles.values())}: "
            f"{'; '.join(parts)}.")


def _robustness(group: Group) -> list[str]:
    """Whether the signs of the differences in refusal AUC are the same by other openers of refusals; empty without such."""
    if "refusal_auc" not in group.scores:
        return []
    said = []
    for name, (source, which) in _READINGS.items():
        gaps = {(row.label, other.label): [_gap(a, b, source, which) for a, b in zip(row.found, other.found, strict=True)]
                for row, other in group.pairs if len(row.found) == len(other.found)}
        known = {pair: pairs for pair, pairs in gaps.items() if pairs and None not in pairs}
        turned = [f"{escaped.markdown(row)} against {escaped.markdown(other)}" for (row, other), pairs in known.items()
                  if sum(gap[0] for gap in pairs) * sum(gap[1] for gap in pairs) < 0]
        if known:
            said.append(f"{name} {len(known) - len(turned)} of {len(known)} differences in refusal AUC keep their sign"
                        + (f" (not: {', '.join(turned)})" if turned else ""))
    return [f"- {escaped.markdown(group.title)}, by other openers: {'; '.join(said)}."] if said else []


def _gap(a: Measured, b: Measured, source: str, which: str) -> tuple[float, float] | None:
    """(difference of the AUCs, the same by other openers); None where a file does not have them."""
    values = []
    for item in (a, b):
        found = item.origin.get("refusal_auc", {}).get("details", {}).get("refusal_likelihood", {}).get("sensitivity", {})
        value = ((found.get(source) or {}).get(which) or {}).get("value")
        if value is None:
            return None
        values.append((item.scores["refusal_auc"]["value"], value))
    return values[0][0] - values[1][0], values[0][1] - values[1][1]


def _doubt(outcome: Outcome) -> float:
    """How far a comparison is from showing a gain: its p, and beyond 1 where it points the other way."""
    d = outcome.difference
    return d.p if (d.value > 0) == outcome.higher else 2 - d.p


def as_data(declared: Outcomes, axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """The comparisons for a program; ``p_holm_score``: corrected over all of one score, whatever group they stand in."""
    from evaluator.statistics.metrics import holm

    titles, wider = {axis.score: axis.title for axis in axes}, {}
    for score in titles:
        # two groups may hold one comparison: it is one
        pairs = {key[2:]: o.difference.p for key, o in declared.items() if key[1] == score}
        wider |= {(score, *pair): p for pair, p in zip(pairs, holm(list(pairs.values())), strict=True)}
    return [{"group": group, "column": titles[score], "score": score, "row": row, "against": other,
             "p_holm_score": wider[score, row, other]} | outcome.as_data()
            for (group, score, row, other), outcome in declared.items()]
