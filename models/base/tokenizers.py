"""Tokenizers, made to fit the model that they are used with, or refused.

What a tokenizer of a user's own brings along and a model cannot stand: no vocabulary (transformers then makes an empty one
without a word), a class that splits texts otherwise than its tokenizer.json, an end token after every text, ids beyond the
rows of the embedding. Embeddings are never resized.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AutoTokenizer

from errors import UserError
from models.base.folders import POINTER_ADVICE, is_pointer, read_config

log = logging.getLogger(__name__)
#: Files that hold a vocabulary; without any of them there is no tokenizer, whatever its configuration names.
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
               "spm.model", "tekken.json", "tiktoken.model", "vocab.model")
#: What of a tokenizer.json decides how a text is split and put together again; its post-processor transformers takes over.
_PIPELINE = ("model", "normalizer", "pre_tokenizer", "decoder")
#: An answer that is found again in what a chat template writes.
_ANSWER = "xAnswerx"
#: A text whose tokens nobody takes for special ones.
_PROBE = "a"


def load(folder: Path, rows: int | None, ends: bool = False) -> Any:
    """The tokenizer of a model folder, with a pad token.

    Args:
        rows: of the embedding that its ids are looked up in; None: not known.
        ends: keep the end token that it may append to every text, as classifiers were trained to read. A language model
            that reads one takes the text before it for finished.

    Raises:
        UserError: no tokenizer, one that cannot be read here, or one that was made for another model.
    """
    _check_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a dozen unrelated types, and whole paragraphs; the user needs one sentence
        raise UserError(f"{folder}: {_unreadable(folder, error)}") from None
    _as_its_file(tokenizer, folder)
    # only names of special tokens were there: transformers makes a tokenizer that knows nothing else
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        raise UserError(f"{folder}: its tokenizer has no vocabulary ({tokenizer.vocab_size} tokens); put tokenizer.json "
                        "beside the weights")
    if not ends:
        _never_end(tokenizer, folder)
    if rows:
        _fit_rows(tokenizer, rows, folder)
    # not a new token: it would need a row of its own in embeddings that are never resized
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_files(folder: Path) -> None:
    there = [folder / name for name in _VOCABULARY if (folder / name).is_file()]
    if not there:
        raise UserError(f"{folder}: holds no tokenizer ({', '.join(_VOCABULARY[:3])} or another vocabulary); put the "
                        "model's tokenizer files beside its weights, at best tokenizer.json")
    settings = folder / "tokenizer_config.json"
    problems = [f"{path}: {POINTER_ADVICE}" for path in there if is_pointer(path)]
    content = read_config(settings, problems) if settings.is_file() else {}
    # with a tokenizer.json transformers takes a class of its own; without, only the code could read the vocabulary
    if content.get("auto_map") and not (folder / "tokenizer.json").is_file():
        problems.append(f"{settings}: names Python code for its tokenizer (auto_map), which is never executed; put a "
                        "tokenizer.json beside it")
    if problems:
        raise UserError(*problems)


def _unreadable(folder: Path, error: Exception) -> str:
    """A sentence on a tokenizer that transformers could not make."""
    if not (folder / "tokenizer.json").is_file():
        return ("its tokenizer has no tokenizer.json, and its vocabulary cannot be turned into one with the packages that "
                "are installed; do that once where sentencepiece and protobuf are: "
                f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})")
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"its tokenizer cannot be read ({type(error).__name__}: {first}); download or save tokenizer.json again"


def _as_its_file(tokenizer: Any, folder: Path) -> None:
    """Split texts as the model's tokenizer.json says, whatever class its configuration names.

    transformers 5 builds most classes (GPT2Tokenizer, Qwen2Tokenizer, LlamaTokenizer) from the vocabulary alone, with the
    normaliser and the splits of the class: those of OLMo 2, which names GPT2Tokenizer, are others, and so are its numbers'
    tokens. It knows some such models by their hub names, which a folder has not.
    """
    file, backend = folder / "tokenizer.json", getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not file.is_file():
        return
    saved = Tokenizer.from_file(str(file))
    # BERT's kind takes case and accents from tokenizer_config.json, and always has
    if isinstance(saved.model, WordPiece):
        return
    other = [part for part in _PIPELINE if _state(getattr(saved, part)) != _state(getattr(backend, part))]
    for part in other:
        setattr(backend, part, getattr(saved, part))
    if other:
        log.info("%s: %s would read texts otherwise than its tokenizer.json (%s); the file is followed", folder,
                 type(tokenizer).__name__, ", ".join(other))


def _state(part: Any) -> bytes | None:
    return None if part is None else part.__getstate__()


def _never_end(tokenizer: Any, folder: Path) -> None:
    """Keep a tokenizer from appending special tokens; those in front (BOS) stay."""
    front, back = _around(tokenizer)
    if not back:
        return
    said = ", ".join(tokenizer.convert_ids_to_tokens(back))
    # both: the attribute is what transformers builds the processor from when the tokenizer is loaded again
    if getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False
        tokenizer.init_kwargs["add_eos_token"] = False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if _around(tokenizer) != (front, []) and backend is not None:
        named = [(tokenizer.convert_ids_to_tokens(i), i) for i in front]
        pieces = [token for token, _ in named]
        backend.post_processor = TemplateProcessing(single=[*pieces, "$A"], pair=[*pieces, "$A", *pieces, "$B"],
                                                    special_tokens=named) if front else ByteLevel(trim_offsets=False)
    if _around(tokenizer) != (front, []):
        raise UserError(f"{folder}: its tokenizer appends {said} to every text, so that each prompt would be finished "
                        "before its answer; set add_eos_token to false in tokenizer_config.json")
    log.info("%s: its tokenizer appends %s to every text; left out, because an answer follows", folder, said)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special ids that the tokenizer puts in front of a text and behind it."""
    ids, special = tokenizer(_PROBE)["input_ids"], set(tokenizer.all_special_ids)
    inner = [i for i, token in enumerate(ids) if token not in special]
    return (ids[: inner[0]], ids[inner[-1] + 1 :]) if inner else (ids, [])


