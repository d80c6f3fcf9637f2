"""Local judge models: checked before anything is judged, loaded when the first item needs them, run in batches.

Rows are padded on the right and read at their last token, so a causal model gives each row what it would get alone.
The longest rows come first: what an interrupted run left undone falls into the same batches again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from errors import UserError
from evaluator.judges.judged_text import RULES
from models.base import spread
from models.base.folders import CAUSAL, CLASSIFIER
from models.base.heads import LogitRule, answer_logits, logit_rule
from models.base.loading import base_path, load_tokenizer
from models.base.placement import compute_dtype, set_up_torch
from models.base.positions import steady
from models.checkpoints.fingerprints import fingerprint
from models.checkpoints.reader import Checkpoint
from models.runs import release_base

log = logging.getLogger(__name__)
#: Longest prompt of a generative judge, even where its model takes more.
MAX_LENGTH = 4096
#: Names of the last layer in transformers' sequence classifiers.
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
#: Tokens of padding that a row of a batch may have, however short it is; of long rows, an eighth.
_SLACK = 16
#: Files that decide what a judge reads.
_TOKENIZER = ("tokenizer", "chat_template", "special_tokens", "added_tokens", "vocab", "merges", "spiece", "sentencepiece",
              "spm")


@dataclass(frozen=True)
class Source:
    """A judge's model on disk, with what its verdicts depend on.

    Args:
        flag: how the user named it, for messages.
        config: its config.json.
        hash: of weights, config, tokenizer files and compute dtype.
        args: the command's flags: dtype, device, threads, cache_dir, judge_batch_tokens, judge_max_length.
    """

    flag: str
    folder: Path
    config: dict[str, Any]
    tokenizer: Any
    hash: str
    args: Any

    @property
    def limit(self) -> int:
        """The longest input in tokens."""
        # never beyond the model's own positions, whatever the flag says
        takes = self.config.get("max_position_embeddings") or self.config.get("n_positions") or MAX_LENGTH
        return min(self.args.judge_max_length or MAX_LENGTH, takes)

    def version(self, *rest: Any) -> str:
        """A hash of the model and of all else that decides a verdict: prompts, thresholds, lengths."""
        return hashlib.blake2b(json.dumps([self.hash, RULES, *rest], default=str).encode(), digest_size=12).hexdigest()


def find(name: str, path: str, args: Any, labels: int = 0) -> Source:
    """Look at a judge's folder without loading its weights.

    Args:
        labels: how many labels its head must have; 0: a causal language model.

    Raises:
        UserError: no such model, no safetensors, no tokenizer, or another layout than this judge needs.
    """
    flag = f"--judges {name}={path}"
    folder = base_path(path, args.cache_dir, flag, CLASSIFIER if labels else CAUSAL)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}: {folder / 'config.json'} cannot be read ({error})") from None
    # headers alone: names and shapes show the layout before a 7B judge is loaded
    with Checkpoint.open(folder) as checkpoint:
        tensors = checkpoint.tensors
    head = _check_layout(flag, config, {name: info.shape for name, info in tensors.items()}, labels)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        raise UserError(f"{flag}: {folder} holds no tokenizer; put the judge's own tokenizer files beside its weights")
    # part of the version: bfloat16 and fp32 give other verdicts near a threshold
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    parts = [fingerprint(folder), json.dumps(config, sort_keys=True), compute_dtype(args.dtype, device)]
    if head:
        # the fingerprint samples the weights; two heads on one body must not be taken for each other
        with tensors[head].file.open("rb") as stream:
            stream.seek(tensors[head].start)
            parts.append(hashlib.sha256(stream.read(tensors[head].nbytes)).hexdigest())
    parts += [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in sorted(folder.glob("*"))
              if file.is_file() and file.name.startswith(_TOKENIZER)]
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()
    # a classifier was trained to read at the end token that its tokenizer may append
    tokenizer = load_tokenizer(folder, ends=bool(labels))
    # texts are cut and counted here; the tokenizer need not warn
    tokenizer.model_max_length = 1 << 40
    # its own template's control tokens are meant; those of judged texts are spelt out by judged_text.py
    tokenizer.split_special_tokens = False
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        tokenizer.backend_tokenizer.encode_special_tokens = False
    return Source(flag, folder, config, tokenizer, digest, args)


def _check_layout(flag: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], labels: int) -> str:
    """The name of the head's tensor, "" for a causal model; a UserError when it is another layout."""
    kind = next(iter(config.get("architectures") or ["nothing"]))
    if not labels:
        if not kind.endswith(("ForCausalLM", "LMHeadModel")):
            raise UserError(f"{flag}: needs a causal language model, its config.json says {kind}")
        return ""
    if not kind.endswith("ForSequenceClassification"):
        raise UserError(f"{flag}: needs a sequence classifier with {labels} label{'s' * (labels > 1)} "
                        f"(…ForSequenceClassification), its config.json says {kind}")
    names = config.get("id2label")
    declared = len(names) if names else config.get("num_labels", 2)
    head = next((name for name in _HEADS if name in shapes), None)
    if head is None:
        raise UserError(f"{flag}: its weights hold no classification head ({', '.join(_HEADS)})")
    # config and weights may disagree: both must fit
    if declared != labels or shapes[head][0] != labels:
        raise UserError(f"{flag}: needs {labels} label{'s' * (labels > 1)}, has {declared} in config.json and "
                        f"{shapes[head][0]} in {head}")
    return head


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Positions in groups of like length, longest first, at most ``tokens`` padded tokens each (one row may have more).

    A row joins a group when it needs little padding: on a processor that is busy anyway, a pad costs what a token costs.
    """
    # longest first: a batch that does not fit into memory fails at once and not at the end
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        shortest = longest - max(_SLACK, longest // 8)
        most = order[start : start + max(1, tokens // max(1, longest))]
        group = [i for i in most if lengths[i] >= shortest]
        yield group
        start += len(group)


def _load(kind: Any, source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """The model in memory; a UserError when weights are missing, for transformers would make them up."""
    # the models that are judged are loaded after their answers: two need not fit beside each other
    release_base()
    # the fused kernel keeps no table of scores, and without a backward pass it is the faster one on a CPU too; it knows no
    # soft-capped scores (Gemma 2), which would be left out in silence
    capped = source.config.get("attn_logit_softcapping")
    extra: dict[str, Any] = {"attn_implementation": "eager"} if capped else {}
    if spread.wanted(source.args):
        extra["device_map"] = _spread(kind, source, dtype)
    elif device.type != "cpu":
        extra["device_map"] = {"": device}
    model, report = kind.from_pretrained(source.folder, dtype=dtype, trust_remote_code=False, use_safetensors=True,
                                         output_loading_info=True, **extra)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{source.flag}: {source.folder} lacks {len(missing)} weights of {type(model).__name__}: "
                        f"{', '.join(missing[:5])}")
    return model.eval()


def _spread(kind: Any, source: Source, dtype: torch.dtype) -> dict[str, int]:
    with torch.device("meta"):
        empty = kind.from_config(AutoConfig.from_pretrained(source.folder, trust_remote_code=False))
    return spread.over_devices(empty, dtype, source.flag)


@dataclass
class Classifier:
    """A sequence classifier in memory."""

    model: Any
    device: torch.device
    pad_id: int

    @classmethod
    def load(cls, source: Source) -> Classifier:
        device, dtype = set_up_torch(source.args)
        model = _load(AutoModelForSequenceClassification, source, dtype, device)
        return cls(model, spread.device_of(model), source.tokenizer.pad_token_id or 0)

    @torch.inference_mode()
    def logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(rows, labels) in fp32: for each row what transformers' own class gives for it alone."""
        if not hasattr(self.model, "score"):
            # an encoder: it reads both ways, so pads must be masked
            ids, mask = _right_pad(rows, self.pad_id, self.device)
            return self.model(input_ids=ids, attention_mask=mask).logits.float().cpu()
        body = getattr(self.model, self.model.base_model_prefix)
        pad_id = self.model.config.get_text_config().pad_token_id
        # without the class's own forward, which would run its head in the model's dtype
        hidden = _at(body, rows, [_pooled(row, pad_id) for row in rows], self.device).to(self.model.score.weight.device)
        # the head in fp32: bfloat16 has steps of 0.004 around a probability of 0.5
        head = self.model.score
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(hidden.float(), head.weight.float(), bias).cpu()


