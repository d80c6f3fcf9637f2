"""The cache of verdicts: nothing is asked twice, nothing that was made is lost, nothing is shared that differs."""

import sqlite3
import threading
from dataclasses import dataclass, field

import pytest

from errors import UserError
from evaluator.judges.cache import Cache, key, verdicts
from evaluator.judges.protocol import Item, Verdict


@dataclass
class Counting:
    """A judge that says how long an answer is, remembers what it was asked, and breaks down after ``stop`` verdicts."""

    name: str = "counting"
    version: str = "1"
    stop: int = 10**9
    fails: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def judge(self, items):
        # backwards: verdicts may come in any order
        for made, i in enumerate(range(len(items) - 1, -1, -1)):
            if made == self.stop:
                raise KeyboardInterrupt
            self.asked.append(items[i].answer)
            note = "failed: 500" if items[i].answer in self.fails else ""
            yield i, Verdict(len(items[i].answer) > 3, float(len(items[i].answer)), {"é": 0.5}, "why\n", note)


@pytest.fixture
def cache(tmp_path):
    with Cache(tmp_path / "scores" / "judgements.sqlite") as opened:
        yield opened


ITEMS = [Item("p", answer) for answer in ("a", "four", "", "line\nline", "多语言", "x" * 100_000, "\ud800")]


def test_the_second_run_asks_nothing_and_says_the_same(cache):
    first = verdicts(Counting(), ITEMS, cache)
    again = Counting()
    assert verdicts(again, ITEMS, cache) == first
    assert again.asked == []
    assert [verdict.score for verdict in first] == [len(item.answer) for item in ITEMS]


def test_a_killed_run_loses_nothing_and_only_the_rest_is_asked(cache, tmp_path):
    killed = Counting(stop=3)
    with pytest.raises(KeyboardInterrupt):
        verdicts(killed, ITEMS, cache)
    rest = Counting()
    # another process reads what the killed one committed
    with Cache(tmp_path / "scores" / "judgements.sqlite") as other:
        found = verdicts(rest, ITEMS, other)
    assert len(killed.asked) == 3
    assert sorted(killed.asked + rest.asked) == sorted(item.answer for item in ITEMS)
    assert [verdict.score for verdict in found] == [len(item.answer) for item in ITEMS]


def test_equal_items_are_judged_once(cache):
    judge = Counting()
    items = [Item("p", "same", id="1"), Item("p", "other"), Item("p", "same", id="2"), Item("q", "same")]
    found = verdicts(judge, items, cache)
    assert sorted(judge.asked) == ["other", "same", "same"]
    assert found[0] == found[2]


def test_failed_verdicts_are_asked_again_and_unparsed_ones_are_not(cache):
    first = verdicts(Counting(fails={"four"}), ITEMS, cache)
    assert first[1].note == "failed: 500"
    again = Counting()
    assert verdicts(again, ITEMS, cache)[1].note == ""
    assert again.asked == ["four"]
    cache.put(again, Item("p", "new"), Verdict(None, note="unparsed"))
    assert verdicts(again, [Item("p", "new")], cache) == [Verdict(None, note="unparsed")]
    assert again.asked == ["four"]


def test_judges_versions_and_fields_share_no_entry(cache):
    item = Item("ab", "c", "d")
    others = [(Counting("other"), item), (Counting(version="2"), item), (Counting(), Item("a", "bc", "d")),
              (Counting(), Item("ab", "cd", "")), (Counting(), Item("ab", "", "cd")), (Counting("counting1", ""), item)]
    assert len({key(judge, it) for judge, it in [*others, (Counting(), item)]}) == 7
    verdicts(Counting(), [item], cache)
    for judge, it in others:
        verdicts(judge, [it], cache)
        assert len(judge.asked) == 1
    # the row's id is no part of it
    assert key(Counting(), Item("ab", "c", "d", "7")) == key(Counting(), item)


def test_a_judge_that_leaves_items_out_is_a_bug(cache):
    class Lazy(Counting):
        def judge(self, items):
            yield 0, Verdict(True)

    with pytest.raises(RuntimeError, match="no verdict for 1 of 2"):
        verdicts(Lazy(), [Item("p", "a"), Item("p", "b")], cache)


def test_a_file_that_is_no_cache_is_explained(tmp_path):
    path = tmp_path / "judgements.sqlite"
    path.write_text("this is no database, and long enough to be read as one" * 50)
    with pytest.raises(UserError, match="cannot be used as the cache"):
        Cache(path)


def test_two_processes_may_write_at_once(tmp_path):
    path = tmp_path / "judgements.sqlite"
    with Cache(path) as one, Cache(path) as two:
        for i in range(20):
            (one, two)[i % 2].put(Counting(), Item("p", str(i)), Verdict(True))
        assert all(one.get(Counting(), Item("p", str(i))) == Verdict(True) for i in range(20))
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM verdicts").fetchone() == (20,)


def test_several_open_a_new_file_at_the_same_time(tmp_path):
    """Each round is a new file: only the first openers of a file can meet."""
    for n in range(20):
        together, wrong = threading.Barrier(4), []

        def work(path, i, together=together, wrong=wrong):
            together.wait()
            try:
                with Cache(path) as cache:
                    cache.put(Counting(), Item("p", str(i)), Verdict(True))
            except UserError as error:
                wrong.append(error)

        path = tmp_path / f"{n}.sqlite"
        threads = [threading.Thread(target=work, args=(path, i)) for i in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not wrong
        with Cache(path) as cache:
            assert all(cache.get(Counting(), Item("p", str(i))) for i in range(4))
