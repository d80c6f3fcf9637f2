"""Scalar reward models: a sequence classifier with one label; the answer with the larger reward is preferred."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evaluator.judges.judged_text import pair_ids, token_ids
from evaluator.judges.local import Classifier, Source, batches, find
from evaluator.judges.prompts import fit_length, load_prompts, renderer
from evaluator.judges.protocol import Item, Verdict
from models.base.processes import in_turns


@dataclass(frozen=True)
class RewardJudge:
    """True: reward(answer) > reward(other); None: equal. The score is reward(answer), on the model's own scale."""

    name: str
    version: str
    source: Source
    encode: Callable[[Item], list[int]]

    def judge(self, items: Sequence[Item]) -> Iterator[tuple[int, Verdict]]:
        """Yield (position, verdict) once both answers of an item were read."""
        if not items:
            return
        # the reward of a text does not depend on what it is compared with
        single = [replace(item, other="") for item in items]
        others = [replace(item, answer=item.other, other="") for item in items]
        both = [item for pair in zip(single, others, strict=True) for item in pair]
        # one text that several items share is read once
        texts = list(dict.fromkeys((item.prompt, item.answer) for item in both))
        encoded = [fit_length(Item(*text), self.encode, self.source.limit) for text in texts]
        place = {text: i for i, text in enumerate(texts)}
        # which items a text's reward helps to decide
        waiting: dict[int, list[int]] = {}
        for i, item in enumerate(both):
            waiting.setdefault(place[item.prompt, item.answer], []).append(i // 2)
        needs = [(place[a.prompt, a.answer], place[b.prompt, b.answer]) for a, b in zip(single, others, strict=True)]
        rewards: dict[int, float] = {}
        yielded: set[int] = set()
        model = Classifier.load(self.source)
        groups = list(batches([len(row.ids) for row in encoded], self.source.args.judge_batch_tokens))
        for positions, batch_rewards in in_turns(
                groups, lambda group: model.logits([encoded[i].ids for i in group])[:, 0].tolist()):
            rewards |= zip(positions, batch_rewards, strict=True)
            for i in dict.fromkeys(i for position in positions for i in waiting[position]):
                mine, other = needs[i]
                if i not in yielded and mine in rewards and other in rewards:
                    yielded.add(i)
                    yield i, verdict(rewards[mine], rewards[other], encoded[mine].cut or encoded[other].cut)


def verdict(mine: float, other: float, cut: bool) -> Verdict:
    """From both rewards."""
    label = None if mine == other else mine > other
    return Verdict(label, round(mine, 6), {"answer": round(mine, 6), "other": round(other, 6)},
                   note="truncated" if cut else "")


def make(name: str, path: str, args: Any) -> RewardJudge:
    """The judge of a folder or hub name.

    A tokenizer with a chat template gets request and answer as its turns, another one both texts as a pair.

    Raises:
        UserError: its head has not one label, or the model cannot be read.
    """
    source = find(name, path, args, 1)
    prompt = load_prompts(args.judge_prompts)["reward"]
    tokenizer = source.tokenizer
    paired = prompt.chat == "turns" and not getattr(tokenizer, "chat_template", None)
    if paired:
        def encode(item: Item) -> list[int]:
            return pair_ids(item.prompt, item.answer, tokenizer)
    else:
        render = renderer(prompt, tokenizer, source.flag, cue=False)

        def encode(item: Item) -> list[int]:
            return token_ids(render(item), tokenizer, start=prompt.chat == "none", end=True)
    return RewardJudge(name, source.version(prompt.hash, paired, source.limit), source, encode)
