"""docs/, README, CONTRIBUTING: every command of theirs parses, every script, test and folder that they name is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

import config
from errors import UserError
from models import fuse
from scripts import reference

ROOT = config.ROOT
#: The lab log is history: it names commands as they were that day. The reference is made from the code.
PAGES = [path.relative_to(ROOT).as_posix()
         for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
         if path.name != "lab-log.md" and "reference/flags" not in path.as_posix()]
#: Words before a command of ours: launchers, and a folder that it is started in.
LAUNCHERS = ("python", "accelerate", "torchrun", "srun", "sbatch")
#: File -> its flags, where it has a dataclass of them.
FLAGS = {call.removeprefix("-m ").replace(".py", "").replace("/", "."): kinds
         for call, kinds in reference.commands().items()}


def fences(page: str) -> list[list[str]]:
    """The lines of every fence of shell commands, without comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [[line.split("  #")[0].strip() for line in block.splitlines() if not line.startswith("#")]
            for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)]


def commands() -> list[tuple[str, str, tuple[str, ...]]]:
    """(page, folder that it starts in, words) of every command of every page."""
    found = []
    for page in PAGES:
        for block in fences(page):
            place, names = "", {}
            for part in (part.strip() for line in block for part in line.split(";")):
                for name, value in names.items():
                    part = part.replace(f"${name}", value)
                words = shlex.split(part)
                if not words:
                    continue
                if re.fullmatch(r"\w+=.*", words[0], re.S) and len(words) == 1:
                    names[words[0].partition("=")[0]] = words[0].partition("=")[2]
                elif words[0] == "cd":
                    place = "" if words[1] == ".." else words[1]
                else:
                    while re.fullmatch(r"[A-Z_]+=.*", words[0], re.S):
                        words = words[1:]
                    found.append((page, place, tuple(words)))
    return found


ALL = commands()


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    """A command that asks a judge behind an API needs a key before anything else."""
    monkeypatch.setenv("OPENAI_API_KEY", "made up")


def ours(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """(dotted module, the words behind it) of a command of this repository; ("", []) of any other program."""
    if words[0] not in LAUNCHERS:
        return "", []
    if words[1] == "-m":
        return words[2], list(words[3:])
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), 0)
    return words[at].removesuffix(".py").replace("/", ".") if at else "", list(words[at + 1:])


def parsed(place: str, words: tuple[str, ...]) -> bool:
    """Whether the command has flags of ours; raises where they do not parse."""
    module, rest = ours(words)
    module = f"{place.replace('/', '.')}.{module}" if place and f"{place}.{module}" in FLAGS else module
    if module not in FLAGS:
        return False
    if module == "models.fuse":
        kind, rest = fuse.COMMANDS[rest[0]][0], rest[1:]
    elif module == "evaluator.registry":
        from evaluator import registry

        kind, _, runs = registry.COMMANDS[rest[0]]
        rest = rest[1 + runs:]
    elif module == "align_basemodel":
        from flags import AlignArgs as kind
    else:
        kind = FLAGS[module][""]
    return config.parse(kind, rest).args is not None


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page):
    # words behind -- are snakemake's own
    mine = [(place, words[:words.index("--")] if "--" in words else words) for at, place, words in ALL if at == page]
    wrong = []
    for place, words in mine:
        try:
            parsed(place, words)
        except (UserError, KeyError) as error:
            wrong.append((" ".join(words), str(error)))
    assert not wrong


def test_most_commands_were_parsed():
    assert sum(parsed(place, words) for _, place, words in ALL if "--" not in words) > 80


@pytest.mark.parametrize("page", PAGES)
def test_scripts_modules_and_folders_exist(page):
    missing = []
    for at, place, words in ALL:
        if at != page:
            continue
        named = words[1] if words[0] == "bash" else ours(words)[0].replace(".", "/") + ".py" if ours(words)[0] else ""
        if named and words[0] != "bash" and ours(words)[0].split(".")[0] in ("venv", "pip", "pytest"):
            named = ""
        tests = [word.partition("::")[0] for word in words if word.startswith("tests/")]
        missing += [(place, path) for path in (named, *tests) if not (ROOT / place / path).exists()]
    assert not missing


#: What stands for a name of the reader's in the tables of docs/reproduce.md.
NAMES = {"TASK": "chinese", "SET": "catqa", "RULE": "ties", "T": "safety", "BASE": "embedded", "NAME": "a-model"}


def mapped() -> list[tuple[str, ...]]:
    """Every command of ours in the right columns of the tables of docs/reproduce.md, with names filled in."""
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    right = [cell for line in page.splitlines() if line.startswith("| ") for cell in line.split(" | ")[1:]]
    codes = [code.removesuffix(" ..") for cell in right for code in re.findall(r"`([^`]+\.py [^`]+)`", cell)]
    return [tuple(re.sub(r"[A-Z]+", lambda found: NAMES.get(found[0], found[0]), word) for word in shlex.split(code))
            for code in codes if not code.startswith("data")]


@pytest.mark.parametrize("words", mapped(), ids=" ".join)
def test_commands_that_stand_for_the_papers_scripts_parse(words):
    """As they stand, without a preset's help: whoever copies one gets what the row says."""
    assert parsed("", words if words[0] == "python" else ("python", *words))


def test_every_table_of_the_papers_is_in_reproduce():
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    tables = [name for path in (ROOT / "workflow" / "papers").glob("*.yaml")
              for name in yaml.safe_load(path.read_text(encoding="utf-8"))["tables"]]
    assert len(tables) > 30
    assert not [name for name in tables if f"`{name}`" not in page]


class Menu(yaml.SafeLoader):
    """mkdocs.yml without mkdocs: what it makes by a call is read as nothing."""


Menu.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)


def test_every_page_is_in_the_sites_menu():
    menu = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=Menu)

    def leaves(item):
        return [item] if isinstance(item, str) else [leaf for part in (item.values() if isinstance(item, dict) else item)
                                                     for leaf in leaves(part)]

    listed = leaves(menu["nav"])
    pages = {Path(page).relative_to("docs").as_posix() for page in PAGES if page.startswith("docs/")} | {"lab-log.md"}
    flags = {f"reference/flags/{path.name}" for path in (ROOT / "docs" / "reference" / "flags").glob("*.md")}
    assert sorted(listed) == sorted(pages | flags)
