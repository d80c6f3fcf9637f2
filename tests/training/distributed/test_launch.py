"""Where a process of a launch computes, and what is said of a launch that cannot work, before anything is loaded."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

import config
import errors
from errors import UserError
from flags import AlignArgs
from flags.launch import Sharding, launch_problems, sharding
from models.base import placement

ACCELERATE = config.ROOT / "scripts" / "accelerate"


def launched(monkeypatch, rank="1", world="4", local="1", here="2"):
    for name, value in {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": here}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def gpus(monkeypatch):
    """Two CUDA devices, on which nothing is done; what became the process's own."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    return chosen


ARGS = SimpleNamespace(threads=1, seed=1, device="auto", dtype="auto")


def test_each_process_has_its_own_device(gpus, monkeypatch):
    assert placement.set_up_torch(ARGS) == (torch.device("cuda"), torch.bfloat16)
    assert gpus == []  # without a launcher torch's first device, as ever
    launched(monkeypatch)
    assert placement.set_up_torch(ARGS)[0] == torch.device("cuda", 1)
    assert gpus == [torch.device("cuda", 1)]


def test_more_processes_than_devices_are_refused(gpus, monkeypatch):
    launched(monkeypatch, local="2", here="3")
    with pytest.raises(UserError, match="3 processes were started on this machine, and torch sees 2 CUDA devices"):
        placement.set_up_torch(ARGS)
    assert gpus == []


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(placement.os, "sched_getaffinity", lambda _: set(range(8)))
    cpu = SimpleNamespace(threads=0, seed=1, device="cpu", dtype="float32")
    placement.set_up_torch(cpu)
    launched(monkeypatch)
    placement.set_up_torch(cpu)
    assert told == [8, 4]


def test_what_asks_for_fsdp2(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert sharding({}) is None
    assert sharding({"fsdp": True, "fsdp_config": {"reshard_after_forward": False}}) == Sharding(False, False)
    assert sharding({"fsdp": "full_shard", "fsdp_config": json.dumps({"fsdp_cpu_offload": True})}) == Sharding(True, True)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}.items():
        monkeypatch.setenv(name, value)
    assert sharding({}) == Sharding(True, True)
    assert launch_problems({}) == []


def test_a_launch_that_cannot_work_is_told(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    (alone,) = launch_problems({"fsdp": True})
    assert "accelerate launch --config_file scripts/accelerate/fsdp2.yaml" in alone
    launched(monkeypatch)
    assert launch_problems({"fsdp": True}) == []
    (unknown,) = launch_problems({"fsdp": True, "fsdp_config": {"min_num_params": 5}})
    assert "min_num_params not read; allowed: reshard_after_forward" in unknown
    (version,) = launch_problems({"fsdp": True, "fsdp_config": {"version": 1}})
    assert "version 1 is not served" in version
    (unreadable,) = launch_problems({"fsdp": True, "fsdp_config": "nowhere.json"})
    assert "no JSON object that can be read" in unreadable
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    (old,) = launch_problems({})
    assert "fsdp_version 1 is not served; use --config_file scripts/accelerate/fsdp2.yaml" in old


def test_deepspeed_without_its_package_is_told_with_the_next_step(monkeypatch, capsys):
    monkeypatch.setattr("flags.launch.find_spec", lambda name: None)
    with pytest.raises(SystemExit), errors.exit_on_user_error():
        config.parse(AlignArgs, ["--moe_flag", "0", "--task_name", "safety", "--deepspeed", "zero3.json"])
    said = capsys.readouterr().err
    assert "--deepspeed: the package deepspeed is not installed; run pip install deepspeed" in said
    assert "scripts/accelerate/fsdp2.yaml" in said
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "distributed_type DEEPSPEED: the package deepspeed is not installed" in launch_problems({})[0]


def test_the_first_process_speaks_first(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit), errors.exit_on_user_error():
            raise UserError("wrong")
    assert len(waited) == 1
    assert capsys.readouterr().err.count("error: wrong") == 2


def test_a_process_whose_neighbour_is_gone_says_so_in_a_line(capsys):
    # as gloo told it in a run of two launches, one of whose processes was killed
    with pytest.raises(SystemExit) as stopped, errors.exit_on_user_error():
        raise RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1940: Connection "
                           "reset by peer. This is typically caused by a remote worker hanging")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: another process of this launch ended without a word")
    with pytest.raises(RuntimeError, match="shapes"), errors.exit_on_user_error():
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_shipped_configurations_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file

    content = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text(encoding="utf-8"))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    # accelerate refuses a key that it does not know
    assert load_config_from_file(str(ACCELERATE / f"{name}.yaml")).distributed_type == kinds[name]
    # --dtype says in what is computed
    assert content["mixed_precision"] == "no"
    if name.startswith("zero"):
        assert content["deepspeed_config"]["zero_stage"] == int(name[-1])


def test_a_parted_tensor_is_made_whole_by_whoever_parted_it(monkeypatch):
    from contextlib import contextmanager

    from models.base.parted import is_parted, whole

    plain = torch.arange(3.0)
    assert whole(plain) is plain
    assert not is_parted(plain)
    # DeepSpeed's mark, and what it does with such a tensor: whole within, empty outside
    full, held = torch.arange(4.0), torch.nn.Parameter(torch.empty(0))
    held.ds_id = 7

    @contextmanager
    def gathered(tensors):
        (tensor,) = tensors
        tensor.data = full
        yield
        tensor.data = torch.empty(0)

    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.zero", SimpleNamespace(GatheredParameters=gathered))
    assert is_parted(held)
    assert torch.equal(whole(held), full)
    assert held.numel() == 0
