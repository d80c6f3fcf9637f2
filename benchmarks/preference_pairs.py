"""Preference pairs for races: random tokens, the lengths of real ones."""

from __future__ import annotations

from typing import Any

#: (prompt, chosen, rejected) tokens of the embedded pairs at the middle of each eighth by total length, in an order drawn
#: once.
LENGTHS = ((42, 26, 209), (47, 25, 115), (52, 26, 440), (41, 60, 58),
           (35, 18, 56), (50, 14, 290), (43, 22, 400), (63, 22, 145))


def batches(steps: int, pairs: int, tokens: int | None, vocabulary: int) -> list[dict[str, Any]]:
    """Random preference pairs, padded as TRL does it: chosen rows first, labels only where the answers are.

    Args:
        tokens: of every row, half of them the prompt; None takes LENGTHS in turn.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    generator = torch.Generator().manual_seed(2)

    def drawn(count: int) -> Any:
        return torch.randint(0, vocabulary, (count,), generator=generator)

    found = []
    for first in range(0, steps * pairs, pairs):
        sizes = [(tokens // 2, tokens - tokens // 2, tokens - tokens // 2) if tokens else LENGTHS[i % len(LENGTHS)]
                 for i in range(first, first + pairs)]
        prompts = [drawn(size[0]) for size in sizes]
        rows = [torch.cat([prompt, drawn(size[side])]) for side in (1, 2)
                for prompt, size in zip(prompts, sizes, strict=True)]
        ids, places = pad_sequence(rows, batch_first=True), torch.arange(max(map(len, rows)))
        real = places < torch.tensor([len(row) for row in rows])[:, None]
        asked = places < torch.tensor([len(prompt) for prompt in prompts] * 2)[:, None]
        found.append({"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(asked | ~real, -100)})
    return found
