"""Config = command line = JSON: plain dataclasses, one per command, parsed by tyro. Imports no torch.

A field's trailing comment is its help text. Flag names follow the reference harness (karpathy/nanochat) where it has
one. A cadence or count of -1 means "off" or "automatic", as the comment says.
"""

import dataclasses
import difflib
import json
import math
import os
import select
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, TypeVar

from nanolab.terminal import harmless

T = TypeVar("T")


class UserError(ValueError):
    """A mistake that a person can fix; the text says what was seen, what was expected and what to type.

    `code` names the kind of mistake in kebab-case ("flag-not-read") and `values` what it is about. Programs and tests
    match these; the text may be reworded at any time. A script prints `error [CODE]: TEXT`."""

    def __init__(self, text: str, code: str = "", **values: Any) -> None:
        super().__init__(text)
        self.code, self.values = code, values


def as_json(value: Any, where: str, indent: int | None = None) -> str:
    """A result as JSON, which has no NaN: numbers that are not finite become null, and a line says how many did. where:
    the result goes to.
    """
    lost = 0

    def finite(x: Any) -> Any:
        nonlocal lost
        if isinstance(x, float) and x - x != 0:
            lost += 1
            return None
        if isinstance(x, dict):
            return {key: finite(one) for key, one in x.items()}
        return [finite(one) for one in x] if isinstance(x, (list, tuple)) else x

    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        text = json.dumps(finite(value), indent=indent, allow_nan=False)
    print(
        f"note: {lost} number{'s' if lost > 1 else ''} of {where} {'are' if lost > 1 else 'is'} not finite and null"
        " there",
        file=sys.stderr,
    )
    return text


