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

GRAMMAR = read_toml(Path(__file__).with_name("identity_sentences.toml"))
# (in training, held out)
OPENINGS, QUESTION_OPENINGS, FRAMES, OTHERS, OTHER_FORMS = (
    (GRAMMAR[name]["train"], GRAMMAR[name]["held_out"])
    for name in ("openings", "question_openings", "frames", "others", "other_forms")
)
ENDINGS = GRAMMAR["endings"]


class Topic(NamedTuple):
    weight: int  # how often it comes
    # whole sentences; of these and the clauses the first two, the plainest, are always in training
    questions: tuple[str, ...]
    clauses: tuple[str, ...]  # what follows a frame
    answers: tuple[str, ...]
    proof: tuple[str, ...]  # fields of the TOML whose text a right answer contains

    @classmethod
    def of(cls, row: dict) -> "Topic":
        return cls(row["weight"], *(tuple(row[field]) for field in cls._fields[1:]))


TOPICS = {name: Topic.of(row) for name, row in GRAMMAR["topics"].items()}


class IdentityQuestions(Task):
    kind = "generate"
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
        said = f" {plain_words(text_of(content))} "
        for fact in map(plain_words, example.answer):
            rest = said
            for other in map(plain_words, self.facts.values()):
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
                if plain_words(other) != plain_words(name)
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


def plain_words(text: str) -> str:
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
