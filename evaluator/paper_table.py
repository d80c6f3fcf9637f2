"""Write one table of a paper: our scores and the published numbers in columns beside each other.

    python evaluator/paper_table.py --spec results/somf_somf/workflow/safety_catqa.json --roots results/somf_somf/seed_42

Which run and score stands in which cell is the spec's, which workflow/paper_tables.py writes; scores come from the
registries of the results folders, published numbers from data/published_numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import config
import console
from errors import UserError, exit_on_user_error
from flags.paper_tables import PaperTableArgs

if TYPE_CHECKING:
    from evaluator.reporting.beside import Beside


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(PaperTableArgs, argv)
        console.set_up(parsed.verbosity)
        args: PaperTableArgs = parsed.args
        from evaluator.reporting import beside

        spec = read_spec(args.spec)
        table = gather(spec, args)
        console.show_written(beside.markdown(table).partition("\n## Notes")[0],
                             write(table, args.results / "report" / (args.name or spec["table"]), args.formats))


def read_spec(place: str) -> dict[str, Any]:
    """The spec of a table.

    Raises:
        UserError: no such file, or none of a table.
    """
    path = Path(place).expanduser()
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        for name in ("paper", "table", "title", "keys", "columns", "rows", "notes"):
            spec[name]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--spec {place}: no spec of a table ({type(error).__name__}); scripts/paper_tables.sh writes one "
                        "to NAME/workflow/TABLE.json") from None
    return spec


def gather(spec: dict[str, Any], args: PaperTableArgs) -> Beside:
    """Read the scores of every run that a cell names.

    Raises:
        UserError: a results folder is missing, or its scores cannot be read.
    """
    from evaluator.reporting import beside
    from evaluator.statistics.comparison import measured

    roots = [Path(root.strip()).expanduser().resolve() for root in args.roots.split(",") if root.strip()] or [args.results]
    cells = [cell for row in spec["rows"] for cell in row["cells"].values()]
    runs = dict.fromkeys(cell["run"] for cell in cells if cell.get("run") and not cell.get("why"))
    # a table without a single cell of ours needs no results
    if runs and (missing := [f"--roots: {root} does not exist" for root in roots if not root.is_dir()]):
        raise UserError(*missing)
    return beside.table(spec, {run: [measured(root, run) for root in roots] for run in runs})


def write(table: Beside, stem: Path, names: Sequence[str]) -> list[Path]:
    """Write the table in these formats beside ``stem``."""
    from evaluator.reporting import beside
    from evaluator.reporting.formats import SUFFIXES
    from evaluator.reporting.html.paper_page import paper_page

    writers = {"md": beside.markdown, "csv": beside.csv_text, "latex": beside.latex, "json": beside.json_text,
               "html": paper_page}
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names:
        paths.append(stem.with_name(stem.name + SUFFIXES[name]))
        paths[-1].write_text(writers[name](table), encoding="utf-8")
    return paths


if __name__ == "__main__":
    main()
