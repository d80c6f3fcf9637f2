"""The writer: files that safetensors loads, nothing that looks finished too early, named errors of full and closed disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from models.checkpoints.header import KINDS
from models.checkpoints.reader import INDEX, SINGLE, Checkpoint
from models.checkpoints.writer import Layout, Writer, plan_layout

SHAPES = ((), (3,), (0, 4), (2, 5))
EVERYTHING = [(f"{dtype}.{i}", dtype, shape) for dtype in reversed(KINDS) for i, shape in enumerate(SHAPES)]
TWO = [("x", "F32", (4,)), ("y", "F32", (2, 2))]


def values(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    size, kind = KINDS[dtype]
    raw = torch.randint(0, 2, (prod(shape) * size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(getattr(torch, kind)).view(shape)


def raw(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.uint8).tolist()


def write(folder: Path, layout: Layout, tensors: dict[str, torch.Tensor], resume: bool = False) -> None:
    writer = Writer(folder, layout, resume)
    for name, tensor in tensors.items():
        writer.write(name, 0, tensor)
    writer.finish()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(*args) -> str:
    with pytest.raises(UserError) as stop:
        Writer(*args)
    return str(stop.value)


@pytest.mark.parametrize("most", [10**9, 40])
def test_every_type_and_shape_loads_with_safetensors_and_with_us(tmp_path, most):
    tensors = {name: values(dtype, shape, seed) for seed, (name, dtype, shape) in enumerate(EVERYTHING)}
    layout = plan_layout(EVERYTHING, most, {"by": "ä test"})
    write(tmp_path, layout, tensors)
    theirs = {}
    for file in tmp_path.glob("*.safetensors"):
        theirs |= load_file(file)
    assert theirs.keys() == tensors.keys()
    with Checkpoint.open(tmp_path) as ours:
        assert ours.metadata == {"format": "pt", "by": "ä test"}
        for name, tensor in tensors.items():
            assert theirs[name].dtype == tensor.dtype
            assert theirs[name].shape == tensor.shape
            mine = ours.read(ours.tensors[name], 0, tensor.numel(), torch.empty(256, dtype=torch.uint8))
            assert raw(mine) == raw(theirs[name]) == raw(tensor)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) == layout.total


def test_a_single_file_is_byte_for_byte_what_safetensors_writes(tmp_path):
    """For tensors in the reference implementation's order: by type from wide to narrow, then by name."""
    order = [("b", "F64", (2,)), ("a", "F32", (3, 1)), ("c", "F32", (2,)), ("d", "U8", (5,))]
    tensors = {name: values(dtype, shape) for name, dtype, shape in order}
    write(tmp_path, plan_layout(order, 10**9), tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / SINGLE).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_are_filled_in_order_and_indexed(tmp_path):
    rows = [("c", "F32", (4,)), ("a", "F32", (2,)), ("zero", "F32", (0,)), ("b", "F32", (100,)), ("d", "BF16", (1,))]
    layout = plan_layout(rows, 24)
    assert [sorted(n for n, p in layout.places.items() if p.file == f) for f in layout.headers] == \
        [["a", "c", "zero"], ["b"], ["d"]]
    write(tmp_path, layout, {name: values(dtype, shape) for name, dtype, shape in rows})
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 16 + 8 + 400 + 2
    assert list(index["weight_map"]) == ["a", "b", "c", "d", "zero"]
    assert index["weight_map"]["b"] == "model-00002-of-00003.safetensors"
    assert plan_layout(rows, 24) == layout


def test_values_start_at_multiples_of_their_size():
    layout = plan_layout([("flag", "BOOL", (3,)), ("half", "F16", (5,)), ("wide", "F64", (1,))], 10**9)
    assert all(place.start % KINDS[place.dtype][0] == 0 for place in layout.places.values())
    assert all(len(header) % 8 == 0 for header in layout.headers.values())


def test_a_name_twice_is_a_bug():
    with pytest.raises(ValueError, match="occurs twice"):
        plan_layout([("x", "F32", (1,)), ("x", "F32", (1,))], 4)


