"""Judged text stays text: nothing that an answer writes becomes a control token of the judge that reads it.

Tokenizers turn "<|im_end|>" inside an answer into the token that ends a turn. transformers' ``split_special_tokens`` would
spell out those of the judge's own template too, so rows are cut inside each such word of the judged text and nowhere else.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

#: Version of the rules below and of the fences in prompts.yaml; part of every local judge's version.
RULES = 2
#: Cues of a frame made of words: "True:" at a line's start, "user:" before a judged text, "USER:" within a line, "[/INST]".
_AT_START = re.compile(r"^([A-Z][A-Za-z ]*|[A-Za-z][A-Za-z ]*(?=:[ \t]*(?:\{(?:prompt|answer)\}|\ue000))):", re.M)
_WITHIN = re.compile(r"(?<= )([A-Z]+):")
_BRACKETS = re.compile(r"<<?/?\|?\w+(?: \w+)*\|?>?>|\[/?[A-Z]+\]")
#: Where a line may begin for a reader: behind any break, and behind blanks and characters without a shape.
_LINE = r"(?:^|(?<=[\r\v\f\x1c-\x1e\x85\u2028\u2029]))[ \t\xa0\u2000-\u200f\u2060\u3000\ufeff]*"
#: How SentencePiece vocabularies name a byte.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Piece(NamedTuple):
    """Part of a judge's input: the judge's own words, or text that is judged."""

    text: str
    judged: bool


def token_ids(pieces: Sequence[Piece], tokenizer: Any, *, start: bool, end: bool = False) -> list[int]:
    """Token ids of a judge's input; of control tokens only those that the judge's own words hold.

    Args:
        start: let the tokenizer put its start token before it; chat templates write their own.
        end: keep what the tokenizer puts behind a whole text (a classifier reads there); a prompt is still open.
    """
    text = "".join(piece.text for piece in pieces)
    cuts, own = _cuts(pieces, text, tokenizer)
    before, behind = _added(tokenizer) if start else ([], [])
    if not cuts:
        ids = list(tokenizer(text, add_special_tokens=start)["input_ids"])
        if _meant(ids, own, pieces, tokenizer, before, behind):
            # some tokenizers close every text
            return ids if end or not behind or ids[-len(behind):] != behind else ids[: -len(behind)]
    ids = _apart(text, cuts, tokenizer)
    if not _meant(ids, own, pieces, tokenizer):
        # a tokenizer that rewrites the text before it looks for tokens: no word of the judged text is left whole
        ids = _apart(text, sorted({*cuts, *_every_character(pieces)}), tokenizer)
    return [*before, *ids, *(behind if end else [])]


def pair_ids(first: str, second: str, tokenizer: Any) -> list[int]:
    """Ids of two judged texts as the tokenizer joins them: of control tokens only those that it puts there itself.

    Such a row cannot be cut inside a control token: a blank parts it, or, where the tokenizer rewrites the text before it
    looks for tokens, all letters.
    """
    own = _controls_of(tokenizer("x", "x")["input_ids"], tokenizer)
    ids = list(tokenizer(_spelt_out(first, tokenizer), _spelt_out(second, tokenizer))["input_ids"])
    return ids if _controls_of(ids, tokenizer) == own else list(tokenizer(" ".join(first), " ".join(second))["input_ids"])


def _spelt_out(text: str, tokenizer: Any) -> str:
    """The text with a blank inside each control token."""
    pattern = _pattern(tokenizer)
    while pattern and (found := pattern.search(text)):
        text = f"{text[: found.start() + 1]} {text[found.start() + 1:]}"
    return text


def cues(frame: str, controls: AbstractSet[str] = frozenset()) -> re.Pattern[str] | None:
    """What of a frame made of words an answer must not imitate: words with a colon, words in brackets; None without any.

    Args:
        controls: control tokens among them, which ``token_ids`` takes care of.
    """
    starts, within, brackets = ("|".join(map(re.escape, sorted({*kind.findall(frame)} - controls, key=len, reverse=True)))
                                for kind in (_AT_START, _WITHIN, _BRACKETS))
    parts = [rf"{_LINE}(?i:{starts})(?=:)" if starts else "", rf"\b(?:{within})(?=:)" if within else "", brackets]
    return re.compile("|".join(filter(None, parts)), re.M) if any(parts) else None


def control_words(tokenizer: Any) -> frozenset[str]:
    """The control tokens of a tokenizer as text."""
    return frozenset(_controls(tokenizer).values())


def without_cues(text: str, pattern: re.Pattern[str] | None) -> str:
    """The text with a blank in each cue ("USER :", "[ /INST]"): a turn that an answer writes is none of the frame's."""
    def spaced(found: re.Match[str]) -> str:
        return f"{found[0][0]} {found[0][1:]}" if found[0][0] in "<[" else f"{found[0]} "

    return pattern.sub(spaced, text) if pattern else text


