"""What local judges read: prompt texts as data, filled in one pass and cut to a length in the answer, never at the cue."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from errors import UserError
from evaluator.judges.judged_text import Piece, control_words, cues, without_cues
from evaluator.judges.judged_text import token_ids as ids_of
from evaluator.judges.protocol import Item

OWN = Path(__file__).with_name("prompts.yaml")
_PLACES = ("prompt", "answer", "other", "mark")
_PLACE = re.compile(rf"\{{({'|'.join(_PLACES)})\}}")
#: The places while a chat template is filled, in characters that no template looks at or holds.
_HELD, _HELD_WHOLE = re.compile("\ue000(prompt|answer|other|mark)\ue001"), re.compile("\ue000[a-z]+\ue001")
#: Judges whose prompt comes from the user alone: a published classifier's name is not for another text's rates.
_OWN_ONLY = ("harmbench",)
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
        if known is not None and name not in (*known, *_OWN_ONLY):
            problems.append(f"{at}: no local judge has this name; known: {', '.join((*known, *_OWN_ONLY))}")
        elif not isinstance(body, dict) or set(body) - set(Prompt.__annotations__):
            problems.append(f"{at}: allowed keys: {', '.join(Prompt.__annotations__)}")
        elif body.get("chat") not in _CHATS:
            problems.append(f"{at}.chat {body.get('chat')}: allowed: {', '.join(_CHATS)}")
        elif not all(isinstance(value, str) for value in body.values()):
            problems.append(f"{at}: every value is text; put numbers, yes and no into quotes")
        elif (body["chat"] == "turns") == bool(body.get("text")):
            problems.append(f"{at}: a text is needed with chat none and user, and has no place with turns")
        elif known is not None and (fault := _wrong_places(body.get("text", ""), known.get(name))):
            problems.append(f"{at}.text: {fault}")
        else:
            prompts[name] = Prompt(**body)
    if problems:
        raise UserError(*problems)
    return prompts


def _wrong_places(text: str, shipped: Prompt | None) -> str:
    """What is wrong with a text's places: without {answer} a judge would give verdicts on nothing; "" where all is well."""
    if not text:
        return ""
    pair = bool(shipped and "{other}" in shipped.text)
    for word in re.findall(r"\{(\w+)\}", text):
        near = get_close_matches(word, _PLACES, 1)
        if near and word not in _PLACES:
            return f"no place is called {{{word}}}; did you mean {{{near[0]}}}?"
    lacking = [f"{{{name}}}" for name in ("answer", *(["other"] if pair else [])) if f"{{{name}}}" not in text]
    if lacking:
        return f"lacks {' and '.join(lacking)}, so that what is judged would not be shown"
    return "" if pair or "{other}" not in text else "has {other}, but this judge reads one answer at a time; leave it out"


def fill(text: str, item: Item) -> str:
    """The text with its places filled in one pass: braces inside an answer are text."""
    return "".join(piece.text for piece in pieces_of(text, item))


def mark_of(item: Item) -> str:
    """The fence around judged texts: it hashes them, so none of them can hold it."""
    texts = json.dumps([item.prompt, item.answer, item.other]).encode()
    return f"[{hashlib.blake2b(texts, digest_size=5).hexdigest()}]"


def pieces_of(text: str, item: Item, places: re.Pattern[str] = _PLACE, *, strip: bool = False,
              frame: re.Pattern[str] | None = None) -> list[Piece]:
    """A prompt's text with its places filled, part by part.

    Args:
        strip: without blanks around the judged texts, as the chat template would have left them.
        frame: cues that the judged texts must not imitate.
    """
    pieces, at = [], 0
    for match in places.finditer(text):
        judged = match[1] != "mark"
        value = without_cues(getattr(item, match[1]), frame) if judged else mark_of(item)
        pieces += [Piece(text[at : match.start()], False), Piece(value.strip() if strip else value, judged)]
        at = match.end()
    return [*pieces, Piece(text[at:], False)]


def renderer(prompt: Prompt, tokenizer: Any, flag: str, cue: bool = True, **options: Any) -> Callable[[Item], list[Piece]]:
    """The function item -> parts of the judge's input.

    A chat template is filled once, with marks in place of the texts: no template acts on what an answer says.

    Args:
        cue: end with the cue for the judge's own turn, as a generative judge needs it; a classifier reads up to the answer.
        options: what the judge's chat template takes beside the turns (a guideline, a risk).

    Raises:
        UserError: the prompt needs a chat template and the tokenizer has none, or none that shows the answer.
    """
    if prompt.chat == "none":
        # user and assistant turns of such a frame are words; an answer's own are spaced out
        frame = cues(prompt.text)
        return lambda item: pieces_of(prompt.text + prompt.lead, item, frame=frame)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(f"{flag}: its tokenizer has no chat template, which this judge's prompt needs; give a text for it "
                        "with --judge_prompts FILE.yaml and chat: none")
    text = _PLACE.sub("\ue000\\1\ue001", prompt.text)
    said = {"user": text} if prompt.chat == "user" else {
        "user": "  \ue000prompt\ue001  ", "assistant": "  \ue000answer\ue001  "}
    held = _templated(tokenizer, said, add_generation_prompt=cue, **options) + prompt.lead
    if "\ue000answer\ue001" not in held:
        raise UserError(f"{flag}: its chat template shows no assistant turn, so the answer would not be judged; give a text "
                        "with {prompt} and {answer} with --judge_prompts FILE.yaml and chat: user")
    # what a template does to the blanks around a turn it does to the judged texts
    strip = prompt.chat == "turns" and "  \ue000answer\ue001  " not in held
    held = re.sub("  (\ue000(?:prompt|answer)\ue001)  ", r"\1", held) if prompt.chat == "turns" else held
    # many guards' turns are words ("Agent:", "<END CONVERSATION>"); a text of ours has fences instead
    frame = cues(held, control_words(tokenizer)) if prompt.chat == "turns" else None
    return lambda item: pieces_of(held, item, _HELD, strip=strip, frame=frame)


def _templated(tokenizer: Any, said: dict[str, str], **options: Any) -> str:
    """The chat template's text of these turns; some templates read a turn as a list of parts (Llama-Guard-3-1B)."""
    from jinja2 import TemplateError

    text = ""
    for content in (str, lambda words: [{"type": "text", "text": words}]):
        try:
            text = tokenizer.apply_chat_template([{"role": role, "content": content(words)} for role, words in said.items()],
                                                 tokenize=False, **options)
        except TemplateError:
            continue
        if all(mark in text for words in said.values() for mark in _HELD_WHOLE.findall(words)):
            break
    return text


def token_ids(pieces: list[Piece], tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt: a chat template writes its own start token, a bare text gets the tokenizer's."""
    return ids_of(pieces, tokenizer, start=prompt.chat == "none")


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
