"""Race: fusing LoRA adapters on their files against PEFT's add_weighted_adapter, at Llama-2-7B shapes.

    python benchmarks/adapters.py --layers 32 --pairs 5 --json adapters.json
    python benchmarks/adapters.py --growth growth.json    # ours by hidden size and number of adapters, with a picture

Inputs are synthesised from a seed. Each measurement is a fresh process that reads the two adapters, fuses them (timed) and
writes the result; sides alternate (A B A B ..), medians count, peaks are of the whole process (PEFT: with transformers,
which it loads). Results are compared as weight changes B A over all modules, and with the exact weighted sum: "to sum" of a
result at rank 8 is at least what any rank 8 must lose. The peer runs at its best: full_matrices=False in its SVD, and base
weights that take no memory (a zero stretched to shape); the row at its default says so. ``limit`` is the time that moving
the factors once, or the multiplications of two thin QRs at the speed of a matrix product, take on this machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
          "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
          "mlp.down_proj": (4096, 11008)}
ONE = "one"
WEIGHTS = (0.6, 0.4)
#: Hidden sizes along the one axis (two adapters), adapters of rank 8 along the other (at this hidden size).
GROWTH = {"hidden": (512, 1024, 2048, 4096, 8192), "adapters": (2, 3, 4, 6, 8, 12), "at": 4096}
#: What grows: name -> (method, its parameters).
GROWN = {"cat": ("cat", {}), "svd to r 8": ("svd", {"rank": 8}), "TIES at r 8": ("ties", {"density": 0.5, "rank": 8})}


@dataclass(frozen=True)
class Race:
    """A row: what is fused, how each side calls it.

    Args:
        inputs: ranks of the two adapters; ``only``: a single 4096 x 4096 matrix instead of all layers.
        ours: (method, parameters); methods that end in _svd are those of --compat peft.
        peer: options of add_weighted_adapter, or None: not raced.
        slow: whether the peer takes a minute and more; left out with --quick.
    """

    name: str
    inputs: tuple[int, int]
    only: bool
    ours: tuple[str, dict[str, Any]]
    peer: dict[str, Any] | None
    slow: bool = False


_SVD = {"combination_type": "svd", "svd_rank": 8}
_TIES = {"combination_type": "ties", "density": 0.5}
RACES = (
    Race("cat, r 8 + 16", (8, 16), False, ("cat", {}), {"combination_type": "cat"}),
    Race("svd to r 8, one 4096 x 4096", (8, 16), True, ("svd", {"rank": 8}), _SVD | {"svd_full_matrices": False}, True),
    Race("svd to r 8, one, peer's default", (8, 16), True, ("svd", {"rank": 8}), _SVD, True),
    Race("svd to r 24 (no loss), one", (8, 16), True, ("svd", {}), None),
    Race("svd to r 8, r 8 + 16", (8, 16), False, ("svd", {"rank": 8}), None),
    Race("sum at r 8 (linear), r 8 + 8", (8, 8), False, ("linear", {}), {"combination_type": "linear"}),
    Race("TIES at r 8, r 8 + 8 (peer: on factors)", (8, 8), False, ("ties", {"density": 0.5, "rank": 8}), _TIES),
    Race("PEFT's ties_svd to r 8, one", (8, 8), True, ("ties_svd", {"density": 0.5, "rank": 8}),
         {"combination_type": "ties_svd", "density": 0.5, "svd_rank": 8, "svd_full_matrices": False}, True),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="decoder layers (default: 32, as in Llama-2-7B)")
    parser.add_argument("--pairs", type=int, default=5, help="A B pairs of each race (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads of both sides; 0: all cores")
    parser.add_argument("--seed", type=int, default=0, help="of the synthesised adapters")
    parser.add_argument("--quick", action="store_true", help="without the peer's dense SVDs (a minute and more each)")
    parser.add_argument("--json", type=Path, help="write the table as JSON too")
    parser.add_argument("--growth", type=Path, help="measure growth instead; JSON here, the picture beside it")
    parser.add_argument("--worker", nargs=3, metavar=("SIDE", "RACE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        side, number, folder = args.worker
        # side "growth": the name of what grows, in the place of a number
        print(json.dumps(grown(number, Path(folder), args.threads) if side == "growth" else
                         work(side, RACES[int(number)], Path(folder), args.threads)))
        return
    if args.growth:
        from growth import plot, told

        found = growth(args)
        args.growth.write_text(json.dumps(found, indent=2) + "\n")
        plot(found["axes"], {"s": ("ours", "limit"), "MB": ("peak MB", "limit MB")}, args.growth.with_suffix(".png"))
        print(told(found["axes"]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        limits = _machine(args.threads)
        synthesise(folder, args.layers, args.seed)
        for number, race in enumerate(RACES):
            peer = race.peer is not None and not (race.slow and args.quick)
            rows.append(run(race, number, folder, args, peer, limits))
            print(f"{race.name}: {rows[-1]['ours_s']:.3f} s against {_cell(rows[-1]['peer_s'], '.3f')} s", file=sys.stderr)
        rows.append(_row("whole command: svd to r 8, r 8 + 8, with the conflict report",
                         [_worker("command", 0, folder, args.threads) for _ in range(args.pairs)], []))
    print(table(rows))
    if args.json:
        content = {"layers": args.layers, "pairs": args.pairs, "machine": limits, "rows": rows}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


def synthesise(folder: Path, layers: int, seed: int) -> None:
    """Adapters of rank 8, 8 and 16 on all linear layers, and the same cut to the first matrix."""
    import torch

    from models.adapters.files import write_adapter

    for name, rank in (("8a", 8), ("8b", 8), ("16b", 16)):
        # a stream for each adapter
        generator = torch.Generator().manual_seed(seed * 3 + len(name) + rank + ord(name[-1]))
        modules = {f"model.layers.{i}.{kind}": (torch.randn(rank, into, generator=generator) / into**0.5,
                                                torch.randn(out, rank, generator=generator) * 0.02)
                   for i in range(layers) for kind, (out, into) in SHAPES.items()}
        first = next(iter(modules))
        for place, held, targets in ((name, modules, {kind.rpartition(".")[2] for kind in SHAPES}),
                                     (f"{name}-{ONE}", {first: modules[first]}, {first})):
            (folder / place).mkdir()
            write_adapter(folder / place, held, targets, {"base_model_name_or_path": "synthetic"})


def growth(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of each of GROWN along both axes, each measurement a fresh process.

    The limit in MB is what the factors of all inputs and of the result hold.
    """
    import torch
    from growth import with_slopes

    from models.adapters.files import read_adapter, write_adapter

    machine, axes = _machine(args.threads), {}
    for axis in ("hidden", "adapters"):
        for value in GROWTH[axis]:
            hidden, count = (value, 2) if axis == "hidden" else (GROWTH["at"], value)
            shapes = {kind: tuple(round(side * hidden / 4096) for side in shape) for kind, shape in SHAPES.items()}
            with tempfile.TemporaryDirectory() as place:
                for i in range(count):
                    generator = torch.Generator().manual_seed(args.seed * 1000 + i)  # a stream for each adapter
                    (folder := Path(place, str(i))).mkdir()
                    modules = {f"model.layers.{layer}.{kind}": (torch.randn(8, into, generator=generator) / into**0.5,
                                                                torch.randn(out, 8, generator=generator) * 0.02)
                               for layer in range(args.layers) for kind, (out, into) in shapes.items()}
                    targets = {kind.rpartition(".")[2] for kind in shapes}
                    write_adapter(folder, modules, targets, {"base_model_name_or_path": "synthetic"})
                for name in GROWN:
                    runs = [_worker("growth", name, Path(place), args.threads) for _ in range(args.pairs)]
                    made = read_adapter(Path(place, "out"))
                    sizes = [_bytes(read_adapter(Path(place, str(i)))) for i in range(count)] + [_bytes(made)]
                    sides = sum(out + into for out, into in shapes.values()) * args.layers
                    # as in the race: QRs of all factors side by side, then the products with their axes
                    flops = 0 if name == "cat" else sides * 8 * (8 * count) ** 2
                    axes.setdefault(f"{axis}, {name}", []).append({
                        axis: value, "ours": statistics.median(r["seconds"] for r in runs),
                        "peak MB": max(r["peak_mb"] for r in runs), "all": [r["seconds"] for r in runs],
                        "limit": max(sum(sizes) / machine["copy"], flops / machine["product"]),
                        "limit MB": sum(sizes) / 2**20})
                    print(f"{axis} {value}, {name}: {axes[f'{axis}, {name}'][-1]['ours']:.3f} s", file=sys.stderr)
    names = ("ours", "limit", "peak MB", "limit MB")
    return {"layers": args.layers, "pairs": args.pairs, "machine": machine,
            "axes": {title: with_slopes(title.partition(",")[0], points, names) for title, points in axes.items()}}


