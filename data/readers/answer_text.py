"""What of a generated text is the answer: what follows the reasoning, without role headers and end-of-turn tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)
#: How models mark reasoning, (opens, closes): Qwen, DeepSeek, Magistral, OpenThinker, Kimi, Seed, Granite.
REASONING: tuple[tuple[str, str], ...] = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")),
    ("[THINK]", "[/THINK]"), ("<|begin_of_thought|>", "<|end_of_thought|>"), ("◁think▷", "◁/think▷"),
    ("Here is my thought process:", "Here is my response:"),
)
#: Marks that reasoning is told by; tokenizers that hold them as special tokens must not drop them from an answer.
MARKS = frozenset((*(mark for pair in REASONING for mark in pair), "<|channel|>", "<|message|>", "<|start|>", "<|end|>",
                   "<|begin_of_solution|>", "<|end_of_solution|>"))
_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>")  # gpt-oss: the channel that the user sees
_HEADERS = re.compile(
    r"\s*(?:<\|start_header_id\|>assistant<\|end_header_id\|>|<\|im_start\|>assistant\b|<start_of_turn>model\b|<\|assistant\|>"
    r"|<｜Assistant｜>|<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>|<\|start\|>assistant\b|<\|begin_of_text\|>"
    r"|<｜begin▁of▁sentence｜>|<bos>|<s>|\[/INST\]|<\|begin_of_solution\|>)\s*")
_ENDS = re.compile(
    r"<\|eot_id\|>|<\|eom_id\|>|<\|im_end\|>|<\|endoftext\|>|<\|end_of_text\|>|<\|END_OF_TURN_TOKEN\|>|<\|end\|>|<\|return\|>"
    r"|<end_of_turn>|<eos>|</s>|<｜end▁of▁sentence｜>|<\|end_of_solution\|>")
_WRAPPED = re.compile(r"\s*<answer>(.*?)(?:</answer>\s*)?", re.S)


def answer_of(text: str) -> tuple[str, str]:
    """The answer in a generated text and what stood around it: "", "reasoning", "unclosed" or "tokens".

    Reasoning that never ends, cut at the token limit, leaves no answer: "". A text without any mark comes back as it is.
    """
    body, found = _without_headers(text), ""
    if "<|channel|>" in body:
        parts = _FINAL.split(body)
        if len(parts) == 1:
            return "", "unclosed"
        body, found = parts[-1], "reasoning"
    for opens, closes in REASONING:
        opened = body.lstrip().startswith(opens)
        # templates may put the opening mark into the prompt: the end alone marks what came before as reasoning
        if closes in body and (opened or closes[0] in "<[◁" and opens not in body.partition(closes)[0]):
            body, found = body.partition(closes)[2], "reasoning"
        elif opened:
            return "", "unclosed"
    if found and (match := _WRAPPED.fullmatch(body)):
        body = match[1]
    body = _without_headers(body)
    # what follows the end of a turn is another turn
    body = _ENDS.split(body, maxsplit=1)[0]
    if found:
        return body.strip(), found
    return (text, "") if body == text else (body.strip(), "tokens")


def judged(rows: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """Rows whose ``output`` is the answer alone; where that differs from the generated text, ``raw`` keeps it whole.

    ``found`` of such a row says what stood around the answer, for ``counted``.
    """
    done, counts = [], dict.fromkeys(("reasoning", "unclosed", "tokens"), 0)
    for row in rows:
        answer, found = answer_of(row["output"])
        if not found and row["output"] and _begun(row.get("rendered") or ""):
            # the template began the reasoning and the answer never ended it
            answer, found = "", "unclosed"
        done.append(row | {"output": answer, "raw": row["output"], "found": found} if found else row)
        if found:
            counts[found] += 1
    for found, said in (("reasoning", "hold a reasoning block; what follows it is judged"),
                        ("unclosed", "end inside their reasoning; they have no answer and count as broken text"),
                        ("tokens", "hold role headers or end-of-turn tokens; what stands between them is judged")):
        if counts[found]:
            log.warning("%s: %d of %d answers %s", place, counts[found], len(rows), said)
    return done


def counted(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many of ``judged``'s rows held reasoning, ended inside it, or held tokens of the template; {} when none did."""
    found = [row["found"] for row in rows if "found" in row]
    return {name: found.count(name) for name in ("reasoning", "unclosed", "tokens") if name in found}


def _begun(prompt: str) -> bool:
    """Whether a rendered prompt ends with the mark that opens reasoning."""
    return prompt.rstrip().endswith(tuple(opens for opens, _ in REASONING if opens[0] in "<[◁"))


def _without_headers(text: str) -> str:
    while match := _HEADERS.match(text):
        text = text[match.end():]
    return text
