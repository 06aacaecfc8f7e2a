#!/usr/bin/env bash
# Runs the tests; makes .venv first if it is missing.
#
#   bash runs/test.sh                       the fast ones: about 6 minutes on 2 CPU cores
#   bash runs/test.sh --all                 the slow ones too (not those that need a GPU): 30 minutes
#   bash runs/test.sh tests/data -k pack    further arguments go to pytest
#   bash runs/test.sh --newest [...]        with the newest version of everything but torch, in .venv-newest, made anew: what a
#                                           new lock would bring. .venv stays as it is; not part of .ci/run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

newest=
if [ "${1:-}" = --newest ]; then
    newest=1 && shift
    if [ -n "${NANOLAB_PYTHON:-}" ]; then
        echo "test.sh: --newest installs, and NANOLAB_PYTHON=$NANOLAB_PYTHON says to install nothing; expected one of them" >&2
        exit 2
    fi
    bash runs/setup.sh --newest test
    python=.venv-newest/bin/python
    differ=$($python runs/lock_diff.py runs/lock.txt)
    count="$(grep -c . <<<"$differ" || true) packages differ from runs/lock.txt"
    echo "test.sh: $count${differ:+ (name, newest, locked):}"
    if [ -n "$differ" ]; then echo "$differ" | column -t 2>/dev/null || echo "$differ"; fi
else
    bash runs/setup.sh test
    python=${NANOLAB_PYTHON:-.venv/bin/python}
fi

arguments=()
for argument in "$@"; do
    if [ "$argument" = --all ]; then arguments+=(-m "not gpu"); else arguments+=("$argument"); fi
done
# Everything: a file at a time, by one process more than there are cores, since some tests wait for processes of their own.
case $* in '' | --all) arguments+=(-n "$(($(getconf _NPROCESSORS_ONLN) + 1))" --dist loadfile --no-loadscope-reorder) ;; esac

if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    echo "test.sh: there is no Chromium here, so the tests of the browser page (tests/browser) are skipped; on Debian: apt-get install chromium"
fi

# One compute thread each, and threads that sleep while they wait: the tests are small and start many processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive
unset PYTHONDONTWRITEBYTECODE # what pytest has rewritten and Python has compiled is not made again by each of the processes
if [ -z "$newest" ]; then exec "$python" -m pytest ${arguments[@]+"${arguments[@]}"}; fi
code=0
"$python" -m pytest ${arguments[@]+"${arguments[@]}"} || code=$?
echo "test.sh: the tests $([ $code = 0 ] && echo passed || echo failed) with the newest versions; $count"
exit $code
