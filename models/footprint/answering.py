"""What answering and scoring hold: weights, the cache of keys and values, the largest moment of a pass without gradients."""

from __future__ import annotations

from typing import Any

from models.footprint.activations import answering
from models.footprint.shapes import FFN, Shape, shape_of
from models.footprint.strategies import Footprint
from models.footprint.training import CONTEXT, Place, base_bytes, fused

#: Tokens of a prompt where nobody says.
PROMPT = 256
#: Rows of fp32 logits that a likelihood needs at a time (evaluator/scoring/likelihood.py).
_LOGIT_ROWS = 256
#: What a GPU's caching allocator keeps of a cache that grows by a copy at each token, as a share of its last size: an H200
#: kept 0.9 to 1.6 (docs/performance.md).
_OUTGROWN = 1.6
#: Tokens of the passes of a router that starts from data (models/llama_moe.py).
_ROUTER = (8, 256)


def inference(args: Any, shape: Shape, place: Place, tokens: int = 0) -> Footprint:
    """``inference.py``: the run that takes most.

    Args:
        tokens: of the longest prompt; 0: 256.
    """
    rows, prompt = args.batch_size, tokens or PROMPT
    # factors of every expert, in the compute type
    data = max((place.compute * experts * shape.lora(rank, FFN) for experts, rank in (
        fused(args.results / "outputs" / run, 8) for run in args.runs if run and "@" not in run) if experts), default=0.0)
    layer = 2 * shape.keys * rows * (prompt + args.max_new_tokens) * place.compute
    # the prompts' pass; or a new token's: logits in the compute type, in fp32, their softmax, and a layer's longer cache
    prompts = answering(shape, rows, prompt, place.compute, place.cuda) + rows * prompt * shape.hidden * place.compute
    moment = max(prompts, rows * shape.vocabulary * (place.compute + 8) + layer)
    return _held(shape, place, layer * shape.layers, moment, data)


def scoring(args: Any, shape: Shape, place: Place) -> Footprint | None:
    """An evaluator: the model where likelihoods are asked for, or the largest judge; None where neither is loaded."""
    found = []
    if _asks_model(args):
        found.append(_passed(shape, place, args.batch_tokens))
    for _, model in getattr(args, "named_judges", ()):
        if model and (judge := shape_of(model)):
            found.append(_passed(judge, place, args.judge_batch_tokens))
    return max(found, key=lambda one: one.peak, default=None)


def building(args: Any, shape: Shape, place: Place) -> Footprint:
    """``models/llama_moe.py``: the base, the experts' factors as read and as stacked, and a data router's passes."""
    experts = len(args.expert_names)
    data = 2 * 4.0 * experts * shape.lora(8, FFN)
    moment = answering(shape, *_ROUTER, place.compute, place.cuda) if args.router_init == "data" else 0.0
    return _held(shape, place, 0.0, moment, data)


def _asks_model(args: Any) -> bool:
    """Whether an evaluator scores with the model itself, and not its answers alone."""
    if getattr(args, "answers", None):
        return False
    return args.hhh if hasattr(args, "hhh") else True


def _passed(shape: Shape, place: Place, tokens: int) -> Footprint:
    logits = min(tokens, _LOGIT_ROWS) * shape.vocabulary * (place.compute + 8)
    return _held(shape, place, 0.0, max(answering(shape, 1, tokens, place.compute, place.cuda), logits), 0.0)


def _held(shape: Shape, place: Place, cache: float, moment: float, data: float) -> Footprint:
    weights = base_bytes(shape, place)
    return Footprint(shape.parameters, 0, weights, activations=cache, passing=moment, data=data,
                     allocator=_OUTGROWN * cache if place.cuda else 0.0, context=CONTEXT[place.cuda],
                     unit=weights * shape.layer / shape.parameters, root=shape.embeddings * place.compute)
