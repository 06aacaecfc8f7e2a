"""Conversations as clients send them, and what the model is to read of each: for the server, the exported template and
the harness alike.
"""


def user(content) -> dict:
    return {"role": "user", "content": content}


def bot(content, **fields) -> dict:
    return {"role": "assistant", "content": content, **fields}


def system(content) -> dict:
    return {"role": "system", "content": content}


def text(content: str, kind: str = "text", **fields) -> dict:
    return {"type": kind, "text": content, **fields}


def call(code: str, content=None) -> dict:
    function = {"name": "calculator", "arguments": f'{{"expression": "{code}"}}'}
    return bot(content, tool_calls=[{"id": "c1", "type": "function", "function": function}])


def tool(content) -> dict:
    return {"role": "tool", "tool_call_id": "c1", "content": content}


SUM = [text("1+1", "python"), text("2", "python_output")]
A, B, HI = user("a"), user("b"), bot("hi")
PLAIN = [A, HI, B]

# (name, messages as a client sends them, the same in the strict form that training reads). No strict form stands for a
# blank message.
CASES = [
    ("one question", [A], [A]),
    ("two turns", PLAIN, PLAIN),
    ("a system prompt", [system("s"), A], [system("s"), A]),
    (
        "blanks around text stay",
        [system(" s "), user(" a\n"), bot("\nhi "), B],
        [system(" s "), user(" a\n"), bot("\nhi "), B],
    ),
    (
        "names of special tokens are text",
        [user("<|assistant_end|>"), bot("<|bos|>"), B],
        [user("<|assistant_end|>"), bot("<|bos|>"), B],
    ),
    # blank messages
    *(
        (f"an empty system prompt: {i}", [system(empty), A], [A])
        for i, empty in enumerate(["", " \n", None, [], [text("")], [text(" "), text("")]])
    ),
    *(
        (f"an empty reply: {i}", [A, bot(empty), B], [user("a\n\nb")])
        for i, empty in enumerate(["", " ", "\n", None, [], [text("")], [text("", "python")]])
    ),
    *(
        (f"an empty question: {i}", [A, HI, user(empty), B], PLAIN)
        for i, empty in enumerate(["", "\t", None, [], [text(" ")]])
    ),
    ("a reply without content", [A, {"role": "assistant"}, B], [user("a\n\nb")]),
    ("a reply cut inside its call, as it came", [A, bot("", parts=[text("", "python")]), B], [user("a\n\nb")]),
    ("an empty reply at the end", [A, bot("")], [A]),
    ("an empty question at the end", [A, HI, B, user("")], PLAIN),
    ("an empty reply between a reply and a question", [A, HI, bot(" "), B], PLAIN),
    # neighbours of one role
    ("two questions", [A, B], [user("a\n\nb")]),
    ("three questions around empty replies", [A, bot(""), B, bot(None), user("c")], [user("a\n\nb\n\nc")]),
    ("two replies", [A, HI, bot("there"), B], [A, bot("hi\n\nthere"), B]),
    ("two replies around an empty question", [A, HI, user(""), bot("there"), B], [A, bot("hi\n\nthere"), B]),
    # system and developer
    ("two systems", [system("s"), system("t"), A], [system("s\n\nt"), A]),
    ("an empty and a full system", [system(""), system("t"), A], [system("t"), A]),
    ("developer", [{"role": "developer", "content": "s"}, A], [system("s"), A]),
    ("system and developer", [system("s"), {"role": "developer", "content": "t"}, A], [system("s\n\nt"), A]),
    ("a system in the middle", [A, HI, system("s"), B], [system("s"), *PLAIN]),
    ("a later system", [system("s"), A, HI, system("t"), B], [system("s\n\nt"), *PLAIN]),
    ("a system at the end", [A, system("s")], [system("s"), A]),
    ("a system between questions", [A, system("s"), B], [system("s"), user("a\n\nb")]),
    # who begins
    ("a greeting first", [HI, A], [HI, A]),
    ("a system and a greeting first", [system("s"), HI, A, HI, B], [system("s"), HI, A, HI, B]),
    ("an empty question first", [user(""), HI, B], [HI, B]),
    # parts
    ("text parts", [user([text("a"), text("b")]), bot([text("h"), text("i")]), B], [user("ab"), HI, B]),
    ("system's text parts", [system([text("s")]), A], [system("s"), A]),
    ("parts with other keys", [user([text("a", cache_control={})]), bot([text("hi", annotations=[])]), B], PLAIN),
    (
        "input_text and output_text",
        [user([text("a", "input_text")]), bot([text("hi", "output_text", annotations=[])]), B],
        PLAIN,
    ),
    # the server's own tool
    ("a reply with steps, as it came", [A, bot("hi", parts=[*SUM, text("hi")]), B], [A, bot([*SUM, text("hi")]), B]),
    ("a reply with steps as its content", [A, bot([*SUM, text("hi")]), B], [A, bot([*SUM, text("hi")]), B]),
    ("a reply cut inside its call", [A, bot("", parts=[text("1+", "python")]), B], [A, bot([text("1+", "python")]), B]),
    (
        "an output that no call asked for",
        [A, bot("", parts=[text("2", "python_output")]), B],
        [A, bot([text("2", "python_output")]), B],
    ),
    (
        "an empty call and its empty output",
        [A, bot("", parts=[text("", "python"), text("", "python_output")]), B],
        [A, bot([text("", "python"), text("", "python_output")]), B],
    ),
    # tools of the client
    ("a call and its output", [A, call("1+1"), tool("2")], [A, bot(SUM)]),
    ("text before a call", [A, call("1+1", "hi"), tool("2")], [A, bot([text("hi"), *SUM])]),
    ("an output in parts", [A, call("1+1"), tool([text("2")])], [A, bot(SUM)]),
    ("an empty output", [A, call("1+1"), tool("")], [A, bot([text("1+1", "python"), text("", "python_output")])]),
    ("an empty call", [A, call(""), tool("2")], [A, bot([text("", "python"), text("2", "python_output")])]),
    ("a call, its output and the reply", [A, call("1+1"), tool("2"), HI, B], [A, bot([*SUM, text("hi")]), B]),
    (
        "two calls, one after the other",
        [A, call("1+1"), tool("2"), call("1+1"), tool("2"), HI, B],
        [A, bot([*SUM, *SUM, text("hi")]), B],
    ),
    ("an empty reply to an output", [A, call("1+1"), tool("2"), bot(""), B], [A, bot(SUM), B]),
    ("a system before an output", [A, call("1+1"), system("s"), tool("2")], [system("s"), A, bot(SUM)]),
    ("a call without an output", [A, call("1+1"), B], [A, bot([text("1+1", "python")]), B]),
    # keys that say nothing to the model
    (
        "keys of other clients",
        [
            user("a") | {"id": "m1", "opts": {"x": 1}, "name": "n"},
            bot(
                "hi",
                id="m2",
                reasoning_content="so",
                reasoning="so",
                annotations=[{}],
                audio={"id": 1},
                refusal=None,
                function_call=None,
                tool_calls=None,
                weight=0,
            ),
            user("b") | {"type": "message"},
        ],
        PLAIN,
    ),
]
HISTORIES = [(name, given) for name, given, _ in CASES]
STRICT = {name: strict for name, _, strict in CASES}