def test_blocks_in_any_order(tmp_path):
    writer = Writer(tmp_path, plan_layout([("x", "F32", (10,))], 10**9))
    whole = torch.arange(10.0)
    for first, last in ((7, 10), (0, 3), (3, 3), (3, 7)):
        writer.write("x", first, whole[first:last])
    assert writer.checksum("x") == zlib.adler32(whole.numpy().tobytes())
    writer.write("x", 0, torch.arange(20.0)[::2])  # strided
    writer.write("x", 8, torch.tensor([8.0, 9.0]))
    writer.finish()
    assert load_file(tmp_path / SINGLE)["x"].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 8, 9]


@pytest.mark.parametrize(("first", "data"), [
    (8, torch.zeros(3)), (-1, torch.zeros(1)), (11, torch.zeros(0)), (0, torch.zeros(5, dtype=torch.float64)),
])
def test_writes_beyond_a_tensor_or_of_another_type_are_bugs(tmp_path, first, data):
    writer = Writer(tmp_path, plan_layout([("x", "F32", (10,)), ("y", "F32", (10,))], 10**9))
    with pytest.raises(ValueError, match="planned 10 float32"):
        writer.write("x", first, data)


# --- nothing looks finished before it is

def test_files_have_their_full_size_and_no_final_name_until_the_end(tmp_path):
    layout = plan_layout(TWO, 16)
    writer = Writer(tmp_path, layout)
    assert names(tmp_path) == {f"{file}.part" for file in layout.headers}
    assert all((tmp_path / f"{file}.part").stat().st_size == size for file, size in layout.sizes.items())
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        Checkpoint.open(tmp_path)
    writer.finish()
    assert names(tmp_path) == {*layout.headers, INDEX}


def test_the_index_comes_last_and_a_torn_finish_can_be_resumed(tmp_path, monkeypatch):
    layout, tensors = plan_layout(TWO, 16), {name: values(dtype, shape, 1) for name, dtype, shape in TWO}
    original, order = Path.replace, []

    def torn(self, target):
        order.append(Path(target).name)
        if len(order) == len(layout.headers) * 2 + stumble:  # each file is renamed twice: when created, when finished
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(Path, "replace", torn)
    for stumble in (0, 1):  # at the last shard; at the index
        order.clear()
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / f"{stumble}", layout, tensors)
        assert INDEX not in names(tmp_path / f"{stumble}")
        with pytest.raises(UserError):
            Checkpoint.open(tmp_path / f"{stumble}")
    monkeypatch.undo()
    for stumble in (0, 1):
        writer = Writer(tmp_path / f"{stumble}", layout, resume=True)
        assert names(tmp_path / f"{stumble}") >= {f"{file}.part" for file in layout.headers}
        assert not names(tmp_path / f"{stumble}") & {*layout.headers, INDEX}
        writer.finish()
        with Checkpoint.open(tmp_path / f"{stumble}") as ours:
            for name, tensor in tensors.items():
                read = ours.read(ours.tensors[name], 0, tensor.numel(), torch.empty(64, dtype=torch.uint8))
                assert raw(read) == raw(tensor)


def test_resume_keeps_what_was_written_and_makes_what_was_not(tmp_path):
    layout = plan_layout(TWO, 16)
    Writer(tmp_path, layout).write("x", 0, torch.arange(4.0))
    (tmp_path / "model-00002-of-00002.safetensors.part").unlink()
    (tmp_path / "model-00002-of-00002.safetensors.new").write_bytes(b"torn while it was created")
    write(tmp_path, layout, {"y": torch.ones(2, 2)}, resume=True)
    assert load_file(tmp_path / "model-00001-of-00002.safetensors")["x"].tolist() == [0, 1, 2, 3]
    assert load_file(tmp_path / "model-00002-of-00002.safetensors")["y"].tolist() == [[1, 1], [1, 1]]
    assert names(tmp_path) == {*layout.headers, INDEX}


