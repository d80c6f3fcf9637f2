"""Fields of a recipe that every level shares: keys, model names in all their spellings, layers, words. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from errors import nearest
from models.merging.mergekit_keys import KEYS, unknown_key
from models.merging.recipe_values import Item, Report, shown

DTYPES = ("float32", "float16", "bfloat16")
#: keys that one may expect and that we do not support -> what to do instead
_REFUSED = {
    "modules": "merge one module at a time, with models or slices",
    "chat_template": "it is a key of mergekit's recipes (merge_method:); ours keep the base's template",
    "random_seed": "give it with --seed",
    "seed": "give it with --seed",
    "tokens": "tokens are matched by their text",
    "pad_to_multiple_of": "rows are as many as the tokens need",
}


def given(keys: Mapping[str, Item], name: str, parent: Item) -> Item:
    """The item of a key that must be there; an empty one at its parent's line when it is missing."""
    return keys.get(name, Item(None, parent.line, f"{parent.name}.{name}" if parent.name else name))


class Fields:
    """Reads fields of one file; problems go to the report.

    Args:
        theirs: by mergekit's rules.
    """

    def __init__(self, report: Report, theirs: bool) -> None:
        self.report, self.theirs = report, theirs
        #: name of a model with an adapter on it -> (model, adapter)
        self.adapters: dict[str, tuple[str, str]] = {}

    def keys(self, item: Item, allowed: Iterable[str]) -> dict[str, Item]:
        """A mapping's items that hold something; an error for every key that is not allowed."""
        for key, entry in item.value.items():
            if key not in allowed and self.theirs:
                unknown_key(self.report, entry, key, tuple(allowed))
            elif key not in allowed:
                why = f"not supported; {_REFUSED[key]}" if key in _REFUSED else f"unknown key{nearest(key, allowed)}"
                self.report.error(entry, f"{why}; allowed keys: {', '.join(allowed)}")
        return {key: entry for key, entry in item.value.items() if key in allowed and entry.value is not None}

    def entries(self, item: Item) -> list[Item]:
        if isinstance(item.value, list) and item.value:
            return item.value
        kinds = {"slices": "slices", "models": "models (or slices instead)"}
        self.report.error(item, f"needs a list of {kinds.get(item.name, 'models')}, one or more")
        return []

    def is_mapping(self, item: Item) -> bool:
        if not isinstance(item.value, dict):
            self.report.error(item, "needs 'key: value' lines")
        return isinstance(item.value, dict)

    def model(self, item: Item | None) -> str | None:
        if item is None:
            return None
        name = item.value
        if self.theirs and isinstance(name, dict):
            return self.reference(item)
        if not isinstance(name, str) or not name.strip():
            self.report.error(item, "needs a model: text that names a folder or run (a number in quotes)")
        # mergekit's MODEL+LORA and MODEL@REVISION; read as folder names they would be "not found"
        elif self.theirs and "+" in name and "@" not in name:
            return self.adapted(item, *name.split("+"))
        elif self.theirs and "@" in name:
            self.report.error(item, f"{name}: a revision is not supported; name the folder of that revision")
        else:
            return name
        return None

    def adapted(self, item: Item, *parts: str) -> str | None:
        """MODEL+ADAPTER as one name, whose parts are kept."""
        if len(parts) != 2 or not all(part.strip() for part in parts):
            self.report.error(item, f"{'+'.join(parts)}: needs MODEL+ADAPTER, one adapter at most")
            return None
        name = "+".join(part.strip() for part in parts)
        self.adapters[name] = (parts[0].strip(), parts[1].strip())
        return name

    def reference(self, item: Item) -> str | None:
        """A model written as a mapping: {model: {path: ..}, lora: {path: ..}}, or its inner part alone."""
        if "path" in item.value:
            keys = self.keys(item, KEYS["path"])
            if "revision" in keys:
                self.report.error(keys["revision"], "a revision is not supported; name the folder of that revision")
            return self.model(keys.get("path", replace(item, value=None, name=f"{item.name}.path")))
        keys = self.keys(item, KEYS["reference"])
        if "override_architecture" in keys:
            self.report.error(keys["override_architecture"], "not supported; change architectures in config.json")
        name = self.model(given(keys, "model", item))
        lora = self.model(keys.get("lora"))
        return self.adapted(item, name, lora) if name and lora else name

    def layers(self, item: Item) -> tuple[int, int] | None:
        numbers = [e.value for e in item.value] if isinstance(item.value, list) else []
        if self.theirs:
            numbers = [int(n) if isinstance(n, str) and n.strip().isdigit() else n for n in numbers]
        if len(numbers) != 2 or not all(type(n) is int for n in numbers):
            self.report.error(item, "needs two whole numbers: [first layer, layer behind the last]")
        elif not 0 <= numbers[0] < numbers[1]:
            self.report.error(item, f"{numbers}: needs 0 <= first < last")
        else:
            return numbers[0], numbers[1]
        return None

    def dtype(self, item: Item | None) -> str | None:
        return self.word(item, DTYPES, lambda text: text.removeprefix("torch."))

    def word(self, item: Item | None, allowed: Iterable[str], clean: Callable[[str], str] = str) -> str | None:
        if item is None:
            return None
        value = clean(shown(item.value))
        if value in allowed:
            return value
        self.report.error(item, f"{value}: not known{nearest(value, allowed)}; allowed: {', '.join(allowed)}")
        return None
