"""Log-probabilities of given answers, in few and full forward passes.

Sequences that begin alike (the same system prompt, the same question, answers with a common start) are laid out as one
tree per pass: every distinct prefix is computed once and a token attends to its own ancestors only. There is no
padding, and the head runs only where an answer token is predicted. Exact: each token sees what it would see alone, within
its layer's window. Where that cannot be promised, the model's own forward reads every row alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.encode import prompt_ids
from errors import UserError
from models.base import processes
from models.base.attention import additive, within
from models.base.families import KNOWN_FORWARDS
from models.base.heads import LogitRule, answer_logits, logit_rule
from models.base.positions import positions, ropes, steady

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from models.runs import Loaded

#: Rows of the (rows, vocabulary) fp32 logits that exist at one time.
_LOGIT_ROWS = 256


@dataclass
class Tree:
    """Token sequences merged by their prefixes: node i has a token, a parent before it (-1: none) and a depth."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    children: dict[tuple[int, int], int] = field(default_factory=dict)

    def new_nodes(self, ids: Sequence[int]) -> int:
        """How many nodes ``add`` would make."""
        node = -1
        for i, token in enumerate(ids):
            # -2 for no such child: -1 is where all sequences begin
            node = self.children.get((node, token), -2)
            if node == -2:
                return len(ids) - i
        return 0

    def add(self, ids: Sequence[int]) -> list[int]:
        """Insert a sequence and return the node of each of its tokens."""
        path, node = [], -1
        for depth, token in enumerate(ids):
            key = (node, token)
            if key not in self.children:
                self.children[key] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = self.children[key]
            path.append(node)
        return path

    def mask(self) -> Tensor:
        """(nodes, nodes) bool: row i is true at node i and at its ancestors."""
        seen = torch.zeros(len(self.tokens), len(self.tokens), dtype=torch.bool)
        # as numpy: a row at a time through torch's dispatch takes far longer; both share one memory
        rows = seen.numpy()
        for node, parent in enumerate(self.parents):
            # parents come before their children: an ancestor's row is finished when it is copied
            if parent >= 0:
                rows[node] = rows[parent]
            rows[node, node] = True
        return seen


@torch.inference_mode()
def answer_logprobs(
    loaded: Loaded, items: Sequence[tuple[str, str]], batch_tokens: int = 512, *, end: bool = False
) -> list[tuple[float, int]]:
    """Summed log-probability of each answer given its prompt, in natural logarithms, and its number of tokens.

    Args:
        items: (rendered prompt, answer) pairs, tokenised apart and joined, as in training.
        batch_tokens: tree nodes in one pass; a longer sequence gets a pass of its own.
        end: also score the template's end marker and EOS, as the training loss does.

    Raises:
        ValueError: a prompt has no token, so that its answer's first token has nothing to condition on.
        UserError: a row is longer than a model with a table of positions can read.
    """
    tokenizer = loaded.tokenizer
    # each prompt once: a question stands before every one of its answers
    prompts = {text: prompt_ids(text, tokenizer, loaded.template) for text in dict.fromkeys(p for p, _ in items)}
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in items]
    if end:
        marker = tokenizer(loaded.template.end, add_special_tokens=False)["input_ids"] if loaded.template.end else []
        answers = [[*ids, *marker, tokenizer.eos_token_id] for ids in answers]
    rows = [(prompts[prompt], answer) for (prompt, _), answer in zip(items, answers, strict=True)]
    if any(not prompt for prompt, _ in rows):
        raise ValueError("a prompt without tokens: the first token of its answer has nothing to condition on")
    if not shareable(loaded.model, max((len(prompt) + len(answer) for prompt, answer in rows), default=0)):
        alone = processes.divided(rows, lambda row: _alone(loaded, *row))
        return [(total, len(answer)) for total, (_, answer) in zip(alone, rows, strict=True)]
    sums = [0.0] * len(rows)
    # whole passes are divided among processes: what shares a pass moves the last bits of a sum
    for found in processes.divided(_passes(rows, batch_tokens), lambda one: _score(loaded, *one)):
        for i, total in found.items():
            sums[i] = total
    return [(total, len(answer)) for total, (_, answer) in zip(sums, rows, strict=True)]


#: Rows of a pass: (number, nodes at which its answer's tokens are predicted, those tokens).
Members = list[tuple[int, list[int], list[int]]]


def _passes(rows: Sequence[tuple[list[int], list[int]]], batch_tokens: int) -> Iterator[tuple[Tree, Members]]:
    """(prompt, answer) rows as trees of at most ``batch_tokens`` nodes; rows without an answer stand in none."""
    # neighbours in this order share the longest prefixes; the last answer token predicts nothing and is left out
    order = sorted((i for i, (_, a) in enumerate(rows) if a), key=lambda i: (rows[i][0], rows[i][1]))
    tree, members = Tree(), []
    for i in order:
        prompt, answer = rows[i]
        ids = [*prompt, *answer[:-1]]
        # 512 nodes, though 1,024 would be faster: the tables were made so, and bfloat16 moves with it (docs/lab-log.md)
        if members and len(tree.tokens) + tree.new_nodes(ids) > batch_tokens:
            yield tree, members
            tree, members = Tree(), []
        # the prompt's last node predicts the answer's first token
        path = tree.add(ids)
        members.append((i, path[len(prompt) - 1 :], answer))
    if members:
        yield tree, members


