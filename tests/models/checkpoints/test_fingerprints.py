"""Fingerprints: one changed value anywhere is another base; old records still count; nothing is read twice."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from pico import make_pico
from safetensors.torch import load_file, save_file

from models.checkpoints import fingerprints
from models.checkpoints.fingerprints import fingerprint, fingerprint_like, same_base, sampled_fingerprint


@pytest.fixture
def base(tmp_path):
    return make_pico(tmp_path / "base")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ABF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def changed(base, name, place=0):
    weights = load_file(base / "model.safetensors")
    weights[name].view(-1)[place] += 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"])
def test_one_changed_weight_is_another_base(base, name):
    before = fingerprint(base)
    assert before == fingerprint(base)
    assert before.startswith("v2-")
    changed(base, name)
    assert fingerprint(base) != before


def test_a_changed_config_is_another_base(base):
    before = fingerprint(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert fingerprint(base) != before


def test_one_value_between_the_samples_is_another_base(tmp_path):
    # 40 MB: the sampled fingerprint reads 256 blocks of 64 kB of it and misses the changed value
    weights = {"w": torch.zeros(10_000_000)}
    save_file(weights, tmp_path / "model.safetensors")
    both = fingerprint(tmp_path), sampled_fingerprint(tmp_path)
    weights["w"][35_000] = 1
    save_file(weights, tmp_path / "model.safetensors")
    assert sampled_fingerprint(tmp_path) == both[1]
    assert fingerprint(tmp_path) != both[0]


def test_what_earlier_versions_recorded_is_accepted_for_the_same_base_alone(base):
    old = sampled_fingerprint(base)
    assert same_base(old, base)
    assert fingerprint_like(old, base) == old
    assert fingerprint_like(None, base) == fingerprint(base)
    assert fingerprint_like("something", base) == fingerprint(base)
    changed(base, "model.norm.weight")
    assert not same_base(old, base)


def test_a_settled_file_is_read_once(base, cache, monkeypatch):
    read = []
    monkeypatch.setattr(fingerprints, "sha256_of", lambda file, whole=fingerprints.sha256_of: (read.append(file.name),
                                                                                               whole(file))[1])
    first = fingerprint(base)
    # too young to be remembered: it could change again within the same tick
    assert fingerprint(base) == first
    assert sorted(read) == ["config.json"] * 2 + ["model.safetensors"] * 2
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 10_000_000_000)
    assert fingerprint(base) == first
    read.clear()
    assert fingerprint(base) == first
    assert not read
    # another time, with the old one put back: the inode's own time tells
    stat = (base / "model.safetensors").stat()
    changed(base, "model.norm.weight")
    os.utime(base / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(base) != first
    assert read == ["model.safetensors"]


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(base, cache, monkeypatch, caplog):
    cache.mkdir()
    (cache / "sha256").write_text("no folder")
    monkeypatch.setattr(time, "time_ns", lambda now=time.time_ns: now() + 10_000_000_000)
    with caplog.at_level("INFO"):
        assert fingerprint(base) == fingerprint(base)
    assert "hashed again at the next start" in caplog.text
