#!/usr/bin/env bash
# Writes runs/lock.txt: one version of every package that set-up installs, for Linux x86-64 and Python 3.10 to 3.13; and
# runs/lock-gpu.txt: what torch's CUDA build brings besides.
#
#   bash dev/lock.sh                                 after a change of pyproject.toml: versions that still fit stay
#   bash dev/lock.sh --upgrade                       the newest of everything; bash runs/test.sh --newest says first whether they work
#   bash dev/lock.sh --upgrade-package transformers  the newest of one
#
# Further arguments go to `uv pip compile`. uv comes from the package registry into a temporary folder; a minute in all.
# Afterwards: bash runs/test.sh --all, and commit both.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip -qq --disable-pip-version-check install uv

cp pyproject.toml "$work/gpu.toml"
cat >>"$work/gpu.toml" <<'EOF'

[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.14'"]
constraint-dependencies = ["torch==2.13.0"]
EOF
# The registry's torch for Linux is a CUDA build. For the CPU its requirements are replaced by those that the CPU build's
# METADATA lists. setuptools builds nanolab itself and the packages that have no wheel.
cat "$work/gpu.toml" - >"$work/cpu.toml" <<'EOF'

[[tool.uv.dependency-metadata]]
name = "torch"
version = "2.13.0"
requires-dist = ["filelock", "typing-extensions>=4.10.0", "setuptools>=77.0.3", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"]
EOF
compile() { # cpu or gpu; uv keeps the versions of a file that is there
    mkdir -p "$work/$1" && cp "$work/$1.toml" "$work/$1/pyproject.toml"
    (cd "$work/$1" && ../venv/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.10 --all-extras \
        --no-annotate --no-header --no-emit-index-url --output-file ../lock.txt "${@:2}")
}
if [ -f runs/lock.txt ]; then cp runs/lock.txt "$work/lock.txt"; fi # uv keeps the versions of a file that is there
compile cpu "$@"
cp "$work/lock.txt" "$work/cpu.txt"
compile gpu
added=$(grep -vxFf "$work/cpu.txt" "$work/lock.txt" || true)
if [ -n "$(grep -vxFf "$work/lock.txt" "$work/cpu.txt")" ] || [ -z "$added" ]; then
    echo "lock.sh: with torch's CUDA build other packages change too; expected additions only; nothing was written" >&2
    diff "$work/cpu.txt" "$work/lock.txt" >&2
    exit 1
fi
{
    echo "# Exact versions of what runs/setup.sh installs; written by dev/lock.sh. pip takes it as --constraint."
    echo "# torch applies everywhere: where pip can see a CPU build (2.13.0+cpu) it is taken before the plain one, because a local"
    echo "# version sorts higher. On a machine with an NVIDIA GPU runs/lock-gpu.txt comes on top."
    sed 's/^\(torch==[^ ]*\) .*/\1/' "$work/cpu.txt"
} >runs/lock.txt
{
    echo "# Exact versions of what torch's CUDA build brings, on top of runs/lock.txt; written by dev/lock.sh."
    echo "$added"
} >runs/lock-gpu.txt
for lock in runs/lock.txt runs/lock-gpu.txt; do echo "lock.sh: $(grep -c == $lock) lines in $lock"; done
git --no-pager diff --stat -- runs/lock.txt runs/lock-gpu.txt
