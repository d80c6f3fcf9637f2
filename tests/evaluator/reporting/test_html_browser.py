"""The HTML page in headless Chromium: it says nothing, asks for nothing, sorts, filters, explains a cell, prints."""

from __future__ import annotations

import base64
import json
import re
import zlib

import pytest
from browser import Browser
from html_report import HOSTILE, QUOTED, fill, write

from config import ROOT

LABELS = ("[...document.querySelectorAll('#board tbody tr')].filter(r => !r.hidden)"
          ".map(r => r.querySelector('th a').textContent)")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "results"
    fill(folder)
    write(folder)
    return folder / "report" / "t.html"


@pytest.fixture(scope="module")
def browser():
    found = Browser()
    yield found
    found.close()


@pytest.fixture
def page(browser, file):
    browser.call("Emulation.setDeviceMetricsOverride", width=1440, height=900, deviceScaleFactor=1, mobile=False)
    browser.call("Emulation.setEmulatedMedia", media="screen", features=[])
    browser.events.clear()
    browser.open(file)
    yield browser
    # whatever a test did: no error, no warning, no dialog, and nothing was asked for but the file
    assert browser.complaints() == []
    assert set(browser.requests()) <= {file.as_uri()}


def click(page, selector):
    page.run(f"document.querySelector({selector!r}).click()")


def colour(page, of="document.body", what="backgroundColor"):
    numbers = re.findall(r"\d+", page.run(f"getComputedStyle({of}).{what}"))
    return tuple(map(int, numbers[:3]))


def test_the_committed_leaderboard_opens_sorts_and_has_the_datas_rows(browser):
    file, report = (ROOT / "docs" / name for name in ("leaderboard.html", "data/leaderboard.json"))
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    browser.events.clear()
    browser.open(file)
    assert browser.run(LABELS) == [row["label"] for row in rows]
    click(browser, "#board th[data-score=refusal_auc] button")
    # the sort keeps the order of equals
    best_first = sorted(rows, key=lambda row: row["cells"]["refusal_auc"]["value"], reverse=True)
    assert browser.run(LABELS) == [row["label"] for row in best_first]
    shown = browser.run("document.querySelector('#board td a[data-score=refusal_auc]').textContent")
    assert f"{best_first[0]['cells']['refusal_auc']['value']:.3f}" in shown
    assert browser.complaints() == []
    assert set(browser.requests()) <= {file.as_uri()}
    assert file.stat().st_size < 5_000_000


def test_a_header_sorts_best_first_and_then_the_other_way(page):
    assert page.run(LABELS) == ["base", "harmless", "naive mix", QUOTED]
    head = "#board th[data-score=safe_refusal]"
    click(page, f"{head} button")
    assert page.run(LABELS) == ["harmless", QUOTED, "naive mix", "base"]
    assert page.run(f"document.querySelector('{head}').getAttribute('aria-sort')") == "descending"
    click(page, f"{head} button")
    assert page.run(LABELS) == ["base", "naive mix", QUOTED, "harmless"]
    # fewer over-refusals are better
    click(page, "#board th[data-score=overrefusal] button")
    assert page.run(LABELS) == ["base", QUOTED, "naive mix", "harmless"]
    assert page.run(f"document.querySelector('{head}').getAttribute('aria-sort')") == "none"
    click(page, "#board th.name button")
    assert page.run(LABELS) == ["base", "harmless", "naive mix", QUOTED]


def test_the_filter_goes_by_words_and_by_kind(page):
    page.run("words.value = 'mix'; words.dispatchEvent(new Event('input'))")
    assert page.run(LABELS) == ["naive mix"]
    assert page.run("document.querySelector('#tools output').textContent") == "1 of 4 rows"
    # a run's name finds its row too, capitals do not matter
    page.run("words.value = ' MOE '; words.dispatchEvent(new Event('input'))")
    assert page.run(LABELS) == [QUOTED]
    page.run("words.value = ''; words.dispatchEvent(new Event('input')); kind.value = 'base'; "
             "kind.dispatchEvent(new Event('change'))")
    assert page.run(LABELS) == ["base"]