def _bytes(adapter: Any) -> int:
    return sum(a.nbytes + b.nbytes for a, b in adapter.modules.values())


def run(race: Race, number: int, folder: Path, args: argparse.Namespace, peer: bool,
        machine: dict[str, float]) -> dict[str, Any]:
    """All measurements of a race, its medians and the distances of the results."""
    import torch

    from models.adapters.files import Adapter, delta_distance, read_adapter

    found: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    for _ in range(args.pairs):
        # A B A B: what the machine does meanwhile meets both sides alike
        for side in ("ours", "peer") if peer else ("ours",):
            found[side].append(_worker(side, number, folder, args.threads))
    sources = [read_adapter(folder / name) for name in _names(race)]
    # factors side by side are the weighted sum itself, at the sum of the ranks: nothing is lost
    exact = Adapter("exact", folder, {}, {
        m: (torch.cat([s.modules[m][0] for s in sources]),
            torch.cat([w * s.modules[m][1] for s, w in zip(sources, WEIGHTS, strict=True)], 1)) for m in sources[0].modules})
    ours, theirs = (read_adapter(folder / side) if found[side] else None for side in ("ours", "peer"))
    row = _row(race.name, found["ours"], found["peer"])
    return row | {"limit_s": _limit(race, exact, machine), "ours_to_sum": delta_distance(ours, exact),
                  "peer_to_sum": theirs and delta_distance(theirs, exact),
                  "ours_to_peer": theirs and delta_distance(ours, theirs)}


