"""Make a safety set: harmful prompts, clean of every test set, with refusals in chosen proportions and prompt styles.

    python -m data.safety_sets --size 60 --hard 0.4 --soft 0.4 --styles none,orbit --name safety_set
    python -m data.safety_sets --prompts mine.csv --against xstest.csv,hex_phi.csv --size 16

Writes results/data/NAME.jsonl, one {"messages": [..]} a line, for align_basemodel.py --data_path or --extra_data, and
NAME.json: what was drawn and what was left out, without the texts. The same flags and seed write the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import config
import console
from errors import exit_on_user_error
from flags.safety_set import SafetySetArgs


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_user_error():
        parsed = config.parse(SafetySetArgs, argv)
        args: SafetySetArgs = parsed.args
        console.set_up(parsed.verbosity)
        from data.sets.safety_sets import write

        print(write(args))


if __name__ == "__main__":
    main()
