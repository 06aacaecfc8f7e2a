#!/usr/bin/env bash
# CPython 3.11.7: going through an OrderedDict hashes every key again, items() and values() twice; a dict hashes none.
#
# Seen: over 100 keys, list(od) calls __hash__ 100 times, list(od.items()) and list(od.values()) 200 times, next(iter(od)) once;
# a dict with the same keys never. Strings keep their hash, tuples do not: with keys of thousands of numbers, a look at the oldest
# entry of a cache costs as much as a lookup, and a walk over the cache twice the hashing of everything in it.
# Who meets it: least-recently-used caches keyed by tuples of token ids, which walk over an OrderedDict; a dict keeps the order of
# insertion too, and `d[key] = d.pop(key)` moves a key to its end.
# Output seen on Python 3.11.7:
#   OrderedDict keys 100 items 200 values 200 first 1
#   dict keys 0 items 0 values 0 first 0
#   tuple of 1,000,000 numbers: the first key of an OrderedDict takes over 100 times as long as that of a dict: True
# Exits with 1 when any is otherwise. Needs no package.
set -euo pipefail
python3 - <<'EOF'
import sys
import time
from collections import OrderedDict


class Key:
    calls = 0

    def __init__(self, number):
        self.number = number

    def __hash__(self):
        Key.calls += 1
        return self.number


def calls(work):
    Key.calls = 0
    work()
    return Key.calls


seen = {}
for kind in (OrderedDict, dict):
    d = kind((Key(i), i) for i in range(100))
    seen[kind] = [calls(lambda: list(d)), calls(lambda: list(d.items())), calls(lambda: list(d.values())), calls(lambda: next(iter(d)))]
    print(kind.__name__, *(word for pair in zip(("keys", "items", "values", "first"), seen[kind]) for word in pair))


def seconds(d):
    def once():
        start = time.perf_counter()
        next(iter(d))
        return time.perf_counter() - start

    return min(once() for _ in range(20))


key = tuple(range(1_000_000))
slower = seconds(OrderedDict({key: 1})) > 100 * seconds({key: 1})
print(f"tuple of 1,000,000 numbers: the first key of an OrderedDict takes over 100 times as long as that of a dict: {slower}")
sys.exit(0 if slower and seen == {OrderedDict: [100, 200, 200, 1], dict: [0, 0, 0, 0]} else 1)
EOF
