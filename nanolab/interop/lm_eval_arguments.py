"""The arguments of the harness's model "nanolab": what --model_args may say, which device and which run are meant."""

from pathlib import Path
from typing import Any

import torch

from nanolab.cli import UserError, nearest
from nanolab.records import checkpoint
from nanolab.records.models import WEIGHTS_ONLY, ModelRef, find_model
from nanolab.runtime import device_kind, devices

ARGUMENTS = {
    "path": str,
    "add_bos_token": bool,
    "device": str,
    "dtype": str,
    "max_gen_toks": int,
    "max_rows": int,
    "tool": str,
    "allow_unsandboxed": bool,
}
HARNESS_DEVICE = "cuda:0"  # what --device is where nobody types it


def checked(given: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The model's arguments from --model_args and the harness's flags, of which --device counts where --model_args has
    none. Raises UserError for what is missing, unknown or of another type.
    """
    # a run may be called 12
    arguments = {name: str(value) if name == "path" else value for name, value in given.items()}
    if "tool" in arguments:
        arguments["tool"] = arguments["tool"] or "none"  # which the harness reads as None
    for name, value in arguments.items():
        if name not in ARGUMENTS:
            raise UserError(
                f"--model_args has {name!r}; expected some of {', '.join(ARGUMENTS)}{nearest(name, list(ARGUMENTS))}",
                "model-args-unknown",
                name=name,
            )
        if type(value) is not ARGUMENTS[name]:
            expected = f"expected {ARGUMENTS[name].__name__}; see nanolab/interop/lm_eval.py"
            raise UserError(f"--model_args has {name}={value}; {expected}", "model-args-type", name=name, value=value)
    if "path" not in arguments:
        raise UserError(
            "--model_args has no path; expected the name or the folder of a run; type --model_args path=NAME",
            "model-args-path",
        )
    flag = flags.get("device") or ""
    arguments["device"] = (
        kind_of(arguments["device"], "--model_args device=") if arguments.get("device") else kind_of(flag, "--device ")
    )
    return arguments


def kind_of(device: str, flag: str) -> str:
    """cuda, mps or cpu as start() takes them; "" for the machine's own. Raises UserError, which names the flag, for a
    device that is not there.
    """
    if device == HARNESS_DEVICE and flag == "--device " and "cuda" not in devices():
        kind = device_kind("")
        print(
            f"device {kind}: the harness says {HARNESS_DEVICE} where nobody types --device, and torch"
            f" {torch.__version__} sees no such device"
        )
        return kind
    kind = device.removesuffix(":0")
    if kind not in ("", "cuda", "mps", "cpu"):
        raise UserError(
            f"{flag}{device} is unknown; expected cuda, mps or cpu (of several GPUs: CUDA_VISIBLE_DEVICES=N); type"
            f" {flag}cpu",
            "device",
            flag=flag.strip(),
            device=device,
        )
    if kind and kind not in devices():
        raise UserError(
            f"{flag}{device}, but torch {torch.__version__} sees no such device; expected one that is there; type"
            f" {flag}cpu",
            "device",
            flag=flag.strip(),
            device=device,
        )
    return kind


def find_run(path: str) -> ModelRef:
    """The checkpoint that NAME[@STEP|best] means, or the newest whole one in the folder of a run. Raises UserError
    where there is none.
    """
    folder = Path(path).expanduser()
    if not (folder / "checkpoints").is_dir():
        if len(folder.parts) > 1:
            raise UserError(
                f"{path} is no run: it has no folder checkpoints; expected the name or the folder of a run; type"
                " path=NAME or path=BASE/runs/NAME"
            )
        return find_model(path)
    newest = checkpoint.newest_valid(folder / "checkpoints", WEIGHTS_ONLY)
    if newest is None:
        raise UserError(
            f"{folder} has no whole checkpoint; expected one in its folder checkpoints; train it again, or name"
            " another run"
        )
    return ModelRef(folder.resolve().name, folder, newest, int(newest.name[5:]))
