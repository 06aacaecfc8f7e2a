#!/usr/bin/env bash
# wandb 0.31.0: x_service_wait in the Settings given to wandb.init has no effect; the variable WANDB_X_SERVICE_WAIT has.
#
# Seen: the time that wandb waits for its own service to report its port. With x_service_wait=0.001 in wandb.init(settings=...) the run begins
# all the same, as with the default of 30 seconds; with WANDB_X_SERVICE_WAIT=0.001 it fails, as asked (ServicePollForTokenError).
# Who meets it: jobs on busy machines where the service takes longer than 30 seconds, and that raise the setting in code.
# Output seen on Python 3.11, offline:
#   settings: begun
#   variable: ServicePollForTokenError
# Exits with 1 when either is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip -qq --disable-pip-version-check install "wandb==0.31.0"
cat >"$work/begin.py" <<'EOF'
import sys
import wandb

given = {"x_service_wait": 0.001} if sys.argv[1] == "settings" else {}
try:
    wandb.init(mode="offline", project="p", dir=sys.argv[2], settings=wandb.Settings(silent=True, **given)).finish()
    print(f"{sys.argv[1]}: begun")
except Exception as error:
    print(f"{sys.argv[1]}: {type(error).__name__}")
EOF
{
    "$work/venv/bin/python" "$work/begin.py" settings "$work" 2>/dev/null
    WANDB_X_SERVICE_WAIT=0.001 "$work/venv/bin/python" "$work/begin.py" variable "$work" 2>/dev/null
} | tee "$work/seen"
diff "$work/seen" - <<'EOF'
settings: begun
variable: ServicePollForTokenError
EOF
