"""Look into trained masks: numbers as JSON, pictures of them beside it.

    python evaluator/mask_figures.py --masks mask_english
    python evaluator/mask_figures.py --masks m_seed1,m_seed2,m_seed3 --run_name seeds

Writes results/masks/NAME: masks.json (kept share and entropy by layer and module, agreement of masks, overlap of tasks),
and per mask heat maps of what it keeps and how sure it is; one of how its tasks' vectors lie over each other where it has
several; with several masks, one of how far they agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
import console
import manifest
from errors import exit_on_user_error
from flags.mask_figures import MaskFiguresArgs

if TYPE_CHECKING:
    import numpy as np


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(MaskFiguresArgs, argv)
        console.set_up(parsed.verbosity)
        args: MaskFiguresArgs = parsed.args
        folder = args.results / "masks" / args.run_name
        content = numbers(args)
        manifest.write_json(folder / "masks.json", content)
        files = draw(content, folder)
        console.show(f"{folder}: masks.json, {', '.join(file.name for file in files)}", str(folder))


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
    short = [Path(name).name for name in args.mask_names]
    # folders of two seeds may bear one name: then their whole paths tell them apart
    labels = short if len(set(short)) == len(short) else args.mask_names
    places = {label: _place(args, name) for label, name in zip(labels, args.mask_names, strict=True)}
    masks = {name: read_mask(place) for name, place in places.items()}
    content: dict[str, Any] = {"masks": {name: {
        "aligned": mask.aligned["name"], "tasks": [task["name"] for task in mask.tasks], "settings": mask.settings.to_json(),
        **mask_numbers(mask, name)} for name, mask in masks.items()}}
    if len(masks) > 1:
        content["agreement"] = agreement(masks, readout)
    # overlap reads the task vectors themselves, which is slow and needs the models to be there
    for name in masks if args.overlap else ():
        with ExitStack() as stack:
            mask, aligned, tasks = open_mask(places[name], args, stack)
            content["masks"][name]["overlap"] = task_overlap(mask, aligned, tasks)
    return content


def draw(content: Mapping[str, Any], folder: Path) -> list[Path]:
    """A picture per mask, one of its tasks' overlap where it has several, and one of the masks' agreement."""
    files = []
    for name, facts in content["masks"].items():
        whole, file = facts["whole"], folder / f"{name.strip('/').replace('/', '_')}.png"
        files.append(mask_heatmaps(facts["grid"], file, f"Mask {name}: share kept ({whole['kept']:.3f} of all) and entropy "
                                   f"in bits ({whole['entropy']:.3f})"))
        if facts.get("overlap", {}).get("pairs"):
            files.append(overlap_matrix(facts["overlap"], file.with_name(f"{file.stem}_overlap.png"), name))
    if "agreement" in content:
        files.append(agreement_matrix(content["agreement"], list(content["masks"]), folder / "agreement.png"))
    return files


def mask_heatmaps(grid: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path, title: str) -> Path:
    """Draw the mean of sigmoid(s), and the entropy below it, by module and layer; cells without logits stay white.

    Args:
        grid: module -> layer ("none" for what belongs to none) -> {"kept", "entropy"}; nothing in it: one white cell.
    """
    import numpy as np

    layers = sorted({layer for row in grid.values() for layer in row},
                    key=lambda layer: (layer == "none", 0 if layer == "none" else int(layer))) or ["none"]
    modules = list(grid) or ["none"]
    # NaN where a module has no logits in a layer: matplotlib leaves the cell white
    kept, entropy = (np.array([[grid.get(module, {}).get(layer, {}).get(key, np.nan) for layer in layers]
                               for module in modules]) for key in ("kept", "entropy"))
    # symmetric around one half, where an untrained mask starts
    reach = max(float(np.abs(kept[np.isfinite(kept)] - 0.5).max(initial=0)), 0.02)
    # an untrained mask has 1 bit; a tenth of a bit at least, so that noise does not fill the colours
    least = min(float(entropy[np.isfinite(entropy)].min(initial=1.0)), 0.9)
    return _picture([_Panel(kept, (0.5 - reach, 0.5 + reach), "PuOr", "share kept"),
                     _Panel(entropy, (least, 1.0), "cividis", "entropy, bits")], layers, modules, path, title, "layer")


def overlap_matrix(found: Mapping[str, Any], path: Path, name: str) -> Path:
    """Draw the cosine (above), the agreement of signs (below) and the energy that the mask keeps (diagonal) of the tasks."""
    tasks = list(found["kept_energy"])
    values = _square(tasks, found["pairs"], "cosine", "same_sign")
    for i, task in enumerate(tasks):
        values[i, i] = found["kept_energy"][task]
    return _picture([_Panel(values, (min(0.0, _least(values)), 1.0), "cividis", "share or cosine")], tasks, tasks, path,
                    f"Tasks of mask {name}: cosine of their vectors above the diagonal, weighted share of equal signs below "
                    "(chance 0.50), on it the share of each vector's energy that the mask keeps")


def agreement_matrix(found: Mapping[str, Any], names: Sequence[str], path: Path) -> Path:
    """Draw Jaccard (upper triangle) and Spearman (lower triangle) of every two masks.

    Raises:
        ValueError: there are no two masks.
    """
    if not found["pairs"]:
        raise ValueError("an agreement needs at least two masks")
    values = _square(names, found["pairs"], "jaccard", "spearman")
    chance = sum(pair["chance"] for pair in found["pairs"]) / len(found["pairs"])
    return _picture([_Panel(values, (min(0.0, _least(values)), 1.0), "cividis", "agreement")], names, names, path,
                    f"Agreement of masks: Jaccard above (chance {chance:.2f}, read-out {found['readout']}), Spearman below "
                    "the diagonal")


def _square(names: Sequence[str], pairs: Sequence[Mapping[str, Any]], above: str, below: str) -> np.ndarray:
    import numpy as np

    values = np.full((len(names), len(names)), np.nan)
    for pair in pairs:
        # each pair is listed once, in either order: the first in the list of names is the row above the diagonal
        i, j = sorted((names.index(pair["one"]), names.index(pair["two"])))
        values[i, j], values[j, i] = (np.nan if pair[key] is None else pair[key] for key in (above, below))
    return values


def _least(values: np.ndarray) -> float:
    import numpy as np

    return float(np.nanmin(values, initial=0.0))


@dataclass(frozen=True)
class _Panel:
    """One matrix of a picture: its values, the ends of its colours, what they mean."""

    values: np.ndarray
    limits: tuple[float, float]
    colours: str
    label: str


def _picture(panels: Sequence[_Panel], across: Sequence[str], down: Sequence[str], path: Path, title: str,
             axis_name: str = "") -> Path:
    """Draw matrices of the same rows and columns below each other."""
    import textwrap

    from evaluator.reporting.figures import _pyplot, _save, shown

    plt = _pyplot()
    size = (max(5.5, 0.32 * len(across) + 3), max(2.4, 0.36 * len(down) + 1.2) * len(panels) + 0.4)
    figure, axes = plt.subplots(len(panels), 1, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        image = axis.imshow(panel.values, aspect="auto", cmap=panel.colours, vmin=panel.limits[0], vmax=panel.limits[1])
        step = max(1, len(across) // 16)
        axis.set_xticks(range(0, len(across), step), list(map(shown, across[::step])))
        axis.set_yticks(range(len(down)), list(map(shown, down)))
        if panel.values.size <= 120:
            _write_numbers(axis, panel)
        figure.colorbar(image, ax=axis, label=panel.label, shrink=0.9)
    axes[-1, 0].set_xlabel(axis_name)
    figure.suptitle(textwrap.fill(shown(title, 400), 70, break_on_hyphens=False), fontsize=9)
    return _save(plt, figure, path)


def _write_numbers(axis: Any, panel: _Panel) -> None:
    import numpy as np

    low, high = panel.limits
    for i, j in np.argwhere(np.isfinite(panel.values)):
        value = panel.values[i, j]
        share = (value - low) / ((high - low) or 1)
        # PuOr is pale in the middle and dark at both ends, cividis dark below
        dark = 0.25 < share < 0.75 if panel.colours == "PuOr" else share > 0.6
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="black" if dark else "white")


def _place(args: MaskFiguresArgs, name: str) -> Path:
    return Path(name).expanduser() if "/" in name else args.results / "outputs" / name


if __name__ == "__main__":
    main()