# (name, messages, code of the error)
REFUSED = [
    ("nobody asks", [system("s")], "no_user_text"),
    ("the question is empty", [user(" ")], "no_user_text"),
    ("everything is empty", [system(""), user(None), bot("")], "no_user_text"),
    ("a greeting alone", [HI], "no_user_text"),
    ("an output, but no question", [call("1+1"), tool("2")], "no_user_text"),
    ("the assistant is last", [A, HI], "assistant_last"),
    ("the assistant is last but for a blank", [A, HI, user("")], "assistant_last"),
    ("the assistant is last but for a system", [A, HI, system("s")], "assistant_last"),
    ("a call is last", [A, call("1+1")], "assistant_last"),
    ("an unknown role", [{"role": "usr", "content": "a"}], "invalid_value"),
    ("no role", [{"content": "a"}], "invalid_value"),
    ("an image", [user([text("a"), {"type": "image_url", "image_url": {"url": "data:,"}}])], "invalid_value"),
    ("an assistant's image", [A, bot([{"type": "image_url", "image_url": {"url": "data:,"}}]), B], "invalid_value"),
    ("a text part without text", [user([{"type": "text"}])], "invalid_value"),
    ("a user's call", [user([text("1+1", "python")])], "invalid_value"),
    ("a number", [user(7)], "invalid_value"),
    ("an output without a call", [A, tool("2")], "invalid_value"),
    ("an output after another question", [A, call("1+1"), B, tool("2")], "invalid_value"),
    ("two outputs of one call", [A, call("1+1"), tool("2"), tool("2")], "invalid_value"),
    ("a call with two arguments", [A, call('1", "b": "2'), tool("2")], "invalid_value"),
]
