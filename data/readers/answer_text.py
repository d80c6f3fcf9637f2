"""What of a generated text is the answer: what follows the reasoning, without role headers and end-of-turn tokens."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)
#: Words that a name around reasoning is made of, in any case: Qwen, DeepSeek, OpenThinker, Seed, Granite, EXAONE, and what
#: prompts for a scratchpad ask for. "reason" and "plan" alone name data as well.
_WORDS = ("think|(?:ant)?thinking|thoughts?|chainofthought|cot|reasoning|rationale|deliberation|reflection|scratchpad"
          "|monologue|innermonologue|analysis")
#: A name with one of them as a part: seed:think, begin_of_thought, longcat_think, think_fast, reasoning_content.
_NAME = rf"(?:[a-z]{{1,12}}[_:|\u2581-]){{0,4}}(?:{_WORDS})(?:[_:|\u2581-][a-z]{{1,12}}){{0,4}}(?!\w)"
#: How models mark reasoning without such a word, (opens, closes): Apertus, Gemma, MedGemma.
_PAIRS: tuple[tuple[str, str], ...] = (
    ("<|inner_prefix|>", "<|inner_suffix|>"), ("<|channel>", "<channel|>"), ("<unused94>", "<unused95>"),
)
#: At the start of a text only, for an answer may hold these as well: Granite 3.2's words, a code block, a folded part of a
#: page. The group is there where it ends.
_OPENINGS = (
    re.compile(r"\s*Here(?: is|['\u2019]s) my (?:thought process|reasoning process|chain of thought):"
               r"(?:.*?(Here(?: is|['\u2019]s) my (?:final )?(?:response|answer):))?", re.S),
    re.compile(r"\s*(?P<fence>```|~~~)[ \t]*(?:think|thinking|thoughts?|reasoning|scratchpad)[ \t]*\n"
               r"(?:.*?(^(?P=fence)[ \t]*(?:\n|\Z)))?", re.S | re.I | re.M),
    re.compile(r"\s*<details\b(?:[^<>]*\breasoning\b[^<>]*>|[^<>]*>\s*<summary>[^<]*\b(?:think\w*|thought\w*|reasoning)\b)"
               r"(?:.*?(</details>))?", re.S | re.I),
)
#: <think>, </think>, <|think|>, ◁think▷, the same as HTML entities or with the wrong slash; [THINK] of Magistral.
_MARK = re.compile("|".join(
    [rf"(?:<|&lt;|\u25c1)\s*(?P<end>[|\uff5c]?[/\\]+)?\s*[|\uff5c]?\s*(?P<name>{_NAME})[^<>&|\uff5c\u25b7]{{0,80}}?(?P<empty>/)?\s*"
     r"[|\uff5c]?\s*(?:>|&gt;|\u25b7)",
     rf"(?P<square>[\[\u3010])(?P<square_end>/)?(?P<square_name>{_NAME})[\]\u3011]"]
    + [f"(?P<o{i}>{re.escape(opens)})|(?P<c{i}>{re.escape(closes)})" for i, (opens, closes) in enumerate(_PAIRS)]), re.I)
#: A mark that is talked about: in quotes or code.
_QUOTES = "`\"'“”‘’"
#: Where reasoning may begin behind other text: on a line of its own or behind a sentence.
_BREAK = re.compile(r"(?:\n|[.!?…。！？]\s)\s*\Z")
#: Further special tokens of a tokenizer by which an answer is told from what stands around it.
_AROUND = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|begin_of_solution|>", "<|end_of_solution|>",
                     "<|START_RESPONSE|>", "<|END_RESPONSE|>"))
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
_WRAPPED = re.compile(r"\s*<(answer|response|output|final|final_answer|final_response)>(.*?)(?:</\1>\s*)?", re.S | re.I)


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
    for opening in _OPENINGS:
        if match := opening.match(body):
            if match[match.re.groups] is None:
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
    marks = list(_MARK.finditer(text))
    last_square = max((mark.start() for mark in marks if mark["square"] and _closes(mark)), default=-1)
    for mark in marks:
        closes = _closes(mark)
        if mark["empty"] and not closes and not depth:
            kept.append(text[place : mark.start()])
            place = mark.end()
        # "[Analysis]" that nothing ends is a heading
        heading = mark["square"] and mark[0] != "[THINK]" and not closes and mark.start() > last_square
        if mark["empty"] or heading or _talked_about(text, mark):
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


def _closes(mark: re.Match[str]) -> bool:
    """Whether a mark ends reasoning: by its slash, or by a word ("end_of_thought")."""
    name = mark["name"] or mark["square_name"]
    return bool(mark["end"] or mark["square_end"] or re.search(r"(?<![a-z])end(?![a-z])", name, re.I)) if name else \
        str(mark.lastgroup)[0] == "c"


def is_mark(token: str) -> bool:
    """Whether reasoning is told by this special token of a tokenizer: it must not be dropped from an answer."""
    return token in _AROUND or bool(_MARK.fullmatch(token))


def is_opening_mark(token: str) -> bool:
    """Whether a token by itself opens a block of reasoning."""
    mark = _MARK.fullmatch(token)
    return mark is not None and not mark["empty"] and not _closes(mark)


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
        if not found and row["output"] and begun(row.get("rendered") or ""):
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


def begun(prompt: str) -> bool:
    """Whether a rendered prompt ends with the mark that opens reasoning."""
    prompt = prompt.rstrip()
    last = next((mark for mark in _MARK.finditer(prompt, max(0, len(prompt) - 120)) if mark.end() == len(prompt)), None)
    return last is not None and not _closes(last) and not last["empty"]


def _without_headers(text: str) -> str:
    while match := _HEADERS.match(text):
        text = text[match.end():]
    return text
