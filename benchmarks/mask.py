"""Race: SOMF's mask training against the published arrangement, on the shape of the embedded model (134M parameters).

    python benchmarks/mask.py --json race.json                 # full task vectors and LoRA factors, five pairs each
    python benchmarks/mask.py --layers 4 --pairs 1 --steps 2   # a short look
    python benchmarks/mask.py --cut 128                        # rows as short as the somf preset makes them
    python benchmarks/mask.py --tokens 64                      # every row 64 tokens: nothing is padded on either side
    python benchmarks/mask.py --device cuda                    # on a GPU; memory is then the device's

Published: RelaxedBernoulli draws and the merge inside autograd (functional_call), and a live second mask model as reference,
also drawn at every step; rows padded to the longest, logits of all positions. Ours is what align_basemodel.py runs:
``models/mask/bank.py``, batches without padding (``training/packing.py``), the reference computed once per pair. Both sides
hold the same random fp32 weights, task vectors, preference pairs and AdamW; the published side shares base and task vectors
between policy and reference, which is kinder to it than the original. The pairs' tokens are random, their lengths those of
the embedded data. Each run is a process of its own, alternating A B A B, and its peak memory is that process's.

Both processes let waiting threads spin briefly, as our commands do, and use the fused AdamW that transformers 5 defaults to.
Ours keeps freed memory, as align_basemodel.py does; ``--keep both`` gives that to the published side too.

Before a race, one step of both sides with the same noise, logits and reference must give the same loss and logit gradients,
or nothing is timed. A pair's first epoch also pays for its reference; ``with reference`` adds that pass to our steps.
The limit is what the products with the step's weights take at the speed of a GEMM measured beside it; attention's own
products and the head's second pass are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
#: hidden, FFN, heads, key/value heads, vocabulary, layers: SmolLM2-135M
SHAPE = (576, 1536, 9, 3, 49152, 30)
RANK, BETA, TEMPERATURE = 256, 0.1, 0.5
BARS = {"speed": 3.0, "memory": 0.5}
#: Greatest relative difference of losses and gradients: sums of 1e8 fp32 numbers in another order.
TOLERANCE = 1e-3


def build(mode: str, layers: int, device: str = "cpu") -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(model, its masked parameters, their task vectors), random from a seed."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, ffn, heads, kv, vocab, _ = SHAPE
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, tie_word_embeddings=True)).eval()
    if mode == "lora":
        # the published LoRA track: rank 256 on q and v
        wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"],
                                                   bias="none", task_type="CAUSAL_LM", init_lora_weights=False))
        model = wrapped.get_base_model().eval()
    model = model.to(device).requires_grad_(False)
    parameters = {n: p for n, p in model.named_parameters() if mode == "full" or "lora_" in n}
    generator = torch.Generator().manual_seed(1)
    deltas = {n: torch.empty(p.shape).normal_(0, 2e-3, generator=generator).to(device) for n, p in parameters.items()}
    return model, parameters, deltas


def answer_logps(logits: Any, labels: Any) -> Any:
    """Summed log-probability of each row's answer, from logits (rows, time, vocabulary) of all positions."""
    wanted = labels[:, 1:]
    # clamp: gather needs an id where nothing is scored; the product below takes it out again
    logps = logits[:, :-1].log_softmax(-1).gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    return (logps * (wanted >= 0)).sum(1)


