"""Preference pairs in the shapes of TRL, UltraFeedback, HH-RLHF, swift and LLaMA-Factory: two answers to one dialog."""

from __future__ import annotations

from typing import Any

from data.readers.columns import HISTORY, SYSTEM, refused
from data.readers.dialog_files import text_of, with_system
from data.readers.turns import TURNS, Exchange, empty, exchange, hh_turns, history_of, is_hh, is_turns, read_turns
from data.records import Pair

#: Columns of the two answers, the better one first.
SIDES = (("chosen", "rejected"), ("response", "rejected_response"), ("chosen_response", "rejected_response"),
         ("answer", "rejected_response"), ("output", "rejected_response"))
#: Columns that ask.
ASK = ("prompt", "instruction", "question", "query")
KNOWN = ("preference {prompt, chosen, rejected, input}, the prompt also as instruction, question or query; dialogs {prompt, "
         "chosen, rejected} of turns, or chosen and rejected that begin alike; {conversations, chosen, rejected}; "
         "{messages, rejected_response}; {query, response, rejected_response}; HH-RLHF's texts")


class NoPair(ValueError):
    """A row of HH-RLHF's whose two dialogs differ before their last answer, or not at all: it has no answers to compare."""


def fits(fields: dict[str, Any]) -> bool:
    """Whether a row has two answers that this reader knows."""
    if "rejected_messages" in fields or "rejected_response" in fields:
        return any(name in fields for name in (*TURNS, *(better for better, _ in SIDES)))
    return {"chosen", "rejected"} <= fields.keys()


def read_pair(fields: dict[str, Any], objective: int, id: str) -> Pair:
    """The pair of a row.

    Raises:
        NoPair: a row of HH-RLHF's that is no pair.
        ValueError: one sentence on what is wrong with the row.
    """
    turns = [name for name in TURNS if not empty(fields.get(name))]
    ask = [name for name in ASK if not empty(fields.get(name))]
    if len(turns) > 1 or len(ask) > 1:
        raise ValueError(f"asks in {' and '.join(turns if len(turns) > 1 else ask)}; drop one of them")
    good, bad, sides = _sides(fields, turns)
    if wrong := refused(fields, {*turns, *ask, *sides, "input", *SYSTEM, *HISTORY}):
        raise ValueError("; ".join(wrong))
    if "rejected_messages" in fields:
        turns = []  # they are the better side
    before: list[tuple[str, str]] = []
    if turns:
        before = read_turns(fields[turns[0]])
        if good is None:  # {messages, rejected_response}: the better answer is the last turn
            if before[-1][0] != "assistant":
                raise ValueError(f"the turns in {turns[0]} do not end with the better answer")
            good, before = before[-1][1], before[:-1]
    question = fields[ask[0]] if ask else None
    hh = not turns and not ask and is_hh(good) and is_hh(bad)
    first, second = (hh_turns(good), hh_turns(bad)) if hh else (_turns(good, sides[0]), _turns(bad, sides[-1]))
    # UltraFeedback's messages are the chosen dialog once more
    if before and before[-1] == first[-1]:
        before = before[:-1]
    if is_turns(question):
        before, question = read_turns(question), None
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    # answers alone may be the same or begin alike: only what stands before the last turn is a prompt that is shared
    shared = min(shared, len(first) - 1, len(second) - 1)
    prefix, answers = first[:shared], (first[shared:], second[shared:])
    if any([role for role, _ in answer] != ["assistant"] for answer in answers) or (
            hh and (first == second or not all(text for _, text in (*first, *second)))):
        said = "chosen and rejected must differ in the last assistant turn alone, and end with it"
        raise NoPair(said) if hh else ValueError(f"{said}; their turns after what they share are "
                                                 f"{' and '.join(', '.join(r for r, _ in a) for a in answers)}")
    try:
        asked, extra = _asked(fields, before, prefix, question, ask)
    except ValueError as error:
        raise NoPair(str(error)) if hh else error from None
    return Pair(asked.prompt, answers[0][0][1], answers[1][0][1], objective, extra, id, asked.system, asked.history)


def _sides(fields: dict[str, Any], turns: list[str]) -> tuple[Any, Any, list[str]]:
    if "rejected_messages" in fields:
        return fields[turns[0]] if turns else None, fields["rejected_messages"], [*turns, "rejected_messages"]
    found = [pair for pair in SIDES if pair[0] in fields and pair[1] in fields]
    if not found and turns and "rejected_response" in fields:
        return None, fields["rejected_response"], ["rejected_response"]
    if len(found) != 1:
        names = ", ".join(dict.fromkeys(name for pair in found for name in pair)) or ", ".join(map(str, fields)) or "none"
        raise ValueError(f"fields {names} are no known pair of answers; allowed: {KNOWN}")
    return fields[found[0][0]], fields[found[0][1]], list(found[0])


def _turns(value: Any, name: str) -> list[tuple[str, str]]:
    """A side as turns: a text is one answer."""
    if isinstance(value, list | tuple) and value and all(isinstance(text, str) for text in value):
        raise ValueError(f"field '{name}' is a list of {len(value)} texts; a pair has one text a side: write a row for each "
                         "pair")
    return read_turns(value) if is_turns(value) else [("assistant", text_of(name, value, True, number=True))]


def _asked(fields: dict[str, Any], before: list[tuple[str, str]], prefix: list[tuple[str, str]], question: Any,
           ask: list[str]) -> tuple[Exchange, str]:
    """(dialog, input) before the two answers: out of a list of turns, of what they share, or of a question's columns."""
    # {prompt: turns, chosen: the same turns and an answer}: what is said twice is said once
    if before and prefix[: len(before)] == before:
        before = []
    if before and prefix:
        raise ValueError("the turns of chosen and rejected do not go on from those of the prompt")
    history = next((fields[name] for name in HISTORY if name in fields), None)
    extra = text_of("input", fields.get("input"), False)
    if before or prefix:
        found = exchange([*before, *prefix], False)
        if not empty(history) or extra:
            raise ValueError(f"has turns and a column '{'input' if extra else 'history'}'; drop one of them")
        asked = [words.strip() for words in (found.prompt, *(words for words, _ in found.history))]
        if question is not None and text_of(ask[0], question, True).strip() not in asked:
            raise ValueError(f"column '{ask[0]}' is no question of the turns beside it; drop the one that is not meant")
    elif question is not None:
        found = Exchange(text_of(ask[0], question, True), "", history=history_of(history))
    else:
        raise ValueError("chosen and rejected have no question before them; add a column 'prompt'")
    return with_system(found, fields), extra
