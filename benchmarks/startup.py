"""Race: how long a command takes to say what it can do (--help) and what it would do (--dry_run), start of Python included.

    python benchmarks/startup.py --json startup.json        # every command, sub-command, objective and plan, five rounds
    python benchmarks/startup.py --only fuse.py --pairs 3   # those whose line holds a text

Each is a fresh process, with the file system's cache warm, and the commands take turns; medians count. "processor s" is
what the process computed, which a busy machine does not stretch. Limits: 0.3 s for --help, 1 s for a plan; the floor is
``python -c pass`` in the same environment, which no command can pass under. Beside them, where they are installed,
``trl dpo --help`` (of the project's environment) and ``mergekit-yaml --help`` (of the peers'; ``--peers`` makes it).

A row that misses its limit names the packages whose import took longest (``python -X importtime``, one more run). Plans are
made of small made-up models: two checkpoints, three adapters, the fused MoE of these.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import installed, peer_python

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"help": 0.3, "plan": 1.0}
#: Flags with which a command says what it would do and does nothing.
PLANNING = ("dry_run", "plan")
#: Command of flags/ -> its lines; {home} has the made-up models: base, tuned, results/outputs/one and moe.
PLANS = {
    "MergeArgs": ("models/fuse.py merge --method linear --models {home}/base,{home}/tuned --parameters weight=0.5,0.5",
                  "models/fuse.py merge --method ties --base_model {home}/base --models {home}/tuned "
                  "--parameters weight=1;density=0.2"),
    "ExportArgs": ("models/fuse.py export one --layout dense --model_name_or_path {home}/base",
                   "models/fuse.py export moe --layout mixtral --model_name_or_path {home}/base"),
    "LeaderboardArgs": ("-m workflow.leaderboard",),
    "PaperTablesArgs": ("-m workflow.paper_tables --paper lora_fusion --table lambda_sweep",
                        "-m workflow.paper_tables --paper h3fusion --table models --preset h3fusion"),
    "EvaluateModelsArgs": ("evaluator/evaluate.py --models base,one --suite safety --model_name_or_path {home}/base",),
}
#: layers, hidden, FFN, key/value width, vocabulary
SHAPE = (2, 64, 128, 64, 384)


@dataclasses.dataclass(frozen=True)
class Line:
    """A command line that is timed: its kind (help, plan, peer, floor), its name, the words of the process."""

    kind: str
    name: str
    words: tuple[str, ...]


def command_files() -> list[str]:
    """Files of the repository that are commands, scripts/ included, this folder and the tests left out."""
    folders = ("", "data", "models", "evaluator", "scripts", "workflow")
    return [path.relative_to(ROOT).as_posix() for folder in folders for path in sorted((ROOT / folder).glob("*.py"))
            if re.search(r"^def main\(", path.read_text(encoding="utf-8"), re.M)]


def help_lines() -> list[Line]:
    """--help of every command, of its sub-commands, and of the objectives of align_basemodel.py."""
    from flags import TRAINED

    named = []
    for file in command_files():
        # as their own help spells them: what lies in data/ and workflow/ is a module
        call = f"-m {file[:-3].replace('/', '.')}" if file.startswith(("data/", "workflow/")) else file
        named.append(call)
        if "sub_commands.chosen(" in (ROOT / file).read_text(encoding="utf-8"):
            commands = importlib.import_module(file[:-3].replace("/", ".")).COMMANDS
            named += [f"{call} {name}" for name in commands]
    named += [f"align_basemodel.py {kind.words}" for kind in TRAINED.values()]
    return [Line("help", f"{name} --help", (sys.executable, *name.split(), "--help")) for name in named]


def planning_commands() -> dict[str, str]:
    """Command of flags/ -> the flag with which it plans."""
    from flags import COMMANDS

    return {kind.__name__: item.name for kind in COMMANDS for item in dataclasses.fields(kind) if item.name in PLANNING}


def plan_lines(home: Path) -> list[Line]:
    """The plan of every command that makes one, and of every script."""
    found = []
    for command, flag in planning_commands().items():
        for text in PLANS[command]:
            words = [word.format(home=home) for word in text.split()]
            found.append(Line("plan", f"{text.replace('{home}/', '')} --{flag}",
                              (sys.executable, *words, "--output_dir", f"{home}/results", f"--{flag}")))
    found += [Line("plan", f"{path.relative_to(ROOT)} --dry_run", ("bash", str(path), "--dry_run"))
              for path in sorted((ROOT / "scripts").glob("*.sh")) if "--dry_run)" in path.read_text(encoding="utf-8")]
    return found


def peer_lines(make: bool) -> list[Line]:
    """The peers' --help, where they are installed."""
    trl, python = Path(sys.executable).parent / "trl", peer_python() if make else installed()
    lines = [Line("peer", "trl dpo --help", (str(trl), "dpo", "--help"))] if trl.is_file() else []
    if python:
        lines.append(Line("peer", "mergekit-yaml --help", (str(python.parent / "mergekit-yaml"), "--help")))
    return lines


