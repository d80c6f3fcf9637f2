"""A safety set: harmful prompts, clean of every test set, with refusals in chosen proportions and prompt styles."""

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
from data.sets import embedded
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
    kept, report = clean(prompts, prompts_to_avoid(args.test_files), args.near)
    log.info("%d prompts, %d in or near a test set left out", len(prompts), len(report.found))
    drawn = draw(kept, args.size, args.seed)
    kinds = deal([args.hard, args.soft, 1 - args.hard - args.soft], len(drawn), args.seed)
    rows = [row(prompts[id], styles[i % len(styles)], pick(refusals[KINDS[kind]], prompts[id], args.seed))
            for i, (id, kind) in enumerate(zip(drawn, kinds, strict=True))]
    path = args.results / "data" / f"{args.name}.jsonl"
    counts = {"kinds": dict(sorted(Counter(KINDS[kind] for kind in kinds).items())),
              "styles": {s.name: sum(i % len(styles) == at for i in range(len(rows))) for at, s in enumerate(styles)}}
    _save(path, rows)
    manifest.write_json(path.with_suffix(".json"), {
        "rows": len(rows), **counts, "prompts": args.prompts, "seed": args.seed, "drawn": drawn,
        "style_versions": {s.name: s.version for s in styles}, "sha256": manifest.sha256(path),
        "decontamination": report.as_dict()})
    kinds_said = ", ".join(f"{n} {kind}" for kind, n in counts["kinds"].items())
    styles_said = ", ".join(f"{n} {name}" for name, n in counts["styles"].items())
    return (f"{path}: {len(rows)} refusals ({kinds_said}; styles: {styles_said}); {len(report.found)} of {len(prompts)} "
            f"prompts left out because a test set has them, listed in {path.stem}.json")


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