def _pooled(row: Sequence[int], pad_id: int | None) -> int:
    """The position that transformers' classifiers read: the last token that is not the model's pad token."""
    return next((i for i in range(len(row) - 1, -1, -1) if row[i] != pad_id), 0) if pad_id is not None else len(row) - 1


@dataclass
class Reader:
    """A causal language model in memory that says what it would write next."""

    model: Any
    device: torch.device
    rule: LogitRule

    @classmethod
    def load(cls, source: Source) -> Reader:
        device, dtype = set_up_torch(source.args)
        model = _load(AutoModelForCausalLM, source, dtype, device)
        return cls(model, spread.device_of(model), logit_rule(model))

    @torch.inference_mode()
    def next_logprobs(self, rows: Sequence[Sequence[int]], tokens: Sequence[int]) -> Tensor:
        """(rows, tokens) fp32: log-probability of each token as the next one after each row, from one forward pass."""
        body = getattr(self.model, self.model.base_model_prefix)
        hidden = _at(body, rows, [len(row) - 1 for row in rows], self.device)
        # one position a row: a batch's whole logits would be (rows, time, vocabulary)
        logits = answer_logits(self.model, hidden, self.rule)
        return (logits[:, list(tokens)] - logits.logsumexp(-1, keepdim=True)).cpu()


def _at(body: Any, rows: Sequence[Sequence[int]], ends: Sequence[int], device: torch.device) -> Tensor:
    """Hidden state (rows, width) of a causal model at one position of each row; the body gives (rows, time, width)."""
    if not steady(body.config, max(map(len, rows))):
        if len(rows) > 1:
            # each row's frequencies would be those of the longest one
            return torch.cat([_at(body, [row], [end], device) for row, end in zip(rows, ends, strict=True)])
        # or of the longest so far, which a short row ends
        body(input_ids=torch.tensor([rows[0][:1]], device=device), use_cache=False)
    # no mask: nothing to the right of a token reaches it, so neither does a pad
    ids, _ = _right_pad(rows, 0, device)
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    # of a model on several devices they are on the last
    return hidden[torch.arange(len(rows), device=hidden.device), torch.tensor(ends, device=hidden.device)]


def _right_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, (torch.arange(longest, device=device)[None] < lengths[:, None]).long()
