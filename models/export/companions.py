"""What lies beside the weights: tokenizer, chat templates, generation settings, licence, configuration."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from manifest import write_json
from models.checkpoints.reader import INDEX
from models.export.sources import Source
from models.merging.merge import COMPANIONS
from models.moe.files import CONFIG as MOE_CONFIG
from models.moe.files import WEIGHTS as MOE_WEIGHTS

#: Named chat templates beside the first one, a file each.
TEMPLATES = "additional_chat_templates"
#: What the base's owner wants to go along with every copy.
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_GENERATION = "generation_config.json"
#: The run's own files beside a model of experts, from which an import gets the factors back bit for bit. In a folder of
#: their own: vLLM reads every .safetensors file that lies beside a single weight file.
FACTORS = "factors"


def tokenizer_folder(source: Source) -> Path:
    """Where the tokenizer lies that the run answers with: its own, else its base's."""
    own = source.folders[0]
    return own if len(source.folders) == 1 and (own / "tokenizer_config.json").is_file() else source.base.folder


def write_companions(source: Source, folder: Path, config: dict[str, Any] | None) -> None:
    """Copy them into ``folder``, and write the configuration where there is one."""
    spoken, base = tokenizer_folder(source), source.base.folder
    files = _named(spoken, COMPANIONS)
    # how the base answers stays the base's, whosever the tokenizer is
    files[_GENERATION] = base / _GENERATION
    for name, file in files.items():
        if file.is_file() and name != INDEX:
            shutil.copyfile(file, folder / name)
    write_licences(source, folder)
    if (spoken / TEMPLATES).is_dir():
        shutil.copytree(spoken / TEMPLATES, folder / TEMPLATES, dirs_exist_ok=True)
    if source.moe and config and "num_experts_per_tok" in config:
        (folder / FACTORS).mkdir(exist_ok=True)
        for name in (MOE_WEIGHTS, MOE_CONFIG):
            shutil.copyfile(source.folders[0] / name, folder / FACTORS / name)
    if config:
        write_json(folder / "config.json", config)


def write_licences(source: Source, folder: Path) -> None:
    """Copy what the base's owner wants to go along."""
    for name, file in _named(source.base.folder, _LICENCES).items():
        if file.is_file():
            shutil.copyfile(file, folder / name)


def _named(folder: Path, patterns: Iterable[str]) -> dict[str, Path]:
    return {file.name: file for pattern in patterns for file in folder.glob(pattern)}
