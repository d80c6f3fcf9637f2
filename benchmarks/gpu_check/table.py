"""The table of scripts/gpu_check.sh: what every check measured, or why it failed.

    python -m benchmarks.gpu_check.table results/gpu_check

Reads ended.tsv (check, exit code, seconds, time limit; of a check that was not run "-", its limit, seconds that were left)
and each check's NAME.json and NAME.log of the folder; writes gpu_check.json and gpu_check.md there, with what --plan tells
beside what was held, and the ends of the logs of what failed. Exit code 1 where anything failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.memory import BAR

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
    if found.get("versions"):
        rows.append(_row("versions", measured=", ".join(f"{name} {number}" for name, number in found["versions"].items())))
    if "gemm_flops" in found:
        rows.append(_row("limits", found["device"], f"GEMM {found['gemm_flops'] / 1e12:.3g} TFLOP/s, "
                         f"copy {found['bytes_per_second'] / 1e9:.4g} GB/s"))
    for row in found["rows"]:
        check = f"{row['part']}, {row.get('shape', found['shape'])}"
        setting = f"batch {row['batch']}" if "batch" in row else ""
        if row["error"]:
            rows.append(_row(check, failed=row["error"]))
            continue
        said = f"{row['seconds']:.3g} s"
        peer = measured.get(f"{row['part']}, TRL")
        if peer:
            said += f", {row['pairs_per_second'] / peer['pairs_per_second']:.2f} x TRL's pairs/s (bar 1.5)"
        # without a GEMM of this run there is no limit
        share = row["of_limit"] if "gemm_flops" in found else None
        rows.append(_row(check, setting, said, row["tokens_per_second"], row["peak_gib"], share)
                    | {"plan_bytes": row.get("plan_bytes"), "held_bytes": row.get("held_bytes")})
    return rows


def generation_race(found: dict[str, Any]) -> list[dict[str, Any]]:
    """benchmarks/generate.py: a row for each batch and side."""
    rows = []
    for row in found["rows"]:
        check, setting = f"generation race, {found['shape']}", f"batch {row['batch']}, {row['side']}"
        if row.get("error"):
            rows.append(_row(check, setting, failed=row["error"]))
            continue
        bar = f" (bar {row['bar']:g})" if row["bar"] else ""
        rows.append(_row(check, setting, f"{row['seconds']:.3g} s, hf is {row['hf_is_faster']:.2f} x faster{bar}, same text "
                         f"{row['same_text']} of {row['prompts']}", row["tokens_per_second"], row["peak_bytes"] / _GIB,
                         row["of_limit"]))
    return rows


def tests(found: dict[str, Any]) -> list[dict[str, Any]]:
    """benchmarks/gpu_check/suite.py: how many passed, and a row for each that failed."""
    said = f"{found['passed']} passed, {found['skipped']} skipped; {found['seconds']:.0f} s, {found['processes']} processes"
    return [_row("tests", "", said), *(_row("tests", row["test"].rpartition("/")[2], failed=row["why"])
                                       for row in found["failed"])]


def processes(found: dict[str, Any]) -> list[dict[str, Any]]:
    """benchmarks/gpu_check/processes.py: a row for each run."""
    return [_row("processes", row["name"], row["measured"], failed=row["error"] or "") for row in found["rows"]]


#: Check -> its rows out of its JSON.
READERS: dict[str, Callable[[Any], list[dict[str, Any]]]] = {
    "tests": tests, "processes": processes, "race_moe": moe_race, "race_mask": mask_race, "race_generate": generation_race,
    "race_static": generation_race, "steps": steps}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Every check's rows, in the order in which they ended."""
    rows = []
    for line in (folder / "ended.tsv").read_text(encoding="utf-8").splitlines():
        name, code, seconds, limit = line.split("\t")
        if code == "-":
            rows.append(_row(name, failed=f"not run: {limit} s were left, and it may take {seconds}"))
            continue
        place, own = folder / f"{name}.json", []
        try:
            own = READERS[name](json.loads(place.read_text(encoding="utf-8")))
        except FileNotFoundError:
            if code == "0":
                own = [_row(name, failed=f"wrote no {place.name}")]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            own = [_row(name, failed=f"{place.name} is not what it should be ({type(error).__name__}: {error})")]
        rows += own
        # a check that says itself which of its parts failed has said it
        if code != "0" and not any(row["failed"] for row in own):
            late = int(code) in LATE
            last = (_tail(folder, name, 1) or ["it said nothing"])[0]
            rows.append(_row(name, failed=f"took longer than {limit} s" if late else f"exit code {code}: {last[:300]}"))
    return rows


def _tail(folder: Path, name: str, count: int) -> list[str]:
    """The last lines of a check's log; a bar that was drawn again and again is its last state."""
    file = folder / f"{name}.log"
    text = file.read_bytes().decode(errors="replace") if file.is_file() else ""
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line.strip()][-count:]


def logs(folder: Path) -> str:
    """The end of the log of every check that failed, as Markdown."""
    told = []
    for line in (folder / "ended.tsv").read_text(encoding="utf-8").splitlines():
        name, code, *_ = line.split("\t")
        if code not in ("0", "-") and (tail := _tail(folder, name, 25)):
            lines = "\n".join(text[:400] for text in tail)
            told.append(f"\n## {name}.log, its end\n\n```\n{lines}\n```\n")
    return "".join(told)


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    """What --plan tells beside what the device held, GB (1e9 bytes), as Markdown; empty where nothing was planned.

    Tensors are what the bar is for; of the device --plan says the peak.
    """
    planned = [row for row in rows if row.get("plan_bytes")]
    if not planned:
        return ""
    lines = [("part", "setting", "plan: tensors", "allocated", "plan is off", f"within {BAR:.0%}", "plan: kept for them",
              "reserved", "plan: device", "device", "plan is off "), ["---"] * 2 + ["---:"] * 9]
    for row in planned:
        plan, held = row["plan_bytes"], row["held_bytes"]

        def size(of: dict[str, float], name: str) -> str:
            return f"{of[name] / 1e9:.2f}" if name in of else ""

        def off(name: str, plan: dict[str, float] = plan, held: dict[str, float] = held) -> float | None:
            return plan[name] / held[name] - 1 if name in held else None

        tensors, device = off("allocated"), off("device")
        lines.append([row["check"], row["setting"], size(plan, "allocated"), size(held, "allocated"),
                      "" if tensors is None else f"{tensors:+.1%}",
                      "" if tensors is None else "yes" if abs(tensors) <= BAR else "NO", size(plan, "reserved"),
                      size(held, "reserved"), size(plan, "device"), size(held, "device"),
                      "" if device is None else f"{device:+.1%}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    seconds, failed = sum(int(line[2]) for line in ended if line[1] != "-"), sum(row["failed"] for row in rows)
    said = f"{len(rows)} rows in {seconds} s; {failed or 'none'} failed"
    plans = memory_table(rows)
    text = f"{table(rows)}\n\n{plans}{plans and chr(10) * 2}{said}\n{logs(folder)}"
    (folder / "gpu_check.md").write_text(text, encoding="utf-8")
    (folder / "gpu_check.json").write_text(json.dumps({"seconds": seconds, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    print(text, end="")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