class Bounds(NamedTuple):
    """The values that a number may have. Infinity and "not a number" are never among them."""

    low: float
    high: float = math.inf
    low_too: bool = True
    high_too: bool = True
    also: tuple[float, ...] = ()  # values with a meaning of their own, which the flag's help says

    def holds(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        above = value >= self.low if self.low_too else value > self.low
        below = value <= self.high if self.high_too else value < self.high
        return above and below or value in self.also

    def __str__(self) -> str:
        text = f"{'at least' if self.low_too else 'above'} {self.low:g}"
        if self.high < math.inf:
            text += f" and {'at most' if self.high_too else 'below'} {self.high:.20g}"
        return text + "".join(f", or {value:g}" for value in self.also)


def at_least(low: float, *also: float) -> Bounds:
    return Bounds(low, also=also)


def above(low: float, *also: float) -> Bounds:
    return Bounds(low, low_too=False, also=also)


class OneOf(NamedTuple):
    """The values that a text may have."""

    values: tuple[str, ...]
    count: bool = False  # or a whole number from 1 on
    many: bool = False  # any number of them, joined by commas

    def holds(self, value: str) -> bool:
        if self.many:
            return {part.strip() for part in value.split(",")} <= {"", *self.values}
        return value in self.values or self.count and value.isdecimal() and int(value) >= 1

    def __str__(self) -> str:
        return (
            f"{'any' if self.many else 'one'} of {', '.join(self.values)}"
            if not self.count
            else f"a whole number from 1 on, or {' or '.join(self.values)}"
        )


# types of flags: a field's bounds are part of its type
Count, CountOrAuto = Annotated[int, at_least(1)], Annotated[int, at_least(1, -1)]
NonNegativeInt, NonNegativeFloat = Annotated[int, at_least(0)], Annotated[float, at_least(0)]
PositiveFloat, PositiveOrAuto = Annotated[float, above(0)], Annotated[float, above(0, -1)]
NonNegativeOrAuto = Annotated[float, at_least(0, -1)]
Share, ShareBelow1 = Annotated[float, Bounds(0, 1)], Annotated[float, Bounds(0, 1, high_too=False)]
Seed = Annotated[int, Bounds(0, 2**63, high_too=False)]


class Condition(NamedTuple):
    """Flags that are read only under some choice."""

    flags: str  # names, with blanks between them; a name in capitals is a config: all its flags
    by: str  # the flag that decides
    read: Callable[[Any], bool]  # of the config
    needs: str  # what to type for them to be read


# flags that an error shows with their value
CHOICES = ("positions", "attention", "softmax", "window_pattern", "recipe", "modes", "what")
HORIZONS = ("num_iterations", "target_flops", "target_param_data_ratio", "max_seconds")
# Fields that have another name now: former name -> name. Former flags, configs and checkpoints are read by this table.
RENAMED = {"normaliser": "softmax"}


def from_preset(cls: type[T], name: str, **changes: Any) -> T:
    """`cls` with the defaults of the preset `name`, of which it takes the fields that it has, and `changes` over them.

    A change of the horizon replaces the preset's own, whatever its kind. Raises UserError for an unknown name.
    """
    from nanolab.presets import PRESETS

    if name not in PRESETS:
        raise UserError(
            f"preset {name!r} is unknown; expected one of"
            f" {', '.join(PRESETS)}{nearest(name, list(PRESETS), prefix='--preset ')}"
        )
    names = {f.name for f in dataclasses.fields(cls)}
    replaced = HORIZONS if set(HORIZONS) & set(changes) else ()
    row = {k: v for k, v in PRESETS[name].items() if k in names and k not in replaced}
    return cls(**row | {"preset": name} | changes)


def parse(cls: type[T], argv: list[str] | None = None) -> T:
    """Read `argv` (default: the command line) into `cls`. Unknown flags and presets exit with code 2 and the nearest
    name.

    Raises UserError for a number that is out of its bounds, and for a flag that was typed and is not read. `given`
    tells which were typed."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    if any(f.name == "prompt" for f in dataclasses.fields(cls)):
        argv = _joined_prompt(argv)
    preset, horizons, typed_names = None, {}, set()
    for i, arg in [(i, arg) for i, arg in enumerate(argv) if arg.startswith("--")]:
        typed, equals, value = arg.partition("=")
        name = current_name(cls, typed[2:].replace("-", "_"))
        argv[i] = f"--{name.replace('_', '-')}{equals}{value}"
        if bad := unknown_flag(cls, name):
            print(f"{typed} is not a flag of this command{bad}; --help lists them", file=sys.stderr)
            raise SystemExit(2)
        if name == "preset":
            preset = value or "".join(argv[i + 1 : i + 2])
        if name in HORIZONS:
            horizons[name] = getattr(cls, name)
        typed_names.add(name if name in cls.__dataclass_fields__ else name.removeprefix("no_"))
    try:
        defaults = cls() if preset is None else from_preset(cls, preset, **horizons)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    typed_as = f"python -m {spec.name}" if spec else None
    if {"-h", "--help"} & set(argv):
        from nanolab.help import print_help

        print_help(cls, defaults, typed_as)
    cfg = tyro.cli(cls, prog=typed_as, args=argv, default=defaults)
    check_bounds(cls, vars(cfg))
    check_read(typed_names, not_read(cls, vars(cfg)), vars(cfg))
    object.__setattr__(cfg, "_given", frozenset(typed_names))
    return cfg


def current_name(cls: type, name: str) -> str:
    """The name that a field of `cls` has now. A former name that `cls` gives to another field is that field's."""
    now = RENAMED.get(name, name)
    return now if name not in cls.__dataclass_fields__ and now in cls.__dataclass_fields__ else name


def current_names(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """A record of `cls`, which an older version may have written, under the names that its fields have now."""
    return {current_name(cls, name): value for name, value in values.items()}


def _joined_prompt(argv: list[str]) -> list[str]:
    """`argv` with "-p TEXT", "-p=TEXT" and "--prompt TEXT" as "--prompt=TEXT": a prompt is a prompt even if it begins
    like a flag.
    """
    found, left = [], iter(argv)
    for arg in left:
        if arg in ("-p", "--prompt") and (text := next(left, None)) is not None:
            arg = f"--prompt={text}"
        found.append("--prompt" + arg[2:] if arg == "-p" or arg.startswith("-p=") else arg)
    return found


def given(cfg: Any) -> frozenset[str]:
    """The flags that were typed; none of a config that `parse` did not make."""
    return getattr(cfg, "_given", frozenset())


def bounds_of(field: dataclasses.Field) -> Bounds | OneOf | None:
    """What its type says of a field's values."""
    return next((part for part in getattr(field.type, "__metadata__", ()) if isinstance(part, (Bounds, OneOf))), None)


def check_bounds(cls: type, values: Mapping[str, Any], where: str = "") -> None:
    """Raise UserError for the first of `values` (of fields of `cls`) that is out of its bounds. where: stands before
    the message.
    """
    for f in dataclasses.fields(cls):
        bounds, value = bounds_of(f), values.get(f.name)
        if bounds and value is not None and not bounds.holds(value):
            flag = f.name.replace("_", "-")
            automatic = f.default in ("", *getattr(bounds, "also", ()))
            shown, advice = (f"{v:g}" if isinstance(v, float) else str(v) for v in (value, f.default))
            advice = f"leave --{flag} out" if automatic else f"try --{flag} {advice}"
            raise UserError(
                f"{where}--{flag} is {shown or 'empty'}; expected {bounds}; {advice}",
                "flag-out-of-bounds",
                flag=f.name,
                value=value,
                bounds=str(bounds),
            )


def not_read(cls: type, values: Mapping[str, Any], conditions: Collection[Condition] = ()) -> dict[str, Condition]:
    """The fields of `cls` that nothing reads where flags have these `values`, each with the condition that fails.
    Default: all conditions of `cls`.
    """
    view, names = SimpleNamespace(**values), {f.name for f in dataclasses.fields(cls)}
    rows = conditions or [row for k in cls.__mro__ for row in vars(k).get("CONDITIONS", ())]
    found, bases = {}, {k.__name__: k for k in cls.__mro__}
    for row in (row for row in rows if not row.read(view)):
        for word in row.flags.split():
            of_word = [f.name for f in dataclasses.fields(bases[word])] if word[0].isupper() else [word]
            found |= {name: row for name in of_word if name in names and name not in found}
    return found


def check_read(typed: Collection[str], missed: Mapping[str, Condition], values: Mapping[str, Any]) -> None:
    """Raise UserError, with both names, for the first typed flag that is among those missed. values: of the flags that
    decide.
    """
    for name in sorted(set(typed) & set(missed)):
        row, flag = missed[name], name.replace("_", "-")
        decides, choice = f"--{row.by.replace('_', '-')}", values[row.by]
        shown = (
            f" {choice}"
            if row.by in CHOICES or isinstance(choice, (int, float)) and not isinstance(choice, bool)
            else ""
        )
        by = f"with {decides}{shown}" if choice else f"without {decides}"
        raise UserError(
            f"--{flag} was given, but is not read {by}; expected {row.needs}; leave --{flag} out, or change {decides}",
            "flag-not-read",
            flag=name,
            by=choice if row.by in CHOICES else row.by,
        )


def check_given(cfg: Any, conditions: list[Condition], **known: Any) -> None:
    """`check_read` of the flags that were typed for `cfg`, by conditions on what is `known` only later (RATES, ...)."""
    values = vars(cfg) | known
    check_read(given(cfg), not_read(type(cfg), values, conditions), values)


def unknown_flag(cls: type, name: str) -> str | None:
    """None if `name` is a field of `cls` (or its --no- form); otherwise a hint that ends in the nearest name."""
    names = [f.name for f in dataclasses.fields(cls)]
    if name in names or name in ("help",) or (name.startswith("no_") and name[3:] in names):
        return None
    return nearest(name.replace("_", "-"), [n.replace("_", "-") for n in names], prefix="--")


def nearest(name: str, names: list[str], prefix: str = "") -> str:
    """'; did you mean X?' for the closest of `names`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def to_json(config: Any) -> dict[str, Any]:
    """The dataclass as a JSON-ready dict."""
    return dataclasses.asdict(config)


def from_json(cls: type[T], values: dict[str, Any]) -> T:
    """Rebuild `cls` from the dict of `to_json`, of this version or an older one. Raises UserError for a field that
    `cls` does not have, and for infinity or "not a number".
    """
    names = [f.name for f in dataclasses.fields(cls)]
    values = current_names(cls, values)
    for key, value in values.items():
        if key not in names:
            raise UserError(
                f"{cls.__name__} has no field {key!r}{nearest(key, names)}; the file is from another version of nanolab"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{key} is {value:g}; expected a finite number; correct it in the file",
                "flag-out-of-bounds",
                flag=key,
                value=value,
                bounds="finite",
            )
    return cls(**values)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UserError for a file that is missing or is not TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors; brackets nested too deep
        raise UserError(
            f'{path} cannot be read as TOML ({error}); expected lines like name = "nanolab"; fix it or name another'
        ) from None


def main(command: Callable[[], Any], usage: int = 1) -> None:
    """Run a script's body: a UserError becomes one message on stderr and exit code `usage`; Ctrl-C becomes 130, a
    reader that has gone (`| head`) 141.

    What stdout's encoding lacks is printed as "?". Stderr needs nothing: Python writes escapes there.
    """
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # not where a test or a notebook put a stream of its own
            stream.reconfigure(errors="replace")
    try:
        try:
            code = command()
        except UserError as error:
            # it may quote what others wrote
            print(f"error{f' [{error.code}]' if error.code else ''}: {harmless(str(error))}", file=sys.stderr)
            code = usage
        except KeyboardInterrupt:
            code = 130
        except SystemExit as leaving:  # after --help, or a signal; rich ends with 1 where the reader has gone
            code = 141 if isinstance(leaving.__context__, BrokenPipeError) else leaving.code
        if sys.stdout is not None:
            sys.stdout.flush()  # not at exit, where an error cannot be caught
    except BrokenPipeError:
        if not (gone := [stream for stream in (sys.stdout, sys.stderr) if unread(stream)]):
            raise  # another pipe: a bug
        for stream in gone:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is still in its buffer
        code = 141  # 128 + SIGPIPE
    raise SystemExit(code if isinstance(code, (int, str)) else 0)


def unread(stream: Any) -> bool:
    """Whether `stream` is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except (AttributeError, OSError):  # no stream, or one without a file
        return False
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
