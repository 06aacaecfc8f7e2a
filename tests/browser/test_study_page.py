"""Pages of studies and the site in Chromium: they load nothing, fit a phone, are legible in light and dark.

    SCREENSHOTS=DIR python -m pytest -m slow tests/browser/test_study_page.py

keeps pictures."""

import os
from pathlib import Path

import pytest
from lab.test_page import run_folder, whole

from nanolab.evals.config import ReportConfig
from nanolab.lab.site import write_site

PAGES = ("index.html", "studies/gate-cpu/index.html", "runs/one.html")
CONTRAST = """() => [...document.querySelectorAll('h1, h2, p, dd, dt, td, th, figcaption, svg text, a')].map((e) => {
  const numbers = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const linear = (x) => x <= .03928 * 255 ? x / 255 / 12.92 : ((x / 255 + .055) / 1.055) ** 2.4;
  const light = (rgb) => { const [r, g, b] = rgb.map(linear); return .2126 * r + .7152 * g + .0722 * b; };
  let under = e; while (getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)') under = under.parentElement;
  const style = getComputedStyle(e), ink = e.tagName === 'text' ? style.fill : style.color;
  const [a, b] = [light(numbers(ink)), light(numbers(getComputedStyle(under).backgroundColor))];
  return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent.slice(0, 40), ink];
})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("site")
    whole(home / "studies" / "gate" / "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLAB_BASE_DIR", str(home / "base"))
        run_folder(home / "base", "one", eval_base={"samples": [{"prompt": "<b>", "text": "x" * 400}]})
        write_site(ReportConfig(site=str(home / "out"), studies=str(home / "studies"), price_per_hour=3))
    return home / "out"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_every_screen_and_loads_nothing(visit, folder, page, scheme):
    wide = visit(f"/{page}", url=f"file://{folder}", color_scheme=scheme)
    phone = visit(f"/{page}", 360, 740, url=f"file://{folder}", color_scheme=scheme)
    for v in (wide, phone):
        assert [request.url for request in v.requests] == [f"file://{folder}/{page}"]
        assert v.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        low = [found for found in v.page.evaluate(CONTRAST) if found[0] < 4.5]
        assert not low, low
        name = f"{page.replace('/', '-')}-{scheme}-{'phone' if v is phone else 'wide'}.png"
        if to := os.environ.get("SCREENSHOTS"):
            v.page.screenshot(path=Path(to) / name, full_page=True)
    sizes = phone.page.evaluate(
        "[...document.querySelectorAll('svg text')].map((e) => e.getBoundingClientRect().height)"
    )
    assert not sizes or min(sizes) >= 9  # letters of a figure are read without zooming


@pytest.mark.slow
def test_a_page_is_read_by_keyboard(visit, folder):
    v = visit("/studies/gate-cpu/index.html", url=f"file://{folder}")
    seen = []
    for _ in range(12):
        v.page.keyboard.press("Tab")
        seen.append(v.page.evaluate("document.activeElement.ariaLabel || document.activeElement.tagName"))
        if seen[-1] == "SUMMARY":
            v.page.keyboard.press("Enter")
            break
    assert "The whole table" in seen and seen[-1] == "SUMMARY"
    assert v.find("details table").is_visible()
