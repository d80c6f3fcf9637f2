"""What generative judges share: the first tokens of their verdict words, compared after one pass over the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from errors import UserError
from evaluator.judges.judged_text import Piece
from evaluator.judges.local import Reader, Source, batches
from evaluator.judges.prompts import Encoded, Prompt, fit_length, renderer, token_ids
from evaluator.judges.protocol import Item
from models.base.processes import in_turns

#: Any item will do: how a verdict word is cut into tokens depends on the prompt's end alone.
PROBE = Item("Why is the sky blue?", "Because it scatters blue light.", "Because it is.")


class Words(NamedTuple):
    """First tokens of verdict words; ``sizes`` of them belong to each word, a token per spelling."""

    tokens: tuple[int, ...]
    sizes: tuple[int, ...]

    def summed(self, logprobs: Sequence[float]) -> list[float]:
        """Log-probability of each word, over its spellings, from that of each token."""
        sums, at = [], 0
        for size in self.sizes:
            part, at = logprobs[at : at + size], at + size
            top = max(part)
            sums.append(part[0] if size == 1 or top == -math.inf else top + math.log(sum(math.exp(p - top) for p in part)))
        return sums


def encoder(source: Source, prompt: Prompt) -> Callable[[Item], list[int]]:
    """The function item -> token ids of the judge's prompt, up to where its verdict begins."""
    render = renderer(prompt, source.tokenizer, source.flag)
    return lambda item: token_ids(render(item), source.tokenizer, prompt)


def verdict_words(source: Source, at: Callable[[str], list[int]], words: Sequence[str]) -> Words:
    """The first token of each verdict word as it follows a prompt: tokenised with it, not apart.

    Args:
        at: what stands behind the prompt -> token ids of both.
        words: each with its spellings behind ``|``.

    Raises:
        UserError: a word melts into the prompt's last token, or two words begin with the same token.
    """
    before = at("")
    firsts: list[list[int]] = []
    for word in words:
        own: list[int] = []
        for spelling in word.split("|"):
            # in place: a tokenizer may join a word with the blank before it
            after = at(spelling)
            if after[: len(before)] == before and len(after) > len(before):
                own.append(after[len(before)])
        if not own:
            raise UserError(f"{source.flag}: '{word}' does not begin with a token of its own behind the judge's prompt; "
                            "give another lead or word with --judge_prompts FILE.yaml")
        firsts.append(list(dict.fromkeys(own)))
    every = [token for own in firsts for token in own]
    if len(set(every)) < len(every):
        raise UserError(f"{source.flag}: its tokenizer begins {' and '.join(words)} with the same token, so they cannot be "
                        "told apart; give other words with --judge_prompts FILE.yaml")
    return Words(tuple(every), tuple(map(len, firsts)))


def next_word(source: Source, encode: Callable[[Item], list[int]], tokens: Sequence[int], items: Sequence[Item],
              model: Reader | None = None) -> Iterator[tuple[int, list[float], Encoded]]:
    """Yield (position, log-probability of each of ``tokens`` as the next one, the encoded row), batch by batch.

    Args:
        model: the judge in memory, where it is asked several times; else it is loaded when there is an item.
    """
    # no model is loaded for nothing
    if not items:
        return
    encoded = [fit_length(item, encode, source.limit) for item in items]
    model = model or Reader.load(source)
    groups = list(batches([len(row.ids) for row in encoded], source.args.judge_batch_tokens))
    for positions, logprobs in in_turns(
            groups, lambda group: model.next_logprobs([encoded[i].ids for i in group], tokens).tolist()):
        yield from ((i, row, encoded[i]) for i, row in zip(positions, logprobs, strict=True))


def check_room(source: Source, encode: Callable[[Item], list[int]]) -> None:
    """A UserError when the bare prompt already fills the judge's window."""
    empty = len(encode(Item("", "")))
    if empty >= source.limit:
        raise UserError(f"{source.flag}: the judge's prompt alone takes {empty} tokens of {source.limit}; raise "
                        "--judge_max_length or shorten the prompt with --judge_prompts FILE.yaml")


def prepared(name: str, source: Source, args: Any, words: Callable[[Prompt], Sequence[str]]) -> tuple[
        Prompt, Callable[[Item], list[int]], tuple[int, ...]]:
    """Prompt, encoder and verdict tokens of the judge ``name``, all checked; one spelling a word."""
    from evaluator.judges.prompts import load_prompts

    prompt = load_prompts(args.judge_prompts)[name]
    if not all(words(prompt)):
        raise UserError(f"--judge_prompts: {name} needs its verdict words (word{', against' * (len(words(prompt)) > 1)})")
    encode, render = encoder(source, prompt), renderer(prompt, source.tokenizer, source.flag)
    check_room(source, encode)

    def at(more: str) -> list[int]:
        return token_ids([*render(PROBE), Piece(more, False)], source.tokenizer, prompt)

    found = verdict_words(source, at, words(prompt))
    if max(found.sizes) > 1:
        raise UserError(f"--judge_prompts: {name} takes one spelling of each verdict word, without |")
    return prompt, encode, found.tokens
