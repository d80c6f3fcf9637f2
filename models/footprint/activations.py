"""What a forward pass keeps for the backward pass, in bytes a token and layer, and what comes and goes beside it. No torch.

Counted tensor by tensor as our models save them (tests/models/footprint/ holds the sums to torch's allocations), with c the
bytes of the compute type, d, f, q, k the widths of hidden state, FFN, queries and keys:

    norm        4 d, the hidden state in fp32; as much again where its weight trains
    attention   GPU: c (2 q + 2 k) + 4 heads, fused. CPU: c (q + 2 k) + c heads x keys, the softmax of every query
    FFN         3 c f: gate, act(gate), up; c f more, their product, where what reads it trains
    LoRA        of each module: c in, its input, and where dropout is on the mask, 1 byte a number on a GPU, c on a CPU
    every weight trains: the inputs of the projections, once each in fp32, a copy for each projection under autocast
    fused MoE   3 c f: gate, up, dropout mask; 4 d for the router, which is fp32; 3 E R c for E experts of R ranks
    soup        c out of every adapter and module, its output before the weight
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from models.footprint.shapes import ATTENTION, Shape

#: (tokens, f) tensors of the compute type that an FFN's backward pass holds beside what was saved: of a dense one, and of a
#: fused MoE's, which makes what it did not keep anew for every slot (models/moe/expert_sum.py).
_DENSE, _FUSED = 4.5, 11.0
#: Rows of logits at a time (training/linear_loss.py); of pairs rows (TRL's TOKEN_CHUNK_SIZE) and entries of the vocabulary
#: (training/packing.py).
CHUNK_ROWS, CHUNK_PAIRS, CHUNK_WORDS = 256, 4096, 8192


@dataclass(frozen=True)
class Pass:
    """A micro-batch and how it is computed.

    Args:
        rows, tokens: of the batch; a preference pair is a row of both answers (training/packing.py).
        answers: tokens that predict a label.
        compute: bytes of the compute type.
        cuda: whether a GPU computes.
        checkpointing: whether layers are computed again in the backward pass.
        modules: that bear a LoRA; none where every weight trains, or none.
        dropout: whether the LoRA's is on.
        every: whether every weight trains, held in fp32.
        masked: whether the weights of ``modules`` themselves get gradients.
        experts, ranks: of a fused MoE, 0: none; ranks of the aligned and the tuned factors together.
        pairs: whether rows are preference pairs, whose head is TRL's.
        mixed: modules of every adapter of a soup, whose weighted outputs are kept.
    """

    rows: int
    tokens: int
    answers: int
    compute: int
    cuda: bool
    checkpointing: bool = False
    modules: tuple[str, ...] = ()
    dropout: bool = False
    every: bool = False
    masked: bool = False
    experts: int = 0
    ranks: int = 0
    pairs: bool = False
    mixed: tuple[tuple[str, ...], ...] = ()

    @property
    def all(self) -> int:
        """Tokens of the batch."""
        return self.rows * self.tokens

    @property
    def cast(self) -> bool:
        """Whether weights in fp32 compute in fewer bits, and so are copied."""
        return (self.every or self.masked) and self.compute < 4


def kept(shape: Shape, step: Pass) -> float:
    """Bytes that all layers keep until the backward pass."""
    n, d = step.all, shape.hidden
    if step.checkpointing:
        # a layer's input; in fp32 where the weights are
        stream = 4 if step.every or step.masked else step.compute
        return n * d * stream * shape.layers + 4 * n * d
    parts = _norm(shape, step), attention(shape, step), _ffn(shape, step), _inputs(shape, step)
    # nothing flows back into frozen embeddings: the first layer's attention keeps nothing but what a LoRA of its own reads
    open_layers = shape.layers if step.every or set(step.modules) & set(ATTENTION) else shape.layers - 1
    norms = 2 * shape.layers + 1 if step.every else 2 * open_layers + (1 if open_layers < shape.layers else 0)
    return n * (norms * parts[0] + open_layers * parts[1] + shape.layers * (parts[2] + parts[3]))


def passing(shape: Shape, step: Pass) -> float:
    """The most bytes beside what is kept: of the head, or of a layer's backward pass; with checkpointing all it keeps."""
    n, f = step.all, shape.intermediate
    layer = (_FUSED if step.experts else _DENSE) * n * f * step.compute
    if not step.cuda:
        # gradients as large as the softmax itself, of the weights and of the scores; by then the layer's FFN is let go
        scores = 2 * step.compute * shape.heads * step.tokens * n
        ffn = replace(step, modules=tuple(name for name in step.modules if name not in ATTENTION))
        layer = max(layer, scores - n * (_norm(shape, step) + _ffn(shape, step) + _inputs(shape, ffn, attends=False)))
    if step.checkpointing:
        layer += n * (2 * _norm(shape, step) + attention(shape, step) + _ffn(shape, step) + _inputs(shape, step))
    return max(layer, head(shape, step))


