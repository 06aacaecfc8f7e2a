#!/usr/bin/env bash
# packaging 26.4 refuses a requirement that ends with a newline; 26.0 and older take it.
#
# Seen: with packaging 26.0 the line "x==1\n" is a requirement; with 26.4 it raises InvalidRequirement. A blank at the end is taken by both.
# Who meets it: code that gives the lines of a requirements file to Requirement() without stripping them.
# Output seen on Python 3.11:
#   26.0 newline: accepted, blank: accepted
#   26.4 newline: InvalidRequirement, blank: accepted
# Exits with 1 when either version does otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 26.0 26.4; do
    python3 -m pip -qq --disable-pip-version-check install --no-deps --target "$work/$version" "packaging==$version"
    PYTHONPATH=$work/$version python3 - <<'EOF' | tee -a "$work/seen"
import packaging
from packaging.requirements import InvalidRequirement, Requirement

def read(line):
    try:
        return "accepted" if str(Requirement(line)) == "x==1" else "read otherwise"
    except InvalidRequirement:
        return "InvalidRequirement"

print(f"{packaging.__version__} newline: {read('x==1' + chr(10))}, blank: {read('x==1 ')}")
EOF
done
diff "$work/seen" - <<'EOF'
26.0 newline: accepted, blank: accepted
26.4 newline: InvalidRequirement, blank: accepted
EOF
