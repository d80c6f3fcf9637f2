"""What generative judges share: the first tokens of their verdict words, compared after one pass over the prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from errors import UserError
from evaluator.judges.judged_text import Piece
from evaluator.judges.local import Reader, Source, batches
from evaluator.judges.prompts import Encoded, Prompt, fit_length, renderer, token_ids
from evaluator.judges.protocol import Item

#: Any item will do: how a verdict word is cut into tokens depends on the prompt's end alone.
_PROBE = Item("Why is the sky blue?", "Because it scatters blue light.", "Because it is.")


def encoder(source: Source, prompt: Prompt) -> Callable[[Item], list[int]]:
    """The function item -> token ids of the judge's prompt, up to where its verdict begins."""
    render = renderer(prompt, source.tokenizer, source.flag)
    return lambda item: token_ids(render(item), source.tokenizer, prompt)


def first_tokens(source: Source, prompt: Prompt, words: Sequence[str]) -> tuple[int, ...]:
    """The first token of each verdict word as it follows the prompt: tokenised with it, not apart.

    Raises:
        UserError: a word melts into the prompt's last token, or two words begin with the same token.
    """
    render = renderer(prompt, source.tokenizer, source.flag)
    pieces = render(_PROBE)
    before = token_ids(pieces, source.tokenizer, prompt)
    firsts = []
    for word in words:
        # in place: a tokenizer may join a word with the blank before it
        after = token_ids([*pieces, Piece(word, False)], source.tokenizer, prompt)
        if after[: len(before)] != before or len(after) == len(before):
            raise UserError(f"{source.flag}: '{word}' does not begin with a token of its own behind the judge's prompt; "
                            "give another lead or word with --judge_prompts FILE.yaml")
        firsts.append(after[len(before)])
    if len(set(firsts)) < len(firsts):
        raise UserError(f"{source.flag}: its tokenizer begins {' and '.join(words)} with the same token, so they cannot be "
                        "told apart; give other words with --judge_prompts FILE.yaml")
    return tuple(firsts)


def next_word(source: Source, encode: Callable[[Item], list[int]], tokens: Sequence[int],
              items: Sequence[Item]) -> Iterator[tuple[int, list[float], Encoded]]:
    """Yield (position, log-probability of each of ``tokens`` as the next one, the encoded row), batch by batch."""
    # no model is loaded for nothing
    if not items:
        return
    encoded = [fit_length(item, encode, source.limit) for item in items]
    model = Reader.load(source)
    for positions in batches([len(row.ids) for row in encoded], source.args.judge_batch_tokens):
        logprobs = model.next_logprobs([encoded[i].ids for i in positions], tokens).tolist()
        yield from ((i, row, encoded[i]) for i, row in zip(positions, logprobs, strict=True))


def check_room(source: Source, encode: Callable[[Item], list[int]]) -> None:
    """A UserError when the bare prompt already fills the judge's window."""
    empty = len(encode(Item("", "")))
    if empty >= source.limit:
        raise UserError(f"{source.flag}: the judge's prompt alone takes {empty} tokens of {source.limit}; raise "
                        "--judge_max_length or shorten the prompt with --judge_prompts FILE.yaml")


def prepared(name: str, source: Source, args: Any, words: Callable[[Prompt], Sequence[str]]) -> tuple[
        Prompt, Callable[[Item], list[int]], tuple[int, ...]]:
    """Prompt, encoder and verdict tokens of the judge ``name``, all checked."""
    from evaluator.judges.prompts import load_prompts

    prompt = load_prompts(args.judge_prompts)[name]
    if not all(words(prompt)):
        raise UserError(f"--judge_prompts: {name} needs its verdict words (word{', against' * (len(words(prompt)) > 1)})")
    encode = encoder(source, prompt)
    check_room(source, encode)
    return prompt, encode, first_tokens(source, prompt, words(prompt))
