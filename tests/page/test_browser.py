"""The page in a real browser: at the width of a phone and of a screen, in light and dark, and on paper."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from headless_browser import Browser

import lbq.page
from lbq.formats.manifest import Manifest
from lbq.formats.report import Report
from lbq.page import render

pytestmark = pytest.mark.browser

Make = Callable[..., tuple[Manifest, Report]]
WIDTHS = (390, 1280)
STYLE = Path(lbq.page.__file__).with_name("page.css")
STEPS = tuple(f"e{i}" for i in range(8))
LONG = "a_name_without_any_place_to_break_" * 7

CONTRAST = """(() => {
  const rgb = colour => colour.match(/[0-9.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = rgb(colour).map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const has_text = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
  const texts = [...document.querySelectorAll('body *')].filter(has_text);
  const shown = texts.filter(e => e.tagName != 'title' && e.getClientRects().length);
  return shown.map(e => {
    const style = getComputedStyle(e), ink = light(e.ownerSVGElement ? style.fill : style.color);
    return [(Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05), e.textContent.trim().slice(0, 30)];
  }).sort((a, b) => a[0] - b[0])[0].concat(shown.length);
})()"""

OVERLAPS = """[...document.querySelectorAll('.plot > svg')].flatMap(svg => {
  const boxes = [...svg.querySelectorAll('.grid text')].map(e => [e.getBoundingClientRect(), e.textContent]);
  const apart = (a, b) => a.right - .5 < b.left || a.bottom - .5 < b.top;
  const meet = (a, b) => !apart(a, b) && !apart(b, a);
  return boxes.flatMap(([a, s], i) => boxes.slice(i + 1).filter(([b]) => meet(a, b)).map(([b, t]) => `${s} and ${t}`));
})"""

CHARTS = """[...document.querySelectorAll('.plot')].map(plot => {
  const box = plot.getBoundingClientRect(), svg = plot.querySelector('svg').getBoundingClientRect();
  return [svg.width, svg.height, box.right];
})"""


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Callable[..., Browser]:
    """``show((manifest, report), width, dark=…)`` opens a page."""

    def opened(made: tuple[Manifest, Report], width: int, **options: Any) -> Browser:
        path = tmp_path / "report.html"
        path.write_bytes(render(*made))
        browser.open(path, width, **options)
        return browser

    return opened


def mixed(unit: int) -> int:
    return (8, 4, 3)[unit % 3]


def palette(dark: bool) -> dict[str, str]:
    """Variables of the style sheet: name → rrggbb."""
    style = STYLE.read_text()
    block = style.split("@media screen and (prefers-color-scheme: dark)")[1] if dark else style
    return dict(re.findall(r"--([a-z0-9]+): #([0-9a-f]{6});", block.partition("}")[0]))


@pytest.fixture(params=[pytest.param(False, id="light"), pytest.param(True, id="dark")])
def dark(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("width", WIDTHS)
def test_everything_is_drawn(make: Make, show: Callable[..., Browser], width: int, dark: bool) -> None:
    """A screenshot has the paper, every colour of charts and maps, and ink."""
    browser = show(make(layers=80, bits=mixed), width, dark=dark)
    loaded = [event["params"]["request"]["url"] for event in browser.events if event["method"].endswith("BeSent")]
    assert [url.partition(":")[0] for url in loaded] == ["file"]  # the page, and nothing else
    assert [event for event in browser.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")] == []
    colours = browser.colours(browser.screenshot())
    named = palette(dark)
    assert set(named) == {"paper", "ink", "muted", "rule", "grey", "own", "b3", "b4", "b8", "one", *STEPS}
    assert colours.most_common(1)[0][0] == named["paper"]
    for name in ("ink", "muted", "rule", "own", "b3", "b4", "b8"):
        assert colours[named[name]] > 50, name
    for name in STEPS:  # more than the legend has
        assert colours[named[name]] > 1500, name
    assert colours["000000"] == 0  # what a shape without a colour would have
    assert colours.total() > width * 3000


@pytest.mark.parametrize("level", ["weights", "full"])
@pytest.mark.parametrize("width", [320, *WIDTHS])
def test_it_fits(make: Make, show: Callable[..., Browser], width: int, level: str) -> None:
    """Nothing is wider than the window, no chart has vanished, and no two labels meet; with names that do not break."""
    manifest, report = make(layers=80, level=level, bits=mixed)
    manifest = msgspec.structs.replace(
        manifest,
        source=msgspec.structs.replace(manifest.source, name=LONG, revision=LONG, files=manifest.files),
        method=msgspec.structs.replace(manifest.method, keep=(LONG,)),
        notes=(LONG,),
        files={LONG: manifest.files["report.json"], **manifest.files},
    )
    browser = show((manifest, report), width)
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") == width
    charts = browser.run(CHARTS)
    assert len(charts) == (1 + 4 + 1 + 1 + 7 if level == "full" else 1 + 1 + 7)
    for chart_width, height, right in charts:
        assert chart_width > 80
        assert height > 80
        assert right <= width
    assert browser.run(OVERLAPS) == []


def test_text_can_be_read(make: Make, show: Callable[..., Browser], dark: bool) -> None:
    """Every text against the paper by WCAG's measure of contrast, 4.5 at least."""
    contrast, text, texts = show(make(bits=mixed), 1280, dark=dark).run(CONTRAST)
    assert texts > 200
    assert contrast >= 4.5, text


def test_print(make: Make, show: Callable[..., Browser]) -> None:
    """A4 paper, light whatever the screen is, and no figure across two pages."""
    browser = show(make(layers=80, bits=mixed), 1280, dark=True)
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    sizes = [tuple(map(float, box)) for box in re.findall(rb"/MediaBox \[0 0 ([0-9.]+) ([0-9.]+)\]", pdf)]
    assert 3 <= len(sizes) <= 8
    assert {(round(width), round(height)) for width, height in sizes} == {(595, 842)}
    show(make(), 680, dark=True, media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run(
        "[...document.querySelectorAll('figure, tr')].every(e => getComputedStyle(e).breakInside == 'avoid')"
    )
    assert browser.run("document.documentElement.scrollWidth") == 680


def test_policy(make: Make, browser: Browser, tmp_path: Path) -> None:
    """A script that came in would not run, nor would an image be fetched: the page's own policy forbids it."""
    page = render(*make(layers=1)).replace(
        b"<main>", b"<main><script>document.title = 'ran'</script><img src=//x.invalid/y>"
    )
    path = tmp_path / "injected.html"
    path.write_bytes(page)
    browser.open(path, 390)
    assert browser.run("document.title") != "ran"
    refused = [event["params"]["entry"]["text"] for event in browser.events if event["method"] == "Log.entryAdded"]
    assert len(refused) == 2
    assert all("Content Security Policy" in text for text in refused)
