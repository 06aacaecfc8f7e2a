"""From a question to a verdict: python -m scripts.lab run|check|sweep|verdict|page STUDY.toml, try FLAGS --against
FLAGS, compare REVISION REVISION, or threshold RUNS --above X.

run makes the runs that are not there and says the verdict; it may be interrupted and typed again. page writes
index.html beside the study's results, which run and verdict do too. check says whether the study's seeds can see
what matters, and what that would take. sweep chooses a rate for each arm, with which run then trains it. compare
takes two revisions of the code for arms, each with the flags of scripts.base_train that follow after --. threshold
compares the mean of finished runs, or of numbers, with a bar. The last line of stdout is one JSON document. Exit
code of verdict and compare: 0 an arm is better; else 4 one is unresolved; else 3 one is equivalent or identical; 1
all are worse. Of run, sweep and try: 0, or 1 where runs are missing. Of check and threshold: 0, or 4 where the seeds
do not suffice. Always 2: what was typed is wrong.
"""

import sys

from nanolab.cli import main, parse
from nanolab.lab.config import OF_TRY, CompareConfig, LabConfig, TryConfig, spelled_out


def run(argv: list[str]) -> int:
    from nanolab.lab.commands import lab, lab_compare, lab_try

    words, after = spelled_out(argv)
    if words[:1] == ["--what=compare"]:
        return lab_compare(parse(CompareConfig, words[1:]), after)
    if words[:1] != ["--what=try"]:
        return lab(parse(LabConfig, [*words, *after]))
    own = tuple(f"{name}=" for name in OF_TRY)
    return lab_try(parse(TryConfig, words[1:]), [word for word in words[1:] if not word.startswith(own)])


if __name__ == "__main__":
    main(lambda: run(sys.argv[1:]), usage=2)
