#!/usr/bin/env bash
# Runs the tests; makes .venv first if it is missing.
#
#   bash runs/test.sh                       the fast ones: at most 6 minutes on 2 CPU cores
#   bash runs/test.sh --all                 the slow ones too (not those that need a GPU): 30 minutes
#   bash runs/test.sh tests/data -k pack    further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash runs/setup.sh test

arguments=()
for argument in "$@"; do
    if [ "$argument" = --all ]; then arguments+=(-m "not gpu"); else arguments+=("$argument"); fi
done
case $* in '' | --all) arguments+=(-n "$(getconf _NPROCESSORS_ONLN)" --dist loadfile) ;; esac # everything: a process per core, a file at a time

if ! command -v chromium chromium-browser google-chrome >/dev/null; then
    echo "test.sh: there is no Chromium here, so the tests of the browser page (tests/browser) are skipped; on Debian: apt-get install chromium"
fi

# One compute thread each, and threads that sleep while they wait: the tests are small and start many processes.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=passive
exec "${NANOLAB_PYTHON:-.venv/bin/python}" -m pytest ${arguments[@]+"${arguments[@]}"}
