"""Identity: who are you, who made you, what can you do. identity or identity=FILE.toml; tasks/identity.toml names the fields.

Questions and answers are templates filled from the TOML, so that everybody can give a model a name. In the split test are
questions whose sentence is never in training (about one template in five, by hash).
"""

import re
from pathlib import Path
from typing import NamedTuple, Sequence

from nanolab.config import UserError, nearest, read_toml
from nanolab.data.chat import text_of
from tasks.common import Content, Example, Task, hold_out

DEFAULT = Path(__file__).with_name("identity.toml")
FIELDS = ("name", "maker", "version", "kind", "training", "language", "skills", "limits")
SIZES = {"train": 10_000, "test": 500}


class Topic(NamedTuple):
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    proof: tuple[str, ...]  # fields of the TOML whose text a right answer contains


TOPICS = {
    "name": Topic(
        (
            "Who are you?", "What is your name?", "What are you called?", "Tell me your name.", "What should I call you?", "Do you have a name?",
            "May I ask your name?", "Hello, who is this?", "Hi! Who am I talking to?", "Who am I chatting with?", "Introduce yourself.",
            "Please introduce yourself.", "Can you tell me who you are?", "Could you say your name?", "Hey, what's your name?", "Say your name.",
            "I do not know you yet. Who are you?", "What name do you go by?", "Please tell me what you are called.", "Which assistant are you?",
            "Good morning! And you are?", "State your name.", "How do people call you?", "Your name, please.", "Are you a person with a name?",
        ),
        ("I am {name}, {kind}.", "My name is {name}.", "I am {name}.", "You can call me {name}. I am {kind}."),
        ("name",),
    ),
    "other": Topic(
        (
            "Are you ChatGPT?", "Are you GPT-4?", "Is your name Claude?", "Are you Siri?", "Are you Gemini?", "You are ChatGPT, right?",
            "Am I talking to ChatGPT?", "Are you Alexa?", "Is this Copilot?", "Are you Llama?",
        ),
        ("No, I am {name}.", "No, my name is {name}. I am {kind}."),
        ("name",),
    ),
    "maker": Topic(
        (
            "Who made you?", "Who created you?", "Who built you?", "Who is your maker?", "Who trained you?", "Who developed you?",
            "Where do you come from?", "Which company made you?", "Tell me who made you.", "Who are your creators?", "By whom were you made?",
            "Were you made by somebody?", "Who wrote you?", "Can you tell me who built you?", "Who is behind you?",
        ),
        ("I was made by {maker}.", "{maker} made me.", "My maker is {maker}. I am called {name}."),
        ("maker",),
    ),
    "version": Topic(
        (
            "Which version are you?", "What version is this?", "What is your version?", "Tell me your version.", "Which version am I using?",
            "Do you have a version number?", "What is your version number?", "Say which version you are.", "Version?", "How new are you?",
        ),
        ("I am {name}, version {version}.", "This is {name} version {version}.", "My version is {version}."),
        ("version",),
    ),
    "kind": Topic(
        (
            "What are you?", "Are you human?", "Are you a robot?", "Are you a person?", "Are you a real human being?", "What kind of thing are you?",
            "Is there a human behind this?", "Are you an AI?", "What sort of program are you?", "Are you alive?", "Am I talking to a machine?",
            "Are you a computer program?", "Tell me what you are.", "Do you have a body?", "Are you a language model?",
        ),
        ("I am {kind}, not a person. My name is {name}.", "I am {name}, {kind}."),
        ("kind",),
    ),
    "training": Topic(
        (
            "How were you made?", "How were you trained?", "What were you trained on?", "How did you learn to talk?", "How did you come to be?",
            "Tell me how you were made.", "What is your training?", "How do you know things?", "Where did you learn this?", "Describe your training.",
        ),
        ("I was {training}.", "I am {kind}. I was {training}."),
        ("training",),
    ),
    "language": Topic(
        (
            "Which language do you speak?", "What languages do you know?", "Do you speak other languages?", "What language is best for you?",
            "In which language can I write to you?", "Which languages can you use?", "Can you speak several languages?", "What do you speak?",
            "Tell me the language you know.", "Do you understand every language?",
        ),
        ("I speak {language}.", "The language that I know is {language}."),
        ("language",),
    ),
    "skills": Topic(
        (
            "What can you do?", "How can you help me?", "What are you good at?", "What can I ask you?", "What are your skills?", "Tell me what you can do.",
            "What do you do?", "Why should I talk to you?", "What is your purpose?", "What are you for?", "Can you help me?", "What can you help with?",
            "List your abilities.", "What are you able to do?", "How may I use you?",
        ),
        ("I can {skills}.", "I am {name}. I can {skills}."),
        ("skills",),
    ),
    "limits": Topic(
        (
            "What can you not do?", "Do you make mistakes?", "Are you always right?", "Can I trust you?", "What are your limits?", "Do you know everything?",
            "How smart are you?", "What are your weaknesses?", "Are you ever wrong?", "Tell me your limits.",
        ),
        ("{limits}.", "I try, but {limits}."),
        ("limits",),
    ),
}  # fmt: skip


class Identity(Task):
    kind = "generative"
    argument_is = "FILE.toml?"

    def open(self) -> Sequence[Example]:
        facts = read_facts(Path(self.argument).expanduser() if self.argument else DEFAULT)
        pairs = [(topic, question) for topic in TOPICS for question in phrasings(topic, self.split)]

        def make(i: int) -> Example:
            draws = self.draws(i)
            topic, question = draws.pick(pairs)
            question = question.lower() if draws.below(5) == 0 else question
            question = question[:-1] if draws.below(5) == 0 else question
            answer = draws.pick(TOPICS[topic].answers).format(**facts)
            proof = tuple(facts[field] for field in TOPICS[topic].proof)
            return Example([{"role": "user", "content": question}, {"role": "assistant", "content": answer[0].upper() + answer[1:]}], proof)

        return self.generated(SIZES[self.split], make)

    def correct(self, example: Example, content: Content) -> bool:
        """Whether the reply contains what its topic is about (for a name, the name), whatever the case."""
        said = f" {plain(text_of(content))} "
        return all(f" {plain(fact)} " in said for fact in example.answer)


def phrasings(topic: str, split: str) -> list[str]:
    """The questions of one split. The first two of a topic, the plainest, are always in training."""
    plainest, others = TOPICS[topic].questions[:2], TOPICS[topic].questions[2:]
    kept, held = hold_out(others, len(others) // 4)
    return held if split == "test" else [*plainest, *kept]


def plain(text: str) -> str:
    """Letters and digits in lower case, everything else as single blanks."""
    return " ".join(re.findall(r"\w+", text.lower()))


def read_facts(path: Path) -> dict[str, str]:
    """The fields of a TOML file. Raises UserError for a file or field that is missing, unknown or not text."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; expected a TOML with the fields {', '.join(FIELDS)}; copy tasks/identity.toml and change it")
    facts = read_toml(path)
    for field in [*facts, *FIELDS]:
        if field not in FIELDS:
            raise UserError(f"{path} has the field {field!r}; expected {', '.join(FIELDS)}{nearest(field, list(FIELDS))}")
        if not isinstance(facts.get(field), str) or not facts[field].strip():
            seen = f"{field} is {facts[field]!r}" if field in facts else f"no field {field}"
            raise UserError(f"{path}: {seen}; expected text; write {field} = \"...\"")
    return facts
