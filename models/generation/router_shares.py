"""What a fused model's routers did with texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from models.generation.answers import encoded, left_pad, pad_id
from models.moe.files import moe_layers
from models.moe.layer import SharedMoe
from models.moe.packed import PackedMoe
from models.moe.router import mean_probabilities
from models.runs import Loaded


@torch.inference_mode()
def router_shares(loaded: Loaded, texts: Sequence[str], batch_size: int = 16) -> np.ndarray:
    """Mean router probability of each expert in each layer, each text counting the same: (layers, experts), fp64."""
    layers = moe_layers(loaded.model)
    # texts of a length together, so that little is padded; a sum does not ask for their order
    rows = sorted(encoded(loaded, texts), key=len)
    total = np.zeros((len(layers), layers[0].num_experts))
    try:
        for layer in layers:
            layer.record = True
        for start in range(0, len(rows), batch_size):
            ids, mask = left_pad(rows[start : start + batch_size], pad_id(loaded.tokenizer), loaded.device)
            loaded.model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            probabilities = [_recorded(layer).to(mask.device) for layer in layers]
            means = mean_probabilities(probabilities, mask)  # (layers, batch, experts)
            total += means.sum(1).float().cpu().numpy()
    finally:
        # what a layer recorded would live as long as the model
        for layer in layers:
            layer.record, layer.probabilities = False, None
    return total / len(rows)


def _recorded(layer: SharedMoe | PackedMoe) -> Tensor:
    if layer.probabilities is None:
        raise RuntimeError("a fused layer recorded nothing: the model did not run it")
    return layer.probabilities
