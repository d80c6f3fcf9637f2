"""Tokenizers that do not fit a model as they are: end tokens after every text, ids beyond the embedding, no vocabulary."""

from __future__ import annotations

import json

import pytest
from pico import make_pico
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from data.encode import encode, prompt_ids
from data.prompts import template
from data.records import Record
from errors import UserError
from models.base.loading import load_tokenizer

TEMPLATES = ("alpaca", "wizardlm", "llama2", "chat")


@pytest.fixture
def base(tmp_path):
    return make_pico(tmp_path / "base")


def appending(base, single="<|im_start|> $A <|im_end|>"):
    """The tokenizer of ``base`` with special tokens around every text, saved again."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[
        (token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>", "<|pad|>")])
    tokenizer.save_pretrained(base)
    assert AutoTokenizer.from_pretrained(base)("Hi").input_ids[-1] == tokenizer.convert_tokens_to_ids(single.split()[-1])


@pytest.mark.parametrize("single", ["<|im_start|> $A <|im_end|>", "$A <|im_end|>", "<|im_start|> $A <|im_end|> <|pad|>"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_end_stands_before_the_answer(base, single, name):
    plain = AutoTokenizer.from_pretrained(base)
    appending(base, single)
    tokenizer = load_tokenizer(base)
    shape = template(name, tokenizer)
    text = shape.render("Say hi", "")
    bos = [tokenizer.bos_token_id] if single.startswith("<") and shape.special_tokens else []
    want = bos + plain(text, add_special_tokens=False).input_ids
    assert prompt_ids(text, tokenizer, shape) == want
    row = encode([Record("Say hi", "Hello", 0)], tokenizer, shape, 200).rows[0]
    ids, labels = row["input_ids"], row["labels"]
    assert [i for i, label in zip(ids, labels, strict=True) if label == -100][:len(want)] == want
    assert labels[len(want):] == ids[len(want):]
    assert ids.count(tokenizer.eos_token_id) == want.count(tokenizer.eos_token_id) + 1
    assert ids[-1] == tokenizer.eos_token_id


def test_a_saved_tokenizer_stays_as_it_was_made(base, tmp_path):
    appending(base)
    load_tokenizer(base).save_pretrained(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run", base)("Hi").input_ids == load_tokenizer(base)("Hi").input_ids


def test_llama_tokenizers_that_add_an_end_by_setting(base, tmp_path):
    from transformers import LlamaTokenizer

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, **{chr(97 + i): 4 + i for i in range(26)}}
    own = LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True, add_eos_token=True)
    for file in base.glob("*token*"):
        file.unlink()
    own.save_pretrained(base)
    assert AutoTokenizer.from_pretrained(base)("hi").input_ids[-1] == 2
    tokenizer = load_tokenizer(base)
    inner = tokenizer("hi", add_special_tokens=False).input_ids
    assert tokenizer("hi").input_ids == [1, *inner]
    tokenizer.save_pretrained(tmp_path / "again")
    # what others read of a run's folder appends none either
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("hi").input_ids == [1, *inner]


def test_classifiers_keep_their_end(base):
    appending(base)
    tokenizer = load_tokenizer(base, ends=True)
    assert tokenizer("Hi").input_ids[-1] == tokenizer.eos_token_id


def with_tokens(base, *, pad=None, extra=(), fill=True):
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    while fill and len(tokenizer) < rows:
        tokenizer.add_tokens([f"<extra{len(tokenizer)}>"])
    tokenizer.add_tokens(list(extra))
    if pad:
        tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.save_pretrained(base)
    return rows


def test_a_pad_token_without_a_row_is_replaced(base, caplog):
    rows = with_tokens(base, pad="[PAD]")
    with caplog.at_level("INFO"):
        tokenizer = load_tokenizer(base)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id < rows
    assert f"pad token '[PAD]' has id {rows}, beyond the {rows} rows of the embedding" in caplog.text


def test_a_pad_token_inside_stays(base):
    assert load_tokenizer(base).pad_token == "<|pad|>"


def test_added_tokens_without_a_row_are_plain_text(base, tmp_path):
    rows = with_tokens(base, pad="[PAD]", extra=["<tool>", "<think>"])
    tokenizer = load_tokenizer(base)
    ids = tokenizer("a <tool> b <think>[PAD]").input_ids
    assert max(ids) < rows
    assert tokenizer.decode(ids) == "a <tool> b <think>[PAD]"
    tokenizer.save_pretrained(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run", base)("a <tool> b <think>[PAD]").input_ids == ids


def test_an_adapters_tokenizer_is_held_to_the_base(base, tmp_path):
    rows = with_tokens(base, pad="[PAD]")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run", base).pad_token_id < rows


def test_ends_and_templates_without_a_row_are_refused(base):
    with_tokens(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match=r"eos_token uses '<\|end\|>', whose id 384 is beyond the 384 rows"):
        load_tokenizer(base)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer.save_pretrained(base)
    with pytest.raises(UserError, match=r"its chat template uses '<\|end\|>'"):
        load_tokenizer(base)


def test_a_vocabulary_of_another_model_is_refused(base, tmp_path):
    small = make_pico(tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 270}))
    with pytest.raises(UserError, match="but the model's embedding has 270 rows"):
        load_tokenizer(small)


def without(base, *keep):
    for file in [*base.glob("*token*"), *base.glob("chat*")]:
        if file.name not in keep:
            file.unlink()


@pytest.mark.parametrize("keep", [(), ("tokenizer_config.json",)])
def test_no_vocabulary(base, keep):
    without(base, *keep)
    if keep:
        # transformers makes a Llama tokenizer of three tokens out of this
        (base / keep[0]).write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>",
                                                   "eos_token": "</s>"}))
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(base)


def test_a_vocabulary_that_only_sentencepiece_reads(base):
    without(base)
    # field 1 of a SentencePiece model: one piece
    (base / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"}))
    with pytest.raises(UserError, match="has no tokenizer.json, and its vocabulary cannot be turned into one") as error:
        load_tokenizer(base)
    assert "sentencepiece and protobuf" in str(error.value)


@pytest.mark.parametrize(("name", "content", "says"), [
    ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ("tokenizer.json", "{", "its tokenizer cannot be read"), ("tokenizer_config.json", "{", "cannot be read"),
])
def test_damaged_files(base, name, content, says):
    (base / name).write_text(content)
    with pytest.raises(UserError, match=says):
        load_tokenizer(base)


def test_code_is_never_needed_nor_run(base):
    content = json.loads((base / "tokenizer_config.json").read_text())
    content["auto_map"] = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    (base / "tokenizer_config.json").write_text(json.dumps(content))
    (base / "tokenizer.json").rename(base / "vocab.json")
    with pytest.raises(UserError, match="auto_map"):
        load_tokenizer(base)


def piped(base, name, **parts):
    """The tokenizer.json of ``base`` with other parts and a class's name beside it; returns that file, read by itself."""
    content = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(content | {"tokenizer_class": name}))
    saved = Tokenizer.from_file(str(base / "tokenizer.json"))
    for part, value in parts.items():
        setattr(saved, part, value)
    saved.save(str(base / "tokenizer.json"))
    return saved


