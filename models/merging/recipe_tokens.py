"""A recipe's tokenizer section and its chat template, as mergekit 0.1.5 reads them. Loads no torch.

    tokenizer:
      source: base                  # base | union | a model: whose tokens the result has
      tokens:                       # rows of single tokens; a token that the source lacks is added to it
        <|im_end|>: {source: MODEL, force: true}
        <pad>: {source: {kind: zero}}
        <new>: {source: {kind: model_token, model: MODEL, token: "<old>"}}
      pad_to_multiple_of: 64        # rows; those without a token are the mean of the others
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from models.merging.mergekit_keys import KEYS
from models.merging.recipe_values import Item, Report, shown

# chat templates by name, written after the formats' own descriptions
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_LLAMA3 = (
    "{% for message in messages %}"
    "{{ bos_token if loop.first else '' }}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_MISTRAL = (
    "{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{{ bos_token }}"
    "{% for turn in turns %}"
    "{% if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('roles must alternate user/assistant, after at most one system message') }}"
    "{% endif %}"
    "{% if turn['role'] == 'user' %}"
    "{{ ' [INST] ' + (system if loop.first else '') + turn['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {"chatml": _CHATML, "llama3": _LLAMA3, "mistral": _MISTRAL}
#: mergekit's other names, which we refuse
WITHOUT_TEXT = ("alpaca", "exaone")
#: A text shorter than this, or without a brace, is no template (mergekit's rule).
_SHORTEST = 20


@dataclass(frozen=True)
class TokenRule:
    """Where a token's row comes from.

    Args:
        model: whose row; None with ``zero``: a row of zeros, without: as for every other token.
        token, token_id: which of that model's rows, by text or by number; neither: the token itself.
        force: inputs that have the token take that row, too.
    """

    model: str | None = None
    zero: bool = False
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenRules:
    """Whose tokens the result has (base, union, or a model's name), single tokens' rows, and the multiple to pad to."""

    source: str
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to: int | None = None


def read_tokens_section(item: Item, report: Report, keys: Callable[[Item, tuple[str, ...]], dict[str, Item]],
                        model: Callable[[Item], str | None]) -> TokenRules:
    """The ``tokenizer`` section of a recipe.

    Args:
        keys: reads a mapping's known keys.
        model: reads a model's name.
    """
    found = keys(item, KEYS["tokenizer"])
    # mergekit's default for a section that names no source
    source = model(found["source"]) if "source" in found else "union"
    rules: dict[str, TokenRule] = {}
    section = found.get("tokens")
    if section is not None and not isinstance(section.value, dict):
        report.error(section, "needs 'TOKEN: {source: ..}' lines")
    elif section is not None:
        for text, entry in section.value.items():
            rule = _rule(entry, report, keys, model)
            if rule is not None:
                rules[text] = rule
    pad = found.get("pad_to_multiple_of")
    size = None if pad is None else _whole(pad, report, 1)
    return TokenRules(source or "base", rules, size)


def _rule(entry: Item, report: Report, keys: Callable, model: Callable) -> TokenRule | None:
    if not isinstance(entry.value, dict):
        report.error(entry, "needs a mapping: {source: MODEL, force: true or false}")
        return None
    found = keys(entry, KEYS["token"])
    force = found["force"].value if "force" in found else False
    if force not in (True, False):
        report.error(found["force"], f"{shown(force)}: needs true or false")
        return None
    source = found.get("source")
    if source is None:
        report.error(entry, "has no source; add source: MODEL, {kind: zero}, or {kind: model_token, model: .., token: ..}")
        return None
    if not isinstance(source.value, dict) or "kind" not in source.value:
        if source.value in ("zero", "model_token"):
            report.error(source, f"{source.value} would be a model's name; write {{kind: {source.value}}}")
            return None
        name = model(source)
        return TokenRule(name, force=bool(force)) if name else None
    parts = keys(source, KEYS["token_source"])
    named = parts.get("kind", Item(None, source.line, f"{source.name}.kind"))
    kind = shown(named.value)
    if kind == "zero":
        return TokenRule(zero=True, force=bool(force))
    if kind != "model_token":
        report.error(named, f"{kind}: not known; allowed: zero, model_token")
        return None
    name = model(parts.get("model", Item(None, source.line, f"{source.name}.model")))
    if ("token" in parts) == ("token_id" in parts):
        report.error(source, "needs token or token_id, one of the two")
        return None
    token = parts["token"].value if "token" in parts else None
    number = _whole(parts["token_id"], report, 0) if "token_id" in parts else None
    if name is None or (token is None and number is None):
        return None
    return TokenRule(name, token=None if token is None else str(token), token_id=number, force=bool(force))


def _whole(item: Item, report: Report, low: int) -> int | None:
    try:
        value = int(str(item.value))
    except ValueError:
        value = low - 1
    if isinstance(item.value, bool) or value < low:
        report.error(item, f"{shown(item.value)}: needs a whole number of {low} or more")
        return None
    return value


def read_chat_template(item: Item, report: Report) -> str | None:
    """``auto``, a template's text, or None and a problem reported.

    A name stands for one of TEMPLATES, a path that ends in .jinja for that file (beside the recipe, or from here).
    """
    text = item.value
    if text == "auto":
        return "auto"
    if isinstance(text, str) and text in TEMPLATES:
        return TEMPLATES[text]
    if isinstance(text, str) and text.endswith(".jinja") and "\n" not in text and "{" not in text:
        for path in (report.path.parent / text, Path(text).expanduser()):
            if path.is_file():
                return path.read_text(encoding="utf-8")
        report.error(item, f"{text}: no such file, neither beside the recipe nor from here")
        return None
    if isinstance(text, str) and len(text) >= _SHORTEST and "{" in text:
        return text
    report.error(item, f"{shown(text)}: no chat template; allowed: auto, {', '.join(TEMPLATES)}, a file .jinja, "
                       "or a template's own text")
    return None