def test_a_column_can_be_hidden(page):
    page.run("document.querySelectorAll('#columns input')[1].click()")
    shown = page.run("[...board.querySelectorAll('thead th')].filter(c => c.offsetWidth).map(c => c.dataset.score)")
    assert shown == [None, "safe_refusal", "balance"]
    assert page.run("document.querySelectorAll('#board tbody td:not([hidden])').length") == 4 * 2


def test_a_cell_opens_the_run_behind_it(page):
    click(page, "#board tr[data-row='3'] a[data-score=overrefusal]")
    text = page.run("panel.innerText")
    assert QUOTED in text
    assert "0.050 [" in text
    # from the expert on, each on a line of its own, and the answers that this score is about alone
    lines = page.run("[...panel.querySelectorAll('.line')].map(e => e.textContent.trim())")
    assert lines[:2] == ["python align_basemodel.py --task_name safety", "python models/llama_moe.py"]
    assert lines[3] == "python inference.py --task_name overrefusal"
    assert lines[4].startswith("python evaluator/evaluate_safety.py --task_name cross_moe --num_samples 60")
    assert len(lines) == 5
    assert page.run("document.activeElement.id") == "panel"
    page.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape'}))")
    assert page.run("[panel.hidden, document.activeElement.dataset.score]") == [True, "overrefusal"]


def test_what_strangers_wrote_stays_text_in_the_living_page(page):
    written = HOSTILE.replace("\u202e", "")
    assert page.run("[...document.querySelectorAll('.answer')].map(e => e.textContent)").count(f"moe answers {written}") > 0
    # before and after a script has touched it
    page.run("document.querySelectorAll('#board td a[data-score]')[4].click()")
    assert page.run("panel.querySelector('.says').textContent") == f"share {written}"
    assert page.run("document.scripts.length") == 3
    assert page.run("document.querySelectorAll('img, [onmouseover], [onerror], b b').length") == 0


