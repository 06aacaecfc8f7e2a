"""The page's markdown: text -> nodes. Expectations are HTML written by hand; growing text must end as the whole text at
once.
"""

import random
import time

import pytest

# markdown -> the HTML of its nodes
CASES = {
    "plain\nwith a break": "<p>plain\nwith a break</p>",
    "one\n\ntwo": "<p>one</p><p>two</p>",
    "**bold** and *slanted* and ***both***": (
        "<p><strong>bold</strong> and <em>slanted</em> and <strong><em>both</em></strong></p>"
    ),
    "__bold__ _slanted_ ~~gone~~ **a *b* c**": (
        "<p><strong>bold</strong> <em>slanted</em> <del>gone</del> <strong>a <em>b</em> c</strong></p>"
    ),
    "5*3*2, 2**3**2, a * b * c, snake_case_name": "<p>5*3*2, 2**3**2, a * b * c, snake_case_name</p>",
    "**open, and *open": "<p>**open, and *open</p>",
    "*crossed **marks* here**": "<p><em>crossed **marks</em> here**</p>",
    r"\*not\* \`code\`": "<p>*not* `code`</p>",
    "`a*b*` and `` x`y ``": "<p><code>a*b*</code> and <code>x`y</code></p>",
    "a ` alone": "<p>a ` alone</p>",
    "# Title\ntext\n###### small": "<h3>Title</h3><p>text</p><h6>small</h6>",
    "#hash": "<p>#hash</p>",
    "---": "<hr>",
    "- a\n- b\n  - c\n\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. c\n4. d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "1. a\n   more\n\n   para\n2. b": '<ol start="1"><li>a\nmore<p>para</p></li><li>b</li></ol>',
    "In\n1986. Not a list": "<p>In\n1986. Not a list</p>",
    "text\n- item": "<p>text</p><ul><li>item</li></ul>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "| a | b |\n|---|--:|\n| 1 | `2` |\n| 3 |": (
        '<div class="table"><table><thead><tr><th class="">a</th><th class="right">b</th></tr></thead><tbody><tr><td'
        ' class="">1</td><td class="right"><code>2</code></td></tr><tr><td class="">3</td><td'
        ' class="right"></td></tr></tbody></table></div>'
    ),
    "a | b is no table": "<p>a | b is no table</p>",
    "<b>not bold</b> &amp; <!-- -->": "<p>&lt;b&gt;not bold&lt;/b&gt; &amp;amp; &lt;!-- --&gt;</p>",
}
LINK = '<a href="{0}" title="{0}" target="_blank" rel="noopener noreferrer nofollow"><bdi>{1}</bdi>{2}</a>'
CASES |= {
    "[here](https://example.org/a?b=1)": (
        f"<p>{LINK.format('https://example.org/a?b=1', 'here', '<small><bdi>(example.org)</bdi></small>')}</p>"
    ),
    "see https://example.org/a.": f"<p>see {LINK.format('https://example.org/a', 'https://example.org/a', '')}.</p>",
    "[post](mailto:a@b.org)": f"<p>{LINK.format('mailto:a@b.org', 'post', '<small><bdi>(a@b.org)</bdi></small>')}</p>",
    "![a cat](https://example.org/cat.png)": (
        "<p>"
        + LINK.format("https://example.org/cat.png", "image: a cat", "<small><bdi>(example.org)</bdi></small>")
        + "</p>"
    ),
    "[bank.com](https://bank.com@evil.example/)": (
        "<p>"
        + LINK.format("https://bank.com@evil.example/", "bank.com", "<small><bdi>(evil.example)</bdi></small>")
        + "</p>"
    ),
    "[x](javascript:alert(1))": "<p>[x](javascript:alert(1))</p>",
    "[x](data:text/html,hi) [y](/local) [z](vbscript:a)": "<p>[x](data:text/html,hi) [y](/local) [z](vbscript:a)</p>",
}

WHOLE = """A **bold** start with *slanted* words, `code` and a [link](https://example.org).

## A heading

1. one
2. two
   - inner **item**

> quoted *text*

| name | count |
|:-----|------:|
| a | 1 |
| b | **2** |

```python
x = "**"  # not bold
```

The end: 5*3 = 15."""

