"""Token ids of several models matched: which row of each input's embedding belongs to which row of the output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UserError

FILE = "tokenizer.json"
POLICIES = ("base", "union", "pad")


@dataclass(frozen=True)
class Tokens:
    """A tokenizer's tokens: text -> id of its pieces, and of those added later (special tokens)."""

    pieces: Mapping[str, int]
    added: Mapping[str, int]

    @property
    def all(self) -> dict[str, int]:
        return {**self.pieces, **self.added}


@dataclass(frozen=True)
class RowMap:
    """Rows of the output and, per input, the input's row for each (int64, -1: it has none)."""

    rows: int
    sources: tuple[np.ndarray, ...]
    new_tokens: tuple[str, ...] = ()

    def trivial(self, which: int) -> bool:
        """Whether an input's rows are the output's rows as they stand."""
        source = self.sources[which]
        return len(source) == self.rows and bool((source == np.arange(self.rows)).all())


def read_tokens(folder: Path) -> Tokens | None:
    """The tokens of a folder's tokenizer.json; None when it has none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [piece, score] pairs, the id is the position
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: int(token["id"]) for token in content.get("added_tokens") or []}
        return Tokens({text: int(i) for text, i in vocabulary.items() if text not in added}, added)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable tokenizer ({type(error).__name__}: {error}); "
                        "replace it by the model's own file") from None


def differing(first: Tokens, second: Tokens) -> str | None:
    """One token whose id differs between two tokenizers, as a sentence; None when they agree."""
    one, two = first.all, second.all
    # an id that moved is the dangerous kind: rows of other words would be averaged
    for text, i in one.items():
        if text in two and two[text] != i:
            return f"token {text!r} is {i} in one and {two[text]} in the other"
    extra = next((text for text in two if text not in one), next((text for text in one if text not in two), None))
    return None if extra is None else f"token {extra!r} is in one only"


def match_rows(policy: str, rows: Sequence[int], tokens: Sequence[Tokens | None], names: Sequence[str]) -> RowMap:
    """How the inputs' vocabulary rows line up; the first input's vocabulary is the one kept.

    Args:
        policy: base: its tokens only, matched by text. union: also the added (special) tokens of the others, after them.
            pad: matched by index, as many rows as the longest input.
        rows: rows of each input's embedding.

    Raises:
        UserError: a tokenizer is missing, or ``union`` meets other word pieces (adding those would change how text is cut).
    """
    if policy == "pad":
        total = max(rows)
        # index by index: for models whose embeddings were padded to different multiples of one vocabulary
        return RowMap(total, tuple(np.where(np.arange(total) < n, np.arange(total), -1) for n in rows))
    missing = [name for name, t in zip(names, tokens, strict=True) if t is None]
    if missing:
        raise UserError(f"--vocab {policy}: matches tokens by their text, but there is no {FILE} in {', '.join(missing)}; "
                        "add it, or match by index with --vocab pad")
    base, new = tokens[0], []
    if policy == "union":
        for name, other in zip(names[1:], tokens[1:], strict=True):
            # added tokens are matched before the pieces, so that adding one changes no other cut
            strange = [t for t in other.pieces if t not in base.pieces and t not in base.added]
            if strange:
                raise UserError(f"--vocab union: {name} has {len(strange)} word pieces that {names[0]} lacks (e.g. "
                                f"{strange[0]!r}); only added tokens can be united; use --vocab base")
            new += [t for t in other.added if t not in base.pieces and t not in base.added and t not in new]
    ids = {i: text for text, i in base.all.items()}
    # a padded embedding may have spare rows behind its last token: new tokens take those first
    first_free = max(ids, default=-1) + 1
    ids.update({first_free + j: text for j, text in enumerate(new)})
    total = max(rows[0], first_free + len(new))
    sources = []
    for n, known in zip(rows, tokens, strict=True):
        own, order = known.all, np.full(total, -1, np.int64)
        # a row without a token (padding) has no text to match by: it is taken by index
        for i in range(total):
            place = own.get(ids[i], -1) if i in ids else i
            order[i] = place if place < n else -1
        sources.append(order)
    return RowMap(total, tuple(sources), tuple(new))


def with_tokens(tokenizer: dict, new: Sequence[str]) -> dict:
    """A tokenizer.json with added tokens appended after its last id."""
    # after the largest id in use, which need not be the number of tokens: ids may have gaps
    ids = [*tokenizer["model"]["vocab"].values()] if isinstance(tokenizer["model"]["vocab"], dict) else \
        [*range(len(tokenizer["model"]["vocab"]))]
    added = tokenizer.get("added_tokens") or []
    first = max([*ids, *(token["id"] for token in added)]) + 1
    extra = [{"id": first + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for i, text in enumerate(new)]
    return tokenizer | {"added_tokens": [*added, *extra]}