def test_the_policy_stops_what_the_page_does_not_do_itself(browser, file):
    browser.open(file)
    browser.events.clear()
    browser.run("(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; "
                "document.body.append(s); const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; })()")
    assert browser.run("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    assert browser.run("typeof ran") == "undefined"
    refused = [event["params"]["entry"]["text"] for event in browser.complaints() if event["method"] == "Log.entryAdded"]
    assert sum("Content Security Policy" in text for text in refused) >= 3


def test_the_fronts_follow_their_menus_the_pointer_and_the_keyboard(page):
    assert page.run("document.querySelectorAll('#plot .point').length") == 4
    # up refusal, across over-refusal: nobody refuses as much as the harmless expert, nobody as little harmless as the base
    first = "document.querySelector('#plot .point')"
    page.run(f"{first}.focus()")
    assert page.run("tip.innerText").startswith("harmless\nrefusal ↑: 0.950 [")
    page.run(f"{first}.blur()")
    assert page.run("tip.hidden") is True
    # the pointer shows the same
    page.run(f"{first}.dispatchEvent(new PointerEvent('pointerenter'))")
    assert page.run("tip.innerText").startswith("harmless\nrefusal ↑: 0.950 [")
    page.run(f"{first}.dispatchEvent(new PointerEvent('pointerleave'))")
    assert page.run("tip.hidden") is True
    assert page.run(f"{first}.getAttribute('aria-label')").startswith("harmless; refusal ↑: 0.950 [")
    corners = page.run("document.querySelector('#plot .front').getAttribute('d').split('L').length")
    assert corners == 4 - 1, "naive mix is beaten by the tuned MoE on both"
    page.run("x.value = 'all_seconds'; x.dispatchEvent(new Event('change'))")
    assert page.run("document.querySelectorAll('#plot .point').length") == 2
    page.run("size.value = 'overrefusal'; size.dispatchEvent(new Event('change'))")
    assert "over-refusal ↓: 0.900" in page.run(f"{first}.getAttribute('aria-label')")


def test_points_in_one_place_speak_for_each_other(browser, file):
    write(file.parent.parent, runs="base,mix,same=mix,moe", name="twins")
    browser.open(file.with_name("twins.html"))
    twins = "[...document.querySelectorAll('#plot .point')].filter(p => p.ariaLabel.startsWith('same'))[0]"
    browser.run(f"{twins}.focus()")
    assert browser.run("tip.innerText").endswith("also here: mix")


def test_dark_is_the_readers_choice_and_the_switchs(page):
    light = colour(page)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    dark = colour(page)
    assert sum(light) > 700
    assert sum(dark) < 100
    click(page, "#theme")
    assert colour(page) == light
    click(page, "#theme")
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    assert colour(page) == dark
    click(page, "#theme")
    assert colour(page) == light


def luminance(rgb):
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(page, scheme):
    """Contrast of WCAG 2.2, AA: 4.5 to 1 for text of this size, 3 to 1 for marks."""
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def contrast(of, what="color", ground="document.body"):
        a, b = sorted((luminance(colour(page, of, what)), luminance(colour(page, ground))))
        return (b + 0.05) / (a + 0.05)

    tinted = "document.querySelector('td.top')"
    for of in ("document.body", "document.querySelector('.says')", "document.querySelector('nav a')",
               "document.querySelector('.sign.better')", "document.querySelector('.sign.worse')"):
        assert contrast(of) >= 4.5, of
    assert contrast("document.querySelector('td.top small')", ground=tinted) >= 4.5
    assert contrast("document.querySelector('#plot .mark')", "fill") >= 3
    assert contrast("document.querySelector('.bar .dot')", "fill", tinted) >= 3


def test_on_a_phone_the_table_scrolls_in_its_box_and_the_names_stay(page):
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    assert page.run("document.documentElement.scrollWidth") <= 390
    page.run("document.querySelector('#leaderboard .scroll').scrollLeft = 90")
    assert page.run("document.querySelector('#leaderboard .scroll').scrollLeft") == 90
    left = "document.querySelector('#board tbody th').getBoundingClientRect().left"
    assert page.run(f"{left} - document.querySelector('#leaderboard .scroll').getBoundingClientRect().left") < 2


def test_it_prints(page):
    page.call("Emulation.setEmulatedMedia", media="print")
    hidden = page.run("['#tools', 'nav', '#theme'].map(s => getComputedStyle(document.querySelector(s)).display)")
    assert hidden == ["none"] * 3
    # on a sheet's width nothing is cut off, and names are not squeezed into a column of letters
    page.call("Emulation.setDeviceMetricsOverride", width=1047, height=740, deviceScaleFactor=1, mobile=False)
    assert page.run("document.documentElement.scrollWidth") <= 1047
    assert page.run("document.querySelector('#board tbody th a').getClientRects().length") == 1
    pdf = base64.b64decode(page.call("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert pdf.startswith(b"%PDF-")
    objects = pdf + b"".join(inflated(part) for part in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.S))
    assert len(re.findall(rb"/Type\s*/Page\b", objects)) >= 2
    # A4, lying
    assert re.search(rb"/MediaBox\s*\[\s*0 0 84[12]", objects)
    # answers to harmful prompts are printed only where a reader opened them
    assert page.run("document.querySelector('details.harmful').open") is False


def inflated(part):
    try:
        return zlib.decompress(part)
    except zlib.error:
        return b""


def test_without_a_script_it_is_a_table(browser, file):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(file)
        shown = "[...document.querySelectorAll('%s')].filter(e => e.offsetWidth).length"
        assert browser.run(shown % "#board tbody tr") == 4
        assert browser.run("document.querySelector('#board tbody tr td b').innerText") == "0.100"
        # what only a script can do is not offered
        assert browser.run(shown % "#tools, #theme, #plot, #panel, .sort") == 0
        assert browser.run(shown % "#no-plot") == 1
        assert browser.run("document.querySelector('#board td a').getAttribute('href')") == "#run-0"
        assert browser.run("document.querySelector('#run-0 summary').innerText").startswith("base")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_without_chromium_it_is_skipped_and_fails_in_ci(monkeypatch):
    import browser as driver

    monkeypatch.setattr(driver.shutil, "which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install -y chromium"):
        driver.chromium()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="needs Chromium"):
        driver.chromium()
