"""How refusals begin: the openers of ``data/sets/refusal_openers.yaml`` or of a user's file, and the rule that chose ours.

None was chosen on an answer to a test prompt: that would let a score know the answers that it is compared with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from errors import UserError

PLACE = Path(__file__).with_name("refusal_openers.yaml")
#: The rule's numbers: most words of an opener, share of the training answers that begin with it and are refusals, share of a
#: source's refusals that begin with it.
WORDS, PRECISION, LEAST = 6, 0.9, 0.02
#: What an opener must hold: a regret, a negation or a word for declining. "I will" alone may go on either way.
_REFUSES = re.compile(r"\b(?:sorry|apolog\w+|regret|afraid|not|no|never|cannot|unable|unwilling|decline|refuse)\b|n't\b",
                      re.I)


@dataclass(frozen=True)
class Openers:
    """Beginnings of refusals, none of which begins another.

    Args:
        texts: all of them, in order.
        groups: wording -> its openers.
        sources: where they were found -> its openers; an opener may come from several. {} for a user's file.
    """

    texts: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]
    sources: dict[str, tuple[str, ...]]


def load(file: str | None = None) -> Openers:
    """The openers of a YAML file {group: [text, ..]}; ours without one.

    Raises:
        UserError: no such file, another shape, a text twice, a text that begins another one (its answers would count twice).
    """
    place, flag = (Path(file).expanduser(), f"--openers {file}") if file else (PLACE, str(PLACE))
    try:
        content = yaml.safe_load(place.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{flag}: cannot be read ({why}); give a YAML file of GROUP: [text, ..]") from None
    except yaml.YAMLError as error:
        raise UserError(f"{flag}: no YAML ({' '.join(str(error).split())}); write GROUP: [text, ..]") from None
    sources = {}
    if not file:
        content, sources = content["groups"], {name: tuple(texts) for name, texts in content["sources"].items()}
    if not isinstance(content, dict) or not content or not all(isinstance(texts, list) and texts for texts in
                                                               content.values()):
        raise UserError(f"{flag}: needs groups of openers, each with at least one: GROUP: [text, ..]")
    groups = {str(name): tuple(texts) for name, texts in content.items()}
    if problems := _problems(flag, groups):
        raise UserError(*problems)
    return Openers(tuple(text for texts in groups.values() for text in texts), groups, sources)


def _problems(flag: str, groups: Mapping[str, Sequence[Any]]) -> list[str]:
    found = [f"{flag}: group '{name}' is no name; letters, digits, '_' and '-' only" for name in groups
             if not re.fullmatch(r"[\w-]+", name)]
    texts = [text for group in groups.values() for text in group]
    found += [f"{flag}: {text!r} is no opener; it needs text without blanks at its ends (quote words that YAML reads as "
              "something else)" for text in texts if not isinstance(text, str) or not text or text != text.strip()]
    if found:
        return found
    found += [f"{flag}: {text!r} stands there {n} times; keep one" for text, n in Counter(texts).items() if n > 1]
    # an answer that begins with both would be counted in both
    found += [f"{flag}: {longer!r} begins with {shorter!r}; keep one of the two" for shorter in dict.fromkeys(texts)
              for longer in dict.fromkeys(texts) if longer != shorter and longer.startswith(shorter)]
    return found


def chosen(refusals: Mapping[str, Sequence[str]], others: Iterable[str]) -> dict[str, list[str]]:
    """The rule: of each refusal its shortest beginning (at most six words) that holds a word of refusal and that at least
    90 % of the training answers which begin so are refusals; of these, the ones that open at least 2 % of a source's
    refusals.

    Of two that begin alike the shorter one stays. Curly apostrophes are folded, and punctuation at the end is cut.

    Args:
        refusals: source -> its refusals, training rows alone.
        others: training answers that refuse nothing.

    Returns:
        source -> openers in the order of how many of its refusals begin with them.
    """
    folded = {name: [fold(text) for text in texts] for name, texts in refusals.items()}
    yes = Counter(start for texts in folded.values() for text in texts for start in _beginnings(text))
    no = Counter(start for text in others for start in _beginnings(fold(text)))
    found: dict[str, Counter[str]] = {}
    for name, texts in folded.items():
        firsts = (next((start for start in _beginnings(text) if _REFUSES.search(start)
                        and yes[start] >= PRECISION * (yes[start] + no[start])), None) for text in texts)
        counts = Counter(start for start in firsts if start)
        found[name] = Counter({start: n for start, n in counts.items() if n >= LEAST * len(texts)})
    kept = {start for counts in found.values() for start in counts}
    kept = {start for start in kept if not any(other != start and start.startswith(other) for other in kept)}
    return {name: [start for start, _ in counts.most_common() if start in kept] for name, counts in found.items()}


def fold(text: str) -> str:
    """Apostrophes straight, white space single."""
    return " ".join(text.replace("’", "'").replace("‘", "'").split())


def _beginnings(text: str) -> list[str]:
    words = text.split(" ")
    return [" ".join(words[:n]).rstrip(",.;:!?") for n in range(1, WORDS + 1) if n <= len(words)]