@pytest.mark.parametrize("other", [
    [("x", "F32", (4,)), ("z", "F32", (2, 2))], [("x", "F32", (4,)), ("y", "F32", (2, 3))], [("x", "F32", (4,))],
])
def test_resume_refuses_what_another_run_wrote(tmp_path, other):
    Writer(tmp_path, plan_layout(other, 16)).close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert ".part: is not what this run writes" in refused(tmp_path, plan_layout(TWO, 16), True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", [SINGLE, f"{SINGLE}.part", INDEX, "model-00001-of-00004.safetensors"])
def test_a_folder_with_a_model_is_not_overwritten(tmp_path, name):
    """The output folder may be an input's."""
    (tmp_path / name).write_text("precious")
    assert f"{tmp_path}: holds {name} already" in refused(tmp_path, plan_layout(TWO, 16))
    assert (tmp_path / name).read_text() == "precious"


def test_a_part_cut_by_something_else_is_an_error_not_a_loop(tmp_path):
    writer = Writer(tmp_path, plan_layout([("x", "F32", (10,))], 10**9))
    os.truncate(tmp_path / f"{SINGLE}.part", 100)
    with pytest.raises(UserError, match="cut short"):
        writer.checksum("x")


# --- disks

def test_a_disk_that_is_too_small_is_named_before_anything_is_written(tmp_path):
    layout = plan_layout([("x", "F32", (1 << 40,))], 10**9)
    text = refused(tmp_path / "out", layout)
    assert f"{tmp_path / 'out'}: the disk is full: {layout.total} bytes are needed, " in text
    assert "are free; free some space or point --output_dir at another disk" in text
    assert not names(tmp_path / "out")


def _failing(number: int, after: int = 0):
    calls = []

    def call(*_, **__):
        calls.append(1)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
    return call


def test_a_disk_that_fills_up_during_allocation(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", _failing(errno.ENOSPC, after=1))
    text = refused(tmp_path, plan_layout(TWO, 16))
    assert "bytes are needed" in text
    assert not names(tmp_path)  # the first shard, which was there already, is given back


def test_a_full_disk_on_resume_keeps_what_is_finished(tmp_path, monkeypatch):
    layout = plan_layout(TWO, 16)
    Writer(tmp_path, layout).close()
    (tmp_path / "model-00002-of-00002.safetensors.part").unlink()
    monkeypatch.setattr(os, "posix_fallocate", _failing(errno.ENOSPC))
    assert "the disk is full" in refused(tmp_path, layout, True)
    assert names(tmp_path) == {"model-00001-of-00002.safetensors.part"}


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_file_systems_that_cannot_reserve(tmp_path, monkeypatch, number):
    if number is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", _failing(number))
    layout = plan_layout(TWO, 10**9)
    write(tmp_path / "out", layout, {"y": torch.ones(2, 2)})
    assert load_file(tmp_path / "out" / SINGLE)["y"].sum() == 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    assert f"{layout.total} bytes are needed, 10 are free" in refused(tmp_path / "full", layout)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("where", ["mkdir", "open"])
def test_folders_that_cannot_be_written(tmp_path, monkeypatch, number, where):
    monkeypatch.setattr(Path, where, _failing(number))
    text = refused(tmp_path / "out", plan_layout(TWO, 16))
    assert f"{tmp_path / 'out'}: cannot be written ({os.strerror(number)}); point --output_dir at" in text


def test_a_limit_of_file_sizes_is_no_missing_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "truncate", _failing(errno.EFBIG))
    text = refused(tmp_path / "out", plan_layout(TWO, 16))
    assert f"{tmp_path / 'out'}: a file of it: it may not grow that large here (ulimit -f" in text


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "out").write_text("")
    assert "cannot be written (File exists)" in refused(tmp_path / "out", plan_layout(TWO, 16))


@pytest.mark.parametrize(("call", "number"), [("pwrite", errno.ENOSPC), ("fsync", errno.EIO)])
def test_errors_while_writing_leave_no_final_name(tmp_path, monkeypatch, call, number):
    layout = plan_layout(TWO, 16)
    monkeypatch.setattr(os, call, _failing(number))
    with pytest.raises(UserError, match=str(tmp_path)):
        write(tmp_path, layout, {"x": torch.ones(4)})
    assert all(name.endswith(".part") for name in names(tmp_path))
