"""The text of --help: flags in groups, the commonest first, each with its comment. Imports no torch.

A command's GROUPS says where its flags stand: title -> names with blanks between them. The group without a title comes
first and has what is typed most often. A name in capitals is a config: the flags that it declares itself, without those
that stand by name somewhere."""

import inspect
import re
from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any


def texts_of(cls: type) -> dict[str, str]:
    """Field -> the comment at the end of its line, or right above it, where the field was declared with one last."""
    found: dict[str, str] = {}
    for base in cls.__mro__[-2::-1]:
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            match = re.match(r"    (\w+): [^#]*(?:# (.*))?", line)
            if match and (text := match[2] or " ".join(above)):
                found[match[1]] = text
            above = [*above, line.strip("# ")] if line.startswith("    # ") else []
    return found


def groups_of(cls: type) -> dict[str, list[str]]:
    """Title -> fields. A config without GROUPS has one group."""
    names, bases = [f.name for f in fields(cls)], {base.__name__: base for base in cls.__mro__}
    rows = {title: words.split() for title, words in vars(cls).get("GROUPS", {"": " ".join(names)}).items()}
    placed, found = {word for words in rows.values() for word in words}, {}
    for title, words in rows.items():
        found[title] = [name for name in words if name in names]
        for base in [bases[word] for word in words if word[0].isupper()]:
            found[title] += [name for name in base.__annotations__ if name in names and name not in placed]
            placed |= set(found[title])
    return found


def print_help(cls: type, defaults: Any, typed_as: str | None) -> None:
    """Print the help of a command and leave with code 0.

    defaults: a config of `cls`. typed_as: how the command is typed; None: as sys.argv says.
    """
    import tyro

    said = texts_of(cls)

    def flag(name: str) -> tuple[str, Any, Any]:
        value = getattr(defaults, name)
        shown = ("off", "on")[value] if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else value
        hint = "" if value == "" else f"(default: {shown})"
        arg = tyro.conf.arg(help=said.get(name, ""), help_behavior_hint=hint)
        return name, Annotated[cls.__dataclass_fields__[name].type, arg], field(default=value)

    def group(title: str, names: list[str]) -> tuple[str, Any, Any]:
        box = make_dataclass(f"{title.title()}Flags", map(flag, names))
        return (
            f"{title}_flags",
            Annotated[box, tyro.conf.arg(name=title, prefix_name=False)],
            field(default_factory=box),
        )

    first, *rest = groups_of(cls).items()
    whole = make_dataclass(cls.__name__, [*map(flag, first[1]), *(group(*row) for row in rest)])
    whole.__doc__ = cls.__doc__
    tyro.cli(whole, args=["--help"], prog=typed_as, config=(tyro.conf.OmitArgPrefixes,))