def head(shape: Shape, step: Pass) -> float:
    """Bytes of output head and loss at their highest."""
    words, answers = shape.vocabulary, step.answers
    if step.every and not step.pairs:
        # torch's own loss: logits, in fp32, their log-softmax, its gradient
        return answers * words * (step.compute + 4 + 4 + 4)
    if step.pairs:
        # TRL's buffer is a chunk wide whatever the vocabulary; without Triton seven tiles in fp32 come and go beside it
        rows = min(answers, CHUNK_PAIRS)
        tiles = rows * (CHUNK_WORDS * step.compute + (0 if step.cuda else 7 * 4 * min(words, CHUNK_WORDS)))
        return tiles + 4 * shape.hidden * (answers + (words if step.every else 0))
    # logits in fp32, and the products or logsumexp's temporary; and the hidden states' gradient
    return min(answers, CHUNK_ROWS) * words * (4 + 4) + answers * shape.hidden * step.compute * 2


def attention(shape: Shape, step: Pass) -> float:
    """Bytes a token of scores, keys and values."""
    q, k = shape.queries, shape.keys
    if step.cuda:
        # a packed row has a mask of its own, with which keys and values are repeated for every head
        return step.compute * (4 * q if step.pairs else 2 * q + 2 * k) + 4 * shape.heads
    # every weight in fp32 gives scores in fp32, whose softmax is copied for the product
    each = 4 + step.compute if step.cast else step.compute
    return step.compute * (q + 2 * k) + each * shape.heads * step.tokens


def _norm(shape: Shape, step: Pass) -> float:
    return (8 if step.every else 4) * shape.hidden + 4


def _ffn(shape: Shape, step: Pass) -> float:
    """Gate, up and what is made of them."""
    return 3 * step.compute * shape.intermediate


def _inputs(shape: Shape, step: Pass, attends: bool = True) -> float:
    """What projections read that train, or whose change does; ``attends``: those of the attention too."""
    c, d, f, q = step.compute, shape.hidden, shape.intermediate, shape.queries
    if step.every:
        return c * ((2 if step.cast else 1) * d + f + (((3 if step.cast else 1) * d + q) if attends else 0))
    mask = (1 if step.cuda else c) if step.dropout else 0
    if step.experts:
        own = (2 * c + mask) * d + 4 * d + 3 * step.experts * step.ranks * c
        return own + shape.widths(tuple(m for m in step.modules if m in ATTENTION))[0] * (c + mask)
    if not step.modules:
        # of a soup each adapter's output, for the gradient of its weight
        return c * sum(shape.widths(modules)[1] for modules in step.mixed)
    if step.dropout or step.cast or c < 4:
        # each module's input is a tensor of its own: dropped, or cast
        return shape.widths(step.modules)[0] * (c + mask)
    # in fp32 without dropout modules that read one tensor share it
    named = set(step.modules)
    return c * (d * bool(named & {"q_proj", "k_proj", "v_proj"}) + d * bool(named & {"gate_proj", "up_proj"})
                + q * ("o_proj" in named) + f * ("down_proj" in named))


def answering(shape: Shape, rows: int, tokens: int, compute: int, cuda: bool) -> float:
    """Bytes of the largest moment of a forward pass that keeps nothing."""
    n, d = rows * tokens, shape.hidden
    scores = 0 if cuda else 2 * compute * shape.heads * tokens * n
    return n * max(3 * compute * shape.intermediate + (4 + 2 * compute) * d, 0) + scores