EACH = """([markdown, steps]) => {
  const box = document.createElement("div");
  const seen = [];
  for (const length of steps) { showMarkdown(box, markdown.slice(0, length), true); seen.push(box.textContent); }
  showMarkdown(box, markdown, false);
  return [box.innerHTML, seen];
}"""


@pytest.fixture(scope="module")
def page(browser, site):
    context = browser.new_context()
    page = context.new_page()
    page.goto(site.url)
    yield page
    context.close()


def html(page, markdown: str, steps: list[int] | tuple = ()) -> str:
    return page.evaluate(EACH, [markdown, list(steps)])[0]


@pytest.mark.slow
def test_each_construct_becomes_its_nodes(page):
    assert {markdown: html(page, markdown) for markdown in CASES} == CASES


def test_code_keeps_its_text_and_names_its_language(page):
    found = html(page, "```python\nif a < b:\n    **c**\n```\nafter")
    assert (
        "<span>python</span>" in found
        and "<code>if a &lt; b:\n    **c**</code>" in found
        and found.endswith("<p>after</p>")
    )
    assert "<code>a\n\n\nb</code>" in html(page, "~~~\na\n\n\nb")  # never closed
    assert "<code>```</code>" in html(page, "````\n```\n````")


def test_characters_that_reorder_or_hide_text_are_written_out_in_code(page):
    assert "<code>a\u27e8U+202E\u27e9b\u27e8U+200B\u27e9</code>" in html(page, "`a\u202eb\u200b`")


def test_growing_text_ends_as_the_whole_text_at_once(page):
    rng = random.Random(0)
    for markdown in [WHOLE, *CASES]:
        at_once = html(page, markdown)
        assert html(page, markdown, list(range(len(markdown) + 1))) == at_once
        assert html(page, markdown, sorted(rng.sample(range(len(markdown) + 1), min(5, len(markdown))))) == at_once


def test_growing_text_never_shows_the_marks_that_it_will_lose(page):
    _, seen = page.evaluate(EACH, [WHOLE, list(range(len(WHOLE) + 1))])
    for text in seen:
        outside = text.replace('x = "**"', "").replace('x = "*', "")
        assert not any(mark in outside for mark in ("**", "*s", "`", "](", "##", "|", "> "))


HARD = {
    "stars": "*a **b " * 15000,
    "closed stars": "*a* **b** " * 10000,
    "brackets": "[" * 100000,
    "links": "[a](" * 25000,
    "half links": "[a](b" * 20000,
    "ticks": "` `` ``` " * 10000,
    "quotes": ">" * 100000,
    "items": "- " * 50000,
    "deep list": "\n".join(" " * i + "- x" for i in range(400)),
    "pipes": "|" * 100000 + "\n" + "|-" * 50000,
    "rows": "|a|b|\n|-|-|\n" + "|c|d|\n" * 2000,
    "spaces": "# a" + " " * 100000 + "b",
    "one line": "x" * 200000,
    "addresses": "http://a " * 10000,
    "one address": "http://" * 15000,
    "escapes": "\\*" * 50000,
    "dashes": "- - " * 25000 + "x",
    "fences": "```\n" * 10001,
    "underscores": "_" * 100001,
    "numbers": "1. a\n" * 5000,
    "label": "[" + "a" * 100000 + "](",
    "image": "![" * 50000,
}


@pytest.mark.slow
def test_hard_texts_take_no_longer_than_their_length_allows(page):
    """About 100,000 characters each; quadratic work would take minutes. The limit is a guard against that, no
    measurement.
    """
    slow = {}
    for name, markdown in HARD.items():
        for open_end in (True, False):
            began = time.perf_counter()
            page.evaluate(
                "([text, open]) => { showMarkdown(document.createElement('div'), text, open); }", [markdown, open_end]
            )
            if (took := time.perf_counter() - began) > 30:
                slow[name, open_end] = took
    assert not slow
