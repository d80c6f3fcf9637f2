"""Run folders appear whole or not at all; the registry survives several writers; nothing secret is written."""

from __future__ import annotations

import json
import multiprocessing
import re

import pytest

import manifest
from errors import UserError

CONFIG = {"seed": 1, "lora_r": 8, "output_dir": "here", "cache_dir": None, "threads": 2, "overwrite": False}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "outputs" / "run"


def write(target, config=None, text="weights", **options):
    with manifest.writing(target, "test", CONFIG if config is None else config, **options) as run:
        (run.folder / "file").write_text(text, encoding="utf-8")
        run.metrics["loss"] = 0.5
        run.inputs["base"] = "abc"
        run.parents.append("parent")


def write_half(target, error, **options):
    with manifest.writing(target, "test", CONFIG, **options) as run:
        (run.folder / "file").write_text("half", encoding="utf-8")
        raise error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_appears_only_when_it_is_complete(target):
    with manifest.writing(target, "test", CONFIG) as run:
        assert run.folder != target
        assert run.folder.parent == target.parent
        assert not target.exists()
    assert names(target.parent) == ["run"]
    assert not run.folder.exists()


def test_the_manifest_says_what_went_in_and_what_came_out(target):
    write(target)
    content = manifest.read(target)
    assert content["status"] == "done"
    assert content["command"] == "test"
    assert content["config"] == CONFIG
    assert (content["seed"], content["metrics"], content["inputs"], content["parents"]) == (
        1, {"loss": 0.5}, {"base": "abc"}, ["parent"])
    assert content["packages"]["torch"] != "not installed"
    assert content["seconds"] >= 0
    assert content["peak_memory_mb"] > 1
    assert re.match(r"\d{4}-\d\d-\d\dT", content["finished"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_nothing(target, error):
    with pytest.raises(error):
        write_half(target, error)
    # not even the folder that it made
    assert not target.parent.exists()


def test_a_failing_overwrite_leaves_the_finished_run(target):
    write(target, text="old")
    with pytest.raises(RuntimeError):
        write_half(target, RuntimeError, overwrite=True)
    assert (target / "file").read_text(encoding="utf-8") == "old"
    assert names(target.parent) == ["run"]


def test_left_overs_of_a_killed_run_are_cleared(target):
    old = target.with_name(".run.partial")
    old.mkdir(parents=True)
    (old / "torn").write_text("x", encoding="utf-8")
    write(target)
    assert names(target) == ["file", "manifest.json"]


def test_finished_knows_the_same_run(target):
    assert not manifest.finished(target, CONFIG)
    write(target)
    assert manifest.finished(target, CONFIG)
    assert manifest.finished(target, json.loads(json.dumps(CONFIG)))


def test_tuples_in_a_configuration_compare_equal_after_the_round_trip(target):
    write(target, {"experts": ("a", "b")})
    assert manifest.finished(target, {"experts": ("a", "b")})


@pytest.mark.parametrize("change", [{"output_dir": "there"}, {"cache_dir": "c"}, {"threads": 9}, {"overwrite": True}])
def test_places_and_threads_do_not_make_another_run(target, change):
    write(target)
    assert manifest.finished(target, CONFIG | change)


def test_a_flag_that_only_an_older_version_recorded_decides_nothing(target):
    write(target, CONFIG | {"expert_topk": 2})
    assert manifest.finished(target, CONFIG)
    with pytest.raises(UserError, match="expert_topk: 2 there, 3 here"):
        manifest.finished(target, CONFIG | {"expert_topk": 3})


def test_another_configuration_is_refused_naming_every_setting(target):
    write(target)
    other = {"seed": 2, "lora_r": 16, "new": "x"}
    with pytest.raises(UserError) as caught:
        manifest.finished(target, CONFIG | other)
    text = str(caught.value)
    assert "seed: 1 there, 2 here" in text
    assert "lora_r: 8 there, 16 here" in text
    assert "new: None there, x here" in text
    assert "threads" not in text
    assert "--overwrite" in text
    with pytest.raises(UserError, match="lora_r"):
        write(target, CONFIG | other, text="new")
    assert (target / "file").read_text(encoding="utf-8") == "weights"


def test_overwrite_replaces(target):
    write(target)
    write(target, CONFIG | {"seed": 2}, text="new", overwrite=True)
    assert (target / "file").read_text(encoding="utf-8") == "new"
    assert manifest.read(target)["seed"] == 2


def test_a_foreign_folder_is_not_replaced(target):
    target.mkdir(parents=True)
    (target / "thesis").write_text("dear", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        write(target)
    assert names(target) == ["thesis"]


def test_an_empty_folder_is_no_obstacle(target):
    target.mkdir(parents=True)
    write(target)
    assert manifest.finished(target, CONFIG)


def test_reading_what_is_not_there_or_damaged_is_a_user_error(target):
    with pytest.raises(UserError, match="no finished run"):
        manifest.read(target)
    write(target)
    (target / "manifest.json").write_text('{"status": "do', encoding="utf-8")
    with pytest.raises(UserError, match="damaged"):
        manifest.read(target)


def test_a_checkpoint_copied_to_a_runs_place_is_a_user_error(target):
    """Its manifest has no configuration (training/sft.py, save_adapter)."""
    target.mkdir(parents=True)
    manifest.write_json(target / "manifest.json", {"status": "checkpoint", "inputs": {"base": "abc"}})
    with pytest.raises(UserError):
        manifest.finished(target, CONFIG)


def test_same_settings(tmp_path):
    path = tmp_path / "settings.json"
    assert not manifest.same_settings(path, CONFIG)
    manifest.write_json(path, CONFIG)
    assert manifest.same_settings(path, CONFIG | {"threads": 5})
    assert not manifest.same_settings(path, CONFIG | {"seed": 5})


def _register_many(results, who):
    for i in range(60):
        manifest.register(results, {"who": who, "i": i, "filler": "x" * 9000})


def test_two_processes_append_whole_lines(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_register_many, args=(tmp_path, who)) for who in ("a", "b")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    rows = manifest.registry(tmp_path)
    assert len(rows) == 120
    for who in ("a", "b"):
        assert [row["i"] for row in rows if row["who"] == who] == list(range(60))


@pytest.mark.parametrize(
    "text", ["plain", "naïve 漢字", "two\nlines", "line\u2028separator", "next\u0085line", "form\x0cfeed"])
def test_registry_gives_back_what_was_registered(tmp_path, text):
    assert manifest.registry(tmp_path) == []
    manifest.register(tmp_path / "new", {"text": text})
    manifest.register(tmp_path / "new", {"text": "next"})
    rows = manifest.registry(tmp_path / "new")
    assert [row["text"] for row in rows] == [text, "next"]
    assert all(row["time"] for row in rows)


def test_write_json_is_atomic(tmp_path):
    path = tmp_path / "deep" / "file.json"
    manifest.write_json(path, {"a": "ü"})
    with pytest.raises(TypeError):
        manifest.write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    assert names(path.parent) == ["file.json"]


def test_no_environment_in_the_manifest(target, monkeypatch):
    secrets = {"HF_TOKEN": "hf_verysecret", "OPENAI_API_KEY": "sk-verysecret", "MY_OWN": "own-verysecret"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    write(target)
    text = (target / "manifest.json").read_text(encoding="utf-8")
    assert "verysecret" not in text
    assert not [name for name in secrets if name in text]


def test_command_line_names_the_script_without_its_folder(target, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(target / "align_basemodel.py"), "--task_name", "safety"])
    write(target)
    assert manifest.read(target)["command_line"] == ["align_basemodel.py", "--task_name", "safety"]


def test_sha256_of_files_and_folders(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, name in ((one, "a"), (two, "b")):
        folder.mkdir()
        (folder / name).write_bytes(b"abc")
    assert manifest.sha256(one / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.sha256(one / "a") == manifest.sha256(two / "b")
    assert manifest.sha256(one) != manifest.sha256(two)


@pytest.mark.parametrize("moment", [1, 2])
def test_a_kill_while_a_run_is_replaced_loses_neither(target, monkeypatch, moment):
    """Killed behind the first or the second rename: old or new is whole afterwards, and the next command finds it."""
    from pathlib import Path

    write(target, text="old")
    rename, renames = Path.replace, []

    class Killed(BaseException):
        pass

    def dies(self, other):
        # of the run's folder: files of it are renamed too
        if target in (Path(self), Path(other)):
            if len(renames) == moment:
                raise Killed
            renames.append(other)
        return rename(self, other)

    # what a kill does not run: the clean-up behind an error
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        patch.setattr(manifest.shutil, "rmtree", lambda folder, **_: (_ for _ in ()).throw(Killed) if len(renames) == moment
                      else None)
        with pytest.raises(Killed):
            write(target, text="new", overwrite=True)
    assert manifest.finished(target, CONFIG)
    assert (target / "file").read_text() == {1: "new", 2: "new"}[moment]
    assert not [name for name in names(target.parent) if name.endswith(".replaced")]


def test_an_interrupt_between_the_renames_puts_the_old_run_back(target, monkeypatch):
    from pathlib import Path

    write(target, text="old")
    rename = Path.replace

    def dies(self, other):
        if Path(other) == target and self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            write(target, text="new", overwrite=True)
    assert (target / "file").read_text() == "old"
    assert names(target.parent) == ["run"]
