"""Vocabulary rows of the inputs lined up: by --vocab, or as a recipe's tokenizer section asks, by mergekit 0.1.5's rules.

Under a section the result has the tokens of its source, then the section's own new ones, then rows up to the multiple asked
for. An input that lacks a token takes, in this order: the row that the section names; the row of the only input that has it;
the base's; the mean of those that have it; zeros when none has. Rows behind the last token are the mean of the input's
others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from errors import UserError
from models.merging.recipe_tokens import TokenRule, TokenRules
from models.merging.tokens.vocabulary import (
    FILE,
    RowMap,
    Tokens,
    check_ids,
    differing,
    entry,
    match_rows,
    read_tokens,
    with_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

    from models.checkpoints.names import View
    from models.merging.recipes import Recipe

#: In an input's rows: it lacks the token; the row is the mean of the others.
LACKS, PADDING = -1, -2
_SHOWN = 6


@dataclass(frozen=True)
class TokenRows(RowMap):
    """A RowMap of a recipe's tokenizer section.

    Args:
        names: of the inputs, as ``sources`` has them.
        base: the recipe's base; None without one: its row then goes before no other's.
        given: output row -> (input's name, its row), or None for zeros: where the section says so.
        forced: rows that every input takes from there.
        tokens: how many rows have a token; the others are padding.
        folder: whose tokenizer files the result takes.
    """

    names: tuple[str, ...] = ()
    base: str | None = None
    given: Mapping[int, tuple[str, int] | None] = field(default_factory=dict)
    forced: frozenset[int] = frozenset()
    tokens: int = 0
    folder: Path | None = None


def rows_of(recipe: Recipe, seen: Mapping[str, View], order: Sequence[str], policy: str, tokenizer: Path | None,
            problems: list[str], notes: list[str]) -> RowMap | None:
    """The inputs' vocabularies lined up; None when they agree already, or when ``problems`` says why they cannot be.

    Args:
        order: the inputs' names, the anchor first.
        policy: what --vocab says; empty: explain and stop where they differ.
        tokenizer: the folder of the tokenizer that the recipe's tokenizer section names.

    Raises:
        UserError: as ``match_rows`` and ``token_rows``.
    """
    embeddings = [seen[m].embedding() for m in order]
    sizes = [info.shape[0] if info else 0 for info in embeddings]
    folders = [seen[m].checkpoint.folder for m in order]
    if recipe.tokens is not None:
        found = token_rows(recipe.tokens, order, folders, sizes, recipe.base_model, tokenizer)
        _tell(found.without_row, str(found.folder), notes)
        return found
    tokens, lost = zip(*(with_rows(read_tokens(folder), size) for folder, size in zip(folders, sizes, strict=True)),
                       strict=True)
    reasons = [f"{order[0]} has {sizes[0]} rows, {m} has {n}" for m, n in zip(order, sizes, strict=True) if n != sizes[0]]
    # equal sizes prove nothing: two tokenizers may number their pieces otherwise
    for model, known in zip(order[1:], tokens[1:], strict=True):
        if tokens[0] and known and (why := differing(tokens[0], known)):
            reasons.append(f"{order[0]} and {model}: {why}")
    if not reasons:
        return None
    if not policy:
        problems.append(f"vocabularies differ ({'; '.join(reasons[:_SHOWN])}); choose --vocab base (the tokens of "
                        f"{order[0]}, matched by text), union (added tokens of the others too), or pad (by index)")
        return None
    rows = match_rows(policy, sizes, tokens, order)
    if policy != "pad" and lost[0]:
        rows = replace(rows, without_row=lost[0])
        _tell(lost[0], order[0], notes)
    if rows.new_tokens:
        check_ids(folders[0], rows, "--vocab union", "use --vocab base")
    notes.append(f"--vocab {policy}: {rows.rows} rows; a token that an input lacks takes the base's row, and one that the "
                 "base lacks too the mean of the inputs that have it")
    return rows


def _tell(texts: Sequence[str], model: str, notes: list[str]) -> None:
    if texts:
        notes.append(f"{model} has no row for {len(texts)} of its added tokens (e.g. {texts[0]!r}): left out of the "
                     "result's tokenizer")


def token_rows(rules: TokenRules, names: Sequence[str], folders: Sequence[Path], sizes: Sequence[int], base: str | None,
               source_folder: Path | None) -> TokenRows:
    """How the inputs' vocabulary rows line up under a tokenizer section.

    Args:
        names, folders, sizes: of the inputs, the anchor first; sizes: rows of each embedding.
        base: the recipe's base, if it has one.
        source_folder: where the tokenizer comes from when the source is a model.

    Raises:
        UserError: a tokenizer is missing; word pieces that cannot be united; a token's source that does not have it.
    """
    read = [with_rows(read_tokens(folder), size)[0] for folder, size in zip(folders, sizes, strict=True)]
    known = [tokens for tokens in read if tokens is not None]
    target_folder = source_folder or folders[0]
    # of a tokenizer that no input has, no embedding says which tokens have rows
    target, lost = with_rows(read_tokens(target_folder), dict(zip(folders, sizes, strict=True)).get(target_folder, 0))
    if target is None or len(known) < len(read):
        missing = [str(f) for f, t in zip([*folders, target_folder], [*read, target], strict=True) if t is None]
        where = ", ".join(dict.fromkeys(missing))
        raise UserError(f"tokenizer: matches tokens by their text, but there is no {FILE} in {where}; add it, or delete the "
                        "recipe's tokenizer section")
    ids = dict(target.all)
    new: list[str] = []
    if rules.source == "union":
        for name, other in zip(names, known, strict=True):
            strange = [t for t in other.pieces if t not in ids]
            if strange:
                raise UserError(f"tokenizer union: {name} has {len(strange)} word pieces that {names[0]} lacks (e.g. "
                                f"{strange[0]!r}), and adding them would cut text otherwise; use source: base")
            new += [t for t in other.added if t not in ids and t not in new]
    new += [text for text in rules.tokens if text not in ids and text not in new]
    first = max(ids.values(), default=-1) + 1
    ids |= {text: first + i for i, text in enumerate(new)}
    count = max(ids.values(), default=-1) + 1
    rows = count if rules.pad_to is None else -(-count // rules.pad_to) * rules.pad_to
    sources = []
    for size, own in zip(sizes, known, strict=True):
        order = np.full(rows, LACKS, np.int64)
        order[count:] = PADDING
        for text, row in ids.items():
            place = own.all.get(text, LACKS)
            order[row] = place if place < size else LACKS
        sources.append(order)
    problems: list[str] = []
    given = {ids[text]: _given(text, rule, names, known, sizes, problems) for text, rule in rules.tokens.items()}
    if problems:
        raise UserError(*problems)
    forced = frozenset(ids[text] for text, rule in rules.tokens.items() if rule.force)
    # with the flags of the first input that has the token; mergekit drops them where the source lacks it
    entries = tuple(entry(text, next((known[i].entries[text] for i in range(len(names)) if text in known[i].entries), {}),
                          first + i) for i, text in enumerate(new))
    found = TokenRows(rows, tuple(sources), entries, lost, tuple(names), base, given, forced, count, target_folder)
    if entries:
        check_ids(target_folder, found, "tokenizer", "take another source")
    return found


def _given(text: str, rule: TokenRule, names: Sequence[str], known: Sequence[Tokens], sizes: Sequence[int],
           problems: list[str]) -> tuple[str, int] | None:
    if rule.zero:
        return None
    if rule.model is None or rule.model not in names:
        problems.append(f"tokenizer.tokens.{text}: {rule.model} is not an input of this merge; allowed: {', '.join(names)}")
        return None
    which = list(names).index(rule.model)
    wanted = rule.token if rule.token is not None else text
    row = rule.token_id if rule.token_id is not None else known[which].all.get(wanted, LACKS)
    if not 0 <= row < sizes[which]:
        what = f"row {row}" if rule.token_id is not None else f"token {wanted!r}"
        problems.append(f"tokenizer.tokens.{text}: {rule.model} has no {what}; it has {sizes[which]} rows")
    return rule.model, row


def fill(rows: TokenRows, members: Sequence[str], values: Sequence[Tensor], top: int, read: Callable[[int, int], Tensor],
         mean: Callable[[int], Tensor]) -> None:
    """Complete a block of every input of one tensor, in place: rows that it lacks, is told to take, or that are padding.

    Args:
        members: the inputs' names, as ``values`` has them; (rows, columns) each.
        top: the block's first row in the output.
        read: (which member, its row) -> (columns,).
        mean: which member -> the mean of its rows that have a token.
    """
    import torch

    maps = [rows.sources[rows.names.index(name)] for name in members]
    for r in range(len(values[0])):
        row = top + r
        places = [int(order[row]) for order in maps]
        if places[0] == PADDING:
            for which, block in enumerate(values):
                block[r] = mean(which)
            continue
        if min(places) >= 0 and row not in rows.forced:
            continue
        having = [i for i, place in enumerate(places) if place >= 0]
        if row in rows.given:
            source = rows.given[row]
            if source is None:
                default = torch.zeros_like(values[0][r])
            elif source[0] not in members:
                raise UserError(f"tokenizer.tokens: the row of {source[0]} is asked for where it takes no part; name "
                                "an input of the slice that holds the embedding")
            else:
                default = read(members.index(source[0]), source[1])
        elif len(having) == 1:
            default = values[having[0]][r].clone()
        elif rows.base in members and members.index(rows.base) in having:
            default = values[members.index(rows.base)][r].clone()
        else:
            default = torch.stack([values[i][r] for i in having]).mean(0) if having else torch.zeros_like(values[0][r])
        for i, block in enumerate(values):
            if places[i] < 0 or row in rows.forced:
                block[r] = default
