#!/usr/bin/env bash
# Makes .venv and installs nanolab into it; does nothing when everything is there.
#
#   bash runs/setup.sh                 what training, evaluation and chat need
#   bash runs/setup.sh test            the test tools as well
#   bash runs/setup.sh tasks int8      any extras of pyproject.toml, one or several; those asked for before stay
#   bash runs/setup.sh --newest test   the newest of everything but torch, in .venv-newest, made anew (runs/test.sh --newest calls it)
#
# PYTHON=python3.12                 the Python that .venv is made from; default: python3, else the newest python3.x
# NANOLAB_PYTHON=/opt/x/bin/python  use this Python as it is and install nothing (conda, a container, a cluster)
#
# On Linux x86-64 with Python 3.10 to 3.13 every version is the one in runs/lock.txt (dev/lock.sh writes it); elsewhere only
# torch's is, and a line says so. With an NVIDIA GPU torch is the registry's CUDA build, what it brings is in runs/lock-gpu.txt,
# and the extra gpu is added.
# Packages come from wherever pip is configured to look. On Linux the default registry has only the CUDA build of torch
# (some GB); if PIP_EXTRA_INDEX_URL names PyTorch's CPU index (its "Get started" page shows the address), the CPU build of
# about 200 MB is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=.venv
if [ "${1:-}" = --newest ]; then venv=.venv-newest && shift; fi
known=$(sed -n '/^\[project.optional-dependencies\]/,/^\[tool/s/^\([a-z0-9_]*\) = .*/\1/p' pyproject.toml | tr '\n' ' ')
for extra in "$@"; do
    case " $known" in *" $extra "*) ;; *)
        echo "setup.sh: $extra is not an extra of pyproject.toml; expected nothing or some of: $known" >&2
        exit 2
        ;;
    esac
done
if [ -n "${NANOLAB_PYTHON:-}" ]; then
    echo "setup: using $NANOLAB_PYTHON as it is (NANOLAB_PYTHON)"
    exit 0
fi

# The stamp says what .venv was last made for; the path is in it because an editable install points here.
want=$( (pwd && cat pyproject.toml runs/lock.txt runs/lock-gpu.txt runs/setup.sh) | cksum | tr ' ' -)
stamp=$venv/nanolab-setup
have='' extras=''
if [ $venv = .venv ] && [ -x .venv/bin/python ] && [ -f $stamp ]; then read -r have extras <$stamp || true; fi
had=$extras
add() { case ",$extras," in *",$1,"*) ;; *) extras=${extras:+$extras,}$1 ;; esac }
for extra in "$@"; do add "$extra"; done
if [ "$have" = "$want" ] && [ "$had" = "$extras" ]; then exit 0; fi

suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

if [ $venv != .venv ] || ! { suitable .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
    found=
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if suitable "$python"; then found=$python && break; fi
    done
    if [ -z "$found" ]; then
        seen=$(${PYTHON:-python3} --version 2>&1 | head -n 1 || true)
        echo "setup.sh: saw ${seen:-no python3}; nanolab needs Python 3.10 or newer." >&2
        echo "Install one, or name it: PYTHON=/path/to/python3.11 bash runs/setup.sh" >&2
        exit 1
    fi
    echo "setup: making $venv with $("$found" --version)"
    if ! log=$("$found" -m venv --clear $venv 2>&1); then
        echo "$log" | tail -n 5 >&2
        echo "setup.sh: $found cannot make a virtual environment; its venv module or pip is missing." >&2
        echo "On Debian and Ubuntu: sudo apt-get install python3-venv" >&2
        exit 1
    fi
fi

# What holds versions: the lock's lines say themselves for which Python and system they are.
lock=runs/lock.txt constraints=$venv/constraints.txt
here=$($venv/bin/python -c 'import platform, sys; print(platform.system(), platform.machine(), "%d.%d" % sys.version_info[:2])')
if [ $venv = .venv ]; then cp $lock $constraints; else grep '^torch==' $lock >$constraints; fi
torch=$(grep '^torch==' $lock) why="no NVIDIA GPU seen" gpu=
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    gpu=$(nvidia-smi -L | head -n 1)
    why=$gpu
    add gpu
    case "$venv $here" in
    ".venv Linux x86_64 "*) cat runs/lock-gpu.txt >>$constraints && lock="$lock and runs/lock-gpu.txt" ;;
    *) sed -i.bak '/^torch==/d' $constraints && rm $constraints.bak && torch="the newest torch" ;; # which build another system has is not known here
    esac
fi
case "$venv $here" in
".venv Linux x86_64 3.1"[0-3]) versions="locked by $lock" ;;
".venv "*) versions="not locked except torch: $lock is for Linux x86_64 with Python 3.10 to 3.13, this is $here" ;;
*) versions="the newest" ;;
esac

# -qq: errors only. --no-compile: of 26,000 files most are never imported; the first import compiles the others.
pip_install() { $venv/bin/python -m pip -qq --disable-pip-version-check install --no-compile "$@"; }
# pip first: the one of Python 3.11 needs twice the time for the rest.
# setuptools stays in the environment and builds what has no wheel, nanolab too; a build in isolation would download its newest.
echo "setup: installing $torch ($why)"
pip_install --constraint $constraints pip
pip_install --constraint $constraints torch "setuptools>=70.1"
echo "setup: installing nanolab${extras:+ with what $extras needs}; versions: $versions"
pip_install --constraint $constraints --no-build-isolation -e ".${extras:+[$extras]}"
case $versions in locked*) # what is left of an earlier set-up and nothing asks for any more: pip has not touched it
    differ=$($venv/bin/python runs/lock_diff.py $constraints)
    off=$(awk 'NF == 3 && $3 != "-" { print $1 "==" $3 }' <<<"$differ") others=$(awk '$3 == "-" { printf " %s", $1 }' <<<"$differ")
    if [ -n "$off" ]; then pip_install --no-build-isolation --no-deps $off; fi
    if [ -n "$others" ]; then echo "setup: these are in .venv but not in $lock and stay:$others (rm -r .venv and set up again to be rid of them)"; fi
    ;;
esac
printf '%s\n' "$want $extras" "versions: $versions" >$stamp
if [ -n "$gpu" ] && ! $venv/bin/python -c 'import torch; raise SystemExit(not torch.cuda.is_available())'; then
    build=$($venv/bin/python -c 'import torch; print(torch.version.cuda and f"for CUDA {torch.version.cuda}" or "a CPU build")')
    echo "setup: $gpu is there, but torch does not see it: its build is $build, and the driver is $(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)." >&2
    echo "A newer driver helps, or a Python with a torch of your own: NANOLAB_PYTHON=/path/to/python" >&2
fi
# PYTHONDONTWRITEBYTECODE, which many containers set: every start would compile again.
version=$(env -u PYTHONDONTWRITEBYTECODE $venv/bin/python -c 'import torch, nanolab.stages.rl; print(torch.__version__)')
echo "setup: done; python is $venv/bin/python, torch $version"
