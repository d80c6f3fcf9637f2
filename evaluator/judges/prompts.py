"""What local judges read: prompt texts as data, filled in one pass and cut to a length in the answer, never at the cue."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from errors import UserError
from evaluator.judges.protocol import Item

OWN = Path(__file__).with_name("prompts.yaml")
_PLACE = re.compile(r"\{(prompt|answer|other)\}")
_CHATS = ("none", "user", "turns")


@dataclass(frozen=True)
class Prompt:
    """A judge's prompt; the fields are explained at the head of prompts.yaml."""

    chat: str
    text: str = ""
    lead: str = ""
    word: str = ""
    against: str = ""

    @property
    def hash(self) -> str:
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Encoded:
    """Token ids of one rendered item, and whether a text was cut to make them fit."""

    ids: list[int]
    cut: bool


def load_prompts(own: str = "") -> dict[str, Prompt]:
    """The prompts of every judge; those in the YAML file ``own`` replace the ones that stand beside this module.

    Raises:
        UserError: the file is missing, is no such YAML, or names an unknown judge or key.
    """
    known = _read(OWN)
    if own:
        path = Path(own).expanduser()
        if not path.is_file():
            raise UserError(f"--judge_prompts {own}: no such file; write one like evaluator/judges/{OWN.name}")
        # judges that the user's file leaves out keep the shipped text
        known |= _read(path, known)
    return known


def _read(path: Path, known: dict[str, Prompt] | None = None) -> dict[str, Prompt]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--judge_prompts {path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--judge_prompts {path}: needs a section per judge, as in evaluator/judges/{OWN.name}")
    problems, prompts = [], {}
    for name, body in content.items():
        at = f"--judge_prompts {path}: {name}"
        # the shipped file defines the names, the user's may only replace them
        if known is not None and name not in known:
            problems.append(f"{at}: no local judge has this name; known: {', '.join(known)}")
        elif not isinstance(body, dict) or set(body) - set(Prompt.__annotations__):
            problems.append(f"{at}: allowed keys: {', '.join(Prompt.__annotations__)}")
        elif body.get("chat") not in _CHATS:
            problems.append(f"{at}.chat {body.get('chat')}: allowed: {', '.join(_CHATS)}")
        elif not all(isinstance(value, str) for value in body.values()):
            problems.append(f"{at}: every value is text; put numbers, yes and no into quotes")
        elif (body["chat"] == "turns") == bool(body.get("text")):
            problems.append(f"{at}: a text is needed with chat none and user, and has no place with turns")
        else:
            prompts[name] = Prompt(**body)
    if problems:
        raise UserError(*problems)
    return prompts


def fill(text: str, item: Item) -> str:
    """The text with its places filled in one pass: braces inside an answer are text."""
    return _PLACE.sub(lambda match: getattr(item, match[1]), text)


def renderer(prompt: Prompt, tokenizer: Any, flag: str, cue: bool = True) -> Callable[[Item], str]:
    """The function item -> text.

    Args:
        cue: end with the cue for the judge's own turn, as a generative judge needs it; a classifier reads up to the answer.

    Raises:
        UserError: the prompt needs a chat template and the tokenizer has none.
    """
    if prompt.chat == "none":
        return lambda item: fill(prompt.text, item) + prompt.lead
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{flag}: its tokenizer has no chat template, which this judge's prompt needs; give a text for it "
                        "with --judge_prompts FILE.yaml and chat: none")

    def render(item: Item) -> str:
        turns = [{"role": "user", "content": fill(prompt.text, item) if prompt.chat == "user" else item.prompt}]
        if prompt.chat == "turns":
            turns.append({"role": "assistant", "content": item.answer})
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=cue) + prompt.lead

    return render


def token_ids(text: str, tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a rendered text: a chat template writes its own start token, a bare text gets the tokenizer's."""
    ids = tokenizer(text, add_special_tokens=prompt.chat == "none")["input_ids"]
    # some tokenizers close every text; a judge's prompt is still open
    return ids[:-1] if prompt.chat == "none" and ids and ids[-1] == tokenizer.eos_token_id else ids


def fit_length(item: Item, encode: Callable[[Item], list[int]], limit: int) -> Encoded:
    """Ids of an item within ``limit`` tokens: its longer answer is cut on the right, the request when both are gone.

    Raises:
        ValueError: the prompt alone, without request and answers, is longer than the limit.
    """
    ids, cut = encode(item), False
    # again and again: how many tokens a shorter text has, only the tokenizer knows
    while len(ids) > limit:
        name = "other" if len(item.other) > len(item.answer) else "answer" if item.answer else "prompt"
        text = getattr(item, name)
        if not text:
            raise ValueError(f"a judge's prompt takes {len(ids)} tokens without any request or answer; its limit is {limit}")
        # a token is at least one byte, mostly several characters: shrink in proportion, and by one at the least
        keep = min(len(text) - 1, int(len(text) * max(0.0, 1 - (len(ids) - limit) / len(ids))))
        item, cut = replace(item, **{name: text[:keep]}), True
        ids = encode(item)
    return Encoded(ids, cut)