def _row(name: str, ours: list[dict[str, float]], peer: list[dict[str, float]]) -> dict[str, Any]:
    times = {"ours": [m["seconds"] for m in ours], "peer": [m["seconds"] for m in peer]}
    median = {side: statistics.median(values) if values else None for side, values in times.items()}
    return {"race": name, "ours_s": median["ours"], "peer_s": median["peer"],
            "ratio": median["peer"] / median["ours"] if peer else None,
            # the worst peak, the median time: memory that was needed once is needed
            "ours_peak_mb": max(m["peak_mb"] for m in ours),
            "peer_peak_mb": max(m["peak_mb"] for m in peer) if peer else None, "all_s": times}


def _worker(side: str, number: int | str, folder: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--threads", str(threads), "--worker", side, str(number), str(folder)]
    # a fresh process: nothing is warm, and peak memory is this measurement's alone
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}, race {number} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def work(side: str, race: Race, folder: Path, threads: int) -> dict[str, float]:
    """One measurement, in a process of its own: read, fuse (timed), write. Side "command": the whole command, timed."""
    if side == "command":
        return _command(folder, threads)
    prepare = _ours if side == "ours" else _peer
    return _measured(folder / side, threads, lambda out: prepare(race, [folder / name for name in _names(race)], out))


def grown(name: str, folder: Path, threads: int) -> dict[str, float]:
    """One measurement of growth, in a process of its own: the adapters of a folder, equal weights."""
    places = sorted((place for place in folder.iterdir() if place.name.isdigit()), key=lambda place: int(place.name))
    return _measured(folder / "out", threads, lambda out: _fused(GROWN[name], places, [1 / len(places)] * len(places), out))