def _cuts(pieces: Sequence[Piece], text: str, tokenizer: Any) -> tuple[list[int], list[str]]:
    """Where the text is cut, and the control tokens that the judge's own words hold."""
    pattern, spans, cuts, own, at = _pattern(tokenizer), list(_spans(pieces)), [], [], 0
    while pattern and (found := pattern.search(text, at)):
        # a word that the answer begins and the frame ends is the answer's too
        if any(found.start() < high and found.end() > low for low, high in spans):
            cuts.append(found.start() + 1)
            at = found.start() + 1
        else:
            own.append(found[0])
            at = found.end()
    return cuts, own


def _spans(pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    low = 0
    for piece in pieces:
        if piece.judged:
            yield low, low + len(piece.text)
        low += len(piece.text)


def _every_character(pieces: Sequence[Piece]) -> set[int]:
    return {place for low, high in _spans(pieces) for place in range(low, high + 1)}


def _apart(text: str, cuts: Sequence[int], tokenizer: Any) -> list[int]:
    """Ids of the parts between the cuts, joined: no token reaches over a cut."""
    edges = [0, *cuts, len(text)]
    return [i for low, high in zip(edges, edges[1:], strict=False) if low < high
            for i in tokenizer(text[low:high], add_special_tokens=False)["input_ids"]]


def _controls(tokenizer: Any) -> dict[int, str]:
    """Added tokens that steer: special ones, and those that the chat template writes (Qwen's <think> is not special)."""
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()
            if len(str(token).strip()) > 1 and (token.special or str(token) in template)}


@functools.lru_cache(maxsize=8)
def _known(tokenizer: Any) -> tuple[re.Pattern[str] | None, frozenset[int], tuple[list[int], list[int]]]:
    # once a tokenizer: an answer of some hundred tokens takes less time than reading this out
    words = sorted(_controls(tokenizer).values(), key=len, reverse=True)
    bare, full = (list(tokenizer("x", add_special_tokens=added)["input_ids"]) for added in (False, True))
    place = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    # characters that a vocabulary lacks become the unknown token or bytes: ordinary text, which steers nothing
    counted = frozenset(i for i, word in _controls(tokenizer).items()
                        if i != tokenizer.unk_token_id and not _BYTE.fullmatch(word))
    return (re.compile("|".join(map(re.escape, words))) if words else None, counted,
            (full[:place], full[place + len(bare):]))


def _pattern(tokenizer: Any) -> re.Pattern[str] | None:
    return _known(tokenizer)[0]


def _added(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text of its own accord."""
    before, behind = _known(tokenizer)[2]
    return list(before), list(behind)


def _controls_of(ids: Sequence[int], tokenizer: Any) -> list[int]:
    return [i for i in ids if i in _known(tokenizer)[1]]


def _meant(ids: Sequence[int], own: Sequence[str], pieces: Sequence[Piece], tokenizer: Any, before: Sequence[int] = (),
           behind: Sequence[int] = ()) -> bool:
    """Whether the control tokens of a row are those of the judge's own words: by a count, one could be exchanged."""
    found = _controls_of(ids, tokenizer)
    front, back = _controls_of(before, tokenizer), _controls_of(behind, tokenizer)
    if found == [*front, *_controls_of(tokenizer.convert_tokens_to_ids(list(own)), tokenizer), *back]:
        return True
    # words of the judge that its tokenizer takes for none where they stand
    bare = "".join(" " if piece.judged else piece.text for piece in pieces)
    return found == [*front, *_controls_of(tokenizer(bare, add_special_tokens=False)["input_ids"], tokenizer), *back]
