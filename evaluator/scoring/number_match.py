"""The number that an answer gives, and whether it is the wanted one."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

#: Digits with separators in threes, or plain digits; a fraction after a point. The sign counts only where no digit, letter
#: or closing bracket stands before it: "5-3" holds 5 and 3, "is -3" holds -3.
_NUMBER = re.compile(r"(?:(?<![\w)\].])[-\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")
_MARKED = re.compile(r"####\s*([^\n]*)")


def numbers(text: str) -> list[Decimal]:
    """Every number written in digits, in order; thousands separators are read, "7." and "7%" are 7."""
    values = []
    for match in _NUMBER.finditer(text):
        try:
            # Decimal, not float: 18, 18.0 and 18.00 are equal, 0.1 is exactly 0.1
            values.append(Decimal(match[0].replace(",", "").replace("\u2212", "-")))
        except InvalidOperation:  # digits of another script than the pattern's authors had in mind
            continue
    return values


def final_number(text: str) -> Decimal | None:
    """The number after the first "####" (GSM8K's own mark) if there is one, else the last number; None without any."""
    marked = _MARKED.search(text)
    # a mark without a number behind it is none: then the last number counts
    if marked and (after := numbers(marked[1])):
        return after[0]
    in_order = numbers(text)
    return in_order[-1] if in_order else None


def same_number(text: str, wanted: str) -> bool:
    """Whether an answer's final number equals the wanted one exactly (18 = 18.0 = 18.00).

    Raises:
        ValueError: ``wanted`` holds no number.
    """
    want = final_number(wanted)
    if want is None:
        raise ValueError(f"the reference {wanted!r} holds no number")
    return final_number(text) == want
