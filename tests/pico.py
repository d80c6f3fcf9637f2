"""A pico Llama on disk: what every test loads instead of a real model. Made in well under a second, nothing fetched."""

from __future__ import annotations

import json
from pathlib import Path

FFN = ("gate_proj", "up_proj", "down_proj")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|pad|>")
TEXTS = (
    "How do I bake bread at home? Mix flour, water, salt and yeast, then wait before you bake it.",
    "What is the capital of France? The capital of France is Paris, and the city lies on the Seine.",
    "I'm sorry, but I can't help with that. Is there something else that I can do for you instead?",
    "Write a short story about a dog who learns to sail. The dog took the boat out on a quiet morning.",
    "user\nassistant\n",
)


def make_pico(folder: Path, *, layers: int = 2, vocab: int = 384, seed: int = 0) -> Path:
    """Save a random Llama (hidden 32, FFN 64, 4 heads / 2 KV heads, tied embeddings, fp32) with its tokenizer.

    Args:
        folder: where config.json, model.safetensors and the tokenizer files go; made if missing.
        layers: decoder layers.
        vocab: size of the embedding, at least 259 (256 bytes and 3 special tokens); the trained vocabulary may be
            smaller.
        seed: of the weights. The tokenizer is the same for every seed.

    Returns:
        ``folder``: a path that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = pico_tokenizer(vocab)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pico_tokenizer(vocab: int = 384):
    """A byte-level BPE tokenizer trained on a few sentences: ChatML markers, end-of-sequence and padding tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    ))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE, model_max_length=512,
    )


def make_adapter(base: Path, folder: Path, *, seed: int = 0, r: int = 4, alpha: float = 2, targets=FFN,
                  **options) -> Path:
    """Save a LoRA adapter with random A and B as training/sft.py does: adapter, tokenizer, fingerprint of the base.

    Args:
        options: more fields of PEFT's LoraConfig, e.g. ``use_rslora=True``.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from models.base.loading import load_base, load_tokenizer
    from models.checkpoints.fingerprints import fingerprint

    model = load_base(base, torch.float32, torch.device("cpu"))
    model = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, bias="none", task_type="CAUSAL_LM",
                                             target_modules=list(targets), **options))
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    load_tokenizer(base).save_pretrained(folder)
    content = {"status": "checkpoint", "inputs": {"base": fingerprint(base)}}
    (folder / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
