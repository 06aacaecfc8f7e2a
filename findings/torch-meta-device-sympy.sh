#!/usr/bin/env bash
# torch 2.13.0: the first sum of two tensors on the meta device imports sympy, seconds of a program's start.
#
# The meta device computes shapes without memory, so it is what one takes to count a large model's parameters before a plan is
# printed. Making a module there (empty, new_zeros, nn.Linear) costs nothing. The first x + x is answered by operators written in
# Python, which load torch._refs, torch.fx.experimental and with them sympy (some hundred modules), though no shape is symbolic.
# On the CPU the same sum loads none of them. zeros_like is one of those operators too; new_zeros of the same shape is not.
# Who meets it: command lines that size a model before they train it; --help and --dry-run feel it most.
# Output seen on Python 3.11 (2 to 4 seconds there once torch has compiled files, more at a first start):
#   import torch                   sympy loaded: False
#   nn.Linear on meta              sympy loaded: False
#   new_zeros on meta              sympy loaded: False
#   x + x on the CPU               sympy loaded: False
#   zeros_like on meta             sympy loaded: True
# and in a second process: x + x on meta   sympy loaded: True
# Exits with 1 when any is otherwise. Needs a package index; on Linux pip may choose a build with CUDA, which is large.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/try.py" <<'END'
import sys
import time

import torch

x, y = torch.empty(2, 3, device="meta"), torch.empty(2, 3)


def after(what, call):
    began = time.perf_counter()
    call()
    print(f"{what:30s} sympy loaded: {'sympy' in sys.modules}")
    print(f"{what}: {time.perf_counter() - began:.2f} s", file=sys.stderr)


if sys.argv[1] == "first":
    after("import torch", lambda: None)
    after("nn.Linear on meta", lambda: torch.nn.Linear(8, 8, device="meta"))
    after("new_zeros on meta", lambda: x.new_zeros(2, 3))
    after("x + x on the CPU", lambda: y + y)
    after("zeros_like on meta", lambda: torch.zeros_like(x))
else:
    after("x + x on meta", lambda: x + x)
END
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -qq install torch==2.13.0
seen=$("$work/venv/bin/python" "$work/try.py" first; "$work/venv/bin/python" "$work/try.py" second)
printf '%s\n' "$seen"
expected="import torch                   sympy loaded: False
nn.Linear on meta              sympy loaded: False
new_zeros on meta              sympy loaded: False
x + x on the CPU               sympy loaded: False
zeros_like on meta             sympy loaded: True
x + x on meta                  sympy loaded: True"
[ "$seen" = "$expected" ]
