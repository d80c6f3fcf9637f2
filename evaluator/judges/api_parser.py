"""Reads one verdict out of a judge's reply: JSON, fenced or with text around, "Score: 4", or the bare word.

Two different verdicts in one reply are none: a wrong guess would count as a measurement, a re-ask costs a cent.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

#: Changes whenever the rules below do: part of a judge's version.
RULES = 3
#: Verdicts stand at the end of a reply; the bound is for the patterns below.
_LONGEST = 20_000  # characters from the end of a reply
_MOST_OBJECTS = 64
#: What may follow a verdict: its end, a stop that no digit follows, an explanation. Not "4.5", "4-5", "A or B", "a tie".
_END = r"(?=\s*(?:$|\n|[.:;,!](?!\s*\d)|[)\]}\"'|(]|[-–—](?!\d)\s|because\b|since\b))"


def parse(text: str, fields: tuple[str, ...], options: Mapping[str, tuple[str, ...]],
          cut: bool = False, bare: bool = True) -> tuple[str, str] | None:
    """The option that a reply names, and the reason that it gives; None unless it names exactly one.

    Args:
        fields: names of the field that holds the verdict, e.g. ("score", "rating").
        options: verdict -> the phrases that stand for it.
        cut: the reply ended at the token limit; only a whole JSON object in it was meant as it stands.
        bare: a reply that is nothing but the phrase counts; of several questions asked at once it would answer each.
    """
    if "<think>" in text and "</think>" not in text:
        return None  # cut off while it was thinking: what it said so far is no verdict
    # what a model thinks aloud weighs both sides and is no verdict
    text = text.rpartition("</think>")[2][-_LONGEST:]
    tag, phrase, again = _patterns(tuple(fields), tuple((name, tuple(words)) for name, words in options.items()))
    meaning = {_fold(word): name for name, words in options.items() for word in words}
    objects = list(_objects(text))
    # all of them, not the last: two objects that disagree are no verdict
    values = [value for parsed in objects for key, value in parsed.items() if _fold(str(key)) in fields]
    if values:
        hits = [phrase.match(_fold(_spelt(value))) for value in values]
        names = {meaning[hit["phrase"]] if hit else "" for hit in hits}
    elif cut:
        return None
    else:
        folded = _fold(text)
        hits = list(tag.finditer(folded))
        # "yes" or "no", A / B: the options are listed, not chosen; so does a reply that repeats the form it should fill
        if any(again.match(folded, hit.end()) for hit in hits):
            return None
        names = {meaning[hit["phrase"]] for hit in hits}
        if not names and bare:
            names = {meaning.get(_fold(text).strip("\"'.()[]{}:! \n"), "")}
    name = names.pop() if names else ""
    if names or not name:
        return None
    reasons = [value for parsed in objects for key, value in parsed.items() if _fold(str(key)) in ("reason", "the reason")]
    return name, reasons[-1] if reasons and isinstance(reasons[-1], str) else "" if objects else text.strip()


@functools.lru_cache(maxsize=32)
def _patterns(fields: tuple[str, ...], options: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[re.Pattern, ...]:
    """On folded text: "FIELD: PHRASE" anywhere, PHRASE at a start, one more PHRASE of a list; longer phrases first."""
    phrases = sorted({_fold(word) for _, words in options for word in words}, key=len, reverse=True)
    one = rf"[\s\"'(\[{{]*(?P<phrase>{'|'.join(map(re.escape, phrases))}){_END}"
    field = "|".join(map(re.escape, fields))
    lead = rf"(?<!\w)(?:the ?)?(?:final |overall )?(?:{field})[\"')\]]*\s*(?:\([^()\n]{{0,30}}\)\s*)?(?:[:=]|is\b)"
    listed = rf"[\"'\s]*(?:,|/|\||-|–|or\b)\s*(?:or\s+)?[\"'\s]*(?:{'|'.join(map(re.escape, phrases))})(?!\w)"
    return re.compile(lead + one), re.compile(one), re.compile(listed)


def _objects(text: str) -> Iterator[dict[Any, Any]]:
    """The outermost JSON objects in a text, first to last."""
    # not strict: models write raw line breaks inside their reasons
    decoder, at = json.JSONDecoder(strict=False), 0
    for _ in range(_MOST_OBJECTS):
        at = text.find("{", at)
        if at < 0:
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        yield value


def _spelt(value: Any) -> str:
    """A JSON value as a judge would write it: 4.0 is 4; lists and objects are no verdict."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value)) if abs(value) < 1e6 else ""
    return str(value) if isinstance(value, str | int | float) else ""


def _fold(text: str) -> str:
    """Lower case, one kind of quote, no markup, underscores as spaces, runs of blanks as one; line breaks stay."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub("[‘’ʼ´`“”]", "'", re.sub("[*#>~]", "", text)).replace("_", " ")
    return re.sub(r"[^\S\n]+", " ", text).strip()
