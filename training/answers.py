"""The language-model loss on answer tokens, with logits only where there are labels."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.encode import IGNORE
from errors import UserError
from models.base.heads import logit_rule
from training.linear_loss import answer_loss


def predicting_places(labels: Tensor) -> Tensor:
    """Labels (batch, time) -> (answers,): places, in the flattened batch, of the tokens whose successor has a label."""
    answers = labels != IGNORE  # a tensor of its own: labels stay as they are
    # nothing comes before the first token of a row
    answers[:, 0] = False
    return answers.flatten().nonzero().squeeze(-1) - 1


class AnswerModel(nn.Module):
    """A causal LM whose forward returns the summed cross-entropy of its answer tokens.

    LoRA weights stay fp32 while products run in ``dtype`` under autocast. Rows are padded on the right, so causal
    attention alone keeps real tokens from seeing pads and no mask is passed (the fast attention path).
    """

    def __init__(self, lm: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.lm, self.dtype = lm, dtype
        # no mask is passed: real tokens would see the pads behind them
        if getattr(self.causal_lm.config.get_text_config(), "use_bidirectional_attention", None):
            raise UserError("--model_name_or_path: use_bidirectional_attention is set: tokens of this model see later ones, "
                            "so it cannot learn to write them; give a causal model")
        self.rule = logit_rule(self.causal_lm)
        if getattr(self.causal_lm, "is_gradient_checkpointing", False):
            # a base in few bits comes so; what is computed again needs our casting too
            self.activation_checkpointing_enable()

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model inside PEFT's wrapper, if there is one."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, Any] | None = None,
                                        **more: Any) -> None:
        """Recompute each layer in the backward pass, as ``torch.utils.checkpoint`` takes its arguments.

        transformers' Trainer asks for it by this name.
        """
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if not kwargs["use_reentrant"]:
            # layers are computed again after forward has ended: autocast is brought back by torch, PEFT's casting is not
            kwargs["context_fn"] = lambda: (contextlib.nullcontext(), self._casting())
        self.causal_lm.activation_checkpointing_enable(kwargs, **more)

    def get_input_embeddings(self) -> nn.Module:
        """Where --neftune_noise_alpha adds its noise."""
        return self.causal_lm.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, objectives: Tensor,
                predicting: Tensor | None = None) -> dict[str, Tensor]:
        """Ids and labels (batch, time) -> {"lm": summed loss of the model's own logits, "tokens": answer tokens}.

        Hidden states are (batch, time, d); only the (answers, d) that predict a label go on to the head. ``predicting``,
        (answers,), are their places as ``predicting_places`` finds them; looked for here, they make the host wait for a GPU.
        """
        if predicting is None:
            predicting = predicting_places(labels)
        model = self.causal_lm
        with self.precision(input_ids.device):
            # the body alone: its head would make logits of every position, and most are prompts and pads
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            loss = answer_loss(hidden.flatten(0, 1)[predicting], model.get_output_embeddings(),
                               labels.flatten()[predicting + 1], self.rule)
        return {"lm": loss, "tokens": labels[:, 1:].ne(IGNORE).sum()}

    @contextlib.contextmanager
    def precision(self, device: torch.device):
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32), self._casting():
            yield

    def _casting(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32 or not hasattr(self.lm, "peft_config"):
            return contextlib.nullcontext()
        # PEFT would copy every activation to fp32 in front of its fp32 weights; autocast casts those instead
        return disable_input_dtype_casting(self.lm)
