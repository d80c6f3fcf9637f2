"""Pico judges with planted weights: attention is a plain mean, the FFN is off, so every logit can be worked out by hand.

A token's embedding is 1 in dimension 0 and, where its text holds an X, 3 in dimension 1. ``expected`` does the arithmetic
again in numpy, apart from torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from pico import pico_tokenizer

HIDDEN, VOCAB, EPS = 32, 384, 1e-6


def flags(**more) -> SimpleNamespace:
    """What judges read of a command's flags."""
    return SimpleNamespace(**{
        "cache_dir": None, "dtype": "float32", "device": "cpu", "threads": 1, "seed": 42, "judge_max_length": 0,
        "judge_batch_tokens": 256, "judge_prompts": "", "judge_compat": "none", "judge_guard": "auto", **more})


def embeddings() -> np.ndarray:
    tokenizer = pico_tokenizer(VOCAB)
    table = np.zeros((VOCAB, HIDDEN), np.float64)
    table[:, 0] = 1
    for text, i in tokenizer.get_vocab().items():
        table[i, 1] = 3 * ("X" in text)
    return table


def make_judge(folder: Path, labels: int, rows: Mapping[int, tuple[float, float]], *, positions: int = 1024,
               names: tuple[str, ...] = (), chat: bool = True) -> Path:
    """Save a planted judge.

    Args:
        labels: of its classification head; 0: a causal language model whose head has a row per token.
        rows: head row -> its weights on dimensions 0 and 1; all other rows are 0.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = pico_tokenizer(VOCAB)
    if not chat:
        tokenizer.chat_template = None
    known = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else \
        {"num_labels": labels} if labels else {}
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=positions, tie_word_embeddings=False, rms_norm_eps=EPS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **known)
    model = (LlamaForSequenceClassification if labels else LlamaForCausalLM)(config)
    head = model.score if labels else model.lm_head
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.from_numpy(embeddings()))
        attention.v_proj.weight.copy_(torch.eye(HIDDEN))
        attention.o_proj.weight.copy_(torch.eye(HIDDEN))
        for row, weights in rows.items():
            head.weight[row, :2] = torch.tensor(weights)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def expected(ids: list[int], rows: Mapping[int, tuple[float, float]], count: int) -> np.ndarray:
    """The ``count`` logits after the last of ``ids``: mean of the normalised tokens, added to the last, normalised, head."""
    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS)

    tokens = embeddings()[ids]
    state = norm(tokens[-1] + norm(tokens).mean(0))
    head = np.zeros((count, HIDDEN))
    for row, weights in rows.items():
        head[row, :2] = weights
    return head @ state


def ids_of(text: str) -> list[int]:
    return pico_tokenizer(VOCAB)(text, add_special_tokens=False)["input_ids"]


def token(text: str) -> int:
    """The first token of a text."""
    return ids_of(text)[0]


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))
