"""--help: every flag has a text and stands in one group, the commonest of a training command first."""

import dataclasses
import re

import pytest
from helpers import configs

from nanolab.cli import parse
from nanolab.help import groups_of, texts_of
from nanolab.stages.config import BaseTrainConfig, RLConfig, SFTConfig


@pytest.mark.parametrize("cls", configs().values(), ids=lambda c: c.__name__)
def test_every_flag_has_a_text_and_one_place(cls):
    names, said = [f.name for f in dataclasses.fields(cls)], texts_of(cls)
    assert [name for name in names if not said.get(name)] == []
    assert sorted(name for group in groups_of(cls).values() for name in group) == sorted(names)


def helped(cls, capsys, *argv) -> str:
    with pytest.raises(SystemExit) as leaving:
        parse(cls, [*argv, "--help"])
    assert leaving.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("cls", [BaseTrainConfig, SFTConfig, RLConfig])
def test_the_commonest_flags_of_training_come_first(cls, capsys, monkeypatch):
    first = groups_of(cls)[""]
    assert len(first) == 10 and {"run", "num_iterations", "resume", "dry_run"} <= set(first)
    monkeypatch.setenv("COLUMNS", "80")
    out = helped(cls, capsys)
    shown = [name.replace("-", "_") for name in re.findall(r"^[│ ] --([a-z][\w-]*)", out, re.M)]
    assert shown[:10] == first
    assert sorted(shown) == sorted(f.name for f in dataclasses.fields(cls))
    titles = re.findall(r"^\W+(?:(\w+) )?options\W*$", out, re.M)
    assert titles == list(groups_of(cls)) and {"data", "training", "evaluation", "run"} <= set(titles)
    assert max(map(len, out.splitlines())) <= 80


def test_help_shows_the_defaults_of_the_preset(capsys):
    assert "(default: learned)" in re.sub(r"[│\s]+", " ", helped(BaseTrainConfig, capsys, "--preset", "gpt2"))
