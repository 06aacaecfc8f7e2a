#!/usr/bin/env bash
# torchrun overwrites TORCHELASTIC_SIGNALS_TO_HANDLE, the variable that its own process manager reads.
#
# Seen in torch 2.13.0: the process manager takes the signals that it hands on to the workers from that variable, but the launcher
# first writes the value of its own option there. A value from the user's environment or a job script is lost without a word.
# What works is the option --signals-to-handle, or PET_SIGNALS_TO_HANDLE, as for every option of torchrun.
# Who meets it: jobs whose scheduler announces the end of the time with SIGUSR1.
# Output seen on Python 3.11:
#   TORCHELASTIC_SIGNALS_TO_HANDLE=SIGUSR1: SIGTERM,SIGINT,SIGHUP,SIGQUIT
#   PET_SIGNALS_TO_HANDLE=SIGUSR1: SIGUSR1
#   --signals-to-handle SIGUSR1: SIGUSR1
# Exits with 1 when one of them is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip -qq --disable-pip-version-check install "torch==2.13.0"
cat >"$work/worker.py" <<'EOF'
import os
print(os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"])
EOF
launch() { "$work/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 1 "$@" "$work/worker.py" 2>/dev/null; }
{
    echo "TORCHELASTIC_SIGNALS_TO_HANDLE=SIGUSR1: $(TORCHELASTIC_SIGNALS_TO_HANDLE=SIGUSR1 launch)"
    echo "PET_SIGNALS_TO_HANDLE=SIGUSR1: $(PET_SIGNALS_TO_HANDLE=SIGUSR1 launch)"
    echo "--signals-to-handle SIGUSR1: $(launch --signals-to-handle SIGUSR1)"
} | tee "$work/seen"
diff "$work/seen" - <<'EOF'
TORCHELASTIC_SIGNALS_TO_HANDLE=SIGUSR1: SIGTERM,SIGINT,SIGHUP,SIGQUIT
PET_SIGNALS_TO_HANDLE=SIGUSR1: SIGUSR1
--signals-to-handle SIGUSR1: SIGUSR1
EOF
