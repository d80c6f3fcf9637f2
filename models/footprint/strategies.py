"""How a step's memory is divided over devices: one process, DDP, FSDP2, DeepSpeed's ZeRO. No torch.

Numbers of what is gathered: FSDP2 (Zhao et al. 2023, section 3.3; torch.distributed.fsdp.fully_shard) keeps the root's own
parameters from forward to backward, and of the layers the one that computes and the next one that is on its way. ZeRO
(Rajbhandari et al. 2020, section 5) divides optimiser state (1), gradients (2) and parameters (3); its buffers are those of
DeepSpeed's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: DeepSpeed's reduce_bucket_size and stage3_max_live_parameters, in numbers.
BUCKET, LIVE = 5e8, 1e9


@dataclass(frozen=True)
class Footprint:
    """Bytes that a command holds on one device at the highest point, by purpose.

    Args:
        parameters, trained: numbers of the whole model, and of them those that train.
        weights: all parameters as they are held.
        gradients, optimiser: of what trains.
        activations: what the forward pass keeps for the backward pass, or the cache of keys and values.
        passing: the most that comes and goes beside them: logits, a layer's gradients, a matrix in fp32.
        communication: buffers between devices, and what is gathered of divided weights.
        context: what the process holds besides: libraries, kernels, products' workspace.
        unit, root: bytes of weights of one layer, and of embedding, head and last norm.
        data: held beside the model, on the device: task vectors, expert factors.
        allocator: what a GPU's caching allocator keeps beside the tensors.
        shared: whether DDP's processes share the optimiser's state out, and reduce gradients where they are.
        in_turn: whether gradients come as activations go, so that the larger of both counts: every weight trains, and no
            gradient outlives its step.
    """

    parameters: int
    trained: int = 0
    weights: float = 0.0
    gradients: float = 0.0
    optimiser: float = 0.0
    activations: float = 0.0
    passing: float = 0.0
    communication: float = 0.0
    context: float = 0.0
    unit: float = 0.0
    root: float = 0.0
    data: float = 0.0
    allocator: float = 0.0
    shared: bool = False
    in_turn: bool = False

    @property
    def tensors(self) -> float:
        """Bytes of tensors at the highest point, the process itself left out."""
        return (self.weights + self.data + self.gradients + self.optimiser + self.activations + self.passing
                + self.communication - self.apart)

    @property
    def apart(self) -> float:
        """Bytes that are counted above and not held together: the smaller of gradients and of what they replace."""
        return min(self.gradients, self.activations + self.passing) if self.in_turn else 0.0

    @property
    def peak(self) -> float:
        """All of it."""
        return self.tensors + self.allocator + self.context

    def parts(self) -> dict[str, float]:
        """Purpose -> bytes, for a table."""
        return {"weights": self.weights, "task vectors, experts": self.data, "gradients": self.gradients,
                "optimiser": self.optimiser, "activations": self.activations, "passing": self.passing,
                "communication": self.communication, "not at once": -self.apart, "allocator": self.allocator,
                "context": self.context}


@dataclass(frozen=True)
class Strategy:
    """What is divided by the number of devices, and how one asks for it.

    Args:
        launch: what stands before the command's file; empty: python.
    """

    called: str
    launch: str = ""
    weights: bool = False
    gradients: bool = False
    optimiser: bool = False


def _config(name: str) -> str:
    return f"accelerate launch --config_file scripts/accelerate/{name}.yaml --num_processes {{devices}}"


#: --plan_strategy -> what it divides.
TABLE: dict[str, Strategy] = {
    "one": Strategy("one process"),
    "ddp": Strategy("DDP", _config("ddp")),
    "fsdp2": Strategy("FSDP2", _config("fsdp2"), weights=True, gradients=True, optimiser=True),
    "zero2": Strategy("ZeRO-2", _config("zero2"), gradients=True, optimiser=True),
    "zero3": Strategy("ZeRO-3", _config("zero3"), weights=True, gradients=True, optimiser=True),
}


def divided(whole: Footprint, strategy: str, devices: int) -> Footprint:
    """What each of ``devices`` holds of a step whose parts on one device are ``whole``; micro-batches are each one's own."""
    if devices == 1:
        return whole
    row = TABLE[strategy]
    share = {True: 1 / devices, False: 1.0}
    # DDP's buckets: a second copy, reduced while the backward pass goes on
    buffers = 0.0 if whole.shared else whole.gradients
    if strategy == "fsdp2":
        # the root's own weights stay; of the layers the one at work, the next one, and a gradient on its way
        buffers = whole.root + 2 * whole.unit + (whole.gradients * whole.unit / whole.weights if whole.weights else 0)
    elif strategy.startswith("zero"):
        buffers = min(whole.gradients, 4 * BUCKET)
        if row.weights:
            buffers += min(whole.weights, LIVE * whole.weights / max(whole.parameters, 1))
    return replace(
        whole, in_turn=whole.in_turn and not strategy.startswith("zero"),  # its buckets keep what they are given
        weights=whole.weights * share[row.weights], data=whole.data * share[row.weights],
        gradients=whole.gradients * share[row.gradients], optimiser=whole.optimiser * share[row.optimiser or whole.shared],
        communication=buffers)
