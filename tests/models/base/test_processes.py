"""Who does what among the processes of a launch, and what a launch that is none is told; torchrun itself, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from launched import launched
from pico import make_adapter

import errors
from config import ROOT
from errors import UserError
from models.base import processes


def test_alone_every_call_is_the_plain_thing():
    processes.join()
    assert (processes.count(), processes.rank()) == (1, 0)
    assert processes.agreed(lambda: 3) == 3
    assert processes.merged({1: 2}) == {1: 2}
    assert list(processes.claimed(3)) == [0, 1, 2]
    assert processes.divided(iter("abc"), str.upper) == ["A", "B", "C"]
    assert list(processes.in_turns("abc", str.upper)) == [("a", "A"), ("b", "B"), ("c", "C")]
    assert list(processes.in_turns("", str.upper)) == []


@pytest.mark.parametrize("n", [2, 3])
def test_every_unit_is_done_once_and_all_see_all(tmp_path, n):
    def act(rank):
        processes.join()
        done = []

        def upper(letter):
            done.append(letter)
            return letter.upper()

        assert processes.agreed(lambda: rank) == 0
        # more units than processes, fewer, none
        for letters in ("abcdefg", "a", ""):
            assert processes.divided(iter(letters), upper) == list(letters.upper())
            before = len(done)
            for place, pair in enumerate(processes.in_turns(letters, upper)):
                assert pair == (letters[place], letters[place].upper())
                # as they come: of each turn this process has done one, and of no later one
                assert len(done) - before <= place // n + 1
            assert len(done) - before == len(letters[rank::n])
        claimed = [list(processes.claimed(5)) for _ in range(2)]
        (tmp_path / str(rank)).write_text(json.dumps([done, claimed]))
        # the counters are the first process's: it must not end while others count
        processes.merged({})

    codes, said = launched(act, n)
    assert codes == [0] * n, said
    parts = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(n)]
    assert sorted(letter for done, _ in parts for letter in done) == sorted("abcdefga" * 2)
    for call in range(2):
        assert sorted(number for _, claimed in parts for number in claimed[call]) == [0, 1, 2, 3, 4]


def test_when_the_store_is_gone_torch_says_nothing_of_its_own():
    def act(rank):
        processes.join()
        if rank == 0:
            return
        with pytest.raises(UserError, match="another process of this launch ended without a word"):
            list(iter(lambda: list(processes.claimed(1)), None))
        # whoever ended has told
        assert not any(tell() for tell in errors.TELLS)

    assert launched(act) == ([0, 0], ["", ""])


def test_a_launch_in_part_is_explained(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE=2: the processes of this launch do not meet .*; start the command by "
                                        "torchrun or accelerate launch, or unset WORLD_SIZE"):
        processes.join()


def test_torchrun_answers_and_says_an_error_once(pico, tmp_path):
    make_adapter(pico, tmp_path / "outputs" / "one")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Do thing {i}", "response": "no", "is_safe": True}) + "\n"
                            for i in range(7)))
    words = ["--task_name", "safety", "--data_path", str(rows), "--max_new_tokens", "3", "--batch_size", "2",
             "--model_name_or_path", str(pico), "--dtype", "float32", "--threads", "1", "--output_dir", str(tmp_path)]

    script = tmp_path / "both.py"
    # of the second run each process finds that it is not there
    script.write_text(f"import inference\nwords = {words!r}\ninference.main([*words, '--cross_task', 'one'])\n"
                      "inference.main([*words, '--cross_task', 'two'])\n")
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True, text=True, cwd=ROOT, timeout=900, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode
    assert ended.stderr.count("error: --cross_task: ") == 1, ended.stderr
    assert ended.stderr.count("7 answers") == 1
    folder = tmp_path / "inference" / "safety" / "test"
    assert [path.name for path in folder.iterdir()] == ["cross_one"]
    assert len((folder / "cross_one" / "outputs_final.jsonl").read_text().splitlines()) == 7
