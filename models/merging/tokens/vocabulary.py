"""Token ids of several models matched: which row of each input's embedding belongs to which row of the output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import manifest
from errors import UserError

FILE = "tokenizer.json"
POLICIES = ("base", "union", "pad")
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class Tokens:
    """A tokenizer's tokens: text -> id of its pieces, and of those added later (special tokens).

    Args:
        entries: text -> the entry of an added token: its flags (special, lstrip, rstrip, normalized, single_word).
    """

    pieces: Mapping[str, int]
    added: Mapping[str, int]
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def all(self) -> dict[str, int]:
        return {**self.pieces, **self.added}


@dataclass(frozen=True)
class RowMap:
    """Rows of the output and, per input, the input's row for each (int64, -1: it has none).

    Args:
        new_tokens: what the output's tokenizer gets beside the first input's: entries of added_tokens, with their new ids.
        without_row: added tokens that leave it: no row of its embedding was theirs.
    """

    rows: int
    sources: tuple[np.ndarray, ...]
    new_tokens: tuple[Mapping[str, Any], ...] = ()
    without_row: tuple[str, ...] = ()

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
        entries = {token["content"]: dict(token) for token in content.get("added_tokens") or []}
        return Tokens({text: int(i) for text, i in vocabulary.items() if text not in added}, added, entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a readable tokenizer ({type(error).__name__}: {error}); "
                        "replace it by the model's own file") from None


def with_rows(tokens: Tokens | None, rows: int) -> tuple[Tokens | None, tuple[str, ...]]:
    """A tokenizer's tokens that its model has a row for, and the texts of the added ones that have none.

    A pad token that was added and never grew into the embedding is the usual one. A row made up for it would be one more
    word that the model may answer.
    """
    if tokens is None or not rows:
        return tokens, ()
    pieces, added = ({text: i for text, i in part.items() if i < rows} for part in (tokens.pieces, tokens.added))
    lost = tuple(text for text in tokens.added if text not in added)
    return Tokens(pieces, added, {text: tokens.entries[text] for text in added}), lost


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
    known = [t for t in tokens if t is not None]
    base = known[0]
    new: dict[str, Mapping[str, Any]] = {}
    if policy == "union":
        for name, other in zip(names[1:], known[1:], strict=True):
            # added tokens are matched before the pieces, so that adding one changes no other cut
            strange = [t for t in other.pieces if t not in base.pieces and t not in base.added]
            if strange:
                raise UserError(f"--vocab union: {name} has {len(strange)} word pieces that {names[0]} lacks (e.g. "
                                f"{strange[0]!r}); only added tokens can be united; use --vocab base")
            new |= {t: other.entries.get(t, {"content": t}) for t in other.added
                    if t not in base.pieces and t not in base.added and t not in new}
    ids = {i: text for text, i in base.all.items()}
    # a padded embedding may have spare rows behind its last token: new tokens take those first
    first_free = max(ids, default=-1) + 1
    ids.update({first_free + j: text for j, text in enumerate(new)})
    total = max(rows[0], first_free + len(new))
    sources = []
    for n, mine in zip(rows, known, strict=True):
        own, order = mine.all, np.full(total, -1, np.int64)
        # a row without a token (padding) has no text to match by: it is taken by index
        for i in range(total):
            place = own.get(ids[i], -1) if i in ids else i
            order[i] = place if place < n else -1
        sources.append(order)
    # the row and the id are one number
    entries = tuple(dict(entry) | {"id": first_free + j} for j, entry in enumerate(new.values()))
    return RowMap(total, tuple(sources), entries)


def entry(text: str, flags: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A new token as tokenizer.json lists it; without flags a plain one, as tokenizer.add_tokens(TEXT) makes it."""
    return {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False, **flags,
            "id": number, "content": text}


def check_ids(folder: Path, rows: RowMap, asked: str, instead: str) -> None:
    """That the tokenizers library numbers the new tokens as their rows are: it counts on by itself where ids have gaps.

    Args:
        asked: the flag or key that asks for the tokens.
        instead: what to do instead.

    Raises:
        UserError: it gives one another id, or refuses the file.
    """
    from tokenizers import Tokenizer

    path = folder / FILE
    content = _with(json.loads(path.read_text(encoding="utf-8")), rows)
    try:
        made = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(f"{path}: the tokenizers library refuses it with the added tokens ({error}); replace it by the "
                        f"model's own file, or {instead}") from None
    for token in rows.new_tokens:
        if (given := made.token_to_id(token["content"])) != token["id"]:
            raise UserError(f"{asked}: {path}: {token['content']!r} would get id {given}, its row is {token['id']}, "
                            f"for the ids of this tokenizer have gaps; {instead}, or add the token to the base first "
                            "(tokenizer.add_tokens, model.resize_token_embeddings)")


def _with(tokenizer: Mapping[str, Any], rows: RowMap) -> dict[str, Any]:
    kept = [token for token in tokenizer.get("added_tokens") or [] if token["content"] not in rows.without_row]
    return {**tokenizer, "added_tokens": [*kept, *rows.new_tokens]}


def write_new_tokens(folder: Path, rows: RowMap) -> None:
    """Add the new tokens to every tokenizer file of a folder that lists added tokens, with the flags that they had.

    Those without a row leave these files first.
    """
    if not rows.new_tokens and not rows.without_row:
        return
    path = folder / FILE
    manifest.write_json(path, _with(json.loads(path.read_text(encoding="utf-8")), rows))
    _leave_out(folder / "tokenizer_config.json", "added_tokens_decoder", rows.without_row)
    _leave_out(folder / "added_tokens.json", None, rows.without_row)
    plain = [{key: token[key] for key in _FLAGS if key in token} | {"content": token["content"]}
             for token in rows.new_tokens]
    by_id = {str(token["id"]): entry for token, entry in zip(rows.new_tokens, plain, strict=True)}
    special = [token["content"] for token in rows.new_tokens if token.get("special")]
    _extend(folder / "tokenizer_config.json", {"added_tokens_decoder": by_id}, special)
    _extend(folder / "special_tokens_map.json", {}, special)
    _extend(folder / "added_tokens.json", {token["content"]: token["id"] for token in rows.new_tokens}, [])


def _extend(path: Path, entries: Mapping[str, Any], special: Sequence[str]) -> None:
    """Add entries to a JSON file, where it is, and special tokens to its lists of those that have no role."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in entries.items():
        if isinstance(value, Mapping):
            # a file that keeps its added tokens elsewhere is read from there
            if key in content:
                content[key] = {**content[key], **value}
        else:
            content[key] = value
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = content.get(key)
        if isinstance(listed, list):
            have = [token.get("content") if isinstance(token, dict) else token for token in listed]
            content[key] = [*listed, *(text for text in special if text not in have)]
    manifest.write_json(path, content)


def _leave_out(path: Path, key: str | None, texts: Sequence[str]) -> None:
    """Take tokens out of a JSON file, where it is: entries by id under a key, or (None) ids by text."""
    if not texts or not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if key is None:
        content = {text: i for text, i in content.items() if text not in texts}
    elif isinstance(content.get(key), dict):
        content[key] = {i: token for i, token in content[key].items() if token.get("content") not in texts}
    manifest.write_json(path, content)
