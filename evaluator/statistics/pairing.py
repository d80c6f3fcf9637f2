"""Which rows of two runs may be compared: same id, same prompt, judged by the same version, on the same split.

What the files do not say (score files older than prompt hashes) is compared by id, and counted as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flags.utility import BENCHMARKS, PROBES

if TYPE_CHECKING:
    from evaluator.statistics.axes import Axis, Measured

#: What evaluate_safety.py reads without --judges, on whatever set; the keyword judge's version is called rules.
_KEYWORD = ("refusal", "safe_refusal", "published_asr", "harm", "incoherent", "refusal_plain", "refusal_edgy")
#: Characters of a version that are shown.
_SHOWN = 12


@dataclass(frozen=True)
class Pairing:
    """The rows that two runs are compared on.

    Args:
        keys: (set, id) of each.
        other_prompt: rows of the same id whose prompts differ; they are left out.
        by_id: rows of ``keys`` where one of the two has no prompt hash.
        unlike: why none may be compared; "" where they may.
        unknown: what one of the two does not say: judges, split.
        computed: in what the two were computed otherwise, which is told and not refused (``_computed``).
        untold: whether one of the two does not say how it was computed.
    """

    keys: tuple[tuple[str, str], ...]
    other_prompt: int = 0
    by_id: int = 0
    unlike: str = ""
    unknown: tuple[str, ...] = ()
    computed: tuple[str, ...] = ()
    untold: bool = False


def side_by_side(a: Sequence[Measured], b: Sequence[Measured]) -> list[tuple[Measured, Measured]]:
    """Seed by seed; a run that was made once stands against every seed of the other. None of 2 seeds against 3."""
    many = max(len(a), len(b))
    a, b = (list(side) * many if len(side) == 1 else side for side in (a, b))
    # which of two seeds would stand against the third, nobody could say
    return list(zip(a, b, strict=True)) if len(a) == len(b) else []


def pair(a: Measured, b: Measured, axis: Axis) -> Pairing:
    """The rows of an axis that both runs have, as far as they may be compared; ``keys`` is empty where they may not."""
    shared = [key for key in a.rows if key[0] == axis.set and axis.key in a.rows[key] and axis.key in b.rows.get(key, {})]
    if not shared:
        return Pairing(())
    left, right = _made(a, axis), _made(b, axis)
    both = {name: (left.get(name), right.get(name)) for name in {**left, **right}}
    # known on both sides and different; what one side does not say is told in the notes instead
    unlike = [f"{name} {x[:_SHOWN]} and {y[:_SHOWN]}" for name, (x, y) in both.items() if x and y and x != y]
    unknown = tuple(name for name, found in both.items() if None in found)
    if unlike:
        return Pairing((), unlike=", ".join(unlike))
    computed, untold = _computed(a, b, axis)
    hashes = {key: (a.prompts.get(key), b.prompts.get(key)) for key in shared}
    kept = tuple(key for key, (x, y) in hashes.items() if x is None or y is None or x == y)
    return Pairing(kept, len(shared) - len(kept), sum(None in hashes[key] for key in kept), unknown=unknown,
                   computed=computed, untold=untold)


def _made(item: Measured, axis: Axis) -> dict[str, str | None]:
    """What a score was made with beside the answers: its judges' versions, the split; None for what is not known."""
    line = item.origin.get(axis.score, {})
    inputs: dict[str, Any] = line.get("inputs") or {}
    facts: dict[str, str | None] = {"split": line.get("split")}
    if axis.set in BENCHMARKS or axis.set in PROBES:
        details = _utility(line, axis.set)
        # shots and examples are part of the prompt's hash
        facts |= {name: str(details[name]) for name in ("filter", "max_new_tokens") if name in details}
        if axis.set in BENCHMARKS:
            facts["lm-eval"] = inputs.get(axis.set, "").partition(" lm-eval ")[2] or None
    elif axis.command == "evaluate_refusal":
        # other openers are another score
        facts["openers"] = inputs.get("openers")
    elif axis.score == "alpaca_eval.win_rate":
        facts["annotator"] = line.get("details", {}).get("annotator")
    elif axis.command == "evaluate_safety" and axis.key in _KEYWORD:
        if axis.key == "harm":
            facts["fitted judge"] = inputs.get("fitted")
        elif axis.key != "incoherent":
            facts["keyword rules"] = inputs.get("rules")
        if axis.key in ("incoherent", "safe_refusal"):
            facts["coherence rules"] = inputs.get("coherence")
    elif "." in axis.score:
        facts |= {f"judge {name}": inputs.get(f"judge {name}") for name in axis.score.split(".")[0].split("_x_")}
    return facts


def how_scored(item: Measured, task: str) -> str:
    """In words, the rows and settings that a benchmark or probe was scored with: models compare where these agree."""
    if task not in item.scores:
        return "not run"
    line = item.origin.get(task, {})
    details, made_of = _utility(line, task), (line.get("inputs") or {}).get(task, "")
    rows, _, version = made_of.partition(" lm-eval ")
    parts = [f"n = {item.scores[task]['n']}", f"{details['shots']}-shot" if "shots" in details else "",
             details.get("filter", ""), f"{details['max_new_tokens']} tokens" if "max_new_tokens" in details else "",
             f"rows {rows[:8]}" if rows else "", f"lm-eval {version}" if version else ""]
    return ", ".join(part for part in parts if part)


