"""Race: models/fuse.py merge against mergekit on the same recipes, files and machine.

    python benchmarks/merge.py                        # 1.1B base + 3 experts, five pairs, every method
    python benchmarks/merge.py --layers 4 --pairs 1   # a short look
    python benchmarks/merge.py --beyond_ram           # a 3B shape inside --memory_gb 1
    python benchmarks/merge.py --growth growth.json   # cost by weights (0.05 to 1 B) and by models (2 to 12); growth.png

Whole commands are timed, start-up included, alternating A B A B; the peer runs from its own environment, made when missing.
Results are compared tensor by tensor. Disk: five times the model (11 GB for 1.1B, 30 GB for the 3B shape).

Growth: ours alone (--with_peer: mergekit too), seconds and peak memory, slopes over the upper half of each axis on doubly
logarithmic axes. Its limit is linear in bytes: every input read once and the result written once, at the speeds that files
had in this run. "work" is without the start-up that a bare import of the same modules takes. The models are merged beside
a base; linear takes the base as one more. Disk: 13 times the second size for the models, four times the largest for the
weights (8 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from growth import plot, told, with_slopes
from peers import peer_python

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
#: layers, hidden, FFN, key/value width, vocabulary
SHAPES = {"1.1B": (22, 2048, 5632, 256, 32000), "3B": (26, 3200, 8640, 3200, 32000)}
#: method -> parameters of every expert, of the recipe
RACES = {
    "linear": ("{weight: 0.33}", "{normalize: false}"),
    "task_arithmetic": ("{weight: 0.4}", "{normalize: false}"),
    "slerp": ("", "{t: 0.4}"),
    "dare_linear": ("{weight: 0.4, density: 0.3}", "{normalize: false}"),
    "ties": ("{weight: 0.4, density: 0.2}", "{normalize: true}"),
    "della": ("{weight: 0.4, density: 0.3, epsilon: 0.1}", "{normalize: true}"),
    "breadcrumbs": ("{weight: 0.4, density: 0.5, gamma: 0.01}", "{normalize: false}"),
}
#: Weights along the one axis, models beside the base along the other, and of which size these are.
GROWTH = {"weights": (5e7, 1e8, 2.5e8, 5e8, 1e9), "models": (2, 3, 4, 6, 8, 12), "at": 1e8}
BARS = {"linear": 5, "task_arithmetic": 4, "dare_linear": 3, "ties": 10, "della": 10}


def synthesise(folder: Path, seed: int, shape: tuple[int, ...], layers: int, base: Path | None) -> None:
    """A Llama-shaped bf16 checkpoint in three shards from a seed; with ``base``, that one plus a small task vector."""
    import torch
    from safetensors.torch import load_file, save_file

    if (folder / "config.json").is_file():
        return
    _, hidden, ffn, kv, vocab = shape
    folder.mkdir(parents=True, exist_ok=True)
    shapes = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocab, hidden))
    shapes["model.norm.weight"] = (hidden,)
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (hidden if n == "q" else kv, hidden) for n in "qkv"}
        shapes |= {f"{at}.self_attn.o_proj.weight": (hidden, hidden), f"{at}.mlp.gate_proj.weight": (ffn, hidden),
                   f"{at}.mlp.up_proj.weight": (ffn, hidden), f"{at}.mlp.down_proj.weight": (hidden, ffn),
                   f"{at}.input_layernorm.weight": (hidden,), f"{at}.post_attention_layernorm.weight": (hidden,)}
    names, weight_map = sorted(shapes), {}
    for part in range(3):
        file = f"model-{part + 1:05d}-of-00003.safetensors"
        old = load_file(base / file) if base else {}
        tensors = {}
        for j, name in list(enumerate(names))[part::3]:
            # a stream for each tensor of each checkpoint
            generator = torch.Generator().manual_seed(seed * 100_003 + j)
            noise = torch.empty(shapes[name], dtype=torch.bfloat16).normal_(0, 0.002 if base else 0.02, generator=generator)
            tensors[name] = old[name] + noise if base else noise
            weight_map[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": kv // (hidden // 32),
        "vocab_size": vocab, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "rms_norm_eps": 1e-5}))


def recipe(method: str, inputs: dict[str, Path], path: Path) -> Path:
    """The mergekit recipe that both sides read."""
    each, whole = RACES[method]
    lines = ["models:"]
    # slerp takes two models, linear takes the base as one of its inputs
    experts = [name for name in inputs if name != "base"]
    for name in ("base", "a") if method == "slerp" else ("base", *experts) if method == "linear" else experts:
        lines += [f"  - model: {inputs[name]}", *([f"    parameters: {each}"] if each else [])]
    lines += [f"merge_method: {method}", f"parameters: {whole}", "dtype: bfloat16"]
    if method != "linear":
        lines.append(f"base_model: {inputs['base']}")
    path.write_text("\n".join(lines) + "\n")
    return path


def apart(function: Callable, *words: Any) -> Any:
    """Call a function in a process of its own: a command started later inherits this one's peak memory as its floor."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *words).result()