def _measured(out: Path, threads: int, prepare) -> dict[str, float]:
    import torch

    torch.set_num_threads(threads or torch.get_num_threads())
    out.mkdir(exist_ok=True)
    call, save = prepare(out)
    # the first call of LAPACK loads it
    torch.linalg.svd(torch.linalg.qr(torch.eye(9, 4, dtype=torch.float64)).R)
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    save(result)
    return {"seconds": seconds, "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    """Of this process alone: ru_maxrss would count what the parent held when it started us."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _ours(race: Race, folders: Sequence[Path], out: Path):
    return _fused(race.ours, folders, WEIGHTS, out)


def _fused(method: tuple[str, dict[str, Any]], folders: Sequence[Path], weights: Sequence[float], out: Path):
    from models.adapters.files import read_adapter, targets_of, write_adapter
    from models.adapters.fuse import fuse
    from models.adapters.methods import ADAPTER_METHODS, PEFT_METHODS

    adapters, (name, given) = [read_adapter(folder) for folder in folders], method
    row = (PEFT_METHODS if name.endswith("_svd") else ADAPTER_METHODS)[name]
    # imports are not what is raced
    row.load()
    parameters = row.configured(name, given, [])
    return (lambda: fuse(adapters, row, parameters, weights, {}, 0),
            lambda done: write_adapter(out, {m: f.pair for m, f in done.items()}, targets_of(adapters), {}))


def _peer(race: Race, folders: Sequence[Path], out: Path):
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    from models.adapters.files import read_adapter, targets_of, write_adapter

    source = read_adapter(folders[0])
    tree = torch.nn.Module()
    for module, (a, b) in source.modules.items():
        *path, last = module.split(".")
        parent = tree
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        linear = torch.nn.Linear(1, 1, bias=False)
        # a zero stretched to shape: the base costs the peer nothing
        linear.weight = torch.nn.Parameter(torch.zeros(1, 1).expand(b.shape[0], a.shape[1]), requires_grad=False)
        linear.in_features, linear.out_features = a.shape[1], b.shape[0]
        parent.add_module(last, linear)
    model = PeftModel.from_pretrained(tree, folders[0], adapter_name="one")
    model.load_adapter(folders[1], adapter_name="two")

    def save(_: None) -> None:
        state = get_peft_model_state_dict(model, adapter_name="both", save_embedding_layers=False)
        factors = {m: tuple(state[f"base_model.model.{m}.lora_{side}.weight"] for side in "AB") for m in source.modules}
        write_adapter(out, factors, targets_of([source]), {})

    return lambda: model.base_model.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", **race.peer), save


def _command(folder: Path, threads: int) -> dict[str, float]:
    """From two files to one, conflict report included, as a person runs it; imports are part of the time."""
    start = time.perf_counter()
    from models.fuse import main as fuse

    fuse(["adapters", "--adapters", f"{folder}/8a,{folder}/8b", "--weights", "0.6,0.4", "--method", "svd", "--rank", "8",
          "--output_dir", f"{folder}/results", "--overwrite", "--threads", str(threads)])
    return {"seconds": time.perf_counter() - start, "peak_mb": _peak_mb()}


def _names(race: Race) -> list[str]:
    second = f"{race.inputs[1]}b"
    return [f"{name}-{ONE}" if race.only else name for name in (f"{race.inputs[0]}a", second)]


def _machine(threads: int) -> dict[str, float]:
    """Speed of a copy (bytes/s, read and written) and of a matrix product (FLOP/s, fp64) on this machine, now."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    big, square = torch.ones(1 << 26), torch.randn(1024, 1024, dtype=torch.float64)
    other = torch.empty_like(big)
    # the best of five: a limit must not be slowed by what else runs
    copy, product = (min(_timed(call) for _ in range(5)) for call in (lambda: other.copy_(big), lambda: square @ square))
    return {"copy": 2 * big.nbytes / copy, "product": 2 * 1024**3 / product}


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _limit(race: Race, exact: Any, machine: dict[str, float]) -> float:
    """Seconds: every factor read once and the result written, or two thin QRs and the products with their axes."""
    moved = sum(a.nbytes + b.nbytes for a, b in exact.modules.values()) * 2
    if race.ours[0] == "cat":
        return moved / machine["copy"]
    rank = sum(race.inputs)
    # forming R and then Q costs 4 m R^2 for each side; the result's axes 2 m R r
    flops = sum((a.shape[1] + b.shape[0]) * (4 * rank**2 + 4 * rank**2) for a, b in exact.modules.values())
    return max(moved / machine["copy"], flops / machine["product"])


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown. Distances are ||D1 - D2|| / the larger norm."""
    columns = {"ours s": ("ours_s", ".4f"), "PEFT s": ("peer_s", ".4f"), "ratio": ("ratio", ",.1f"),
               "limit s": ("limit_s", ".4f"), "ours MB": ("ours_peak_mb", ".0f"), "PEFT MB": ("peer_peak_mb", ".0f"),
               "ours to sum": ("ours_to_sum", ".1e"), "PEFT to sum": ("peer_to_sum", ".1e"),
               "ours to PEFT": ("ours_to_peer", ".1e")}
    lines = [f"| race | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for r in rows:
        lines.append(f"| {r['race']} | " + " | ".join(_cell(r.get(key), form) for key, form in columns.values()) + " |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
