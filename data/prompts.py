"""Every template and stop string, nowhere else.

A ``Template`` turns a question into the text that a model sees and an answer into the text that it should give, with
the end markers that make it stop. Two are known: the model's own chat template, and Stanford Alpaca's (Apache-2.0),
which H3Fusion uses with a plain-text end marker (spec section 2.3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from errors import UserError

END_MARKER = "###END"

_PREAMBLE = "Below is an instruction that describes a task"
_REQUEST = "Write a response that appropriately completes the request.\n\n"
ALPACA_WITH_INPUT = (
    f"{_PREAMBLE}, paired with an input that provides further context. {_REQUEST}"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = f"{_PREAMBLE}. {_REQUEST}### Instruction:\n{{instruction}}\n\n### Response:"
ALPACA_HASHES = {
    "with input": (ALPACA_WITH_INPUT, "28811e9850d9511bab334d167a03a8a37614535fdb28d645492efac8e9951c0f"),
    "without input": (ALPACA_NO_INPUT, "35101bc36d10997c7d926d8f21f7d173aec6523f3a57d78821b944a89925cdca"),
}


@dataclass(frozen=True)
class Template:
    """How a question and its answer become text.

    Args:
        name: ``chat`` or ``alpaca``.
        render: (prompt, input) -> the text up to and including the cue for the answer.
        end: text that follows an answer in training; generation stops at it.
        special_tokens: whether the tokenizer should add its own start token in front.
    """

    name: str
    render: Callable[[str, str], str]
    end: str
    special_tokens: bool

    def answer(self, text: str) -> str:
        """The text that the model is trained to write: answer and end marker (the EOS id is appended when encoding)."""
        return text + self.end


def template(name: str, tokenizer: Any) -> Template:
    """The template of that name for a tokenizer.

    Raises:
        UserError: an Alpaca template differs from its published hash; the tokenizer has no chat template.
    """
    if name == "alpaca":
        check_alpaca(ALPACA_HASHES)
        return Template("alpaca", _alpaca, END_MARKER, special_tokens=True)
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("--template chat: this tokenizer has no chat template; use --template alpaca")
    return Template("chat", lambda prompt, input: _chat(tokenizer, prompt, input), "", special_tokens=False)


def check_alpaca(table: dict[str, tuple[str, str]]) -> None:
    """Compare templates with their published SHA-256; a UserError names each one that differs."""
    problems = [
        f"Alpaca template {name}: its SHA-256 is {got}, not {want}; restore the text in data/prompts.py"
        for name, (text, want) in table.items()
        if (got := hashlib.sha256(text.encode()).hexdigest()) != want
    ]
    if problems:
        raise UserError(*problems)


def _alpaca(prompt: str, input: str) -> str:
    # one pass: braces inside a user's text must not be read as placeholders
    head, rest = (ALPACA_WITH_INPUT if input else ALPACA_NO_INPUT).split("{instruction}")
    return head + prompt + (rest.replace("{input}", input) if input else rest)


def _chat(tokenizer: Any, prompt: str, input: str) -> str:
    content = f"{prompt}\n\n{input}" if input else prompt
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
