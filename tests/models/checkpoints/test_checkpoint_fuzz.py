"""The checkpoint reader on damaged input: refused with a named error, or read exactly as safetensors reads it.

The longer run is benchmarks/fuzz_checkpoint.py; what it keeps is replayed here.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from benchmarks.fuzz_checkpoint import CORPUS, Ground, mutated, seeds, sound_file
from models.checkpoints import header as checkpoint_header
from models.checkpoints.header import KINDS
from models.checkpoints.reader import Checkpoint

KEPT = sorted(CORPUS.glob("*"))
BOUNDED = settings(max_examples=250, derandomize=True, deadline=None, database=None)
NUMBERS = st.one_of(st.integers(-1, 24), st.sampled_from([2**31, 2**48, 2**63, 2**64, 1.0, True, None]))
ENTRIES = st.fixed_dictionaries({
    "dtype": st.sampled_from([*KINDS, "F4", "f32", 8]), "shape": st.lists(NUMBERS, max_size=3),
    "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3)}, optional={"more": st.none()})
NAMES = st.one_of(st.sampled_from(["a", "b", "__metadata__"]), st.text(max_size=4))


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.name)
def test_what_the_fuzzer_kept_is_answered_as_it_was(ground, path):
    answer, _, _ = path.name.partition("-")
    assert all(kind.startswith(answer) for kind in ground.judge(path.read_bytes()))


def test_the_corpus_is_small_and_covers_both_answers():
    assert {path.name.partition("-")[0] for path in KEPT} == {"accepted", "refused"}
    assert 40 <= len(KEPT) <= 60
    assert sum(path.stat().st_size for path in KEPT) < 200_000


SEEDS = seeds()


@BOUNDED
@given(st.sampled_from(SEEDS), st.randoms(use_true_random=False), st.integers(1, 3))
def test_damaged_files_and_indexes(ground, data, rng, times):
    for _ in range(times):
        data = mutated(data, rng)
    assert ground.judge(data)


@BOUNDED
@given(st.dictionaries(NAMES, ENTRIES, max_size=3), st.integers(0, 40), st.integers(-8, 8))
def test_headers_of_all_kinds(ground, header, size, lie):
    text = json.dumps(header).encode()
    assert ground.judge(max(len(text) + (lie if lie % 4 == 0 else 0), 0).to_bytes(8, "little") + text + bytes(size))


@BOUNDED
@given(st.binary(max_size=64))
def test_bytes_without_sense(ground, data):
    assert all(kind.startswith("refused") for kind in ground.judge(data))


@pytest.mark.parametrize("seed", range(40))
def test_sound_files_are_read_as_torch_gets_them_from_safetensors(tmp_path, seed):
    path = tmp_path / "model.safetensors"
    path.write_bytes(sound_file(random.Random(seed)))
    theirs = load_file(path)
    out = torch.empty(1024, dtype=torch.uint8)
    with Checkpoint.open(path) as ours:
        assert ours.tensors.keys() == theirs.keys()
        for name, info in ours.tensors.items():
            mine = ours.read(info, 0, theirs[name].numel(), out).view(info.shape)
            assert (mine.dtype, mine.shape) == (theirs[name].dtype, theirs[name].shape)
            assert mine.reshape(-1).view(torch.uint8).tolist() == theirs[name].reshape(-1).view(torch.uint8).tolist()


# --- the judge itself

MINUS_ZERO = b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}'


def test_a_reader_more_lenient_than_safetensors_is_caught(ground, monkeypatch):
    data = len(MINUS_ZERO).to_bytes(8, "little") + MINUS_ZERO
    assert ground.judge(data)[0].startswith("refused: tensor X: shape X")
    monkeypatch.setattr(checkpoint_header, "_is_shape", lambda shape: True)
    with pytest.raises(AssertionError, match="safetensors refuses what we accept"):
        ground.judge(data)


def test_a_reader_that_reads_other_bytes_is_caught(ground, monkeypatch):
    data = sound_file(random.Random(3))
    assert ground.judge(data)[0].startswith("accepted")
    original = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda *args: original(*args).view(torch.uint8) ^ 1)
    with pytest.raises(AssertionError):
        ground.judge(data)


def test_a_reader_that_leaves_the_folder_is_caught(ground, monkeypatch):
    from models.checkpoints import reader as checkpoint

    index = json.dumps({"weight_map": {"c": "../model-00002-of-00002.safetensors"}}).encode()
    assert ground.judge(index) == ["refused: index: names X, allowed are plain names of .safetensors files beside it"]
    monkeypatch.setattr(checkpoint, "_name_fault", lambda folder, name: None)
    monkeypatch.setattr(checkpoint, "_against_index", lambda *_: [])
    with pytest.raises(AssertionError, match="accepts"):
        ground.judge(index)


def test_an_error_without_the_file_is_caught(ground, monkeypatch):
    monkeypatch.setattr(checkpoint_header, "few", lambda file, faults: list(faults))
    with pytest.raises(AssertionError, match="names no file"):
        ground.judge(Path(CORPUS / "refused-tensor-x-dtype-x-is-not-known.safetensors").read_bytes())
