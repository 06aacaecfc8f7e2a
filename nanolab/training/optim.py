"""Muon for matrices, AdamW for everything else, in one optimizer for one rank or many.

There is no DDP: every rank's gradients are summed here (the loss is already divided by the global token count), each
rank updates the part that it owns and keeps optimizer state for that part only, and the parts are gathered
(training/groups.py). A step has three phases, so that messages travel while others compute: launch all reductions; per
group wait, update, launch the gather; wait for the gathers. Every message's handle and tensors are held until it has
been waited for. Plain torch operators throughout: nothing is compiled, so nothing needs Triton.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanolab.cli import UserError
from nanolab.runtime import Runtime
from nanolab.training.groups import KINDS


class MuonAdamW:
    """The optimizer. `groups` are dicts:

    name, kind, params [(name, fp32 Parameter)], lr, weight_decay, and
    - kind "adamw": betas, eps
    - kind "muon": momentum, beta2, ns_steps; all matrices of one shape, and lr already has the shape's factor
    The loop may change lr, momentum and weight_decay between steps; "initial_lr" remembers the first lr.
    """

    def __init__(self, groups: list[dict[str, Any]], runtime: Runtime):
        self.runtime, self.groups, self.steps, self.reduced = runtime, groups, 0, False
        for group in groups:
            group["initial_lr"] = group["lr"]
            for name, p in group["params"]:
                if p.dtype != torch.float32 or not p.is_contiguous():
                    raise ValueError(
                        f"parameter {name} is {p.dtype}, strides {p.stride()}; expected contiguous float32 master"
                        " weights"
                    )
        self.parts = [KINDS[group["kind"]](group, runtime) for group in groups]

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for group in self.groups for _, p in group["params"]]

    def memory(self) -> tuple[int, int]:
        """(bytes of this rank's state, bytes that a step holds beside it, parameters and gradients, at most).
        Parameters may be on the meta device.
        """
        held = peak = sum(part.step_bytes() for part in self.parts)
        for part in self.parts:  # in the order of `step`
            peak = max(peak, held + part.update_bytes())
            held += part.sent_bytes()
        return sum(t.nbytes for part in self.parts for t in part.state()), max(peak, held)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient. A collective call; gradients stay as they are."""
        self._reduce()
        self.steps += 1
        for part in self.parts:
            part.wait()
            part.update(self.steps)
            part.gather()
        for part in self.parts:
            part.finish()
        self.reduced = False

    @torch.no_grad()
    def grad_norm(self, clip: float = -1.0) -> Tensor:
        """L2 norm of the gradients summed over ranks, a scalar on the device. A collective call, between the last
        backward pass and `step`.

        With `clip` above 0 the sums that `step` will use are scaled so that their norm is at most that. Reads every
        gradient once and with many ranks gives up the overlap of the reductions with the update; the reductions
        themselves are the ones that `step` then uses, and the host waits for nothing."""
        self._reduce()
        for part in self.parts:
            part.wait()
        norms = torch._foreach_norm([g for part in self.parts for g in part.counted_grads()])
        total = torch.stack(norms).square().sum() if norms else torch.zeros((), device=self.runtime.device)
        norm = self.runtime.all_reduce_(total).sqrt()
        grads = [g for part in self.parts for g in part.grads]
        if clip > 0 and grads:
            torch._foreach_mul_(grads, (clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def zero_grad(self) -> None:
        """Drop gradients, also those that `grad_norm` has summed for a step that was not taken."""
        for p in self.params:
            p.grad = None
        for part in self.parts:
            part.wait()
            part.forget()
        self.reduced = False

    def _reduce(self) -> None:
        if not self.reduced:
            for part in self.parts:
                part.reduce()
            self.reduced = True

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's state: "<parameter>/<slot>@<start>:<stop>" -> 1-D fp32 view of that range of the flattened slot.

        Rank 0 adds "step" (int64). The ranks' dicts have no key in common; together they are the whole state.
        """
        state = {f"{p.key}@{p.start}:{p.stop}": p.tensor for part in self.parts for p in part.pieces() if p.saved}
        if self.runtime.is_main:
            state["step"] = torch.tensor(self.steps)
        return state

    @torch.no_grad()
    def load_state_dict(self, pieces: Mapping[str, Tensor]) -> None:
        """Take this rank's state from the pieces of all ranks of any number. Only the pieces that it needs are read.

        Raises UserError that names what is missing, unknown or incomplete; nothing has been changed then.
        """
        found = self._check(pieces)
        for part in self.parts:
            for piece in part.pieces():
                for start, stop, key in found[piece.key]:
                    low, high = max(start, piece.start), min(stop, piece.stop)
                    if low < high:
                        piece.tensor[low - piece.start : high - piece.start].copy_(
                            pieces[key][low - start : high - start]
                        )
        self.steps = int(pieces["step"])

    def _check(self, pieces: Mapping[str, Tensor]) -> dict[str, list[tuple[int, int, str]]]:
        """Slot -> its (start, stop, key) in order, after making sure that they are exactly the slots of this model."""
        sizes = {key: size for part in self.parts for key, size in part.sizes().items()}
        found: dict[str, list[tuple[int, int, str]]] = {key: [] for key in sizes}
        extra = []
        for key in pieces:
            match = re.fullmatch(r"(.+)@(\d+):(\d+)", key)
            if match and match[1] in found:
                found[match[1]].append((int(match[2]), int(match[3]), key))
            elif key != "step":
                extra.append(key)
        missing = [] if "step" in pieces else ["step"]
        for slot, ranges in found.items():
            ranges.sort()
            ends = [0, *(stop for _, stop, _ in ranges)]
            if [start for start, _, _ in ranges] != ends[:-1] or ends[-1] != sizes[slot]:
                have = ", ".join(f"{start}:{stop}" for start, stop, _ in ranges) or "nothing"
                missing.append(f"{slot} (has {have} of 0:{sizes[slot]})")
        if missing or extra:
            raise UserError(
                f"the optimizer state does not fit this model: missing or incomplete: {_listed(missing)}; unknown:"
                f" {_listed(extra)}. Expected the state of the same architecture, from all ranks that saved it; start"
                " without --resume, or resume with the flags of the saved run"
            )
        return found


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
