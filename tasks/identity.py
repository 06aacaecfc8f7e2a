"""Identity: who are you, who made you, what can you do. identity or identity=FILE.toml; tasks/identity.toml names the
fields.

Answers are templates filled from the TOML, so that everybody can give a model a name. A question is a small grammar,
since few fixed sentences generalise poorly: an opening, a core and an ending, the first and last mostly empty; a core
is a sentence of its topic, or a frame ("Can you tell me") around one of its clauses ("who you are"). Splits:

    train  ordinary
    test   every sentence, frame and clause is one that training never shows, and so are some openings
    name   the same of the questions for the name alone: no two texts are alike, every core comes three or four times

A model that says its name whatever it is asked is always right in name: read it beside test, where other topics are
half."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nanolab.cli import UserError, nearest, read_toml
from nanolab.data.chat import text_of
from tasks.common import Content, Draws, Example, Task, hold_out

DEFAULT = Path(__file__).with_name("identity.toml")
FIELDS = ("name", "maker", "version", "kind", "training", "language", "skills", "limits")
SIZES = {"train": 20_000, "test": 500}

# Pairs are (in training, held out). A frame carries the mark that ends its sentence as its last character.
OPENINGS = (
    [
        "Hello!",
        "Hi!",
        "Hi there.",
        "Hey!",
        "Hello there!",
        "Good morning!",
        "Good evening!",
        "Good day.",
        "Excuse me,",
        "Sorry,",
        "OK,",
        "Now,",
        "I am new here.",
        "We have not met yet.",
        "Nice to meet you!",
        "I do not know you yet.",
        "Thanks.",
        "Before we start:",
        "First of all,",
    ],
    ["Good afternoon!", "Greetings!", "Hey there!", "Pardon me,", "Let us begin.", "This is my first time here."],
)
QUESTION_OPENINGS = (
    ["One question:", "Quick question:", "I have a question.", "Just curious:"],
    ["Another question:", "Let me ask something."],
)
ENDINGS = {
    "question": [", by the way", ", my friend", " then"],
    "request": [" please", ", please", ", my friend"],
    "statement": [", by the way", ", my friend"],
}
FRAMES = (
    [
        "Tell me.",
        "Please tell me.",
        "Can you tell me?",
        "Could you tell me?",
        "Will you tell me?",
        "Can you say?",
        "I want to know.",
        "I would like to know.",
        "I wonder.",
        "Let me know.",
        "May I ask?",
        "May I know?",
        "I need to know.",
        "Remind me.",
        "Do you know?",
        "I forgot.",
        "Just tell me.",
        "Please say.",
        "Would you tell me?",
        "Can I ask?",
        "I do not know.",
        "Do you remember?",
        "I am wondering.",
        "I am not sure.",
    ],
    [
        "Would you mind telling me?",
        "I have no idea.",
        "It would be nice to know.",
        "Could I ask?",
        "Nobody told me.",
        "I'd love to know.",
    ],
)
OTHERS = (
    [
        "ChatGPT",
        "GPT-4",
        "Claude",
        "Siri",
        "Gemini",
        "Alexa",
        "Copilot",
        "Llama",
        "Grok",
        "Mistral",
        "Qwen",
        "DeepSeek",
        "Eliza",
        "Jarvis",
        "Watson",
        "Anna",
        "Tom",
        "Maria",
        "Peter",
        "Bob",
        "Alice",
        "Max",
        "Emma",
        "John",
    ],
    ["Bard", "Cortana", "Oscar"],
)
OTHER_FORMS = (
    [
        "Are you {other}?",
        "Is your name {other}?",
        "You are {other}, right?",
        "Am I talking to {other}?",
        "Is this {other}?",
        "Are you called {other}?",
        "Do people call you {other}?",
        "I think you are {other}.",
        "So you are {other}?",
        "Am I chatting with {other}?",
        "Is {other} your name?",
        "You must be {other}.",
        "Are you really {other}?",
        "Is that you, {other}?",
        "Your name is {other}, is it not?",
        "Are you not {other}?",
        "You seem to be {other}.",
        "You sound like {other}.",
        "You remind me of {other}.",
        "I guess that you are {other}.",
        "Surely you are {other}.",
        "You are {other}, I think.",
        "You are {other}, I guess.",
        "You are {other}, correct?",
        "Yes, you are {other}.",
        "Then you are {other}.",
        "I know that you are {other}.",
        "Somebody said that you are {other}.",
        "They told me that you are {other}.",
        "I heard that you are {other}.",
        "I was told that you are called {other}.",
        "Can I call you {other}?",
        "May I call you {other}?",
        "Could it be that you are {other}?",
        "Are you the same as {other}?",
        "I take you for {other}.",
        "I thought that you were {other}.",
        "For me you are {other}.",
    ],
    [
        "You are {other}, are you not?",
        "Is this {other} speaking?",
        "Do you go by the name {other}?",
        "You look like {other} to me.",
    ],
)


class Topic(NamedTuple):
    weight: int  # how often it comes
    # whole sentences; of these and the clauses the first two, the plainest, are always in training
    questions: tuple[str, ...]
    clauses: tuple[str, ...]  # what follows a frame
    answers: tuple[str, ...]
    proof: tuple[str, ...]  # fields of the TOML whose text a right answer contains


TOPICS = {
    "name": Topic(
        4,
        (
            "Who are you?",
            "What is your name?",
            "What's your name?",
            "What are you called?",
            "Tell me your name.",
            "What should I call you?",
            "What can I call you?",
            "What may I call you?",
            "What do I call you?",
            "How should I address you?",
            "What do people call you?",
            "What do others call you?",
            "What do your friends call you?",
            "Do you have a name?",
            "Have you got a name?",
            "May I ask your name?",
            "May I know your name?",
            "Can I know your name?",
            "Can you tell me your name?",
            "Could you tell me your name?",
            "Would you tell me your name?",
            "Will you tell me your name?",
            "Who is this?",
            "Who is there?",
            "Who is speaking?",
            "Who am I talking to?",
            "Who am I speaking with?",
            "Who am I chatting with?",
            "Who am I writing to?",
            "Who do I have here?",
            "Whom am I talking to?",
            "Introduce yourself.",
            "Please introduce yourself.",
            "Can you introduce yourself?",
            "Could you introduce yourself?",
            "Would you introduce yourself?",
            "Say your name.",
            "State your name.",
            "Give me your name.",
            "Name yourself.",
            "Identify yourself.",
            "Your name?",
            "Your name, please.",
            "Name?",
            "What name do you go by?",
            "Which name do you go by?",
            "What name do you have?",
            "Which name do you use?",
            "What name were you given?",
            "What name did they give you?",
            "By what name are you known?",
            "Which assistant are you?",
            "Which assistant is this?",
            "Which model are you?",
            "What model is this?",
            "Which chatbot am I using?",
            "What do you call yourself?",
            "And who are you?",
            "And what is your name?",
            "Who might you be?",
            "Who exactly are you?",
            "I need your name.",
            "I want to know your name.",
            "I would like to know your name.",
            "I do not know your name.",
            "I forgot your name.",
            "Write your name.",
            "Show me your name.",
            "What was your name again?",
            "Who are you again?",
            "Does this program have a name?",
            "What is the name of this program?",
            "What is the name of this assistant?",
            "What is this program called?",
            "What is this model called?",
            "Do you know your name?",
            "What is your full name?",
            "What is your first name?",
            "Let me know your name.",
            "Can you give me your name?",
            "Do you have a name of your own?",
        ),
        (
            "who you are",
            "what your name is",
            "what you are called",
            "what I should call you",
            "which name you go by",
            "who I am talking to",
            "what people call you",
            "who is speaking",
            "which assistant you are",
            "who I am chatting with",
            "what name you have",
            "what I can call you",
            "what the name of this program is",
            "whether you have a name",
        ),
        ("I am {name}, {kind}.", "I am {name}.", "My name is {name}.", "My name is {name}. I am {kind}."),
        ("name",),
    ),
    "other": Topic(2, (), (), ("No, I am {name}.", "No, I am {name}, {kind}.", "No, my name is {name}."), ("name",)),
    "maker": Topic(
        1,
        (
            "Who made you?",
            "Who created you?",
            "Who built you?",
            "Who is your maker?",
            "Who trained you?",
            "Who developed you?",
            "Who is your creator?",
            "Where do you come from?",
            "Which company made you?",
            "Tell me who your maker is.",
            "Who are your creators?",
            "By whom were you made?",
            "Were you made by somebody?",
            "Who wrote you?",
            "Can you name your maker?",
            "Who is behind you?",
            "Who programmed you?",
            "Who designed you?",
            "Did OpenAI make you?",
            "Were you made by Google?",
            "Do you come from a big company?",
            "Who are the people who made you?",
        ),
        (
            "who made you",
            "who created you",
            "who built you",
            "who trained you",
            "where you come from",
            "who is behind you",
            "who developed you",
            "which company made you",
            "who programmed you",
            "who your makers are",
        ),
        ("I was made by {maker}.", "{maker} made me.", "I am {name}. I was made by {maker}."),
        ("maker",),
    ),
    "version": Topic(
        1,
        (
            "Which version are you?",
            "Version?",
            "What version is this?",
            "What is your version?",
            "Tell me your version.",
            "Which version am I using?",
            "Do you have a version number?",
            "What is your version number?",
            "State your version.",
            "Are you the newest version?",
            "Which version of you is this?",
            "Give me your version number.",
            "What version number do you have?",
            "What version are you on?",
        ),
        (
            "which version you are",
            "what your version is",
            "which version this is",
            "which version I am using",
            "what version number you have",
        ),
        ("I am {name}, version {version}.", "I am version {version}.", "My version is {version}."),
        ("version",),
    ),
    "kind": Topic(
        1,
        (
            "What are you?",
            "Are you human?",
            "Are you a robot?",
            "Are you a person?",
            "Are you a real human being?",
            "What kind of thing are you?",
            "Is there a human behind this?",
            "Are you an AI?",
            "What sort of program are you?",
            "Are you alive?",
            "Am I talking to a machine?",
            "Are you a computer program?",
            "Do you have a body?",
            "Are you a language model?",
            "Are you a machine?",
            "Are you a man or a woman?",
            "Am I talking to a human?",
            "Are you real?",
            "Are you a chatbot?",
            "What exactly are you?",
            "Is this a computer?",
            "Are you artificial?",
        ),
        (
            "what you are",
            "whether you are human",
            "whether you are a robot",
            "what kind of thing you are",
            "whether you are a person",
            "whether I am talking to a machine",
            "whether you are real",
            "what sort of program you are",
        ),
        ("I am {kind}, not a person.", "I am {name}, {kind}.", "I am {kind}. My name is {name}."),
        ("kind",),
    ),
    "training": Topic(
        1,
        (
            "How were you made?",
            "How were you trained?",
            "What were you trained on?",
            "How did you learn to talk?",
            "How did you come to be?",
            "What is your training?",
            "How do you know things?",
            "Where did you learn this?",
            "Describe your training.",
            "How did you learn?",
            "How did they train you?",
            "How were you built?",
            "Tell me about your training.",
            "What did you learn from?",
            "Did you go to school?",
        ),
        (
            "how you were made",
            "how you were trained",
            "how you learned to talk",
            "what you were trained on",
            "where you learned this",
            "how you came to be",
            "how you were built",
        ),
        ("I was {training}.", "I am {kind}. I was {training}."),
        ("training",),
    ),
    "language": Topic(
        1,
        (
            "Which language do you speak?",
            "What languages do you know?",
            "Do you speak other languages?",
            "What language is best for you?",
            "In which language can I write to you?",
            "Which languages can you use?",
            "Can you speak several languages?",
            "What do you speak?",
            "Name the languages you know.",
            "Do you understand every language?",
            "Do you speak French?",
            "Can you speak German?",
            "Do you know Spanish?",
            "Can I write to you in Italian?",
            "Which language do you understand?",
            "What language are we speaking?",
        ),
        (
            "which language you speak",
            "which languages you know",
            "what languages you understand",
            "whether you speak other languages",
            "in which language I can write to you",
            "which language is best for you",
            "whether you speak French",
        ),
        ("I speak {language}.", "The language that I know is {language}."),
        ("language",),
    ),
    "skills": Topic(
        1,
        (
            "What can you do?",
            "How can you help me?",
            "What are you good at?",
            "What can I ask you?",
            "What are your skills?",
            "What do you do?",
            "Why should I talk to you?",
            "What is your purpose?",
            "What are you for?",
            "Can you help me?",
            "What can you help with?",
            "List your abilities.",
            "What are you able to do?",
            "How may I use you?",
            "What can you do for me?",
            "What do you know?",
            "What are you made for?",
            "Name your skills.",
            "What is your job?",
            "What are your strengths?",
            "How can I use you?",
            "Show me your skills.",
        ),
        (
            "what you can do",
            "how you can help me",
            "what you are good at",
            "what I can ask you",
            "what you are for",
            "what your skills are",
            "what you can do for me",
            "what your job is",
        ),
        ("I can {skills}.", "I am {name}. I can {skills}."),
        ("skills",),
    ),
    "limits": Topic(
        1,
        (
            "What can you not do?",
            "Do you make mistakes?",
            "Are you always right?",
            "Can I trust you?",
            "What are your limits?",
            "Do you know everything?",
            "How smart are you?",
            "What are your weaknesses?",
            "Are you ever wrong?",
            "Tell me your limits.",
            "Are you clever?",
            "Is everything you say true?",
            "Can you be wrong?",
            "Do you always tell the truth?",
            "How much do you know?",
            "What are you bad at?",
            "How reliable are you?",
        ),
        (
            "what you cannot do",
            "what your limits are",
            "whether you make mistakes",
            "whether I can trust you",
            "what your weaknesses are",
            "whether you know everything",
            "how smart you are",
            "whether you can be wrong",
        ),
        ("{limits}.", "I try, but {limits}."),
        ("limits",),
    ),
}


class Identity(Task):
    kind = "generative"
    measures = "the fact is in the reply"
    version = 3
    splits = ("train", "test", "name")
    argument_is = "FILE.toml?"

    def open(self) -> Sequence[Example]:
        self.facts = read_facts(Path(self.argument).expanduser() if self.argument else DEFAULT)
        groups = {topic: cores(topic, self.split != "train", self.facts["name"]) for topic in TOPICS}
        if self.split == "name":
            asked = [
                (topic, text)
                for topic in ("name", "other")
                for group in groups[topic]
                for core in group
                for text in variants(core)
            ]
            return self.shuffled(len(asked), lambda i: self.conversation(self.draws(i), *asked[i]))
        often = [topic for topic in TOPICS for _ in range(TOPICS[topic].weight)]

        def make(i: int) -> Example:
            draws = self.draws(i)
            topic = draws.pick(often)
            core = draws.pick(draws.pick(groups[topic]))
            opening = draws.pick(openings(core, self.split == "test" and draws.below(2) == 0)) if draws.below(2) else ""
            ending = draws.pick(endings(core)) if draws.below(4) == 0 else ""
            return self.conversation(draws, topic, sentence(opening, core, ending))

        return self.generated(SIZES[self.split], make)

    def conversation(self, draws: Draws, topic: str, text: str) -> Example:
        """One in five texts is in lower case, one in five has no mark at its end."""
        text = text.lower() if draws.below(5) == 0 else text
        text = text[:-1] if draws.below(5) == 0 else text
        answer = draws.pick(TOPICS[topic].answers).format(**self.facts)
        proof = tuple(self.facts[field] for field in TOPICS[topic].proof)
        return Example(
            [{"role": "user", "content": text}, {"role": "assistant", "content": answer[0].upper() + answer[1:]}], proof
        )

    def correct(self, example: Example, content: Content) -> bool:
        """Whether the reply contains what its topic is about (for a name, the name), whatever the case.

        A fact inside another one does not count: "the nanolab project made me" does not say that the name is nanolab.
        """
        said = f" {plain(text_of(content))} "
        for fact in map(plain, example.answer):
            rest = said
            for other in map(plain, self.facts.values()):
                rest = rest.replace(f" {other} ", "  ") if f" {fact} " in f" {other} " and other != fact else rest
            if f" {fact} " not in rest:
                return False
        return True


def cores(topic: str, held_out: bool, name: str) -> list[list[str]]:
    """The questions of a topic, without openings and endings: whole sentences, and frames around clauses. `name`:
    nobody else's.
    """
    if topic == "other":
        return [
            [
                form.format(other=other)
                for form in OTHER_FORMS[held_out]
                for other in OTHERS[held_out]
                if plain(other) != plain(name)
            ]
        ]
    clauses = unseen_or_not(TOPICS[topic].clauses, held_out)
    return [
        unseen_or_not(TOPICS[topic].questions, held_out),
        [f"{frame[:-1]} {clause}{frame[-1]}" for frame in FRAMES[held_out] for clause in clauses],
    ]


def unseen_or_not(items: Sequence[str], held_out: bool) -> list[str]:
    """About a quarter of the items, by hash, are held out; the first two never."""
    kept, held = hold_out(items[2:], len(items) // 4)
    return held if held_out else [*items[:2], *kept]


def openings(core: str, held_out: bool) -> list[str]:
    return OPENINGS[held_out] + (QUESTION_OPENINGS[held_out] if core.endswith("?") else [])


def endings(core: str) -> list[str]:
    """What may stand before the last mark; nothing where a comma or "please" is there already."""
    if re.search(",|please", core, re.IGNORECASE):
        return [""]
    return ENDINGS[
        "question" if core.endswith("?") else "statement" if re.match(r"(I|I'd|You|It|Nobody)\b", core) else "request"
    ]


def sentence(opening: str, core: str, ending: str) -> str:
    """After a comma or colon the core goes on in lower case."""
    core = f"{core[:-1]}{ending}{core[-1]}"
    core = core[0].lower() + core[1:] if opening.endswith((",", ":")) and not re.match(r"I\b", core) else core
    return f"{opening} {core}".lstrip()


def variants(core: str) -> list[str]:
    """Texts of the split name: the core alone, after an opening of training, after an unseen one, and with an ending
    where one fits.
    """
    draws = Draws("variants", core)
    beside = [(draws.pick(openings(core, held)), "") for held in (False, True)]
    ending = draws.pick(endings(core))
    return [
        sentence(opening, core, ending) for opening, ending in [("", ""), *beside, *([("", ending)] if ending else [])]
    ]


def plain(text: str) -> str:
    """Letters and digits in lower case, everything else as single blanks."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_facts(path: Path) -> dict[str, str]:
    """The fields of a TOML file. Raises UserError for a file or field that is missing, unknown or not text."""
    if not path.is_file():
        raise UserError(
            f"{path} is not a file; expected a TOML with the fields {', '.join(FIELDS)}; copy tasks/identity.toml and"
            " change it"
        )
    facts = read_toml(path)
    for field in [*facts, *FIELDS]:
        if field not in FIELDS:
            raise UserError(
                f"{path} has the field {field!r}; expected {', '.join(FIELDS)}{nearest(field, list(FIELDS))}"
            )
        if not isinstance(facts.get(field), str) or not facts[field].strip():
            seen = f"{field} is {facts[field]!r}" if field in facts else f"no field {field}"
            raise UserError(f'{path}: {seen}; expected text; write {field} = "..."')
    return facts
