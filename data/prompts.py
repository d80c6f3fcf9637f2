"""Every template and stop string, nowhere else.

A ``Template`` turns a question into the text that a model sees and an answer into the text that it should give, with
the end markers that make it stop. Four are known: the model's own chat template; Stanford Alpaca's (Apache-2.0), which
H3Fusion uses with a plain-text end marker (spec section 2.3); WizardLM's bare response marker (SOMF, spec section 2.5);
Llama-2's chat format (LoRA fusion, spec section 2.2). The chat format and Llama-2's have a place for a system text and
for earlier exchanges.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError

from errors import UserError

log = logging.getLogger(__name__)
END_MARKER = "###END"
LLAMA2_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

_PREAMBLE = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request.\n\n"
ALPACA_WITH_INPUT = (
    f"{_PREAMBLE}, paired with an input that provides further context. {_REQUEST}"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = f"{_PREAMBLE}. {_REQUEST}### Instruction:\n{{instruction}}\n\n### Response:"
#: SHA-256 of the published texts: a model trained on one space more or less does not compare with the paper's.
ALPACA_HASHES = {
    "with input": (ALPACA_WITH_INPUT, "28811e9850d9511bab334d167a03a8a37614535fdb28d645492efac8e9951c0f"),
    "without input": (ALPACA_NO_INPUT, "35101bc36d10997c7d926d8f21f7d173aec6523f3a57d78821b944a89925cdca"),
}

#: The day that chat templates are told it is; Llama 3's own where it is told none.
_DAY = datetime(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
#: What a chat template, or transformers over several of them, may raise.
_RAISED = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
#: Earlier exchanges of a dialog: (the user's words, the answer).
_History = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Template:
    """How a question and its answer become text.

    Args:
        name: ``chat``, ``alpaca``, ``wizardlm`` or ``llama2``.
        render: (prompt, input, system="", history=()) -> the text up to and including the cue for the answer; the history
            holds earlier exchanges, (the user's words, the answer) each.
        end: text that follows an answer in training; generation stops at it.
        special_tokens: whether the tokenizer should add its own start token in front.
        lead: text between the cue and an answer in training. A model writes it as part of its first token, so it is no part
            of what is rendered for it.
        turns: whether it has a place for earlier exchanges.
    """

    name: str
    render: Callable[..., str]
    end: str
    special_tokens: bool
    lead: str = ""
    turns: bool = False

    @property
    def stop(self) -> str:
        """The text at which generation stops; white space (Llama-2's end) is none, the EOS follows it anyway."""
        return self.end.strip()

    def answer(self, text: str) -> str:
        """The text that the model is trained to write: answer and end marker (the EOS id is appended when encoding)."""
        return self.lead + (text.strip() if self.lead else text) + self.end


def template(name: str, tokenizer: Any) -> Template:
    """The template of that name for a tokenizer.

    Raises:
        UserError: an Alpaca template differs from its published hash; the tokenizer has no chat template.
    """
    if name == "alpaca":
        # at every use, not in a test alone: an edited template would train without a word
        check_alpaca(ALPACA_HASHES)
        return Template("alpaca", _alpaca, END_MARKER, special_tokens=True)
    if name == "wizardlm":
        return Template("wizardlm", _wizardlm, "", special_tokens=True)
    if name == "llama2":
        # the space after the closing mark is part of the format; a model writes it with its first token
        return Template("llama2", lambda prompt, input, system="", history=(): _llama2(
            prompt, input, system, history, _between(tokenizer)), " ", special_tokens=True, lead=" ", turns=True)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("--template chat: this tokenizer has no chat template; use --template alpaca")
    if "strftime_now" in str(tokenizer.chat_template):
        log.info("the chat template asks for the day; every prompt is told %s, so that runs of two days are one experiment",
                 _DAY.strftime("%d %b %Y"))
    return Template("chat", lambda prompt, input, system="", history=(): _chat(tokenizer, prompt, input, system, history),
                    "", special_tokens=False, turns=True)


def check_alpaca(table: dict[str, tuple[str, str]]) -> None:
    """Compare templates with their published SHA-256; a UserError names each one that differs."""
    problems = [
        f"Alpaca template {name}: its SHA-256 is {got}, not {want}; restore the text in data/prompts.py"
        for name, (text, want) in table.items()
        if (got := hashlib.sha256(text.encode()).hexdigest()) != want
    ]
    if problems:
        raise UserError(*problems)


def _alpaca(prompt: str, input: str, system: str = "", history: _History = ()) -> str:
    _one_turn("alpaca", system, history)
    # one pass: braces inside a user's text must not be read as placeholders
    head, rest = (ALPACA_WITH_INPUT if input else ALPACA_NO_INPUT).split("{instruction}")
    return head + prompt + (rest.replace("{input}", input) if input else rest)


def _wizardlm(prompt: str, input: str, system: str = "", history: _History = ()) -> str:
    _one_turn("wizardlm", system, history)
    return f"{prompt}\n{input}\n\n### Response:" if input else f"{prompt}\n\n### Response:"


def _one_turn(name: str, system: str, history: _History) -> None:
    if system:
        raise UserError(f"--template {name}: has no place for a system text, and rows or --prompt_style have one; use "
                        "--template chat or llama2")
    if history:
        raise UserError(f"--template {name}: has no place for earlier turns, and rows have some; use --template chat or "
                        "llama2, or rows of one question and answer")


def _llama2(prompt: str, input: str, system: str, history: _History, between: str) -> str:
    """``[INST] <<SYS>>\\nSYSTEM\\n<</SYS>>\\n\\nUSER [/INST]``; what stands between the marks is stripped.

    Args:
        between: the end and start tokens that part one exchange from the next.

    Raises:
        UserError: a text holds one of the marks, which would change the turns.
    """
    content = f"{prompt}\n\n{input}" if input else prompt
    texts = [content, system, *(text for exchange in history for text in exchange)]
    # text that holds a mark could end the user's turn and speak as somebody else
    if mark := next((mark for mark in LLAMA2_MARKS if any(mark in text for text in texts)), None):
        raise UserError(f"--template llama2: a prompt holds {mark}, a mark of the format itself; remove it from the data")
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    earlier = ""
    for user, answer in history:
        earlier += f"[INST] {(head + user).strip()} [/INST] {answer.strip()} {between}"
        head = ""
    return f"{earlier}[INST] {(head + content).strip()} [/INST]"


def _between(tokenizer: Any) -> str:
    """The tokenizer's own end and start token, the latter where it puts one before every text."""
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return (tokenizer.eos_token or "") + (tokenizer.bos_token if starts else "")


def _chat(tokenizer: Any, prompt: str, input: str, system: str = "", history: _History = ()) -> str:
    """The model's own format. A template without a place for a system text, because it refuses one or leaves it out (Gemma,
    early Mistral), gets it in front of the first user's words, a blank line between them, as these models' cards advise.

    Raises:
        UserError: the template refuses the other turns, or leaves one out.
    """
    content = f"{prompt}\n\n{input}" if input else prompt
    turns = []
    for user, answer in history:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    turns.append({"role": "user", "content": content})
    if system:
        with contextlib.suppress(*_RAISED):
            text = _rendered(tokenizer, [{"role": "system", "content": system}, *turns])
            # templates strip what they are given
            if all(turn["content"].strip() in text for turn in ({"content": system}, *turns)):
                return text
        turns[0] = {"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}
    try:
        text = _rendered(tokenizer, turns)
    except _RAISED as error:
        what = f"turns by {', '.join(turn['role'] for turn in turns)}" if history else "a single user turn"
        raise UserError(f"--template chat: the model's chat template refuses {what} ({error}); "
                        f"{'change the rows' if history else 'mend it'}, or use --template llama2 or alpaca") from None
    # some templates know user turns alone and pass over all others without a word
    if lost := next((t["role"] for t in turns if t["content"].strip() not in text), None):
        raise UserError(f"--template chat: the model's chat template leaves the {lost} turn out; use rows of one exchange, "
                        "or --template llama2")
    return text


def _rendered(tokenizer: Any, turns: Sequence[dict[str, str]]) -> str:
    given = {}
    if "strftime_now" in str(tokenizer.chat_template):
        # Llama 3 and Mistral write the day into the system turn: prompts of two days would be two sets, no run came again
        given["chat_template"] = _NOW.sub(lambda call: repr(_DAY.strftime(call[2])), tokenizer.get_chat_template())
    return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True, **given)
