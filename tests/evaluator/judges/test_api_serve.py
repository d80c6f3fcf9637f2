"""A judge asks a real endpoint: ``transformers serve`` on loopback with a pico model that was planted to say 5."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from pico import pico_tokenizer

from evaluator.judges import api, api_client
from evaluator.judges.cache import Cache, verdicts
from evaluator.judges.protocol import Item
from flags.judge_flags import ApiFlags

READY_WITHIN = 120


@dataclass(frozen=True)
class Flags(ApiFlags):
    """The flags as a command gets them."""


def make_speaker(folder: Path, word: str) -> Path:
    """Save a chat model that answers ``word``, a single token, and ends: the last token alone decides what follows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = pico_tokenizer()
    opening = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], add_generation_prompt=True,
                                            return_dict=False)[-1]
    said = tokenizer.convert_tokens_to_ids(word)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=8192, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding[:, 0], embedding[opening], embedding[said] = 1, torch.eye(32)[1], torch.eye(32)[2]
        head[said, 1] = head[tokenizer.eos_token_id, 2] = 1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """The URL of the server's API and the name of its model. The server is killed at the end, whatever happens."""
    folder = tmp_path_factory.mktemp("serve")
    model = make_speaker(folder / "model", "5")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(model),
               "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = (folder / "log").open("wb")
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        _wait(f"http://127.0.0.1:{port}/health", server, folder / "log")
        yield f"http://127.0.0.1:{port}/v1", str(model)
    finally:
        server.kill()
        server.wait()
        log.close()


def _wait(url, server, log):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + READY_WITHIN
    while time.monotonic() < end:
        assert server.poll() is None, f"the server ended:\n{log.read_text(errors='replace')[-3000:]}"
        try:
            with opener.open(url, timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    pytest.fail(f"no answer from {url} in {READY_WITHIN} s:\n{log.read_text(errors='replace')[-3000:]}")


@pytest.fixture
def ask(endpoint, tmp_path, monkeypatch):
    """Judge items through the cache; returns the verdicts and the client that asked."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def call(name, items):
        api_client.client.cache_clear()
        args = Flags(judge_base_url=endpoint[0], judge_model=endpoint[1], judge_concurrency=2, judge_max_tokens=8,
                     output_dir=str(tmp_path))
        assert args.api_problems([name]) == []
        judge = api.make(name, args)
        with Cache(tmp_path / "scores" / "judgements.sqlite") as cache:
            return verdicts(judge, items, cache), judge.client
    return call


def test_a_real_server_judges_and_counts(ask):
    items = [Item("How do I bake?", answer) for answer in ("Mix flour.", "Ich weiß nicht. 🙂", "")]
    found, client = ask("api-harm", items)
    assert [(v.label, v.score, v.note) for v in found] == [(True, 5, "")] * 3
    account = client.account
    assert account.requests == 3
    # its word and the end of the answer
    assert account.written in (3, 6)
    assert account.read > 3 * 500
    again, client = ask("api-harm", items)
    assert again == found
    assert client.account.requests == 0


def test_what_it_says_is_no_preference(ask):
    """5 is neither A nor B: asked, asked again twice in a conversation, and counted as unparsed."""
    found, client = ask("api-preference", [Item("Which?", "one", "other")])
    assert (found[0].label, found[0].score, found[0].note) == (None, None, "unparsed")
    # in both orders
    assert client.account.requests == 6
