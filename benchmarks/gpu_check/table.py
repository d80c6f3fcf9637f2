"""The table of scripts/gpu_check.sh: what every check measured, or why it failed.

    python -m benchmarks.gpu_check.table results/gpu_check

Reads ended.tsv (check, exit code, seconds, time limit) and each check's NAME.json and NAME.log of the folder; writes
gpu_check.json and gpu_check.md there. Exit code 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("check", "setting", "measured", "tokens/s", "peak GiB", "of the limit")
#: Exit codes of timeout(1): its own, and that of a process it had to kill.
LATE = (124, 137)
_GIB = 2**30


def _row(check: str, setting: str = "", measured: str = "", speed: float | None = None, peak: float | None = None,
         share: float | None = None, failed: str = "") -> dict[str, Any]:
    return {"check": check, "setting": setting, "measured": f"failed: {failed}" if failed else measured, "tokens/s": speed,
            "peak GiB": peak, "of the limit": share, "failed": bool(failed)}


def moe_race(found: dict[str, Any]) -> list[dict[str, Any]]:
    """benchmarks/moe.py: a row for each number of tokens and direction."""
    rows = []
    for row in found["rows"]:
        seconds, bar = row["seconds"]["ours"], row["bar_to_dense"]
        said = f"{1e3 * seconds:.3g} ms, {row['ours_to_dense']:.2f} x dense{f' (bar {bar:g})' if bar else ''}, "
        rows.append(_row("MoE layer", f"{row['tokens']} tokens, {row['direction']}",
                         said + f"{row['best_backend']} {row['backend_to_ours']:.2f} x ours", row["tokens"] / seconds,
                         row["peak_bytes"]["ours"] / _GIB, row["of_limit"],
                         "" if row["outputs_equal"] else f"outputs differ by {row['error']:.0e} from materialised experts"))
    return rows


def mask_race(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """benchmarks/mask.py: a row for each kind of task vectors."""
    return [_row("mask, 135M", f"{row['mode']}, cut at {row['cut']}", f"{row['seconds']:.3g} s/step, published "
                 f"{row['ratio']:.2f} x ours (bar {row['bars']['speed']:g}), memory {row['memory_ratio']:.2f} of it",
                 None, row["peak_gib"], row["of_limit"]) for row in found]


def steps(found: dict[str, Any]) -> list[dict[str, Any]]:
    """benchmarks/gpu_check/steps.py: a row for each part; TRL's stands in the row of the race against it."""
    rows, measured = [], {row["part"]: row for row in found["rows"] if not row["error"]}
    if "gemm_flops" in found:
        rows.append(_row("limits", found["device"], f"GEMM {found['gemm_flops'] / 1e12:.3g} TFLOP/s, "
                         f"copy {found['bytes_per_second'] / 1e9:.4g} GB/s"))
    for row in found["rows"]:
        check, setting = f"{row['part']}, {found['shape']}", f"batch {row['batch']}" if "batch" in row else ""
        if row["error"]:
            rows.append(_row(check, failed=row["error"]))
            continue
        said = f"{row['seconds']:.3g} s"
        peer = measured.get(f"{row['part']}, TRL")
        if peer:
            said += f", {row['pairs_per_second'] / peer['pairs_per_second']:.2f} x TRL's pairs/s (bar 1.5)"
        rows.append(_row(check, setting, said, row["tokens_per_second"], row["peak_gib"], row["of_limit"]))
    return rows


def any_race(found: Any) -> list[dict[str, Any]]:
    """A race whose rows are not known here: its numbers by name."""
    entries = found.get("rows", []) if isinstance(found, dict) else found
    told = []
    for entry in entries:
        numbers = {name: value for name, value in entry.items() if isinstance(value, (int, float, str))}
        told.append(_row("generation race", measured=", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items()),
            speed=numbers.get("tokens_per_second"), peak=numbers.get("peak_gib"), share=numbers.get("of_limit")))
    return told


#: Check -> its rows out of its JSON; a check without one is told by its log's last line.
READERS: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
    "race_moe": moe_race, "race_mask": mask_race, "race_generate": any_race, "steps": steps}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Every check's rows, in the order in which they ended."""
    rows = []
    for line in (folder / "ended.tsv").read_text(encoding="utf-8").splitlines():
        name, code, seconds, limit = line.split("\t")
        log, place = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace"), folder / f"{name}.json"
        last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "it said nothing")
        own: list[dict[str, Any]] = []
        if name in READERS:
            try:
                own = READERS[name](json.loads(place.read_text(encoding="utf-8")))
            except FileNotFoundError:
                if code == "0":
                    own = [_row(name, failed=f"wrote no {place.name}")]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                own = [_row(name, failed=f"{place.name} is not what it should be ({type(error).__name__}: {error})")]
        elif code == "0":
            own = [_row(name, measured=last)]
        rows += own
        # a check that says itself which of its parts failed has said it
        if code != "0" and not any(row["failed"] for row in own):
            late = int(code) in LATE
            rows.append(_row(name, failed=f"took longer than {limit} s" if late else f"exit code {code}: {last[:300]}"))
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    forms = {"tokens/s": ",.0f", "peak GiB": ".2f", "of the limit": ".0%"}
    lines = [COLUMNS, ["---"] * 3 + ["---:"] * 3]
    for row in rows:
        cells = [row[name] if name not in forms else "" if row[name] is None else format(row[name], forms[name])
                 for name in COLUMNS]
        lines.append([cell.replace("|", "/") for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what scripts/gpu_check.sh wrote")
    folder = parser.parse_args(argv).folder
    rows = rows_of(folder)
    ended = [line.split("\t") for line in (folder / "ended.tsv").read_text(encoding="utf-8").splitlines()]
    seconds, failed = sum(int(line[2]) for line in ended), sum(row["failed"] for row in rows)
    said = f"{len(rows)} rows in {seconds} s; {failed or 'none'} failed"
    text = f"{table(rows)}\n\n{said}\n"
    (folder / "gpu_check.md").write_text(text, encoding="utf-8")
    (folder / "gpu_check.json").write_text(json.dumps({"seconds": seconds, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(text, end="")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
