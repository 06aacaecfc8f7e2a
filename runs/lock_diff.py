"""What is installed in this Python, beside a lock: python runs/lock_diff.py runs/lock.txt

One line a difference: name, version installed, version locked, or - where the lock does not list it. Not compared: pip,
nanolab, what torch's CUDA build brings (its own metadata pins that), the local part of a version (2.13.0+cpu), and
torch itself where the lock leaves it out."""

import re
import sys
from importlib.metadata import distributions

try:
    from packaging.requirements import Requirement
except ImportError:  # before anything is installed
    from pip._vendor.packaging.requirements import Requirement

FREE = re.compile(r"pip|nanolab|torch|triton|nvidia-.*|cuda-.*")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(path: str) -> None:
    with open(path) as file:
        lines = [Requirement(line.strip()) for line in file if line.strip() and not line.startswith("#")]
    locked = {
        canonical(line.name): str(line.specifier)[2:] for line in lines if line.marker is None or line.marker.evaluate()
    }
    installed = {canonical(dist.metadata["Name"]): dist.version for dist in distributions()}
    for name, version in sorted(installed.items()):
        if name not in locked and FREE.fullmatch(name):
            continue
        if version.split("+")[0] != locked.get(name):
            print(name, version, locked.get(name, "-"))


if __name__ == "__main__":
    main(sys.argv[1])
