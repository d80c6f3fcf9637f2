"""From hidden states to logits, for every pass that runs a model's body and its output head apart.

Training, likelihoods, preference pairs and judges call the body alone and the head only where an answer token is predicted.
What the model's own forward does behind its head (Gemma 2 caps, Granite divides, Cohere multiplies) is done here, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from errors import UserError
from models.base.families import FAMILIES, KNOWN_FORWARDS

#: What families beyond ``FAMILIES`` call such settings; which of them a forward heeds is found out by asking it.
_MULTIPLIERS, _DIVISORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"), ("logits_scaling",)
_CAPS = ("final_logit_softcapping",)
#: Tokens of the row that an unknown model is asked with.
_PROBE = 8


@dataclass(frozen=True)
class LogitRule:
    """What becomes of the head's products: ``cap tanh(scale x / cap)``; without a cap ``scale x``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits of any shape; the tensor itself where there is nothing to do."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def logit_rule(model: PreTrainedModel) -> LogitRule:
    """The rule of a causal LM, not wrapped by PEFT.

    A family's row says which settings its forward heeds. A model of another family is asked: its own forward reads a few
    tokens, and the rule that gives the same logits is taken.

    Raises:
        UserError: no rule does, or the model has no body and head to run apart.
    """
    # its own type, not its text model's: a vision model may treat the logits of the same body otherwise
    config = model.config
    family = KNOWN_FORWARDS.get(config.model_type)
    if family is None:
        return _asked(model)
    scale = getattr(config, family.multiplier) if family.multiplier else 1.0
    return LogitRule(scale / getattr(config, family.divisor) if family.divisor else scale,
                     getattr(config, family.cap) if family.cap else None)


def answer_logits(model: PreTrainedModel, hidden: Tensor, rule: LogitRule | None = None) -> Tensor:
    """Hidden states (rows, d) of the body -> logits (rows, vocabulary) as the model's own forward gives them, in fp32.

    Args:
        rule: the model's, where the caller has asked for it before.
    """
    # fp32 before scale and cap: bfloat16 logits of 10 have steps of 0.06
    # and back to where its caller works: a model may be spread over several devices
    return (rule or logit_rule(model))(model.get_output_embeddings()(hidden).float()).to(hidden.device)


def head_weight(head: nn.Module) -> Tensor:
    """The matrix (vocabulary, d) by which a head multiplies, LoRA included; gradients reach what of it is trained.

    Raises:
        UserError: a LoRA on the head with dropout, which is no one matrix.
    """
    weight = head.weight
    for name in getattr(head, "active_adapters", []):
        if name not in getattr(head, "lora_A", {}):
            continue
        if getattr(head.lora_dropout[name], "p", 0.0):
            raise UserError("--lora_dropout: a LoRA on the output head (--lora_targets) takes none here, because answers "
                            "are scored by one matrix; use --lora_dropout 0, or leave the head out")
        weight = weight + (head.lora_B[name].weight @ head.lora_A[name].weight * head.scaling[name]).to(weight.dtype)
    return weight


def _asked(model: PreTrainedModel) -> LogitRule:
    """The rule by which body and head give what ``model`` itself gives for a row of a few tokens."""
    kind = model.config.model_type
    head = model.get_output_embeddings()
    ids = (torch.arange(_PROBE, device=model.device) % model.config.get_text_config().vocab_size)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            found = model.base_model(input_ids=ids, use_cache=False)
            hidden = getattr(found, "last_hidden_state", None)
            if head is None or hidden is None:
                raise UserError(f"--model_name_or_path: {type(model).__name__} (model type '{kind}') has no body and output "
                                "head that can be run apart, as training and judging do; known: "
                                f"{', '.join(sorted(FAMILIES))}")
            wanted = model(input_ids=ids, use_cache=False).logits[0].float()
            plain = head(hidden[0]).float().to(wanted.device)
    finally:
        model.train(training)
    # both ran the same products; what is left is the rounding of scale and cap in the model's own precision
    near = float(wanted.abs().max()) * (1e-4 if head.weight.dtype == torch.float32 else 2e-2)
    for rule in _candidates(model):
        if float((rule(plain) - wanted).abs().max()) <= near:
            return rule
    raise UserError(f"--model_name_or_path: model type '{kind}' makes its logits otherwise than by its head and one of the "
                    f"settings {', '.join((*_MULTIPLIERS, *_CAPS))}; train or judge with one of "
                    f"{', '.join(sorted(FAMILIES))}. inference.py answers with this model too")


def _candidates(model: PreTrainedModel) -> Iterator[LogitRule]:
    """Rules that a config's settings allow, the plain one first."""
    config = model.config.get_text_config()
    scales = [1.0, *(float(value) for name in _MULTIPLIERS if (value := getattr(config, name, None))),
              *(1 / value for name in _DIVISORS if (value := getattr(config, name, None)))]
    caps = [None, *(value for name in _CAPS if (value := getattr(config, name, None)))]
    yield from (LogitRule(scale, cap) for cap in caps for scale in scales)
