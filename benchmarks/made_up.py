"""A tokenizer for made-up models: nothing is fetched, every text can be encoded."""

from __future__ import annotations

from typing import Any

#: Answers end with the end token, as chat templates end them.
TEMPLATE = "{% for message in messages %}{{ message['content'] }}</s>{% endfor %}"


def tokenizer(vocabulary: int) -> Any:
    """A byte-level BPE without merges: 256 bytes, <s>, </s>, <pad>; ids are below ``vocabulary``, 259 or more.

    Raises:
        ValueError: a smaller vocabulary, whose model has no row for some byte.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special, alphabet = ("<s>", "</s>", "<pad>"), sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary < len(special) + len(alphabet):
        raise ValueError(f"a vocabulary of {vocabulary} has no place for {len(alphabet)} bytes and {len(special)} more")
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate((*special, *alphabet))}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                   chat_template=TEMPLATE)