def _computed(a: Measured, b: Measured, axis: Axis) -> tuple[tuple[str, ...], bool]:
    """In what two runs were computed otherwise (dtype, batches, back end), and whether one of them does not say.

    They are compared all the same, and a note says so: it is rounding, which below float32 moves single answers (11 to 21 %
    of greedy ones between two batch sizes) in no known direction. Refusing would leave models that need smaller batches
    without a comparison. In float32 batches move nothing that a report shows.
    """
    answered = (axis.command == "evaluate_safety" and axis.score != "hhh_harmless") or "." in axis.score
    found = []
    for item in (a, b):
        made = item.origin.get(axis.score, {}).get("details", {}).get("made_with", {})
        found.append(made.get("answers", {}).get(axis.set, {}) if answered else made.get("model", {}))
    if any("backend" in way for way in found):
        # answers of the back end hf do not say so
        found = [{"backend": "hf"} | way if way else way for way in found]
    names = dict.fromkeys(["dtype", *found[0], *found[1]])
    if all(way.get("dtype") == "float32" for way in found):
        names = {"dtype": None}
    differ = tuple(f"{name.replace('_', ' ')} {found[0][name]} and {found[1][name]}" for name in names
                   if all(name in way for way in found) and found[0][name] != found[1][name])
    return differ, any(name not in way for name in names for way in found)


def how_judged(item: Measured, place: str, key: str) -> tuple[list[str], int]:
    """In words, who judged the answers to a set, and in what version; and how many answers were asked about (0: unknown)."""
    from evaluator.statistics.axes import Axis

    base, _, part = key.partition(".")
    # a joint score of two judges is called A_x_B.SET.joint; alpaca_eval names its own set
    score = key if key.startswith("alpaca_eval.") else f"{base}.{place}{f'.{part}' if part else ''}"
    line = item.origin.get(score, {})
    details = line.get("details", {})
    facts = [f"{name} {value[:_SHOWN] if value else 'unknown'}" for name, value in _made(
        item, Axis(score, "", line.get("command", "").partition(".")[0], place, key, "rate")).items()]
    source = details.get("protocols", {}).get(place, {})
    if source.get("stands_in"):
        facts.append(f"{source.get('source')} stands in")
    if "answers_task" in details:
        facts.append(f"answers to {details['answers_task']}")
    asked = details.get("judged", {}).get(score, {}).get("answers") or details.get("sent") or 0
    return facts, int(asked)


def _utility(line: dict[str, Any], task: str) -> dict[str, Any]:
    return line.get("details", {}).get("utility", {}).get(task) or {}


def notes(pairs: Iterable[tuple[str, Sequence[Measured], str, Sequence[Measured]]], axes: Sequence[Axis]) -> list[str]:
    """What a report must say of its differences: what was left out and why, what was compared by id alone.

    Args:
        pairs: (label, one run per seed, label, one run per seed) of every comparison.
    """
    unlike: dict[str, None] = {}
    other: dict[str, None] = {}
    by_id: dict[str, None] = {}
    unknown: dict[str, None] = {}
    computed: dict[str, None] = {}
    untold: dict[str, None] = {}
    for first, a, second, b in pairs:
        for axis in axes:
            made = [pair(x, y, part) for x, y in side_by_side(a, b)
                    for part in (axis.parts if axis.kind in ("auc", "threshold", "corrected") else (axis,))]
            where = f"{first} and {second} on {axis.title}"
            unlike |= dict.fromkeys(f"{where} ({pairing.unlike})" for pairing in made if pairing.unlike)
            if lost := sum(pairing.other_prompt for pairing in made):
                other[f"{where} ({lost} of {lost + sum(len(pairing.keys) for pairing in made)} rows)"] = None
            if any(pairing.untold for pairing in made):
                untold[axis.title] = None
            if any(pairing.by_id for pairing in made):
                by_id[axis.title] = None
            computed |= dict.fromkeys(f"{where} ({', '.join(pairing.computed)})" for pairing in made if pairing.computed)
            unknown |= dict.fromkeys(f"{name} of {axis.title}" for pairing in made for name in pairing.unknown)
    sentences = (("No difference is given where two runs were judged by different versions or on different splits", unlike),
                 ("Left out of the differences, same id but another prompt", other),
                 ("Compared by id alone: a score file has no hashes of its prompts (--overwrite scores again)", by_id),
                 ("Compared although computed otherwise (below float32 that moves single answers, in no known direction)",
                  computed),
                 ("Compared although a score file does not say in which dtype and batches", untold),
                 ("Compared although a score file does not say", unknown))
    return [f"- {text}: {'; '.join(pairing)}." for text, pairing in sentences if pairing]
