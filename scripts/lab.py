"""From a question to a verdict: python -m scripts.lab run|check|verdict|page STUDY.toml, try FLAGS --against FLAGS, or
threshold RUNS --above X.

run makes the runs that are not there and says the verdict; it may be interrupted and typed again. page writes
index.html beside the study's results, which run and verdict do too. check says whether
the study's seeds can see what matters, and what that would take. threshold compares the mean of finished runs, or of
numbers, with a bar. The last line of stdout is one JSON document. Exit code of verdict: 0 an arm is better; else 4 one
is unresolved; else 3 one is equivalent or identical; 1 all are worse. Of run and try: 0, or 1 where runs are missing.
Of check and threshold: 0, or 4 where the seeds do not suffice. Always 2: what was typed is wrong.
"""

import sys

from nanolab.cli import main, parse
from nanolab.lab.config import LabConfig, TryConfig

OF_TRY = tuple(f"--{name}" for name in TryConfig.__annotations__)


def run(argv: list[str]) -> int:
    from nanolab.lab.commands import lab, lab_try

    words = spelled_out(argv)
    if words[:1] != ["--what=try"]:
        return lab(parse(LabConfig, words))
    own = tuple(f"{name}=" for name in OF_TRY)
    return lab_try(parse(TryConfig, words[1:]), [word for word in words[1:] if not word.startswith(own)])


def spelled_out(argv: list[str]) -> list[str]:
    """The first words say what to do and with what. A flag of try and its value become one word."""
    places = ["--what", "--idea" if argv[:1] == ["try"] else "--study"]
    words = [f"{name}={argv.pop(0)}" for name in places if argv and (not argv[0].startswith("-") or " " in argv[0])]
    left = iter(argv)
    for word in left:
        words.append(f"{word}={next(left, '')}" if words[:1] == ["--what=try"] and word in OF_TRY else word)
    return words


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]), usage=2)
