#!/usr/bin/env bash
# Makes .venv and installs nanolab into it; does nothing when everything is there.
#
#   bash runs/setup.sh         what training, evaluation and chat need
#   bash runs/setup.sh test    the test tools as well
#   bash runs/setup.sh tasks   what reads question sets from the hub as well
#   bash runs/setup.sh hf      transformers: to evaluate and import models of other makers; so too lm_eval, plots (pyproject.toml)
#
# PYTHON=python3.12                 the Python that .venv is made from; default: python3, else the newest python3.x
# NANOLAB_PYTHON=/opt/x/bin/python  use this Python as it is and install nothing (conda, a container, a cluster)
#
# Without an NVIDIA GPU torch is the build that runs/constraints-cpu.txt pins. Packages come from wherever pip is
# configured to look. On Linux the default registry has only the CUDA build (some GB); if PIP_EXTRA_INDEX_URL names
# PyTorch's CPU index (its "Get started" page shows the address), the CPU build of about 200 MB is taken.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra=${1:-}
case $extra in '' | test | tasks | hf | lm_eval | plots) ;; *)
    echo "setup.sh: $extra is not a set of packages; expected nothing, test, tasks, hf, lm_eval or plots" >&2
    exit 2
    ;;
esac
if [ -n "${NANOLAB_PYTHON:-}" ]; then
    echo "setup: using $NANOLAB_PYTHON as it is (NANOLAB_PYTHON)"
    exit 0
fi

# The stamp says what .venv was last made for; the path is in it because an editable install points here.
want=$( (pwd && cat pyproject.toml runs/constraints-cpu.txt runs/setup.sh) | cksum | tr ' ' -)
stamp=.venv/nanolab-setup
if [ -x .venv/bin/python ] && [ -f "$stamp" ]; then
    read -r have have_extra <"$stamp" || true
    case ",$have_extra,," in *,"$extra",*) extra=$have_extra ;; *) extra=${have_extra:+$have_extra,}$extra ;; esac
    if [ "$have" = "$want" ] && [ "$have_extra" = "$extra" ]; then exit 0; fi
fi

suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

if ! { suitable .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
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
    echo "setup: making .venv with $("$found" --version)"
    if ! log=$("$found" -m venv --clear .venv 2>&1); then
        echo "$log" | tail -n 5 >&2
        echo "setup.sh: $found cannot make a virtual environment; its venv module or pip is missing." >&2
        echo "On Debian and Ubuntu: sudo apt-get install python3-venv" >&2
        exit 1
    fi
fi

pip() { .venv/bin/python -m pip -qq --disable-pip-version-check "$@"; } # -qq: errors only
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "setup: installing torch for $(nvidia-smi -L | head -n 1)"
    pip install torch
    pip install -e ".${extra:+[$extra]}"
else
    echo "setup: installing $(grep ^torch runs/constraints-cpu.txt) (no NVIDIA GPU seen)"
    pip install --constraint runs/constraints-cpu.txt torch
    echo "setup: installing nanolab${extra:+ with what $extra needs}"
    pip install --constraint runs/constraints-cpu.txt -e ".${extra:+[$extra]}"
fi
echo "$want $extra" >"$stamp"
echo "setup: done; python is .venv/bin/python, torch $(.venv/bin/python -c 'import torch; print(torch.__version__)')"
