"""A page of 1,152 features with hostile text, opened from disk in Chromium: loads, sorts, filters, opens, by mouse and keys."""

import pytest
from feature_run import DEAD, HOSTILE, make_run, use_run

from saelib import feature_pages
from tests.browser.chromium import WIDTHS, resize, start, until

pytestmark = pytest.mark.browser
N = 1152


@pytest.fixture(scope="session")
def page(llama, rows, harvested, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    make_run(folder, llama, rows, harvested, n_features=N)
    with pytest.MonkeyPatch.context() as patch:
        use_run(folder, patch)
        return feature_pages.make("made")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A running Chromium; skips where none is installed."""
    try:
        browser = start(tmp_path_factory.mktemp("profile"))
    except LookupError as error:
        pytest.skip(str(error))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium, page):
    """The page, freshly opened at desktop size; afterwards nothing of the text has run and nothing was complained about."""
    resize(chromium, *WIDTHS["desktop"])
    chromium.get("about:blank")
    chromium.get_log("browser")
    chromium.get((page / "index.html").as_uri())
    until(chromium, f"return document.querySelectorAll('tbody tr').length === {N}")
    yield chromium
    assert chromium.execute_script("return window.hacked") is None
    assert chromium.get_log("browser") == []


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def column(browser, key):
    """What the list shows in a column, top to bottom."""
    return browser.execute_script(
        "return [...document.querySelectorAll(`tbody td.${arguments[0]}`)].map(td => td.textContent)", key
    )


def click(browser, selector):
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def opened(browser, feature):
    """Wait for a feature's page; what it says."""
    until(
        browser,
        f"return document.querySelector('#feature:not([hidden]) h2')?.textContent.startsWith('Feature {feature} ')",
    )
    return browser.execute_script("return document.querySelector('#feature').textContent")


def test_first_paint(browser, page):
    timings = []
    for _ in range(5):
        browser.get("about:blank")
        browser.get((page / "index.html").as_uri())
        until(browser, f"return document.querySelectorAll('tbody tr').length === {N}")
        entries = browser.execute_script("return performance.getEntriesByType('paint').map(e => [e.name, e.startTime])")
        timings.append(dict(entries))
    first, content = (sorted(t[name] for t in timings)[2] for name in ("first-paint", "first-contentful-paint"))
    print(f"\nfirst paint {first:.0f} ms, first contentful paint {content:.0f} ms, {N} features (median of 5)")
    assert first < 1000 and content < 1000


def test_lists_every_feature_and_asks_no_network(browser):
    assert column(browser, "id") == [str(number) for number in range(N)]
    assert "1,152 features, 1 dead" in browser.execute_script("return document.querySelector('#about').textContent")
    assert browser.execute_script(
        "return performance.getEntriesByType('resource').every(e => e.name.startsWith('file:') || e.name.startsWith('data:'))"
    )


def test_sorts_by_a_click_and_by_keys(browser):
    from selenium.webdriver import Keys

    click(browser, "th[data-key=max] button")
    until(browser, f"return document.querySelectorAll('tbody tr').length === {N}")
    values = [float(value) for value in column(browser, "max")]
    assert values == sorted(values, reverse=True) and column(browser, "id")[-1] == str(DEAD)
    sorted_by = "return [...document.querySelectorAll('th[aria-sort]')].map(th => [th.dataset.key, th.ariaSort])"
    assert browser.execute_script(sorted_by) == [["max", "descending"]]
    browser.execute_script("document.querySelector('th[data-key=max] button').focus()")
    press(browser, Keys.ENTER)
    until(browser, f"return document.querySelectorAll('tbody tr').length === {N}")
    values = [float(value) for value in column(browser, "max")]
    assert values == sorted(values) and browser.execute_script(sorted_by) == [["max", "ascending"]]
    click(browser, "th[data-key=score] button")
    until(browser, f"return document.querySelectorAll('tbody tr').length === {N}")
    scores = [value for value in column(browser, "score")]
    known = [float(value) for value in scores if value != "–"]
    assert known == sorted(known, reverse=True) and scores[len(known) :] == ["–"] * (N - len(known)) != []


@pytest.mark.parametrize("wanted", ["1043", "#1043", "dead", "HACKED"])
def test_filters_by_number_word_and_token(browser, wanted):
    press(browser, "/")
    until(browser, "return document.activeElement.id === 'filter'")
    press(browser, wanted)
    ids = column(browser, "id")
    shown = browser.execute_script("return document.querySelector('#count').textContent")
    assert 0 < len(ids) < N and shown == f"{len(ids):,} of {N:,}"
    if wanted == "dead":
        assert ids == [str(DEAD)]
    elif wanted == "HACKED":
        rules, tokens = column(browser, "explanation"), column(browser, "fires")
        seen = [one for one in zip(rules, tokens, strict=True) if any(word in "".join(one) for word in ("hacked", "‮"))]
        assert len(seen) > 0.8 * len(ids)  # of others the rule is cut off in the list
    else:
        assert "1043" in ids


def test_opens_by_a_click_and_comes_back(browser):
    click(browser, "tbody tr:nth-child(8) td.max")
    says = opened(browser, 7)
    assert browser.execute_script("return location.hash") == "#f7"
    for part in ("frequency", "Explanation by token rules", "promotes", "suppresses", "Nearest features", "Strongest"):
        assert part in says
    bars, printed = browser.execute_script(
        "return [[...document.querySelectorAll('.stack')].map(s => s.getBoundingClientRect().height),"
        " [...document.querySelectorAll('.stack b')].map(b => Number(b.textContent.replace(',', '')))]"
    )
    assert len(bars) == 10 and printed[bars.index(max(bars))] == max(printed)
    assert all(abs(bar / max(bars) - n / max(printed)) < 0.03 for bar, n in zip(bars, printed, strict=True))
    click(browser, "figure input")
    logged = browser.execute_script(
        "return [...document.querySelectorAll('.stack')].map(s => s.getBoundingClientRect().height)"
    )
    assert sum(logged) > sum(bars)
    click(browser, ".nearest a")
    until(
        browser,
        "return location.hash !== '#f7' && document.querySelector('h2').textContent.includes(location.hash.slice(2))",
    )
    browser.back()
    opened(browser, 7)
    browser.back()
    until(browser, "return !document.querySelector('#list').hidden")


def test_keys_alone(browser):
    from selenium.webdriver import Keys

    press(browser, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.ENTER)
    opened(browser, 1)
    assert browser.execute_script("return document.activeElement.tagName") == "H2"
    press(browser, Keys.ARROW_RIGHT)
    opened(browser, 2)
    press(browser, Keys.ARROW_LEFT)
    opened(browser, 1)
    press(browser, Keys.ESCAPE)
    until(browser, "return !document.querySelector('#list').hidden && document.activeElement.textContent === '1'")
    press(browser, "/")
    until(browser, "return document.activeElement.id === 'filter'")
    press(browser, "1043", Keys.ENTER)
    opened(browser, 1043)
    press(browser, Keys.ESCAPE)
    until(browser, "return !document.querySelector('#list').hidden")
    press(browser, Keys.ESCAPE)
    until(browser, f"return document.querySelectorAll('tbody tr').length === {N}")


@pytest.mark.parametrize("feature", [DEAD, N - 1, N])
def test_an_address_opens_its_feature(browser, page, feature):
    browser.get("about:blank")
    browser.get(f"{(page / 'index.html').as_uri()}#f{feature}")
    if feature == N:
        assert until(browser, "return document.querySelector('h2')?.textContent") == f"There is no feature {N}"
    else:
        assert ("Not active on any of" in opened(browser, feature)) == (feature == DEAD)


def test_hostile_text_is_shown_and_does_nothing(browser):
    found = set()
    for feature in range(12):
        browser.execute_script(f"location.hash = 'f{feature}'")
        says = opened(browser, feature)
        found |= {text for text in HOSTILE if text in says or text.replace(" ", "␣") in says}
        inside = "return document.querySelectorAll('#feature :is(script, img, style, iframe, b b)').length"
        assert browser.execute_script(inside) == 0
    assert found == set(HOSTILE)
    assert browser.execute_script("return getComputedStyle(document.querySelector('#feature')).display") != "none"


@pytest.mark.parametrize("width", [320, 390])
def test_no_horizontal_scroll_on_a_phone(browser, width):
    resize(browser, width, 844)
    wide = "return [document.documentElement.scrollWidth, innerWidth]"
    for place in ("", "f0", f"f{DEAD}"):
        browser.execute_script(f"location.hash = '{place}'")
        if place:
            opened(browser, place[1:])
        assert browser.execute_script(wide) == [width, width]
    letters = browser.execute_script("return parseFloat(getComputedStyle(document.body).fontSize)")
    assert letters >= 14
