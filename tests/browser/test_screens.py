"""Pictures of the page, for people to look at; dev/screenshots/ is made by

    SCREENSHOTS=dev/screenshots python -m pytest -m slow tests/browser/test_screens.py

with the models scripted below, so that the pictures show the page and say nothing about any model. Without SCREENSHOTS
they go into a temporary folder, and the test is whether they can be taken and stay small."""

import os
from pathlib import Path

import pytest

LARGEST = 150_000  # bytes of a picture
EVERYTHING = """Fibonacci numbers begin with **0** and **1**; each further one is the *sum of the two before* it.

1. Keep the last two numbers.
2. Add them, and move on by one.

```python
def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a
```

| n | 5 | 10 | 20 |
|---|--:|---:|---:|
| `fibonacci(n)` | 5 | 55 | 6765 |

> They grow by a factor of about 1.618 each time."""
CHAT = {
    "What is 37 + 58?": "Let me calculate that. <<37+58>>37 + 58 = **95**.",
    "And how many r are in strawberry?": '<<"strawberry".count("r")>>There are **3** r in strawberry.',
    "How do I compute Fibonacci numbers in Python?": EVERYTHING,
    "Spell the word banana.": "b, a, n, a, n, a",
}


@pytest.mark.slow
def test_screenshots(visit, site, script, monkeypatch, tmp_path):
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    for asked, reply in CHAT.items():
        monkeypatch.setitem(script, asked, reply)
    for name in ("ada", "bert"):
        monkeypatch.setattr(site.engines[name], "burst", 3)
    calculations, fibonacci, spelling = list(CHAT)[:2], list(CHAT)[2], list(CHAT)[3]

    def picture(name, asked, path="/", width=1200, height=800, **options):
        v = visit(path, width, height, **options)
        v.find("#welcome button:enabled").first.wait_for()
        for text in asked:
            v.ask(text)
        v.page.screenshot(path=folder / f"{name}.png")
        return v

    picture("start", [])
    picture("light", [spelling, fibonacci])
    picture("dark", [spelling, fibonacci], color_scheme="dark")
    v = picture("steps", calculations)
    v.find("summary").first.click()
    v.page.screenshot(path=folder / "steps.png")
    picture("compare", calculations, "/compare")
    picture("phone", calculations, width=390, height=780, has_touch=True, is_mobile=True)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.png")}
    assert (
        set(sizes) >= {f"{name}.png" for name in ("start", "light", "dark", "steps", "compare", "phone")}
        and max(sizes.values()) < LARGEST
    )
