"""Which columns of a training row mean something: each is read, or refused by its name; all others are named once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable
from typing import Any

from data.readers.turns import empty

log = logging.getLogger(__name__)
#: Columns that hold the system text of a row, and the exchanges before it.
SYSTEM = ("system", "system_prompt")
HISTORY = ("history",)


def _set(value: Any) -> bool:
    # some files keep their lists as JSON texts
    return not empty(value) and not (isinstance(value, str) and value.strip() in ("[]", "{}", "null"))


def _unequal(value: Any) -> bool:
    return not empty(value) and str(value) not in ("1", "1.0")


def _binary(value: Any) -> bool:
    return not empty(value) and str(value).lower() in ("true", "false", "0", "1", "0.0", "1.0")


#: meaning -> columns, which values of them say something, what the user can do.
MEANINGS: dict[str, tuple[tuple[str, ...], Callable[[Any], bool], str]] = {
    "the system text": (SYSTEM, _set, "this shape has no place for it; give dialogs, or instruction rows"),
    "earlier exchanges": (HISTORY, _set, "this shape has no place for them; give dialogs of turns"),
    "tools": (("tools", "functions", "tool_calls", "function_calls"), _set,
              "tool use is not trained on; drop these rows, or the column"),
    "images, video or sound": (("image", "images", "video", "videos", "audio", "audios"), _set,
                               "only text is trained on; drop these rows, or the column"),
    "weights of rows": (("weight", "weights", "sample_weight", "loss_weight"), _unequal,
                        "all rows weigh the same; drop the column, or repeat rows"),
    "a label of one answer (KTO)": (("label", "kto_tag"), _binary,
                                    "there is no KTO; keep the good rows and drop the column, or make preference pairs"),
    "whether an answer is safe": (("is_safe",), _set,
                                  "it is read of {prompt, response} rows by --task_name safety; drop the unsafe rows, then "
                                  "the column"),
    "an answer to be preferred or not": (("chosen", "rejected", "rejected_response", "rejected_messages",
                                          "chosen_response"), _set,
                                         "training on answers reads none; add --method dpo, or drop the column"),
    "arguments of a chat template": (("chat_template_kwargs",), _set, "none are passed on; drop the column"),
    "turns": (("messages", "conversations", "conversation"), _set,
              "the row has its question and answer in other columns, too; drop one of the two"),
    "a model's reasoning": (("reasoning_content", "thinking"), _set,
                            "answers are trained on as they stand; write it into the answer, or drop the column"),
}
#: What changes the question; the others are no matter where a model is only asked.
_ASKED = ("the system text", "earlier exchanges", "tools", "images, video or sound")
_OF = {column: meaning for meaning, (columns, _, _) in MEANINGS.items() for column in columns}


#: Texts by which programs write that there is none. They can be answers, too, so they are told and kept.
_NOTHING = ("none", "null", "n/a", "#n/a", "na", "<na>", "nan", "nat", "<noinput>", "noinput")


def folded(fields: dict[Any, Any]) -> dict[str, Any]:
    """The fields under small letters: sets differ in the capitals of their columns, not in what these mean.

    Raises:
        ValueError: two columns differ in capitals alone, and in what they hold.
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        key = str(name).strip().lower()
        if not empty(found.get(key)) and not empty(value) and found[key] != value:
            raise ValueError(f"has two columns '{key}', in capital and small letters, with different values; drop one")
        if empty(found.get(key)):
            found[key] = value
    return found


def says_nothing(text: str) -> bool:
    """Whether a text is one by which programs write that there is none."""
    return text.strip().lower() in _NOTHING


def tell_nothing(place: Any, texts: dict[str, Iterable[tuple[str, str]]]) -> None:
    """Say how many texts of rows are words for nothing: they stay texts, since an answer may be one.

    Args:
        texts: what the texts are -> (text, name of its row).
    """
    for what, pairs in texts.items():
        if found := [(text, name) for text, name in pairs if says_nothing(text)]:
            log.warning("%s: %d %s are only '%s' or the like and are kept as text; where nothing is meant, leave it empty "
                        "(first: row %s)", place, len(found), what, found[0][0].strip(), found[0][1])


def refused(fields: dict[str, Any], read: Container[str], split: str = "train") -> list[str]:
    """A sentence for each column of a known meaning that says something and is not among those that are read.

    Args:
        split: where it is not train, columns about answers are passed over.
    """
    found = []
    for name, value in fields.items():
        if (meaning := _OF.get(str(name).strip().lower())) is None or name in read:
            continue
        if split != "train" and meaning not in _ASKED:
            continue
        _, says, advice = MEANINGS[meaning]
        if says(value):
            found.append(f"column '{name}' holds {meaning}: {advice}")
    return found


def tell_unread(place: Any, names: Iterable[str], read: Container[str]) -> None:
    """Say once which columns of a file have no known meaning and are not read."""
    if rest := [str(name) for name in dict.fromkeys(names) if name not in read and str(name).lower() not in _OF]:
        log.info("%s: columns that are not read: %s", place, ", ".join(rest))