def make_models(home: Path) -> None:
    """Two small checkpoints with a tokenizer, three adapters on the first as runs, and their fused MoE."""
    import torch
    from made_up import tokenizer as made_tokenizer
    from merge import synthesise

    from models.adapters.files import write_adapter
    from models.checkpoints.fingerprints import fingerprint

    layers, hidden, ffn, _, vocabulary = SHAPE
    for seed, name in enumerate(("base", "tuned")):
        synthesise(home / name, seed, SHAPE, layers, home / "base" if seed else None)
        made_tokenizer(vocabulary).save_pretrained(home / name)
    generator, outputs = torch.Generator().manual_seed(0), home / "results" / "outputs"
    made = json.dumps({"status": "checkpoint", "inputs": {"base": fingerprint(home / "base")}})
    targets = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    for name in ("one", "two", "three"):
        (outputs / name).mkdir(parents=True)
        factors = {f"model.layers.{i}.mlp.{kind}": tuple(
            torch.randn(shape, generator=generator) for shape in ((4, into), (out, 4)))
            for i in range(layers) for kind, (out, into) in targets.items()}
        write_adapter(outputs / name, factors, targets, {"base_model_name_or_path": str(home / "base"),
                                                         "task_type": "CAUSAL_LM"})
        (outputs / name / "manifest.json").write_text(made, encoding="utf-8")
    fused = [sys.executable, "models/llama_moe.py", "--experts", "one,two,three", "--model_name_or_path", f"{home}/base",
             "--run_name", "moe", "--output_dir", f"{home}/results", "--device", "cpu"]
    timed(fused)


def timed(words: Sequence[str]) -> tuple[float, float, str]:
    """(wall seconds, processor seconds, what it wrote to stderr) of a process in the repository's root.

    Raises:
        SystemExit: it failed; a command that fails fast must not win.
    """
    # what is measured is ours alone: no hub, and no warning of a missing one
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = os.times()
    start = time.perf_counter()
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    after = os.times()
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}\n{done.stderr[-2000:]}")
    used = after.children_user - before.children_user + after.children_system - before.children_system
    return seconds, used, done.stderr


def slowest_imports(report: str, count: int = 4) -> list[tuple[str, float]]:
    """(package, seconds) of the packages whose own modules took longest, from what ``python -X importtime`` wrote."""
    packages: Counter[str] = Counter()
    for own, name in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)$", report, re.M):
        packages[name.split(".")[0]] += int(own)
    return [(name, micros / 1e6) for name, micros in packages.most_common(count)]


def measure(lines: Sequence[Line], pairs: int) -> list[dict[str, Any]]:
    """A row for each line: medians over rounds in which every line has its turn, after one round that does not count."""
    times: dict[str, list[tuple[float, float]]] = {line.name: [] for line in lines}
    for number in range(pairs + 1):
        for line in lines:
            seconds, used, _ = timed(line.words)
            if number:
                times[line.name].append((seconds, used))
        print(f"round {number} of {pairs}", file=sys.stderr, flush=True)
    rows = []
    for line in lines:
        wall, used = (statistics.median(column) for column in zip(*times[line.name], strict=True))
        limit = LIMITS.get(line.kind)
        row = {"kind": line.kind, "command": line.name, "seconds": wall, "processor_seconds": used, "limit": limit,
               "met": None if limit is None else wall <= limit, "all": times[line.name], "imports": []}
        if row["met"] is False and line.words[0] == sys.executable:
            row["imports"] = slowest_imports(timed([sys.executable, "-X", "importtime", *line.words[1:]])[2])
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| command | s | limit | met | processor s | longest imports |", "|---|---:|---:|---|---:|---|"]
    for row in rows:
        met = {None: "", True: "yes", False: "NO"}[row["met"]]
        slow = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["imports"])
        lines.append(f"| {row['command']} | {row['seconds']:.2f} | {row['limit'] or ''} | {met} | "
                     f"{row['processor_seconds']:.2f} | {slow} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="rounds in which every command has its turn (default: 5)")
    parser.add_argument("--only", default="", help="time the lines that hold this text; the floor and the peers stay")
    parser.add_argument("--peers", action="store_true", help="make the environment of mergekit if it is missing (2 GB)")
    parser.add_argument("--json", type=Path, help="write the rows as JSON too")
    args = parser.parse_args(argv)
    if args.pairs < 1:
        parser.error("--pairs must be at least 1")
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        chosen = [line for line in (*help_lines(), *plan_lines(home)) if args.only in line.name]
        if not chosen:
            parser.error(f"--only {args.only}: no line holds that text; leave it out to see them all")
        if any(str(home) in word for line in chosen for word in line.words):
            make_models(home)
        rows = measure([Line("floor", "python -c pass", (sys.executable, "-c", "pass")), *chosen, *peer_lines(args.peers)],
                       args.pairs)
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps({"pairs": args.pairs, "cores": len(os.sched_getaffinity(0)), "rows": rows}, indent=2)
                             + "\n")


if __name__ == "__main__":
    main()
