"""The page in a real headless Chromium: sorting, filters, console, network, widths."""

from __future__ import annotations

import json
import shutil

import pytest

from pegbox.report import write_report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium and its driver on the PATH"),
]


@pytest.fixture(scope="module")
def address(made, tmp_path_factory):
    (path,) = write_report(made, ["html"], tmp_path_factory.mktemp("report"))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def size(browser, width, height=900):
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def names(browser):
    return [c.text.split("\n")[0] for c in browser.find_elements("css selector", "#results tbody th")]


def test_no_errors_and_no_request_but_the_page_itself(browser, address):
    size(browser, 1280)
    browser.get(address)
    assert [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith(("data:", "chrome"))} == {address}


def test_a_heading_sorts_and_sorts_back(browser, address):
    size(browser, 1280)
    browser.get(address)
    before = names(browser)
    heads = browser.find_elements("css selector", "#results thead th")
    button = heads[1].find_element("css selector", "button")
    button.click()
    falling = names(browser)
    assert heads[1].get_attribute("aria-sort") == "descending"
    assert falling[-1] == "mezo"  # no value: last either way
    button.click()
    rising = names(browser)
    assert rising[:-1] == falling[:-1][::-1]
    assert rising[-1] == "mezo"
    heads[0].find_element("css selector", "button").click()
    assert names(browser) == sorted(before)


def test_filters_show_the_rows_they_name(browser, address):
    size(browser, 1280)
    browser.get(address)
    browser.find_element("css selector", "[data-filter=fixed]").click()
    shown = [s for s in browser.find_elements("css selector", ".sample") if s.is_displayed()]
    assert shown
    assert all("fixed" in s.get_attribute("data-tags").split() for s in shown)


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_and_text_is_readable(browser, address, width, scheme):
    size(browser, width)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(address)
    browser.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    paper, ink = browser.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    )
    assert contrast(paper, ink) > 7
    smallest = browser.execute_script(
        "return Math.min(...[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height))"
    )
    assert smallest > 8


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        parts = [int(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    a, b = sorted([luminance(one), luminance(other)])
    return (b + 0.05) / (a + 0.05)
