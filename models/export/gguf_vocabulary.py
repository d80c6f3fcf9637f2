"""A tokenizer as llama.cpp keeps it: tokens, kinds, merges, and which of its ways to split a text before the merges.

llama.cpp knows ways to split by name and does not read regular expressions, so that a tokenizer is written only where its
splitting is one that is known here; anything else would read other tokens without a word.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from errors import UserError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
#: What a pre-tokenizer does, piece by piece -> llama.cpp's name of it.
_SPLITS: dict[tuple, str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LLAMA3, "Isolated"), ("ByteLevel", False)): "llama-bpe",
    (("Split", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"), "Isolated"), ("ByteLevel", False)): "qwen2",
}
#: llama.cpp's kinds of tokens (gguf.TokenType).
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_INSTEAD = ("write the run with --layout mixtral (or dense) and turn that folder into GGUF with llama.cpp's own "
            "convert_hf_to_gguf.py, which knows more tokenizers")


def splitting(folder: Path) -> str:
    """llama.cpp's name of how a folder's tokenizer splits texts.

    Raises:
        UserError: no byte-level BPE in a tokenizer.json, or it splits or rewrites texts in a way that has no name here.
    """
    content = _read(folder)
    model = content.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("ignore_merges") and "merges" not in model:
        raise UserError(f"--layout gguf: {folder / 'tokenizer.json'} is no byte-level BPE (type {model.get('type')}, "
                        f"byte_fallback {model.get('byte_fallback')}); {_INSTEAD}")
    if content.get("normalizer"):
        raise UserError(f"--layout gguf: {folder / 'tokenizer.json'} rewrites texts before it splits them (normalizer "
                        f"{content['normalizer'].get('type')}), which llama.cpp does not; {_INSTEAD}")
    pre = content.get("pre_tokenizer") or {}
    pieces = tuple(_piece(part) for part in (pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]))
    if pieces not in _SPLITS:
        raise UserError(f"--layout gguf: {folder / 'tokenizer.json'} splits texts in a way whose name in llama.cpp is not "
                        f"known here ({', '.join(str(piece[0]) for piece in pieces)}); {_INSTEAD}")
    return _SPLITS[pieces]


def _piece(part: dict[str, Any]) -> tuple:
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return kind, bool(part.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(part.get("individual_digits"))
    if kind == "Split" and not part.get("invert"):
        return kind, (part.get("pattern") or {}).get("Regex"), part.get("behavior")
    return kind, "?"


def _read(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"--layout gguf: {folder / 'tokenizer.json'} cannot be read; {_INSTEAD}") from None


def add_vocabulary(writer: Any, folder: Path, tokenizer: Any, rows: int, turn_end: int | None) -> None:
    """Put a tokenizer into a ``gguf.GGUFWriter``.

    Args:
        folder: of the tokenizer.
        tokenizer: the same, loaded: its special tokens and chat template.
        rows: of the embedding; ids without a token become unused ones.
        turn_end: the token that the chat template puts behind an answer.
    """
    content = _read(folder)
    tokens: dict[int, tuple[str, int]] = {i: (token, _NORMAL) for token, i in content["model"]["vocab"].items()}
    for added in content.get("added_tokens") or []:
        tokens[added["id"]] = added["content"], _CONTROL if added.get("special") else _USER_DEFINED
    listed = [tokens.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(folder))
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    # an empty list has no type, and llama.cpp wants one
    writer.add_token_merges(merges or ["Ġ Ġ"])
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id, "eot": turn_end}
    for name, number in ids.items():
        if number is not None and number < rows:
            getattr(writer, f"add_{name}_token_id")(number)
    front = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(front) and tokenizer.bos_token_id is not None and front[0] == tokenizer.bos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
