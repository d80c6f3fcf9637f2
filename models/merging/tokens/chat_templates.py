"""Chat templates of model folders: found where transformers looks, the commonest chosen, a new one written."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import manifest
from errors import UserError
from models.merging.recipes import Recipe

log = logging.getLogger(__name__)
TEMPLATE, OLD_TEMPLATE, CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"


def template_of(folder: Path) -> str:
    """A folder's chat template; empty when it has none.

    Raises:
        UserError: a damaged tokenizer_config.json or chat_template.json.
    """
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    for name in (CONFIG, OLD_TEMPLATE):
        found = _json(folder / name).get("chat_template") if (folder / name).is_file() else None
        # several by name: the one that a chat without tools takes
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found.strip():
            return found
    return ""


def chosen_template(recipe: Recipe, folders: Mapping[str, Path]) -> str:
    """The template that a recipe asks for; empty: the result keeps the base's.

    Args:
        folders: of the inputs, the anchor first: of equally common templates the first wins (mergekit's order is random).

    Raises:
        UserError: a template is asked for, and the result has no tokenizer to go with it.
    """
    if recipe.chat_template is None:
        return ""
    if recipe.chat_template == "auto":
        found = Counter(text.strip() for folder in folders.values() if (text := template_of(folder)))
        if not found:
            log.warning("%s: chat_template auto: no input has a chat template, so the result has none", recipe.path)
            return ""
        return found.most_common(1)[0][0]
    first = next(iter(folders.values()))
    if not any((first / name).is_file() for name in (CONFIG, "tokenizer.json", "tokenizer.model")):
        raise UserError(f"{recipe.path}: chat_template: {first} has no tokenizer that could hold it; add the tokenizer's "
                        "files, or delete chat_template")
    return recipe.chat_template


def write_template(folder: Path, template: str) -> None:
    """The only template of a finished folder: in chat_template.jinja, which transformers reads first, and nowhere else."""
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    (folder / OLD_TEMPLATE).unlink(missing_ok=True)
    if (folder / CONFIG).is_file():
        config = _json(folder / CONFIG)
        config.pop("chat_template", None)
        manifest.write_json(folder / CONFIG, config)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); replace it by the model's own file") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object; replace it by the model's own file")
    return content
