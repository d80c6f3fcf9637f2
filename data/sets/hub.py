"""Sets of the Hugging Face hub: how a name is told from a file, its configuration and split, its rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from data.readers.row_files import SUFFIXES, Row
from errors import UserError


@dataclass(frozen=True)
class HubSet:
    """Where ``datasets.load_dataset`` finds a published set: its positional arguments, data files, split names."""

    arguments: tuple[str, ...]
    train: str
    test: str
    data_files: str | None = None


HUB: dict[str, HubSet] = {
    # the hub's loading script for AlpacaEval is refused by recent releases of datasets: read its file
    "tatsu-lab/alpaca_eval": HubSet(("json",), "", "train", "hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json"),
    "PKU-Alignment/BeaverTails": HubSet(("PKU-Alignment/BeaverTails",), "30k_train", "30k_test"),
    "truthfulqa/truthful_qa": HubSet(("truthfulqa/truthful_qa", "generation"), "validation", "validation"),
    "bench-llm/or-bench": HubSet(("bench-llm/or-bench", "or-bench-hard-1k"), "", "train"),
    "openai/gsm8k": HubSet(("openai/gsm8k", "main"), "train", "test"),
    **{name: HubSet((name,), "train", "") for name in (
        "llamafactory/alpaca_gpt4_en", "llamafactory/alpaca_gpt4_zh", "iamshnoo/alpaca-cleaned-hindi",
        "sahil2801/CodeAlpaca-20k")},
}


def is_local(place: str) -> bool:
    """Whether this is meant as a file or folder and not as a hub name."""
    return (Path(place).expanduser().exists() or place.lower().endswith(SUFFIXES)
            or place.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?(@[\w.-]+)?", place))


def hub_rows(name: str, split: str) -> list[Row]:
    """Every row of a hub set's split; a UserError in one sentence when the hub cannot be reached.

    Args:
        name: NAME, NAME:SPLIT, NAME@SPLIT or NAME:CONFIG@SPLIT.
    """
    # NAME:SPLIT takes another split than the one that fits: SOMF trains its mask on PKU-SafeRLHF's test split
    name, at, wanted = name.partition("@")
    name, _, more = name.partition(":")
    hub = HUB.get(name, HubSet((name,), "train", "test"))
    if at and more:
        hub = replace(hub, arguments=(hub.arguments[0], more))
    wanted = wanted if at else more
    if not (hub_split := wanted or (hub.train if split == "train" else hub.test)):
        raise UserError(f"{name} has no {split} split; give a local file")
    files = {"data_files": hub.data_files} if hub.data_files else {}
    try:
        from datasets import load_dataset

        data = load_dataset(*hub.arguments, split=hub_split, **files)
    except Exception as error:  # the hub client raises a dozen unrelated types; the user needs one sentence
        raise UserError(
            f"{name}: neither a local file nor to be had from the hub ({type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0][:200]}); name a set's configuration and split as NAME:CONFIG@SPLIT; "
            "download it where there is a network and give the file "
            f"({', '.join(SUFFIXES)}) with --data_path, or use the embedded data (--data_source embedded)") from None
    return [Row(dict(fields), f"{name}[{hub_split}]:{i + 1}") for i, fields in enumerate(data)]