def _fit_rows(tokenizer: Any, rows: int, folder: Path) -> None:
    """See to it that no text can give an id that the embedding has no row for."""
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if not beyond:
        return
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if foreign := sorted(beyond.keys() - added, key=lambda token: beyond[token]):
        raise UserError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, but the model's embedding has {rows} rows "
                        f"(e.g. {foreign[0]!r} is {beyond[foreign[0]]}); give the model's own tokenizer")
    needed = {what: token for what in ("bos_token", "eos_token") if (token := getattr(tokenizer, what)) in beyond}
    if written := [token for token in beyond if token in _shown(tokenizer)]:
        needed["its chat template"] = written[0]
    if needed:
        what, token = next(iter(needed.items()))
        raise UserError(f"{folder}: {what} uses {token!r}, whose id {beyond[token]} is beyond the {rows} rows of the "
                        "model's embedding; give the model whose vocabulary was resized for it, or the base's own tokenizer")
    if tokenizer.pad_token in beyond:
        log.info("%s: pad token %r has id %d, beyond the %d rows of the embedding; padding with %r instead", folder,
                 tokenizer.pad_token, beyond[tokenizer.pad_token], rows, tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    _forget(tokenizer, beyond)
    log.info("%s: %d added tokens have no row in the embedding and are read as plain text, e.g. %r", folder, len(beyond),
             next(iter(beyond)))


def _shown(tokenizer: Any) -> str:
    """What the chat template writes around a short exchange; empty without a template that can."""
    if not tokenizer.chat_template:
        return ""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception:  # templates raise what they like; the one who uses it tells that
        return ""


def turn_end(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer; None where it puts none."""
    _, found, after = _shown(tokenizer).rpartition(_ANSWER)
    after = after.strip() if found else ""
    first = next(iter(tokenizer(after, add_special_tokens=False)["input_ids"]), None) if after else None
    token = tokenizer.added_tokens_decoder.get(first)
    # a word is no end; neither is what starts a text
    return first if token is not None and token.special and first != tokenizer.bos_token_id else None


def _forget(tokenizer: Any, tokens: dict[str, int]) -> None:
    """Take added tokens out of a tokenizer, so that their text is split like any other."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in tokens]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
