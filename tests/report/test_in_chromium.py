"""report.html in a real browser: nothing is asked for, nothing complained about, nothing sticks out, all can be read."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from phased_cpt.report import write_report
from tests.report.chromium import Chromium, chromium_here, running_chromium
from tests.report.folders import phase, record, two_phases
from tests.report.test_page import evil_run

WINDOWS = {"a desktop": (1280, 900), "a phone": (360, 780)}

# What sticks out to the right of the page, but for what lies in a box of its own that scrolls.
STICKS_OUT = """
[...document.querySelectorAll("body *")].filter(each => !each.closest(".scroll, svg, .unseen")
    && each.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(each => each.outerHTML.slice(0, 80))
"""
# The least contrast of any text with what it stands on, as WCAG counts it; 4.5 is AA.
LEAST_CONTRAST = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = colour => rgb(colour).slice(0, 3).map(x => x / 255).map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const beneath = each => { while (each && rgb(getComputedStyle(each).backgroundColor)[3] < 255) each = each.parentElement;
    return each ? getComputedStyle(each).backgroundColor : "white"; };
  const ratios = [...document.querySelectorAll("body *")]
    .filter(each => !each.closest("svg, .unseen") && [...each.childNodes].some(node => node.nodeType == 3 && node.data.trim()))
    .map(each => { const a = light(getComputedStyle(each).color) + 0.05, b = light(beneath(each)) + 0.05;
      return [Math.max(a, b) / Math.min(a, b), each.outerHTML.slice(0, 80)]; });
  return ratios.sort((a, b) => a[0] - b[0])[0];
})()
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with running_chromium(chromium_here()) as running:
        yield running


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_report_is_whole_in_a_browser(chromium: Chromium, tmp_path: Path, window: str, theme: str) -> None:
    page = write_report(two_phases(tmp_path))
    chromium.look_at(page, *WINDOWS[window], theme)
    assert chromium.requests() == [page.as_uri()]
    assert chromium.complaints() == []
    assert chromium.value(STICKS_OUT) == []
    assert chromium.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert chromium.value("[...document.querySelectorAll('.matrix td span')].map(each => each.innerText)") == [
        "3.200", "4.000", "5.000", "2.900", "3.900", "–", "3.000", "3.100", "5.200",
    ]  # fmt: skip
    best, base = "document.querySelector('td.b8')", "document.querySelector('.matrix td')"
    assert chromium.value(f"getComputedStyle({best}).backgroundColor != getComputedStyle({base}).backgroundColor")
    is_dark = chromium.value("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    assert is_dark == (theme == "dark")  # the style is not turned away by the page's own policy
    chromium.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert chromium.value(STICKS_OUT) == []
    ratio, where = chromium.value(LEAST_CONTRAST)
    assert ratio >= 4.5, where


def test_hostile_texts_do_nothing_in_a_browser(chromium: Chromium, tmp_path: Path) -> None:
    page = write_report(evil_run(tmp_path))
    chromium.look_at(page, *WINDOWS["a phone"], "light")
    assert chromium.requests() == [page.as_uri()]
    assert chromium.complaints() == []
    assert chromium.value(STICKS_OUT) == []
    assert chromium.value("document.scripts.length + document.images.length") == 0


def test_names_without_end_do_not_break_the_page(chromium: Chromium, tmp_path: Path) -> None:
    names = ["a" * 60, *(f"phase_{at}" for at in range(30))]
    phases = [phase(at, name, "pending", started=None) for at, name in enumerate(names, 1)]
    page = write_report(two_phases(tmp_path, **{"run.json": record(*phases, name="x" * 80)}))
    chromium.look_at(page, *WINDOWS["a phone"], "light")
    assert chromium.value(STICKS_OUT) == []


def test_the_browser_would_tell(chromium: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    noisy = "<body><img src='none.png'><script>console.log('x'); nowhere()</script>"
    page.write_text(f"{noisy}<p style='width: 3000px; color: #ccc'>x</p>")
    chromium.look_at(page, *WINDOWS["a phone"], "light")
    assert chromium.requests() == [page.as_uri(), (tmp_path / "none.png").as_uri()]
    assert len(chromium.complaints()) >= 2
    assert len(chromium.value(STICKS_OUT)) == 1
    assert chromium.value(LEAST_CONTRAST)[0] < 2


def test_where_there_is_no_browser_a_person_may_go_on_and_ci_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(
        pytest.skip.Exception, match=r"none of chromium.* is installed \(Debian: apt-get install chromium\)"
    ):
        chromium_here()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="none of chromium"):
        chromium_here()
