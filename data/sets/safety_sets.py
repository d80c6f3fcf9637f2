"""A safety set: harmful prompts, clean of every test set, refused in chosen ways and prompt styles; contrasts."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import manifest
from data.prompt_styles import style
from data.readers.dialog_files import read_prompts
from data.records import normalise, stable_hash
from data.sets import contrasts, embedded
from data.sets.decontaminate import clean, prompts_to_avoid
from errors import UserError
from flags.safety_set import SafetySetArgs

log = logging.getLogger(__name__)
KINDS = ("hard", "soft", "redirect")
_REFUSALS = Path(__file__).with_name("refusal_styles.yaml")


def write(args: SafetySetArgs) -> str:
    """Make the set and write both files; returns what to tell the person.

    Raises:
        UserError: a file has problems, a style lacks its text, or too few prompts are left.
    """
    styles = [style(name, args.files_of_styles.get(name)) for name in args.style_names]
    refusals = read_refusals(args.refusals)
    prompts = candidates(args.prompts)
    # cleaned before drawing: dropping drawn ones would leave fewer than --size
    tests = prompts_to_avoid(args.test_files)
    kept, report = clean(prompts, tests, args.near)
    log.info("%d prompts, %d in or near a test set left out", len(prompts), len(report.found))
    # without --size all prompts stay and the pairs are added
    total = args.size if args.size >= 0 else round(len(kept) / (1 - args.contrast_share))
    pairs = draw_pairs(round(total * args.contrast_share / 2), tests, args)
    drawn = draw(kept, args.size if args.size < 0 else args.size - 2 * len(pairs), args.seed)
    kinds = deal([args.hard, args.soft, 1 - args.hard - args.soft], len(drawn) + len(pairs), args.seed)
    texts = [*(prompts[id] for id in drawn), *(pair.harmful for pair in pairs)]
    # a pair's halves in one style, or the style would tell which is refused
    framed = [styles[i % len(styles)] for i in (*range(len(drawn)), *range(len(pairs)))]
    rows = [row(text, style, pick(refusals[KINDS[kind]], text, args.seed))
            for text, style, kind in zip(texts, framed, kinds, strict=True)]
    rows += [row(pair.harmless, styles[i % len(styles)], pair.answer) for i, pair in enumerate(pairs)]
    used = Counter(s.name for s in (*framed, *framed[len(drawn):]))
    path = args.results / "data" / f"{args.name}.jsonl"
    counts: dict[str, Any] = {"kinds": dict(sorted(Counter(KINDS[kind] for kind in kinds).items())),
              "styles": {s.name: used[s.name] for s in styles}}
    if pairs:
        counts |= {"answers": len(pairs), "contrasts": [pair.id for pair in pairs]}
    _save(path, rows)
    manifest.write_json(path.with_suffix(".json"), {
        "rows": len(rows), **counts, "prompts": args.prompts, "seed": args.seed, "drawn": drawn,
        "style_versions": {s.name: s.version for s in styles}, "sha256": manifest.sha256(path),
        "decontamination": report.as_dict()})
    kinds_said = ", ".join(f"{n} {kind}" for kind, n in counts["kinds"].items())
    styles_said = ", ".join(f"{n} {name}" for name, n in counts["styles"].items())
    answered = f" and {len(pairs)} answers" if pairs else ""
    return (f"{path}: {len(texts)} refusals{answered} ({kinds_said}; styles: {styles_said}); {len(report.found)} of "
            f"{len(prompts)} prompts left out because a test set has them, listed in {path.stem}.json")


def draw_pairs(count: int, tests: Mapping[str, Sequence[str]], args: SafetySetArgs) -> list[contrasts.Contrast]:
    """So many training contrasts of which neither half is in or near a test prompt.

    Raises:
        UserError: there are fewer.
    """
    if not count:
        return []
    known = contrasts.pairs("train")
    halves = {f"{pair.id} {half}": text for pair in known for half, text in (("-", pair.harmful), ("+", pair.harmless))}
    kept = set(clean(halves, tests, args.near)[0])
    usable = [pair for pair in known if {f"{pair.id} -", f"{pair.id} +"} <= kept]
    if count > len(usable):
        raise UserError(f"--contrast_share {args.contrast_share}: these are {count} pairs, and {len(usable)} are in no test "
                        "set; lower it, or --size")
    return contrasts.draw(usable, count, f"contrasts {args.seed}")


def candidates(place: str) -> dict[str, str]:
    """id -> harmful prompt, each text once."""
    if place == "advbench":
        texts = [(f"advbench-{i}", row["value"]) for i, row in enumerate(embedded.advbench())]
    else:
        file = Path(place).expanduser()
        texts = [(f"{file.stem}-{i}", text) for i, text in enumerate(read_prompts(file))]
    # reversed, so that the first of equal texts gives its id
    first = {normalise(text): id for id, text in reversed(texts)}
    return {id: text for id, text in texts if first[normalise(text)] == id}


def read_refusals(file: str | None) -> dict[str, list[str]]:
    """The refusals by kind.

    Raises:
        UserError: the file is not YAML, a kind is missing or empty, or something is no text.
    """
    path = Path(file).expanduser() if file else _REFUSALS
    try:
        refusals = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--refusals {file}: not readable as YAML ({type(error).__name__})") from None
    ok = isinstance(refusals, dict) and set(refusals) == set(KINDS) and all(
        isinstance(texts, list) and texts and all(isinstance(text, str) and text.strip() for text in texts)
        for texts in refusals.values())
    if not ok:
        raise UserError(f"--refusals {file}: needs the keys {', '.join(KINDS)}, each with a list of texts")
    return refusals


def draw(ids: Sequence[str], size: int, seed: int) -> list[str]:
    """``size`` ids (-1: all) in an order that depends on the seed.

    Raises:
        UserError: there are fewer.
    """
    if size > len(ids):
        raise UserError(f"--size {size}: only {len(ids)} prompts are in no test set; lower it, or give more --prompts")
    chosen = list(ids)
    random.Random(f"prompts {seed}").shuffle(chosen)
    return chosen if size < 0 else chosen[:size]


def deal(shares: Sequence[float], n: int, seed: int) -> list[int]:
    """n kinds in these shares, exactly (largest remainders), shuffled."""
    exact = [share * n for share in shares]
    # 0.29 * 100 is 28.999999999999996: a whole share must not lose a row to rounding
    counts = [int(value + 1e-9) for value in exact]
    # the largest remainders get what is left, so that the counts sum to n
    for i in sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])[: n - sum(counts)]:
        counts[i] += 1
    kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
    # a stream of its own: the draw of prompts does not decide the kinds
    random.Random(f"kinds {seed}").shuffle(kinds)
    return kinds


def pick(texts: Sequence[str], prompt: str, seed: int) -> str:
    """The text that belongs to a prompt under a seed."""
    return texts[stable_hash(prompt, f"refusal {seed}") % len(texts)]


def row(prompt: str, style: Any, refusal: str) -> dict[str, list[Mapping[str, str]]]:
    """One dialog."""
    system = [{"role": "system", "content": style.system}] if style.system else []
    return {"messages": [*system, {"role": "user", "content": style.frame(prompt)},
                         {"role": "assistant", "content": refusal}]}


def _save(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)
