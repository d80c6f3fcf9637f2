"""Look into trained masks: numbers as JSON, pictures of them beside it.

    python evaluator/mask_figures.py --masks mask_english
    python evaluator/mask_figures.py --masks m_seed1,m_seed2,m_seed3 --run_name seeds

Writes results/masks/NAME: masks.json (kept share and entropy by layer and module, agreement of masks, overlap of tasks),
and per mask a heat map of what it keeps; with several masks, one of how far they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
import manifest
from commands.mask_figures import MaskFiguresArgs
from errors import exit_on_user_error

if TYPE_CHECKING:
    import numpy as np


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        args: MaskFiguresArgs = config.parse(MaskFiguresArgs, argv).args
        folder = args.results / "masks" / args.run_name
        content = numbers(args)
        manifest.write_json(folder / "masks.json", content)
        files = draw(content, folder)
        print(f"{folder}: masks.json, {', '.join(file.name for file in files)}")


def numbers(args: MaskFiguresArgs) -> dict[str, Any]:
    """What masks.json holds.

    Raises:
        UserError: no such mask, a mask without logits, masks of different shapes, a read-out that is none.
    """
    from models.mask.diagnostics import agreement, mask_numbers, task_overlap
    from models.mask.export import open_mask
    from models.mask.files import read_mask
    from models.mask.settings import parse_readout

    readout = parse_readout(args.readout)
    masks = {name: read_mask(_place(args, name)) for name in args.mask_names}
    content: dict[str, Any] = {"masks": {name: {
        "aligned": mask.aligned["name"], "tasks": [task["name"] for task in mask.tasks], "settings": mask.settings.to_json(),
        **mask_numbers(mask, name)} for name, mask in masks.items()}}
    if len(masks) > 1:
        content["agreement"] = agreement(masks, readout)
    for name in masks if args.overlap else ():
        with ExitStack() as stack:
            mask, aligned, tasks = open_mask(_place(args, name), args, stack)
            content["masks"][name]["overlap"] = task_overlap(mask, aligned, tasks)
    return content


def draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """A picture per mask, and one of their agreement."""
    files = []
    for name, found in content["masks"].items():
        whole, file = found["whole"], folder / f"{name.strip('/').replace('/', '_')}.png"
        files.append(kept_heatmap(found["grid"], file, f"Share kept by mask {name} ({whole['kept']:.3f} of all, entropy "
                                  f"{whole['entropy']:.3f} bits)"))
    if "agreement" in content:
        files.append(agreement_matrix(content["agreement"], list(content["masks"]), folder / "agreement.png"))
    return files


def kept_heatmap(grid: Mapping[str, Mapping[str, float]], path: Path, title: str) -> Path:
    """Draw the mean of sigmoid(s) by module and layer; cells that hold no logits stay white.

    Args:
        grid: module -> layer ("none" for what belongs to none) -> share; nothing in it: one white cell.
    """
    import numpy as np

    layers = sorted({layer for row in grid.values() for layer in row},
                    key=lambda layer: (layer == "none", 0 if layer == "none" else int(layer)))
    modules, layers = list(grid) or ["none"], layers or ["none"]
    values = np.array([[grid.get(module, {}).get(layer, np.nan) for layer in layers] for module in modules])
    known = values[np.isfinite(values)]
    # symmetric around one half, where an untrained mask starts
    reach = max(float(np.abs(known - 0.5).max(initial=0)), 0.02)
    return _matrix(values, layers, modules, path, title, (0.5 - reach, 0.5 + reach), "PuOr", "share kept", "layer")


def agreement_matrix(found: Mapping[str, Any], names: Sequence[str], path: Path) -> Path:
    """Draw Jaccard (upper triangle) and Spearman (lower triangle) of every two masks.

    Raises:
        ValueError: there are no two masks.
    """
    import numpy as np

    if not found["pairs"]:
        raise ValueError("an agreement needs at least two masks")

    values = np.full((len(names), len(names)), np.nan)
    for pair in found["pairs"]:
        i, j = sorted((names.index(pair["one"]), names.index(pair["two"])))
        values[i, j] = pair["jaccard"]
        values[j, i] = np.nan if pair["spearman"] is None else pair["spearman"]
    chance = sum(pair["chance"] for pair in found["pairs"]) / len(found["pairs"])
    title = (f"Agreement of masks: Jaccard above (chance {chance:.2f}, read-out {found['readout']}), Spearman below the "
             "diagonal")
    return _matrix(values, names, names, path, title, (min(0.0, float(np.nanmin(values))), 1.0), "cividis", "agreement", "")


def _matrix(values: np.ndarray, across: Sequence[str], down: Sequence[str], path: Path, title: str,
            limits: tuple[float, float], colours: str, label: str, axis_name: str) -> Path:
    import textwrap

    from evaluator.figures import _pyplot, _save

    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(max(5.5, 0.32 * len(across) + 3), max(2.4, 0.36 * len(down) + 1.6)),
                                layout="constrained")
    image = axis.imshow(values, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    step = max(1, len(across) // 16)
    axis.set_xticks(range(0, len(across), step), across[::step])
    axis.set_yticks(range(len(down)), down)
    axis.set_xlabel(axis_name)
    axis.set_title(textwrap.fill(title, 70, break_on_hyphens=False), fontsize=9)
    if values.size <= 120:
        for i in range(len(down)):
            for j in range(len(across)):
                if values[i, j] == values[i, j]:
                    share = (values[i, j] - limits[0]) / ((limits[1] - limits[0]) or 1)
                    dark = 0.25 < share < 0.75 if colours == "PuOr" else share > 0.6
                    axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7,
                              color="black" if dark else "white")
    figure.colorbar(image, ax=axis, label=label, shrink=0.9)
    return _save(plt, figure, path)


def _place(args: MaskFiguresArgs, name: str) -> Path:
    return Path(name).expanduser() if "/" in name else args.results / "outputs" / name


if __name__ == "__main__":
    main()