# OLMo 2 and StarCoder 2 name GPT2Tokenizer, and transformers' class of that name splits otherwise
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "CohereTokenizerFast", "Phi3Tokenizer"])
@pytest.mark.parametrize("parts", [
    {"normalizer": normalizers.NFKC()},
    {"pre_tokenizer": pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])},
], ids=str)
def test_texts_are_split_as_the_file_says_and_not_as_the_class_would(base, tmp_path, name, parts):
    saved = piped(base, name, **parts)
    tokenizer = load_tokenizer(base)
    tokenizer.save_pretrained(tmp_path / "run")
    for text in ("Hello  there, I'm\n\n  fine.", "Mix 12345 g of Ｆlour"):
        want = saved.encode(text, add_special_tokens=False).ids
        assert tokenizer(text, add_special_tokens=False).input_ids == want
        assert load_tokenizer(tmp_path / "run", base)(text, add_special_tokens=False).input_ids == want
        assert tokenizer.decode(want) == saved.decode(want)


def test_llama_2s_space_after_a_special_token(base):
    from tokenizers import decoders, models

    pieces = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz[]/", "▁h", "▁["]
    saved = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[("▁", "h"), ("▁", "[")],
                                 fuse_unk=True, unk_token="<unk>"))
    saved.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    saved.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    saved.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    saved.add_special_tokens(["<unk>", "<s>", "</s>"])
    saved.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>",
                                                           "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}))
    text = "[inst] hi [/inst] a </s><s>[inst] b"
    tokenizer = load_tokenizer(base)
    assert tokenizer(text).input_ids == saved.encode(text).ids
    # transformers' own class leaves the second "▁[" out
    assert tokenizer(text).input_ids.count(pieces.index("▁[")) == 3
