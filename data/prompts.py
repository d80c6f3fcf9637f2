"""Every template and stop string, nowhere else.

A ``Template`` turns a question into the text that a model sees and an answer into the text that it should give, with
the end markers that make it stop. Four are known: the model's own chat template; Stanford Alpaca's (Apache-2.0), which
H3Fusion uses with a plain-text end marker (spec section 2.3); WizardLM's bare response marker (SOMF, spec section 2.5);
Llama-2's chat format (LoRA fusion, spec section 2.2). The chat format and Llama-2's have a place for a system text.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError

from errors import UserError

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


@dataclass(frozen=True)
class Template:
    """How a question and its answer become text.

    Args:
        name: ``chat``, ``alpaca``, ``wizardlm`` or ``llama2``.
        render: (prompt, input, system="") -> the text up to and including the cue for the answer.
        end: text that follows an answer in training; generation stops at it.
        special_tokens: whether the tokenizer should add its own start token in front.
        lead: text between the cue and an answer in training. A model writes it as part of its first token, so it is no part
            of what is rendered for it.
    """

    name: str
    render: Callable[..., str]
    end: str
    special_tokens: bool
    lead: str = ""

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
        return Template("llama2", _llama2, " ", special_tokens=True, lead=" ")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("--template chat: this tokenizer has no chat template; use --template alpaca")
    return Template("chat", lambda prompt, input, system="": _chat(tokenizer, prompt, input, system), "",
                    special_tokens=False)


def check_alpaca(table: dict[str, tuple[str, str]]) -> None:
    """Compare templates with their published SHA-256; a UserError names each one that differs."""
    problems = [
        f"Alpaca template {name}: its SHA-256 is {got}, not {want}; restore the text in data/prompts.py"
        for name, (text, want) in table.items()
        if (got := hashlib.sha256(text.encode()).hexdigest()) != want
    ]
    if problems:
        raise UserError(*problems)


def _alpaca(prompt: str, input: str, system: str = "") -> str:
    _no_system("alpaca", system)
    # one pass: braces inside a user's text must not be read as placeholders
    head, rest = (ALPACA_WITH_INPUT if input else ALPACA_NO_INPUT).split("{instruction}")
    return head + prompt + (rest.replace("{input}", input) if input else rest)


def _wizardlm(prompt: str, input: str, system: str = "") -> str:
    _no_system("wizardlm", system)
    return f"{prompt}\n{input}\n\n### Response:" if input else f"{prompt}\n\n### Response:"


def _no_system(name: str, system: str) -> None:
    if system:
        raise UserError(f"--template {name}: has no place for a system text, and rows or --prompt_style have one; use "
                        "--template chat or llama2")


def _llama2(prompt: str, input: str, system: str = "") -> str:
    """``[INST] <<SYS>>\\nSYSTEM\\n<</SYS>>\\n\\nUSER [/INST]``; what stands between the marks is stripped.

    Raises:
        UserError: a text holds one of the marks, which would change the turns.
    """
    content = f"{prompt}\n\n{input}" if input else prompt
    # text that holds a mark could end the user's turn and speak as somebody else
    if mark := next((mark for mark in LLAMA2_MARKS if mark in content or mark in system), None):
        raise UserError(f"--template llama2: a prompt holds {mark}, a mark of the format itself; remove it from the data")
    body = (f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else "") + content
    return f"[INST] {body.strip()} [/INST]"


def _chat(tokenizer: Any, prompt: str, input: str, system: str = "") -> str:
    """The model's own format. A template without a place for a system text, because it refuses one or leaves it out (Gemma,
    early Mistral), gets it in front of the user's words, a blank line between them, as these models' cards advise.

    Raises:
        UserError: the template refuses a single user turn.
    """
    content = f"{prompt}\n\n{input}" if input else prompt
    if system:
        with contextlib.suppress(TemplateError):
            text = _rendered(tokenizer, {"role": "system", "content": system}, {"role": "user", "content": content})
            # templates strip what they are given
            if system.strip() in text:
                return text
        content = f"{system}\n\n{content}"
    try:
        return _rendered(tokenizer, {"role": "user", "content": content})
    except TemplateError as error:
        raise UserError(f"--template chat: this tokenizer's chat template refuses a single user turn ({error}); use "
                        "--template alpaca, or mend the chat template") from None


def _rendered(tokenizer: Any, *turns: dict[str, str]) -> str:
    return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
