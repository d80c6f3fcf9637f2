"""The utility anchor: while a mask learns safety, samples of the tasks keep their skill by SFT or KL."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import sources
from data.collate import mix, pad_rows
from data.encode import IGNORE, encode
from data.prompts import Template
from errors import UserError
from flags import MaskArgs
from models.base.positions import check_rows

log = logging.getLogger(__name__)
#: Tokens of the teacher's distribution that are kept; the others count as one.
TOP = 64


@dataclass
class Anchor:
    """Encoded samples of every task, in a fixed order that mixes the tasks, and their teacher's answers for ``kl``.

    Args:
        rows: encoded samples.
        teacher: per row, (ids (answer tokens, TOP), log-probabilities of the same shape); empty for ``sft``.
    """

    rows: list[dict[str, Any]]
    batch: int
    pad: int
    teacher: list[tuple[Tensor, Tensor]]

    def picked(self, turn: int) -> list[int]:
        """The rows of a turn: a function of the turn alone, so that a resumed run sees the same."""
        first = turn * self.batch
        return [(first + i) % len(self.rows) for i in range(min(self.batch, len(self.rows)))]

    def loss(self, model: nn.Module, turn: int, device: torch.device) -> Tensor:
        """Mean over answer tokens of the negative log-likelihood, or of KL(teacher || model) on the kept tokens.

        Logits are (batch, time, vocabulary), those of answers (answers, vocabulary), the kept ones (answers, TOP).
        """
        places = self.picked(turn)
        batch = {k: v.to(device) for k, v in pad_rows([self.rows[i] for i in places], self.pad).items()}
        answers = batch["labels"][:, 1:] != IGNORE
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        if not self.teacher:
            log_probs = model(**inputs, labels=batch["labels"], fused_lm_head=True).log_probs
            return -log_probs.sum() / answers.sum().clamp_min(1)
        # fp32: a KL of two close distributions is a difference of nearly equal numbers
        logits = model(**inputs).logits[:, :-1][answers].float()
        ids = torch.cat([self.teacher[i][0] for i in places]).to(device)
        taught = torch.cat([self.teacher[i][1] for i in places]).to(device)
        return coarse_kl(taught, logits.log_softmax(-1).gather(1, ids)).mean()


def coarse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) per row, of log-probabilities (rows, TOP) of the same tokens; all other tokens count as one."""
    def rest(logs: Tensor) -> Tensor:
        # below 1 also where rounding puts the kept tokens at 1 or more: the rest keeps a finite logarithm
        return torch.log1p(-logs.exp().sum(-1).clamp(max=1 - 1e-6))

    others, theirs = rest(teacher), rest(student)
    return (teacher.exp() * (teacher - student)).sum(-1) + others.exp() * (others - theirs)


def anchor_rows(args: MaskArgs, tokenizer: Any, form: Template, base: Path) -> list[list[dict[str, Any]]]:
    """Encoded samples of each task; read before a model is loaded.

    Args:
        base: folder of the model that is to read them.

    Raises:
        UserError: no such data, or rows longer than the base can read.
    """
    if args.anchor == "none":
        return []
    files = dict(part.partition("=")[::2] for part in (args.anchor_path or "").split(",") if part)
    if missing := [name for name in args.anchor_names if files and name not in files]:
        raise UserError(f"--anchor_path {args.anchor_path}: no file for {', '.join(missing)}; give NAME=FILE,...")
    groups = []
    for name in args.anchor_names:
        records = sources.load_records(name, "train", source={name: files[name]} if files else args.data_source)
        # the objective decides nothing here; mix() draws within one
        chosen = mix([replace(r, objective=0) for r in records], args.anchor_samples, "proportional", args.seed)
        rows = encode(chosen, tokenizer, form, args.model_max_length)
        log.info("anchor %s: %s", name, rows.report(args.model_max_length))
        check_rows(base, [len(row["input_ids"]) for row in rows.rows], args.model_max_length)
        groups.append(rows.rows)
    return groups


def make_anchor(args: MaskArgs, groups: Sequence[list[dict[str, Any]]], pad: int, model: nn.Module, device: torch.device,
                autocast: Any, become: Callable[[int], None]) -> Anchor | None:
    """The anchor of a run; for ``kl`` each task's tuned model is asked for its distributions first.

    Args:
        become: turns the live model into a task's tuned one.
    """
    if not groups:
        return None
    teacher: list[list[tuple[Tensor, Tensor]]] = []
    if args.anchor == "kl":
        for i, rows in enumerate(groups):
            become(i)
            teacher.append([_taught(model, row, device, autocast) for row in rows])
    # round robin: a batch of consecutive rows holds all tasks for as long as they last
    order = [(i, j) for j in range(max(map(len, groups))) for i, rows in enumerate(groups) if j < len(rows)]
    return Anchor([groups[i][j] for i, j in order], args.anchor_batch_size, pad,
                  [teacher[i][j] for i, j in order] if teacher else [])


@torch.no_grad()
def _taught(model: nn.Module, row: dict[str, Any], device: torch.device, autocast: Any) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities (answer tokens, TOP) of one row, from logits (1, time, vocabulary)."""
    ids = torch.tensor([row["input_ids"]], device=device)
    answers = torch.tensor(row["labels"][1:], device=device) != IGNORE
    # row by row: no padding, and never more logits than one row's; in the precision that the student will have
    with autocast():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1][answers].float()
    # at least one token is left over for the rest
    logs, places = logits.log_softmax(-1).topk(min(TOP, logits.shape[-1] - 1), -1)
    return places.cpu(), logs.cpu()