def dpo(logps: Any, reference: Any) -> Any:
    import torch.nn.functional as F

    chosen, rejected = (logps - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def clock() -> tuple[float, float]:
    """Wall time, and this process's own processor time, which a busy machine does not stretch; a GPU has done its work."""
    if (torch := sys.modules.get("torch")) and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def draw_and_merge(scores: dict[str, Any], bases: dict[str, Any], deltas: dict[str, Any]) -> dict[str, Any]:
    """The published merge: a relaxed Bernoulli mask per tensor, divided by its mean, inside autograd."""
    import torch
    from torch.distributions import RelaxedBernoulli

    merged, heat = {}, torch.tensor(TEMPERATURE, device=next(iter(scores.values())).device)
    for name, score in scores.items():
        mask = RelaxedBernoulli(heat, logits=score).rsample()
        merged[name] = bases[name] + mask / mask.mean() * deltas[name]
    return merged


def called(model: Any, merged: dict[str, Any], rows: dict[str, Any]) -> Any:
    """A model's answer log-probabilities under other weights."""
    import torch

    inputs = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"], "use_cache": False}
    return answer_logps(torch.func.functional_call(model, merged, (), inputs).logits, rows["labels"])


def pack(model: Any) -> Any:
    """The function (batch) -> answer log-probabilities that our trainers call."""
    from trl.trainer.utils import add_fused_lm_head

    from training.packing import OUTPUTS, pack_forward

    add_fused_lm_head(model, outputs=OUTPUTS)
    if not pack_forward(model):
        raise SystemExit("this model's batches cannot be packed")
    return lambda rows: model(**rows, fused_lm_head=True).log_probs.sum(1)


def published(mode: str, layers: int, data: list[dict[str, Any]], device: str = "cpu") -> list[list[float]]:
    import copy

    import torch

    model, parameters, deltas = build(mode, layers, device)
    # as the original holds them (spec 4.7): the policy's weights, a base that the merge starts from, a second model
    second, bases = copy.deepcopy(model), {n: p.detach().clone() for n, p in parameters.items()}
    logits = {n: torch.zeros_like(p).requires_grad_(True) for n, p in parameters.items()}
    others = {n: torch.zeros_like(p) for n, p in parameters.items()}
    optimizer = torch.optim.AdamW(list(logits.values()), lr=5e-3, fused=True)
    seconds: list[list[float]] = []
    for rows in data:
        start = clock()
        with torch.no_grad():
            reference = called(second, draw_and_merge(others, bases, deltas), rows)
        dpo(called(model, draw_and_merge(logits, bases, deltas), rows), reference).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append([now - then for now, then in zip(clock(), start, strict=True)])
    return seconds


def make_bank(mode: str, parameters: dict[str, Any], deltas: dict[str, Any]) -> Any:
    """Our mask over these parameters; takes the task vectors out of ``deltas``."""
    from models.mask.bank import MaskBank, make_slot
    from models.mask.settings import Settings
    from models.mask.slots import Spec
    from models.mask.units import Units

    settings, slots = Settings(space="weights" if mode == "full" else "factors"), []
    for name, live in list(parameters.items()):
        part = "weight" if mode == "full" else name.rpartition("lora_")[2][0]
        spec = Spec(name, name, part, tuple(live.shape), Units(tuple(live.shape)))
        slots.append(make_slot(spec, live, live.detach().clone(), [deltas.pop(name)], settings))
    return MaskBank(slots, settings)


def ours(mode: str, layers: int, data: list[dict[str, Any]],
         device: str = "cpu") -> tuple[list[list[float]], dict[str, Any]]:
    import torch

    from models.mask.bank import Draw
    from models.mask.memory import memory_plan
    from models.mask.settings import Rule

    model, parameters, deltas = build(mode, layers, device)
    bank = make_bank(mode, parameters, deltas)
    optimizer = torch.optim.AdamW(list(bank.parameters()), lr=5e-3, fused=True)
    call = pack(model)
    references, waited = [], []
    with torch.no_grad():  # the aligned model, once; later epochs and runs read these from disk
        for rows in data:
            start = clock()
            references.append(call(rows))
            waited.append([now - then for now, then in zip(clock(), start, strict=True)])
    bank.attach()
    seconds: list[list[float]] = []
    for i, (rows, reference) in enumerate(zip(data, references, strict=True)):
        start = clock()
        bank.write(Draw(f"race|{i}", TEMPERATURE))
        dpo(call(rows), reference).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append([now - then for now, then in zip(clock(), start, strict=True)])
    total = sum(p.numel() for p in model.parameters())
    plans = {name: memory_plan([slot.spec for slot in bank.slots], Rule(), 1, storage, logit, total, storage).per_scalar
             for name, storage, logit in (("float32", 4, 4), ("bfloat16", 2, 2))}
    return seconds, {"plans": plans, "reference": waited, "work": statistics.mean(
        work(model, parameters, rows) for rows in data[1:])}


def work(model: Any, parameters: dict[str, Any], rows: dict[str, Any]) -> int:
    """Operations of a step's products with weights, packed.

    2 per weight and token forwards, 2 backwards to the activations, 2 more to the weights under a mask; the output head
    counts for answer tokens only.
    """
    head = model.get_output_embeddings().weight
    masked = {id(p) for p in parameters.values()}
    body = sum(p.numel() * (6 if id(p) in masked else 4) for p in model.parameters() if p.dim() == 2 and p is not head)
    ends = head.numel() * (6 if id(head) in masked else 4)
    answers = int((rows["labels"] >= 0).sum())
    prompts = int(rows["attention_mask"].sum()) - answers
    return body * (prompts // 2 + answers) + ends * answers


def compare(mode: str, layers: int, rows: dict[str, Any], device: str = "cpu") -> dict[str, float]:
    """One step of both sides on the same noise, logits and reference: relative difference of losses and logit gradients."""
    from unittest.mock import patch

    import torch

    from models.mask.bank import Draw
    from models.mask.concrete import noise, uniform
    from models.mask.fused.launch import device_bits, has_triton

    model, parameters, deltas = build(mode, layers, device)
    with torch.no_grad():
        reference = called(model, {}, rows)
    generator = torch.Generator().manual_seed(3)
    logits = {n: torch.randn(p.shape, generator=generator).to(device).requires_grad_(True) for n, p in parameters.items()}
    bases = {n: p.detach().clone() for n, p in parameters.items()}
    # RelaxedBernoulli asks torch.rand once per tensor, in this order; it gets the numbers that ours counts
    # on a GPU they are drawn by kernels, from a stream of their own
    bits = device_bits if device == "cuda" and has_triton() else lambda key, count, place: noise(key, 0, count, place)
    counted = (uniform(bits(f"race|0|{n}", p.numel(), p.device)).view(p.shape) for n, p in parameters.items())
    with patch.object(torch, "rand", lambda *_, **__: next(counted)):
        merged = draw_and_merge(logits, bases, deltas)
    theirs = dpo(called(model, merged, rows), reference)
    theirs.backward()
    bank = make_bank(mode, parameters, deltas)
    bank.load_logits({n: v.detach().reshape(-1) for n, v in logits.items()})
    bank.attach()
    bank.write(Draw("race|0", TEMPERATURE))
    mine = dpo(pack(model)(rows), reference)
    mine.backward()
    gap = size = 0.0
    for name, parameter in zip(bank.names, bank.logits, strict=True):
        want = logits[name].grad.reshape(-1).double()
        # fp64: sums of 1e8 squares, whose difference is what is measured
        gap += float((parameter.grad.double() - want).square().sum())
        size += float(want.square().sum())
    mine, theirs = mine.item(), theirs.item()
    return {"loss": abs(mine - theirs) / abs(theirs), "gradient": (gap / size) ** 0.5}


def gemm(device: str = "cpu", seconds: float = 1.0) -> float:
    """fp32 operations per second of a square matrix product, the best of as many as fit in ``seconds``."""
    import torch

    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start, _ = clock()
        a @ b
        best = min(best, clock()[0] - start)
    return 2 * size**3 / best


def child(side: str, mode: str, layers: int, steps: int, pairs: int, tokens: int | None, cut: int,
          threads: int, keep: str, device: str = "cpu") -> None:
    """One run in this process; prints its figures as JSON."""
    from runtime import keep_freed_memory, short_waits

    short_waits()  # as the commands do
    if keep == "both" or (keep == "ours" and side == "ours"):
        keep_freed_memory()  # as align_basemodel.py does
    import torch

    torch.set_num_threads(threads)
    from peft import LoraConfig  # noqa: F401 - imported before the floor is read
    from transformers import LlamaForCausalLM  # noqa: F401

    from benchmarks.preference_pairs import batches

    # what torch and transformers take before any model: both sides have it
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    data = [{name: rows.to(device) for name, rows in batch.items()}
            for batch in batches(steps + 1, pairs, tokens, SHAPE[4], cut)]
    if side == "compare":
        print(json.dumps(compare(mode, layers, data[0], device)))
        return
    facts: dict[str, Any] = {}
    if side == "ours":
        seconds, facts = ours(mode, layers, data, device)
    else:
        seconds = published(mode, layers, data, device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device == "cuda":
        peak, floor = torch.cuda.max_memory_allocated(), 0
    # the first step allocates; the others hold pairs of different lengths, so their mean counts
    wall, own = (statistics.mean(step[i] for step in seconds[1:]) for i in (0, 1))
    if side == "ours":
        facts["reference"] = statistics.mean(step[0] for step in facts["reference"][1:])
    print(json.dumps({"seconds": wall, "cpu": own, "all": seconds, "peak": peak, "floor": floor, "gemm": gemm(device),
                      **facts}))


def run(side: str, mode: str, args: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, str(Path(__file__).resolve()), "--child", side, "--mode", mode, "--layers", str(args.layers),
             "--steps", str(args.steps), "--batch", str(args.batch), "--threads", str(args.threads), "--keep", args.keep,
             "--cut", str(args.cut), "--device", args.device, *(["--tokens", str(args.tokens)] if args.tokens else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])})
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def race(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    equal = run("compare", mode, args)
    if not all(value <= TOLERANCE for value in equal.values()):  # NaN is no agreement either
        raise SystemExit(f"{mode}: the sides do not compute the same: relative difference of the loss {equal['loss']:.1e}, "
                         f"of the gradient {equal['gradient']:.1e}; at most {TOLERANCE:g}")
    print(f"{mode}: loss within {equal['loss']:.1e}, gradient within {equal['gradient']:.1e}", file=sys.stderr)
    # in turn, so that a busy quarter of an hour meets both sides
    rows: dict[str, list[dict[str, Any]]] = {"ours": [], "published": []}
    for _ in range(args.pairs):
        for side, found in rows.items():
            found.append(run(side, mode, args))
            last = found[-1]
            print(f"{mode}: {side} {last['seconds']:.2f} s/step, peak {last['peak'] / GIB:.2f} GiB", file=sys.stderr)
    mine, theirs = (statistics.median(row["seconds"] for row in rows[side]) for side in rows)
    cpu, more = (statistics.median(row["cpu"] for row in rows[side]) for side in rows)
    peak, other = (statistics.median(row["peak"] for row in rows[side]) for side in rows)
    floors = [statistics.median(row["floor"] for row in rows[side]) for side in rows]
    reference = statistics.median(row["reference"] for row in rows["ours"])
    speed, known = statistics.median(row["gemm"] for row in rows["ours"]), rows["ours"][0]
    limit = known["work"] / speed
    return {"mode": mode, "pairs": args.pairs, "layers": args.layers, "batch": args.batch, "tokens": args.tokens,
            "cut": args.cut, "threads": args.threads, "keep": args.keep, "dtype": "float32", "device": args.device,
            "difference": equal,
            "seconds": mine, "published_seconds": theirs, "ratio": theirs / mine, "cpu_seconds": cpu,
            "published_cpu_seconds": more, "cpu_ratio": more / cpu, "reference_seconds": reference,
            "ratio_with_reference": theirs / (mine + reference), "gemm_gflops": speed / 1e9,
            "limit_seconds": limit, "of_limit": limit / mine, "peak_gib": peak / GIB,
            "published_peak_gib": other / GIB, "memory_ratio": peak / other,
            "beyond_imports_ratio": (peak - floors[0]) / (other - floors[1]), "bars": BARS,
            "bytes_per_masked": known["plans"], "all": rows}


def table(results: list[dict[str, Any]]) -> str:
    columns = {
        "task vectors": lambda r: r["mode"], "pairs": lambda r: str(r["pairs"]),
        "ours s/step": lambda r: f"{r['seconds']:.2f}",
        "published s/step": lambda r: f"{r['published_seconds']:.2f}", "ratio": lambda r: f"{r['ratio']:.1f}",
        "with reference": lambda r: f"{r['ratio_with_reference']:.1f}", "CPU time ratio": lambda r: f"{r['cpu_ratio']:.1f}",
        "bar": lambda r: f"{BARS['speed']:g}", "ours GiB": lambda r: f"{r['peak_gib']:.2f}",
        "published GiB": lambda r: f"{r['published_peak_gib']:.2f}", "share": lambda r: f"{r['memory_ratio']:.2f}",
        "bar ": lambda r: f"{BARS['memory']:g}", "limit s": lambda r: f"{r['limit_seconds']:.2f}",
        "of the limit": lambda r: f"{r['of_limit']:.0%}", "gradient within": lambda r: f"{r['difference']['gradient']:.0e}",
        "bytes per masked scalar, fp32 / bf16":
            lambda r: f"{r['bytes_per_masked']['float32']:.0f} / {r['bytes_per_masked']['bfloat16']:.0f}"}
    rows = [[shown(r) for shown in columns.values()] for r in results]
    return "\n".join(f"| {' | '.join(row)} |" for row in (list(columns), ["---"] * len(columns), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", default="full,lora")
    parser.add_argument("--layers", type=int, default=SHAPE[5], help="shorten the model")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run, after one untimed; 4 see every length")
    parser.add_argument("--batch", type=int, default=2, help="preference pairs per step")
    parser.add_argument("--tokens", type=int, default=None,
                        help="of every row, half of them the prompt (default: the lengths of the embedded pairs)")
    parser.add_argument("--cut", type=int, default=512, help="tokens that a row keeps (64 or more); the somf preset: 128")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", choices=("ours", "both", "none"), default="ours",
                        help="who keeps freed memory: ours, as align_basemodel.py does; both sides; none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", choices=("ours", "published", "compare"), help=argparse.SUPPRESS)
    parser.add_argument("--mode", choices=("full", "lora"), default="full", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.mode, args.layers, args.steps, args.batch, args.tokens, args.cut, args.threads,
              args.keep, args.device)
        return
    if min(args.pairs, args.steps, args.layers) < 1 or args.cut < 64 or set(args.modes.split(",")) - {"full", "lora"}:
        parser.error("--pairs, --steps and --layers must be at least 1, --cut at least 64, --modes full, lora or full,lora")
    results = []
    for mode in args.modes.split(","):
        results.append(race(mode, args))
        if args.json:
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