def shareable(model: PreTrainedModel, longest: int) -> bool:
    """Whether rows of up to ``longest`` tokens can stand in one pass.

    That takes a known forward, no token that looks ahead, and RoPE whose frequencies do not depend on the longest row of a
    pass (as those of LongRoPE and dynamic scaling do beyond the original length).
    """
    config = model.config
    if config.model_type not in KNOWN_FORWARDS or getattr(config, "use_bidirectional_attention", None):
        return False
    return steady(config, longest)


def _alone(loaded: Loaded, prompt: list[int], answer: list[int]) -> float:
    """The sum for one row by the model's own forward, whatever its family does with positions, masks and logits."""
    # the last token too, though nobody asks what follows it: RoPE may go by the length of the whole row
    ids = [*prompt, *answer]
    reach = positions(loaded.model.config)
    if loaded.model.config.model_type not in KNOWN_FORWARDS and reach and len(ids) > reach:
        raise UserError(f"--model_name_or_path: a prompt and its answer have {len(ids)} tokens, but model type "
                        f"'{loaded.model.config.model_type}' has {reach} positions; use a model with more")
    if not answer:
        return 0.0
    row = torch.tensor([ids], device=loaded.device)
    if any(settings.get("rope_type") == "dynamic" for settings in ropes(loaded.model.config)):
        # transformers keeps the frequencies of the longest row so far, until it reads a short one
        loaded.model(input_ids=row[:, :1], use_cache=False)
    logits = loaded.model(input_ids=row, use_cache=False).logits[0, len(prompt) - 1 : -1]
    targets = torch.tensor(answer, device=loaded.device)[:, None]
    return float(logits.float().log_softmax(-1).gather(1, targets).double().sum())


def _masks(model: PreTrainedModel, seen: Tensor, depths: Tensor) -> Tensor | dict[str, Tensor]:
    """``seen`` (nodes, nodes) as masks (1, 1, nodes, nodes) in the form that the model takes: one, or one per layer type."""
    # additive masks: every attention implementation of transformers takes them as they are, whatever the family
    dtype = model.get_output_embeddings().weight.dtype
    whole = additive(seen, dtype)[None, None]
    windows, window = KNOWN_FORWARDS[model.config.model_type].windows, getattr(model.config, "sliding_window", None)
    # no row reaches beyond its window: most never do
    if not windows or window is None or int(depths.max()) < window:
        return whole
    cut = additive(seen & within(depths, window), dtype)[None, None]
    return cut if windows == "all" else {"full_attention": whole, "sliding_attention": cut}


def _score(loaded: Loaded, tree: Tree, members: Members) -> dict[int, float]:
    """The members' sums by their numbers: one row (1, nodes), mask (1, 1, nodes, nodes), hidden states (1, nodes, d)."""
    model, device = loaded.model, loaded.device
    # depth, not place: a token stands where it would in its own sequence
    depths = torch.tensor(tree.depths, device=device)
    hidden = model.base_model(
        input_ids=torch.tensor([tree.tokens], device=device), attention_mask=_masks(model, tree.mask().to(device), depths),
        position_ids=depths[None], use_cache=False,
    ).last_hidden_state[0].to(device)
    where = torch.tensor([node for _, path, _ in members for node in path], device=device)
    targets = torch.tensor([token for _, _, answer in members for token in answer], device=device)
    logprobs = _target_logprobs(model, hidden, where, targets)
    # summed in double: hundreds of fp32 terms would lose the digits that tell two answers apart
    # on the device, and fetched together: a row at a time would wait for it once for every row
    parts = logprobs.double().split([len(path) for _, path, _ in members])
    return dict(zip((i for i, _, _ in members), torch.stack([part.sum() for part in parts]).tolist(), strict=True))


def _target_logprobs(model: PreTrainedModel, hidden: Tensor, where: Tensor, targets: Tensor) -> Tensor:
    """log p(target | node) for each (node, target); a node shared by several answers meets the head once."""
    nodes, slot = where.unique(return_inverse=True)
    rule: LogitRule = logit_rule(model)
    out = torch.empty(len(where), dtype=torch.float32, device=hidden.device)
    for low in range(0, len(nodes), _LOGIT_ROWS):
        # fp32: differences of log-probabilities decide MC1, and bfloat16 logits of 10 have steps of 0.06
        logits = answer_logits(model, hidden[nodes[low : low + _LOGIT_ROWS]], rule)
        here = (slot >= low) & (slot < low + _LOGIT_ROWS)
        rows = slot[here] - low
        out[here] = logits[rows, targets[here]] - logits.logsumexp(-1)[rows]
    return out
