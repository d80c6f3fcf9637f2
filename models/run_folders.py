"""Where a trained run lies, whatever it is: an adapter, a fused model, a full one, or a weighted sum of adapters."""

from __future__ import annotations

from pathlib import Path

from errors import UserError, nearest_place
from flags.mixture import Parts, mixture_parts

ADAPTER, MOE = "adapter_config.json", "moe_config.json"


def run_folder(results: Path, run: str, checkpoint: int = -1) -> Path:
    """Where a trained run lies; a UserError lists the runs that exist."""
    if checkpoint >= 0:
        folder = results / "checkpoints" / run / f"checkpoint-{checkpoint}"
        if not folder.is_dir():
            there = sorted(entry.name for entry in folder.parent.glob("checkpoint-*"))
            raise UserError(f"--checkpoint_number {checkpoint}: {folder} does not exist; there: {there or 'none'}")
        # both names lead to one folder of answers and scores: the second would be taken for the first
        if (same := results / "outputs" / f"{run}_{checkpoint}").is_dir():
            raise UserError(f"--checkpoint_number {checkpoint}: its answers and scores go to cross_{same.name}, and so do "
                            f"those of the run '{same.name}'; rename the folder {same} first")
        return folder
    folder = results / "outputs" / run
    if not any((folder / name).is_file() for name in (ADAPTER, MOE, "config.json")):
        there = sorted(entry.name for entry in (results / "outputs").glob("[!.]*")) if (results / "outputs").is_dir() else []
        raise UserError(
            f"run '{run}': nothing in {folder}{nearest_place(folder)}; there: {', '.join(there) or 'none'}; "
            f"train it with align_basemodel.py (or models/llama_moe.py for {run if 'moe' in run else 'raw_moe'})"
        )
    return folder


def run_files(results: Path, run: str, checkpoint: int = -1) -> list[Path]:
    """The weight files of a run, or of every adapter of a weighted sum (``task@0.6_safety@0.4``), sorted.

    Raises:
        UserError: one of them does not exist; names all that lack.
    """
    # every missing part at once, not one a call
    files, problems = [], []
    for name in [name for name, _ in parts_of(run)] or [run]:
        try:
            folder = run_folder(results, name, checkpoint)
            there = sorted(folder.glob("*.safetensors"))
            # nothing would tell two such runs apart, and nothing of it could be loaded
            if not there:
                pickled = sorted(path.name for path in folder.glob("*model*") if path.suffix in (".bin", ".pt", ".pth"))
                problems.append(f"run '{name}': {folder} " + (
                    f"holds {pickled[0]} only: pickled weights may run code when they are read and are refused; load them "
                    f"where that does no harm and write them again with save_pretrained({str(folder)!r})" if pickled else
                    "holds no .safetensors file; train or save it again"))
            files += there
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return files


def parts_of(run: str) -> Parts:
    """(run, weight) pairs of a weighted sum's name; empty for an ordinary run; a UserError for a malformed sum."""
    try:
        return mixture_parts(run)
    except ValueError as error:
        raise UserError(f"run '{run}': {error}") from None
