"""What of a generated text is the answer: what follows the reasoning, without role headers and end-of-turn tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)
#: Names of tags around reasoning, in any case, with a prefix ("seed:think") or attributes: Qwen, DeepSeek, OpenThinker,
#: Seed, Granite, EXAONE, and what prompts for a scratchpad ask for.
_NAMES = ("think|thinking|thoughts?|reasoning|reflection|scratchpad|scratchpad_reasoning|inner_monologue|internal_monologue"
          "|analysis")
#: How models mark reasoning, (opens, closes): Magistral, OpenThinker, Kimi, Command A, Apertus, Gemma.
_PAIRS: tuple[tuple[str, str], ...] = (
    ("[THINK]", "[/THINK]"), ("<|begin_of_thought|>", "<|end_of_thought|>"), ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|inner_prefix|>", "<|inner_suffix|>"), ("<|channel>", "<channel|>"),
)
#: What templates and tokenizers hold of these.
REASONING: tuple[tuple[str, str], ...] = (
    *((f"<{name}>", f"</{name}>") for name in ("think", "thinking", "thought", "reasoning", "seed:think")), *_PAIRS)
#: Granite 3.2: words, which an answer may hold as well; only at its start do they open anything.
_SPOKEN = re.compile(r"\s*Here is my thought process:(?:.*?Here is my response:)?", re.S)
_MARK = re.compile("|".join(
    [rf"(?P<tag><\s*(?P<end>/)?\s*(?:\w+:)?(?P<name>{_NAMES})\b[^<>]{{0,80}}>)"]
    + [f"(?P<o{i}>{re.escape(opens)})|(?P<c{i}>{re.escape(closes)})" for i, (opens, closes) in enumerate(_PAIRS)]), re.I)
#: A mark that is talked about: in quotes or code.
_QUOTES = "`\"'“”‘’"
#: Where reasoning may begin behind other text: on a line of its own or behind a sentence.
_BREAK = re.compile(r"(?:\n|[.!?…。！？]\s)\s*\Z")
#: Marks that reasoning is told by; tokenizers that hold them as special tokens must not drop them from an answer.
MARKS = frozenset((*(mark for pair in REASONING for mark in pair), "<|channel|>", "<|message|>", "<|start|>", "<|end|>",
                   "<|begin_of_solution|>", "<|end_of_solution|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"))
_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>")  # gpt-oss: the channel that the user sees
#: The same where the special tokens were dropped: "analysisThe user asks ...assistantfinalSure".
_BARE_CHANNELS = re.compile(r"\s*analysis(?=[A-Z\"'])")
_BARE_FINAL = re.compile(r"assistant\s*final")
_HEADERS = re.compile(
    r"\s*(?:<\|start_header_id\|>assistant<\|end_header_id\|>|<\|im_start\|>assistant\b|<start_of_turn>model\b|<\|assistant\|>"
    r"|<｜Assistant｜>|<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>|<\|start\|>assistant\b|<\|begin_of_text\|>"
    r"|<｜begin▁of▁sentence｜>|<bos>|<s>|\[/INST\]|<\|begin_of_solution\|>"
    r"|<\|START_RESPONSE\|>|<\|begin_of_box\|>)\s*")
_ENDS = re.compile(
    r"<\|eot_id\|>|<\|eom_id\|>|<\|im_end\|>|<\|endoftext\|>|<\|end_of_text\|>|<\|END_OF_TURN_TOKEN\|>|<\|end\|>|<\|return\|>"
    r"|<end_of_turn>|<eos>|</s>|<｜end▁of▁sentence｜>|<\|end_of_solution\|>"
    r"|<\|END_RESPONSE\|>|<\|end_of_box\|>")
_WRAPPED = re.compile(r"\s*<(answer|response|output)>(.*?)(?:</\1>\s*)?", re.S | re.I)


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
    elif match := _BARE_CHANNELS.match(body):
        parts = _BARE_FINAL.split(body)
        if len(parts) == 1:
            return "", "unclosed"
        body, found = parts[-1], "reasoning"
    if match := _SPOKEN.match(body):
        if not match[0].endswith("response:"):
            return "", "unclosed"
        body, found = body[match.end():], "reasoning"
    outside, open_still = _outside(body)
    if outside != body:
        if open_still and not outside.strip():
            return "", "unclosed"
        body, found = outside, "reasoning"
    if found and (match := _WRAPPED.fullmatch(body)):
        body = match[2]
    body = _without_headers(body)
    # what follows the end of a turn is another turn
    body = _ENDS.split(body, maxsplit=1)[0]
    if found:
        return body.strip(), found
    return (text, "") if body == text else (body.strip(), "tokens")


def _outside(text: str) -> tuple[str, bool]:
    """The text without its blocks of reasoning, and whether the last one never ends.

    An end without a beginning ends what came before it: templates may put the opening mark into the prompt. A mark in
    quotes, in code or within a sentence is talked about, and so is the end that belongs to it.
    """
    kept: list[str] = []
    place, depth, mentioned, last = 0, 0, 0, -1
    for mark in _MARK.finditer(text):
        closes = bool(mark["end"]) if mark["tag"] else bool(mark.lastgroup and mark.lastgroup[0] == "c")
        if _talked_about(text, mark):
            continue
        if not closes:
            before = text[place : mark.start()]
            if depth:
                depth += 1
            elif not before.strip() or _BREAK.search(before):
                kept.append(before)
                depth, last = 1, -1
            else:
                mentioned += 1
        elif depth:
            depth, last = depth - 1, mark.end()
            if not depth:
                place = last
        elif mentioned:
            mentioned -= 1
        else:
            kept, place = [], mark.end()
    if depth and last < 0:
        return "".join(kept), True
    # a block that only spoke of another one ends where the last end is
    return "".join([*kept, text[last if depth else place :]]), False


def _talked_about(text: str, mark: re.Match[str]) -> bool:
    around = text[: mark.start()][-1:], text[mark.end() :][:1]
    return any(c and c in _QUOTES for c in around[:1]) and any(c and c in _QUOTES for c in around[1:]) \
        or text.count("```", 0, mark.start()) % 2 == 1


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
    for found, said in (("reasoning", "hold a reasoning block; what stands outside it is judged"),
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
