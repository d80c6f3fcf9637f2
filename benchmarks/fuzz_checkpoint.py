"""Feed damaged weight files and indexes to the checkpoint reader and compare it with the safetensors package.

    python benchmarks/fuzz_checkpoint.py --minutes 10

What we accept, safetensors must accept too and read to the same bytes; what we refuse, a UserError must name. Guided by
coverage where atheris is installed (pip install atheris), else by the same mutations alone. The smallest input for each kind
of answer is kept in tests/models/checkpoints/corpus/checkpoint, which the tests replay; inputs that break the rule go to
--crashes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "models" / "checkpoints" / "corpus" / "checkpoint"
#: Longest input: faults lie in the frame and the header, and small inputs are tried faster.
_MOST_BYTES = 4096
_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_INTEGERS = (0, 1, 2, 4, 8, 12, -1, 2**31, 2**48, 2**48 + 1, 2**63, 2**64 - 1, 2**64)
_ODD = (
    None, True, False, 0.0, -0.0, 2.0, 1e308, float("nan"), "", "a", "b", "F32", "BF16", "I8", "BOOL", "F4", "F8_E8M0",
    "\0", "\ud800", "ä", "__metadata__", *_SHARDS, f"../{_SHARDS[0]}", f"/{_SHARDS[0]}", "..", "gone.safetensors", "w.bin",
    [], [0], [0, 0], [1] * 65, [2**24, 2**25], [2**40, 2**40, 0], {}, {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
)
_TOKENS = (
    b'"', b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"-", b"-0", b"0",
    b"1e2", b".5", b"\\", b"\\ud800", b"\\u0000", b"NaN", b"Infinity", b"true", b"null", b"9" * 25, b"[" * 200,
)


@dataclass
class Tally:
    """What a run has seen."""

    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    crashes: list[str] = field(default_factory=list)


class Ground:
    """Folders to try inputs in: one for weight files, one with two sound shards for indexes, decoys around them."""

    def __init__(self, root: Path) -> None:
        self.file, self.index = root / "file" / "model.safetensors", root / "index" / "model.safetensors.index.json"
        self.placed = {"a": _SHARDS[0], "b": _SHARDS[0], "c": _SHARDS[1]}
        for folder in (self.file.parent, self.index.parent):
            folder.mkdir()
        for folder in (root, self.index.parent):
            for shard in _SHARDS:
                names = [name for name, place in self.placed.items() if place == shard]
                header = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
                (folder / shard).write_bytes(_framed(json.dumps(header).encode(), "".join(names).encode()))
            # a pickle as decoy: an index that names it must be refused
            (folder / "w.bin").write_bytes(b"\x80\x04.")

    def judge(self, data: bytes) -> list[str]:
        """Try an input, as an index when it starts like one; returns the kinds of answer, "refused: ..." or "accepted: ...".

        Raises:
            AssertionError: the reader is more lenient than safetensors, reads other values, or names no file.
        """
        from errors import UserError
        from models.checkpoints.reader import Checkpoint

        place = self.index if data.startswith(b"{") else self.file
        place.unlink(missing_ok=True)  # ext4 would flush a file to disk that is cut to nothing and written again
        place.write_bytes(data)
        try:
            checkpoint = Checkpoint.open(place.parent)
        except UserError as error:
            problems = error.problems
        else:
            with checkpoint:
                return self._check_index(checkpoint, data) if place == self.index else _check_file(checkpoint, data)
        assert problems, "refused without a reason"
        for problem in problems:
            assert problem.startswith(str(place.parent)), f"names no file: {problem}"
            assert problem.isprintable(), f"would break a log: {problem!r}"
            # a message may not carry a hostile file into a log
            assert len(problem) < 2000, f"too long: {problem}"
        return sorted({"refused: " + _kind(problem, place) for problem in problems})

    def _check_index(self, checkpoint: Any, data: bytes) -> list[str]:
        placed = json.loads(data)["weight_map"]
        # an index may name fewer shards, but for those that it names it must tell the whole truth
        wanted = {name: shard for name, shard in self.placed.items() if shard in placed.values()}
        assert placed == wanted, f"accepts {placed}"
        assert {name: info.file.name for name, info in checkpoint.tensors.items()} == wanted
        assert all(_bytes_of(checkpoint, name) == name.encode() for name in wanted)
        return [f"accepted: index of {len(checkpoint.files)} shards"]


def _check_file(checkpoint: Any, data: bytes) -> list[str]:
    from safetensors import SafetensorError, deserialize

    try:
        theirs = dict(deserialize(data))
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses what we accept: {error}") from None
    assert set(theirs) == set(checkpoint.tensors)
    for name, info in checkpoint.tensors.items():
        assert (theirs[name]["dtype"], theirs[name]["shape"]) == (info.dtype, list(info.shape))
        assert _bytes_of(checkpoint, name) == bytes(theirs[name]["data"])
    infos = checkpoint.tensors.values()
    features = {"zero-size": any(not i.nbytes for i in infos), "scalar": any(not i.shape for i in infos),
                "unaligned": any(i.start % 8 for i in infos), "no metadata": not checkpoint.metadata, "file": True}
    return [f"accepted: {feature}" for feature, there in features.items() if there]


def _bytes_of(checkpoint: Any, name: str) -> bytes:
    """A tensor's bytes, read in two pieces."""
    import torch

    from models.checkpoints.reader import KINDS

    info = checkpoint.tensors[name]
    count = info.nbytes // KINDS[info.dtype][0]
    out = torch.empty(info.nbytes, dtype=torch.uint8)
    pieces = ((0, count // 2), (count // 2, count - count // 2))
    # in two pieces, because a merge reads blocks: offsets inside a tensor are tried as well
    return b"".join(bytes(checkpoint.read(info, first, n, out).view(torch.uint8).numpy()) for first, n in pieces)


def _kind(problem: str, place: Path) -> str:
    """A problem without its values: two inputs that are refused for the same reason have the same kind."""
    text = re.sub(r"^[^:]*: ", "index: " if place.suffix == ".json" else "", problem)
    text = re.sub(r"b?'(?:\\.|[^'\\])*'|b?\"(?:\\.|[^\"\\])*\"", "X", text).split(";")[0].split(" (e.g.")[0]
    # brackets inside out, until none is left
    while (shorter := re.sub(r"\[[^][{}]*\]|\{[^][{}]*\}", "X", text)) != text:
        text = shorter
    return re.sub(r"-?\b\d[\d.e+]*|\b(?:None|True|False|nan|inf)\b|(?<=of )[A-Z][A-Z0-9_]+(?= needs)", "X", text)


def seeds() -> list[bytes]:
    """Real files and an index to start from, and what earlier runs found."""
    import torch
    from safetensors.torch import save

    tensors = {"model.embed.weight": torch.ones(3, 2, dtype=torch.bfloat16), "norm": torch.tensor(1.5),
               "none": torch.zeros(0, 5, dtype=torch.bool)}
    index = {"metadata": {"total_size": 3}, "weight_map": {"a": _SHARDS[0], "b": _SHARDS[0], "c": _SHARDS[1]}}
    rng = random.Random(0)
    return [save(tensors, {"format": "pt"}), *(sound_file(rng) for _ in range(8)), json.dumps(index).encode(),
            json.dumps({"weight_map": {"c": _SHARDS[1]}}).encode(),
            *(path.read_bytes() for path in sorted(CORPUS.glob("*")) if path.is_file())]


def sound_file(rng: random.Random) -> bytes:
    """A correct file of a few random tensors, in any order."""
    from models.checkpoints.reader import KINDS

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    place = 0
    for i in range(rng.randint(1, 4)):
        dtype, shape = rng.choice(list(KINDS)), [rng.choice((0, 1, 2, 3)) for _ in range(rng.randint(0, 3))]
        nbytes = KINDS[dtype][0]
        for size in shape:
            nbytes *= size
        header[rng.choice(("a", "ä", "layer.weight")) + str(i)] = \
            {"dtype": dtype, "shape": shape, "data_offsets": [place, place + nbytes]}
        place += nbytes
    items = list(header.items())
    rng.shuffle(items)
    return _framed(json.dumps(dict(items)).encode(), rng.randbytes(place))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: to a JSON value, to the text, to the frame around it (length, bytes of data)."""
    index = data.startswith(b"{")
    length = len(data) if index else int.from_bytes(data[:8], "little")
    text, rest = (data, b"") if index else (data[8:8 + length], data[8 + length:])
    for _ in range(rng.randint(1, 3)):
        roll = rng.random()
        if roll < 0.6:
            text = _restructured(text, rng)
        elif roll < 0.85:
            text = _scrambled(text, rng)
        else:
            rest = rest[:rng.randint(0, len(rest))] if rng.random() < 0.5 else rest + bytes(rng.choice((1, 4, 8, 64)))
    if index:
        return text
    if rng.random() < 0.9:
        return _framed(text, rest)
    whole = _framed(text, rest, rng.choice((*_INTEGERS, len(text) + rng.randint(-9, 9), 100_000_001)))
    return whole if rng.random() < 0.7 else whole[:rng.randint(0, len(whole))]


def _framed(text: bytes, rest: bytes, length: int | None = None) -> bytes:
    claimed = len(text) if length is None else length
    return min(max(claimed, 0), 2**64 - 1).to_bytes(8, "little") + text + rest


def _restructured(text: bytes, rng: random.Random) -> bytes:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return _scrambled(text, rng)
    nodes = list(_nodes(content))
    if not nodes:
        return json.dumps({"a": rng.choice(_ODD)}).encode()
    parent, key = rng.choice(nodes)
    value, roll = parent[key], rng.random()
    if roll < 0.3 and type(value) is int:
        parent[key] = value + rng.choice((-8, -4, -1, 1, 4, 8))
    elif roll < 0.5 and isinstance(value, list) and len(value) == 2 and {*map(type, value)} == {int}:
        by = rng.choice((-8, -4, 1, 4, 8))  # both offsets: holes and overlaps
        parent[key] = [value[0] + by, value[1] + by]
    elif roll < 0.5:
        parent[key] = rng.choice(_INTEGERS) if type(value) is int else rng.choice(_ODD)
    elif roll < 0.65:
        other, place = rng.choice(nodes)
        parent[key] = json.loads(json.dumps(other[place]))  # a copy: a value inside itself has no text
    elif roll < 0.8 and isinstance(parent, dict):
        parent[str(rng.choice((*_ODD, *parent)))] = parent.pop(key)
    elif roll < 0.9:
        del parent[key]
    elif isinstance(parent, dict):
        parent[str(rng.choice(_ODD))] = rng.choice(_ODD)
    else:
        parent.insert(key, rng.choice(_INTEGERS))
    return json.dumps(content, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")


def _nodes(content: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, outermost first."""
    found, waiting = [], [content]
    while waiting:
        parent = waiting.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        found += [(parent, key) for key in keys]
        waiting += [parent[key] for key in keys]
    return found


def _scrambled(text: bytes, rng: random.Random) -> bytes:
    start = rng.randint(0, len(text))
    stop = min(len(text), start + rng.randint(0, 12))
    roll = rng.random()
    if roll < 0.4:
        return text[:start] + rng.choice(_TOKENS) + text[start:]
    if roll < 0.6:
        return text[:start] + rng.choice(_TOKENS) + text[stop:]
    if roll < 0.7:
        return text[:start] + bytes([rng.randrange(256)]) + text[start + 1:]
    if roll < 0.8:
        return text[:start] + text[stop:]
    if roll < 0.9 and (members := list(re.finditer(rb'"[^"]*": *(?:\{[^{}]*\}|"[^"]*"|\[[^]]*\])', text))):
        member = rng.choice(members)  # the same key twice
        return text[:member.start()] + member[0] + b"," + text[member.start():]
    return text + b" " * rng.randint(1, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long (10)")
    parser.add_argument("--seed", type=int, default=42, help="of the mutations (42)")
    parser.add_argument("--crashes", type=Path, default=ROOT / "results" / "fuzz", help="for inputs that break the rule")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _run(args, Path(folder))


def _run(args: argparse.Namespace, folder: Path) -> None:
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris:
        with atheris.instrument_imports(include=["models.checkpoints.reader", "models.checkpoints.header"]):
            import models.checkpoints.reader  # noqa: F401 - its branches are counted from here on
    from safetensors import SafetensorError, deserialize

    ground, tally, starts = Ground(folder), Tally(), seeds()
    began = time.monotonic()

    def attempt(data: bytes) -> None:
        tally.counts["inputs"] += 1
        try:
            kinds = ground.judge(data)
        except Exception as error:  # whatever it is, it is what we look for
            _keep_crash(args.crashes, data, error, tally)
            return
        accepted = kinds[0].startswith("accepted")
        tally.counts["accepted" if accepted else "refused"] += 1
        tally.counts["indexes" if data.startswith(b"{") else "files"] += 1
        # counted, not wrong: we may be stricter than safetensors, never more lenient
        if not accepted and not data.startswith(b"{"):
            try:
                deserialize(data)
                tally.counts["refused, though safetensors reads them"] += 1
            except SafetensorError:
                pass
        for kind in kinds:
            tally.kinds[kind] += 1
            # an input with several faults shows none of them clearly
            if len(kinds) == 1 or accepted:
                _keep(kind, data)

    def step(data: bytes) -> None:
        attempt(data)
        if time.monotonic() - began > args.minutes * 60:
            _report(tally, time.monotonic() - began, "atheris" if atheris else "mutations alone")
            os._exit(1 if tally.crashes else 0)  # libFuzzer's loop has no other way out that lets the count be printed

    rng = random.Random(args.seed)
    if not atheris:
        while True:
            step(mutated(rng.choice(starts), rng) if rng.random() < 0.9 else sound_file(rng))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        # libFuzzer's seed, so that a run can be repeated
        own = random.Random(seed)
        # mostly our own mutations: blind bytes seldom leave JSON that gets past the first check
        roll = own.random()
        if roll < 0.05 or not data:
            return own.choice(starts)[:most]
        if roll < 0.15:
            return sound_file(own)[:most]
        return (bytes(atheris.Mutate(data, most)) if roll < 0.3 else mutated(data, own))[:most]

    found = folder / "found"
    found.mkdir()
    for i, data in enumerate(starts):
        (found / str(i)).write_bytes(data)
    atheris.Setup([sys.argv[0], f"-max_len={_MOST_BYTES}", f"-seed={args.seed}", "-verbosity=0", "-timeout=60", str(found)],
                  step, custom_mutator=mutate)
    atheris.Fuzz()


def _keep(kind: str, data: bytes) -> None:
    """Keep an input that is the first of its kind, or smaller than the one that is kept."""
    name = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")[:70].strip("-")
    path = CORPUS / f"{name}{'.json' if data.startswith(b'{') else '.safetensors'}"
    if len(data) <= _MOST_BYTES and (not path.exists() or len(data) < path.stat().st_size):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _keep_crash(folder: Path, data: bytes, error: Exception, tally: Tally) -> None:
    what = f"{type(error).__name__}: {_kind(str(error), folder)[:200]}"
    if what not in tally.crashes:
        tally.crashes.append(what)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"crash-{len(tally.crashes):03d}").write_bytes(data)


def _report(tally: Tally, seconds: float, engine: str) -> None:
    for kind, count in sorted(tally.kinds.items()):
        print(f"{count:>10,}  {kind}")
    print(f"engine: {engine}; {seconds:.0f} s; " + "; ".join(f"{name}: {count:,}" for name, count in tally.counts.items()))
    for crash in tally.crashes:
        print(f"CRASH {crash}")
    print(f"crashes: {len(tally.crashes)}; kinds of answer: {len(tally.kinds)}; "
          f"kept: {sum(1 for _ in CORPUS.glob('*'))} files", flush=True)


if __name__ == "__main__":
    main()
