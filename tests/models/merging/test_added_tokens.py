"""Tokens that one input added, in the result: their flags, their ids, their rows; the old tokens as they were."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pico import make_pico
from safetensors.torch import load_file
from synthetic import make_checkpoint

from models import fuse

FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")
#: text -> flags, none of them as another
ADDED = {
    "<tool>": dict(special=True, lstrip=True, rstrip=False, normalized=False, single_word=False),
    "<strip>": dict(special=True, lstrip=False, rstrip=True, normalized=False, single_word=False),
    "grams": dict(special=False, lstrip=False, rstrip=False, normalized=True, single_word=True),
}


@pytest.fixture
def tuned(tmp_path) -> Path:
    """A pico base, and a model tuned from it that added three tokens and grew its embedding."""
    from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

    make_pico(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer.add_tokens([AddedToken(text, **flags) for text, flags in ADDED.items()])
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer) + 5)  # padded, as most are
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    return tmp_path


def union(folder: Path) -> Path:
    fuse.main(["merge", "--method", "linear", "--models", f"{folder / 'base'},{folder / 'tuned'}", "--vocab", "union",
               "--output_dir", str(folder / "r")])
    return folder / "r" / "outputs" / "merged"


def flags_of(tokenizer) -> dict[str, dict[str, bool]]:
    return {token.content: {flag: getattr(token, flag) for flag in FLAGS}
            for token in tokenizer.added_tokens_decoder.values()}


@pytest.mark.parametrize("older", [False, True], ids=["as transformers 5 writes", "as transformers 4 wrote"])
def test_added_tokens_keep_their_flags_ids_and_rows(tuned, older):
    from transformers import AutoTokenizer

    base, other = (AutoTokenizer.from_pretrained(tuned / name) for name in ("base", "tuned"))
    if older:
        path = tuned / "base" / "tokenizer_config.json"
        decoder = {str(i): {"content": t.content, **{f: getattr(t, f) for f in FLAGS}}
                   for i, t in base.added_tokens_decoder.items()}
        path.write_text(json.dumps(json.loads(path.read_text()) | {
            "added_tokens_decoder": decoder, "additional_special_tokens": [], "tokenizer_class": "PreTrainedTokenizerFast"}))
        (tuned / "base" / "special_tokens_map.json").write_text(json.dumps(
            {"additional_special_tokens": [], "pad_token": "<|pad|>"}))
        (tuned / "base" / "added_tokens.json").write_text("{}")
    out = union(tuned)
    made = AutoTokenizer.from_pretrained(out)
    assert {text: flags_of(made)[text] for text in ADDED} == ADDED
    # the base's are what they were
    assert {text: flags for text, flags in flags_of(made).items() if text not in ADDED} == flags_of(base)
    assert {text: i for text, i in made.get_vocab().items() if text not in ADDED} == base.get_vocab()
    text = "Mix  <tool> the flour <strip> with 3 grams, kilograms and water"
    assert made.convert_ids_to_tokens(made(text).input_ids) == other.convert_ids_to_tokens(other(text).input_ids)
    assert made.decode(made(text).input_ids, skip_special_tokens=True) == other.decode(other(text).input_ids,
                                                                                       skip_special_tokens=True)
    # the id of a new token is its row, and that row is the tuned model's
    rows, tuned_rows = (load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (out, tuned / "tuned"))
    for token in ADDED:
        assert torch.equal(rows[made.convert_tokens_to_ids(token)], tuned_rows[other.convert_tokens_to_ids(token)])
    if older:
        config = json.loads((out / "tokenizer_config.json").read_text())
        ids = {text: made.convert_tokens_to_ids(text) for text in ADDED}
        assert {text: config["added_tokens_decoder"][str(i)] for text, i in ids.items()} == {
            text: {"content": text, **flags} for text, flags in ADDED.items()}
        assert config["additional_special_tokens"] == ["<tool>", "<strip>"]
        roles = json.loads((out / "special_tokens_map.json").read_text())
        assert roles == {"additional_special_tokens": ["<tool>", "<strip>"], "pad_token": "<|pad|>"}
        assert json.loads((out / "added_tokens.json").read_text()) == ids


def test_ids_that_a_tokenizer_would_number_otherwise_are_refused(tmp_path, capsys):
    def tokenizer(folder: Path, pieces: dict[str, int], added: list[str]) -> None:
        extra = [{"id": max(pieces.values()) + 1 + i, "content": text, "special": True, "single_word": False,
                  "lstrip": False, "rstrip": False, "normalized": False} for i, text in enumerate(added)]
        (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": extra, "model": {
            "type": "WordLevel", "vocab": pieces, "unk_token": "a"}}))

    base = make_checkpoint(tmp_path / "base", vocab=8, scale=0.5)
    make_checkpoint(tmp_path / "tuned", vocab=9, seed=1)
    tokenizer(base, {"a": 0, "b": 1, "c": 5}, [])
    tokenizer(tmp_path / "tuned", {"a": 0, "b": 1, "c": 5}, ["<new>"])
    with pytest.raises(SystemExit):
        union(tmp_path)
    assert "have gaps" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_bias_over_the_vocabulary_is_not_lined_up_by_guess(tmp_path, capsys):
    from safetensors.torch import save_file
    from synthetic import make_tokenizer

    for name, pieces in (("base", "abc"), ("tuned", "bac")):
        folder = make_checkpoint(tmp_path / name, vocab=3, scale=0.5)
        make_tokenizer(folder, list(pieces))
        tensors = load_file(folder / "model.safetensors") | {"lm_head.bias": torch.arange(3.0)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        union(tmp_path)
    assert "lm_head.bias" in capsys.readouterr().err


def test_a_recipe_s_tokenizer_section_keeps_the_flags_and_adds_its_own_tokens_plain(tuned):
    from transformers import AutoTokenizer

    recipe = tuned / "r.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {tuned / 'base'}}}, {{model: {tuned / 'tuned'}}}]\n"
                      "tokenizer: {source: union, pad_to_multiple_of: 16, tokens: {<own>: {source: {kind: zero}}}}\n")
    fuse.main(["merge", "--recipe", str(recipe), "--output_dir", str(tuned / "r"), "--run_name", "out"])
    out = tuned / "r" / "outputs" / "out"
    made, other = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(tuned / "tuned")
    assert {text: flags_of(made)[text] for text in ADDED} == ADDED
    # as mergekit does by tokenizer.add_tokens(TEXT)
    plain = AutoTokenizer.from_pretrained(tuned / "base")
    plain.add_tokens("<own>")
    assert flags_of(made)["<own>"] == flags_of(plain)["<own>"]
    rows, tuned_rows = (load_file(f / "model.safetensors")["model.embed_tokens.weight"] for f in (out, tuned / "tuned"))
    assert len(rows) % 16 == 0
    for token in ADDED:
        torch.testing.assert_close(rows[made.convert_tokens_to_ids(token)], tuned_rows[other.convert_tokens_to_ids(token)])
    assert not rows[made.convert_tokens_to_ids("<own>")].any()


@pytest.mark.parametrize("policy", ["", "base", "union"])
def test_a_token_that_never_grew_into_the_embedding_gets_no_row(tmp_path, policy):
    """Llama 2's [PAD] of id 32000 over 32000 rows: a row made up for it would be one more word to answer."""
    from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer

    make_pico(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    size = len(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    tokenizer.add_tokens([AddedToken("[PAD]", special=True)])
    tokenizer.save_pretrained(tmp_path / "base")
    if policy:
        # without it the two agree
        grown = AutoTokenizer.from_pretrained(tmp_path / "tuned")
        grown.add_tokens([AddedToken("<tool>", special=True)])
        grown.save_pretrained(tmp_path / "tuned")
        model.resize_token_embeddings(size + 1)
        model.save_pretrained(tmp_path / "tuned")
    fuse.main(["merge", "--method", "linear", "--models", f"{tmp_path / 'base'},{tmp_path / 'tuned'}", "--output_dir",
               str(tmp_path / "r"), *(["--vocab", policy] if policy else [])])
    out = tmp_path / "r" / "outputs" / "merged"
    rows = load_file(out / "model.safetensors")["model.embed_tokens.weight"]
    made = AutoTokenizer.from_pretrained(out)
    assert len(rows) == json.loads((out / "config.json").read_text())["vocab_size"] == size + (policy == "union")
    # the first rows are the special tokens', of which the pad token's is 0 from the start
    assert rows[3:].any(1).all()
    if policy == "union":
        tuned_rows = load_file(tmp_path / "tuned" / "model.safetensors")["model.embed_tokens.weight"]
        assert made.convert_tokens_to_ids("<tool>") == size
        torch.testing.assert_close(rows[size], tuned_rows[size])
    assert ("[PAD]" in made.get_vocab()) == (not policy)
