"""Dialogs as lists of turns in the shapes that training files have: role and content, from and value, HH-RLHF's text."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

#: What roles are called, and what each means here.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant"}
#: Columns that hold the turns of a dialog.
TURNS = ("messages", "conversations", "conversation")
#: Columns of TRL's that hold turns or texts.
_EITHER = ("prompt", "completion", "chosen", "rejected", "rejected_messages")
_WRITTEN = re.compile(r"""\s*\[\s*\{\s*(["'])(?:role|from|content|value)\1\s*:""")
#: Roles of tool use: what a call looks like differs from model to model, so they are refused by name.
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython", "tool_call",
              "tool_response")
#: Keys of a turn that would change what is trained on: refused unless empty or the value that changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_calls": (), "function_call": (), "tool_call_id": (), "images": (), "audio": (), "reasoning_content": (),
    "thinking": (), "weight": (1,), "loss": (True,), "train": (True,), "prefix": (False,), "refusal": ()}
_HH = re.compile(r"\n\n(Human|Assistant):[ \t]?")


@dataclass(frozen=True)
class Exchange:
    """A dialog up to a question: its system text, the exchanges before, the user's last words and, where there is one, the
    answer to them."""

    prompt: str
    answer: str
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()


def empty(value: Any) -> bool:
    """Whether a value says nothing: None, NaN, blank text, an empty list or object."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (
        isinstance(value, str) and not value.strip()) or (isinstance(value, list | tuple | dict) and not len(value))


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns (or one turn), as opposed to a text or a list of texts."""
    turns = value if isinstance(value, list | tuple) else [value]
    return bool(turns) and all(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def turns_in_texts(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a row, in which a list of turns that a table holds as a JSON text is that list.

    Raises:
        ValueError: Python's own notation, as pandas writes lists into a CSV: it would be trained on letter by letter.
    """
    found = dict(fields)
    for name, value in fields.items():
        if not isinstance(value, str) or str(name).strip().lower() not in (*TURNS, *_EITHER) or not _WRITTEN.match(value):
            continue
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"column '{name}' holds a list of turns in Python's notation, not in JSON; save the table as "
                             ".jsonl or .parquet, or the column by json.dumps") from None
    return found


def read_turns(value: Any) -> list[tuple[str, str]]:
    """(role, text) of each turn, roles in our words.

    Raises:
        ValueError: one sentence: no turns, an unknown role, tool use, content that is no text.
    """
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list | tuple) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("needs a list of turns, each {role, content}")
    found = []
    for number, turn in enumerate(turns, 1):
        named = str(turn.get("role", turn.get("from"))).strip().lower()
        if named in TOOL_ROLES:
            raise ValueError(f"turn {number} has the role '{named}': tool use is not trained on; drop such dialogs, or "
                             "write calls and results into user and assistant turns")
        for key, neutral in _NEUTRAL.items():
            if key in turn and not empty(turn[key]) and turn[key] not in neutral:
                raise ValueError(f"turn {number} has '{key}', which is not read; drop the key, or the dialog")
        # an unknown role keeps its name for the message
        found.append((ROLES.get(named, f"'{named[:40]}'"), _content(turn.get("content", turn.get("value")), number)))
    return found


def _content(value: Any, number: int) -> str:
    """The text of a turn; content parts are joined, other parts than text are refused."""
    if isinstance(value, list | tuple) and value:
        texts = []
        for part in value:
            kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
            if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
                raise ValueError(f"turn {number} has a content part of type '{kind}'; only text is trained on")
            texts.append(part["text"])
        value = "".join(texts)
    # "nan" is what pandas writes for a missing text
    if not isinstance(value, str) or not value.strip() or value == "nan":
        raise ValueError("every turn needs content that is text and not blank")
    return value


def exchange(turns: list[tuple[str, str]], answered: bool | None) -> Exchange:
    """The dialog of turns that alternate from the user on, after at most one system turn.

    Args:
        answered: the last turn must be the assistant's (True), the user's (False), or either (None).

    Raises:
        ValueError: the turns do not alternate, or the last one is not whose it should be.
    """
    roles = [role for role, _ in turns]
    body = turns[1:] if roles[:1] == ["system"] else turns
    wanted = ["user", "assistant"] * len(body)
    odd = len(body) % 2 == 1
    if not body or [role for role, _ in body] != wanted[: len(body)] or (answered is not None and odd == answered):
        want = "(system,) user, assistant" if answered is not False else "(system,) user"
        raise ValueError(f"its turns are {', '.join(roles)}; needed: {want}"
                         + (" (several exchanges: user, assistant, user, assistant ..)" if len(body) > 2 else "")
                         + (f"; roles may be called {', '.join(ROLES)}" if not set(roles) <= set(ROLES.values()) else ""))
    texts = [text for _, text in body]
    answer = "" if odd else texts.pop()
    prompt = texts.pop()
    return Exchange(prompt, answer, turns[0][1] if roles[0] == "system" else "",
                    tuple(zip(texts[::2], texts[1::2], strict=True)))


def is_hh(value: Any) -> bool:
    """Whether a text is a dialog in HH-RLHF's way: it begins with a Human turn."""
    return isinstance(value, str) and _HH.match("\n\n" + value.lstrip()) is not None and "\n\nAssistant:" in value


def hh_turns(text: str) -> list[tuple[str, str]]:
    """(role, text) of ``\\n\\nHuman: .. \\n\\nAssistant: ..``, each text stripped; a blank one stays blank."""
    parts = _HH.split("\n\n" + text.lstrip())
    return [("user" if who == "Human" else "assistant", said.strip())
            for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def history_of(value: Any) -> tuple[tuple[str, str], ...]:
    """Earlier exchanges of an Alpaca row: a list of [the user's words, the answer] pairs, or of turns.

    Raises:
        ValueError: it is neither.
    """
    if empty(value):
        return ()
    if is_turns(value):
        before = exchange(read_turns(value), True)
        if before.system:
            raise ValueError("'history' has a system turn; give it as the column 'system'")
        return (*before.history, (before.prompt, before.answer))
    pairs: Sequence[Any] = value if isinstance(value, list | tuple) else [None]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) and t.strip() for t in pair)
               for pair in pairs):
        raise ValueError("'history' needs a list of [question, answer] pairs of texts that are not blank")
    return tuple((user, answer) for user, answer in pairs)