def timed(command: list[str]) -> tuple[float, int]:
    """(seconds, peak resident bytes) of one command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    # read to its end before waiting: a full pipe would stop the command
    error = process.stderr.read()
    # wait4 gives this child's peak; getrusage would give the largest of all children
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"{' '.join(command)}\n{error.decode()[-3000:]}")
    return seconds, usage.ru_maxrss * 1024


def io_seconds(files: list[Path], out_bytes: int, folder: Path, workers: int) -> tuple[float, float]:
    """Seconds to read every input once, and to write and sync the output's bytes once, by as many workers."""
    def read(file: Path) -> None:
        buffer = bytearray(1 << 20)
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    def write(i: int) -> None:
        # random bytes: a file system that compresses would write zeros for nothing
        block = os.urandom(1 << 20)
        with (folder / f"limit{i}.bin").open("wb", buffering=0) as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, out_bytes // workers))
            for _ in range(out_bytes // workers >> 20):
                stream.write(block)
            os.fsync(stream.fileno())

    with ThreadPoolExecutor(workers) as pool:
        start = time.perf_counter()
        list(pool.map(read, files))
        middle = time.perf_counter()
        list(pool.map(write, range(workers)))
        end = time.perf_counter()
    for i in range(workers):
        (folder / f"limit{i}.bin").unlink()
    return middle - start, end - middle


def compare(ours: Path, theirs: Path, base: Path, names: list[str]) -> dict[str, float]:
    """Relative distance of the two results' task vectors, and the share of elements that differ, over sampled tensors."""
    import torch
    from safetensors import safe_open

    def read(folder: Path, name: str) -> torch.Tensor:
        index = folder / "model.safetensors.index.json"
        file = json.loads(index.read_text())["weight_map"][name] if index.is_file() else "model.safetensors"
        with safe_open(folder / file, "pt") as stream:
            return stream.get_tensor(name).float()

    apart = whole = energy = 0.0
    differ = total = 0
    for name in names:
        one, two, zero = (read(f, name) for f in (ours, theirs, base))
        apart += float((one - two).pow(2).sum())
        whole += float((two - zero).pow(2).sum())
        energy += float((one - zero).pow(2).sum())
        differ, total = differ + int((one != two).sum()), total + one.numel()
    return {"distance": (apart / whole) ** 0.5, "elements_differ": differ / total, "norm_ratio": (energy / whole) ** 0.5}


def in_turn(method: str, inputs: dict[str, Path], work: Path, pairs: int, peer: Path | None,
            workers: int) -> tuple[dict[str, list[tuple[float, int]]], Path, Path]:
    """(side -> (seconds, peak bytes) of every run, folders of the two results); without a peer's Python ours alone."""
    path = recipe(method, inputs, work / f"{method}.yml")
    ours_out, theirs_out = work / "results" / "outputs" / method, work / f"peer_{method}"
    ours = [sys.executable, str(ROOT / "models" / "fuse.py"), "merge", "--recipe", str(path), "--run_name", method,
            "--output_dir", str(work / "results")]
    rows: dict[str, list[tuple[float, int]]] = {"ours": [], **({"peer": []} if peer else {})}
    for _ in range(pairs):
        subprocess.run(["rm", "-rf", str(ours_out), str(theirs_out)], check=True)
        rows["ours"].append(timed(ours))
        if peer:
            rows["peer"].append(timed([str(peer.parent / "mergekit-yaml"), str(path), str(theirs_out), "--quiet",
                                       "--no-copy-tokenizer", "--no-write-model-card", "-j", str(workers)]))
        said = ", ".join(f"{side} {runs[-1][0]:.1f} s" for side, runs in rows.items())
        print(f"{method}, {len(inputs)} inputs: {said}", file=sys.stderr)
    return rows, ours_out, theirs_out


def race(method: str, inputs: dict[str, Path], work: Path, pairs: int, peer: Path, workers: int) -> dict:
    rows, ours_out, theirs_out = in_turn(method, inputs, work, pairs, peer, workers)
    mine, other = (statistics.median(s for s, _ in rows[k]) for k in ("ours", "peer"))
    # one tensor of each kind: wide, square, a vector
    sample = [f"model.layers.0.{n}" for n in ("mlp.up_proj.weight", "self_attn.o_proj.weight", "input_layernorm.weight")]
    result = {"method": method, "pairs": pairs, "seconds": mine, "peer_seconds": other, "ratio": other / mine,
              "bar": BARS.get(method), "all": rows, "peak_gib": max(b for _, b in rows["ours"]) / GIB,
              "peer_peak_gib": max(b for _, b in rows["peer"]) / GIB,
              **apart(compare, ours_out, theirs_out, inputs["base"], sample)}
    subprocess.run(["rm", "-rf", str(ours_out), str(theirs_out)], check=True)
    return result


def beyond_ram(work: Path, layers: int | None) -> dict:
    """A 3B shape with ``--memory_gb 1``: peak resident bytes of the merge above those of the bare interpreter."""
    shape = SHAPES["3B"]
    inputs = {n: work / "3B" / n for n in ("base", "a", "b", "c")}
    for seed, (name, folder) in enumerate(inputs.items()):
        apart(synthesise, folder, seed, shape, layers or shape[0], None if name == "base" else inputs["base"])
    path = recipe("ties", inputs, work / "3b.yml")
    # what the imports alone take: the promise is about what comes on top
    _, bare = timed([sys.executable, "-c", "import torch, models.merging.execute, models.operators.sparse"])
    seconds, peak = timed([sys.executable, str(ROOT / "models" / "fuse.py"), "merge", "--recipe", str(path), "--run_name",
                           "ram", "--output_dir", str(work / "results"), "--overwrite", "--memory_gb", "1"])
    return {"shape": "3B", "method": "ties", "seconds": seconds, "peak_gib": peak / GIB, "interpreter_gib": bare / GIB,
            "beyond_interpreter_gib": (peak - bare) / GIB, "promise_gib": 1}


def shape_of(weights: float) -> tuple[int, ...]:
    """The shape of about so many weights, as deep for its width as the 1.1B one, with the same vocabulary and ratios."""
    layers_of_one, width, _, _, vocabulary = SHAPES["1.1B"]
    found = []
    for hidden in range(256, 4097, 128):
        ffn, kv = round(hidden * 2.75 / 32) * 32, hidden // 8
        layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn
        layers = round((weights - 2 * vocabulary * hidden) / layer)
        if layers > 1:
            found.append((abs(layers / hidden * width / layers_of_one - 1), (layers, hidden, ffn, kv, vocabulary)))
    return min(found)[1]


def growth(work: Path, methods: list[str], pairs: int, peer: Path | None) -> dict[str, Any]:
    """Seconds and peak memory of whole merges along both axes of GROWTH, for each method."""
    # what a run starts with, whatever its inputs: the imports of a merge
    start_up, _ = min(timed([sys.executable, "-c", "import torch, models.merging.execute, models.operators.sparse"])
                      for _ in range(3))
    workers, axes, rates = len(os.sched_getaffinity(0)), {}, []

    def point(method: str, place: Path, count: int) -> dict[str, Any]:
        inputs = {name: place / name for name in ("base", *(f"m{i}" for i in range(count)))}
        for seed, (name, folder) in enumerate(inputs.items()):
            shape = json.loads((place / "shape.json").read_text())
            apart(synthesise, folder, seed, tuple(shape), shape[0], None if name == "base" else inputs["base"])
        rows, ours, theirs = in_turn(method, inputs, work, pairs, peer, workers)
        subprocess.run(["rm", "-rf", str(ours), str(theirs)], check=True)
        files = [file for folder in inputs.values() for file in folder.glob("*.safetensors")]
        read, written = (sum(file.stat().st_size for file in group) for group in (
            files, inputs["base"].glob("*.safetensors")))
        seconds = io_seconds(files, written, work, workers)
        rates.append((read / seconds[0], written / seconds[1]))
        found = {"weights": written // 2, "models": count, "read_bytes": read, "written_bytes": written}
        for side, name in (("ours", "ours"), ("peer", "mergekit")):
            if side in rows:
                found |= {name: statistics.median(s for s, _ in rows[side]),
                          f"{name} GiB": max(b for _, b in rows[side]) / GIB, f"{name} all": rows[side]}
        # a start-up that was slower than a whole run leaves no work to tell
        return found | {"work": max(found["ours"] - start_up, 0.0)}

    for method in methods:
        for axis in ("weights", "models"):
            points = []
            for value in GROWTH[axis]:
                place = work / (f"{value:.0f}" if axis == "weights" else f"{GROWTH['at']:.0f}")
                place.mkdir(parents=True, exist_ok=True)
                (place / "shape.json").write_text(json.dumps(shape_of(value if axis == "weights" else GROWTH["at"])))
                points.append(point(method, place, 3 if axis == "weights" else value))
            axes[f"{axis}, {method}"] = points
    # one speed for all sizes, the best that was seen: the limit is linear in bytes
    speeds = {"read": max(r for r, _ in rates), "write": max(w for _, w in rates)}
    for points in axes.values():
        for p in points:
            p["limit"] = p["read_bytes"] / speeds["read"] + p["written_bytes"] / speeds["write"]
    names = ("ours", "work", "mergekit", "limit", "ours GiB", "mergekit GiB")
    return {"start_up": start_up, "bytes_per_second": speeds, "pairs": pairs, "workers": workers,
            "axes": {title: with_slopes(title.partition(",")[0], points, names) for title, points in axes.items()}}


def table(results: list[dict]) -> str:
    lines = ["| method | pairs | ours s | mergekit s | ratio | bar | ours GiB | mergekit GiB | x I/O limit | distance |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for r in results:
        lines.append(f"| {r['method']} | {r['pairs']} | {r['seconds']:.1f} | {r['peer_seconds']:.1f} | {r['ratio']:.1f} | "
                     f"{r['bar'] or ''} | {r['peak_gib']:.2f} | {r['peer_peak_gib']:.2f} | "
                     f"{r['seconds'] / r['io_limit']:.1f} | {r['distance']:.1e} |")
    return "\n".join(lines)


def save(results: list[dict], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(results, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=None, help=f"default: {','.join(RACES)}; with --growth linear,ties")
    parser.add_argument("--layers", type=int, default=None, help="shorten the model")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--work", type=Path, default=None, help="where inputs and outputs lie; kept when given")
    parser.add_argument("--beyond_ram", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--growth", type=Path, default=None, help="measure growth instead; JSON here, the picture beside it")
    parser.add_argument("--with_peer", action="store_true", help="with --growth: mergekit too")
    args = parser.parse_args()
    methods = (args.methods or ("linear,ties" if args.growth else ",".join(RACES))).split(",")
    if set(methods) - set(RACES) or args.pairs < 1 or (args.growth and "slerp" in methods):
        parser.error(f"--methods: of {', '.join(RACES)} (slerp, of two models, does not grow); --pairs at least 1")
    with tempfile.TemporaryDirectory() as scratch:
        work = (args.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        results = []
        if args.growth:
            found = growth(work, methods, args.pairs, peer_python() if args.with_peer else None)
            args.growth.write_text(json.dumps(found, indent=2) + "\n")
            plot(found["axes"], {"s": ("ours", "work", "mergekit", "limit"), "GiB": ("ours GiB", "mergekit GiB")},
                 args.growth.with_suffix(".png"))
            print(told(found["axes"]))
            return
        if args.beyond_ram:
            results.append(beyond_ram(work, args.layers))
            print(json.dumps(results[0], indent=2))
        else:
            shape = SHAPES["1.1B"]
            inputs = {n: work / "1.1B" / n for n in ("base", "a", "b", "c")}
            for seed, (name, folder) in enumerate(inputs.items()):
                base = None if name == "base" else inputs["base"]
                apart(synthesise, folder, seed, shape, args.layers or shape[0], base)
            peer, workers = peer_python(), len(os.sched_getaffinity(0))
            for method in methods:
                read = ("base", "a") if method == "slerp" else inputs
                files = [f for name in read for f in inputs[name].glob("*.safetensors")]
                result = race(method, inputs, work, args.pairs, peer, workers)
                # after the race: the page cache is as warm as it was for the commands
                out_bytes = sum(f.stat().st_size for f in inputs["base"].glob("*.safetensors"))
                limits = [sum(io_seconds(files, out_bytes, work, workers)) for _ in range(3)]
                results.append(result | {"io_limit": statistics.median(limits), "io_limits": limits})
                save(results, args.json)  # hours of racing survive an interruption
            print(table(results))
        save(results, args.json)


if __name__ == "__main__":
    main()
