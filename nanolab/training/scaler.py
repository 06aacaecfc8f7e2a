"""Dynamic loss scaling for fp16: gradients too small for fp16 are lifted by a factor that backs off when they
overflow.
"""

from typing import Any

import torch
from torch import Tensor

from nanolab.cli import UserError
from nanolab.runtime import Runtime

GROWTH, BACKOFF = 2.0, 0.5  # powers of two: scaling and unscaling are exact


class LossScaler:
    """The rule of Mixed Precision Training (https://arxiv.org/abs/1710.03740) and torch.amp.GradScaler, for many ranks:
    double after `growth_interval` good steps in a row; on an overflow anywhere, halve and skip the step everywhere.

        scaler.scale(loss).backward()
        found_inf = scaler.unscale_(optimizer)
        if not found_inf: optimizer.step()
        scaler.update(found_inf)
    """

    def __init__(self, runtime: Runtime, initial_scale: float = 65536.0, growth_interval: int = 2000):
        self.runtime, self.factor, self.growth_interval, self.good_steps = runtime, initial_scale, growth_interval, 0

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.factor

    @torch.no_grad()
    def unscale_(self, optimizer: Any) -> bool:
        """Divide this rank's gradients by the scale in place; True on every rank if one rank has a gradient that is not
        finite.

        A collective call. It waits for the device once. The gradients of a step with an overflow are not to be used.
        """
        grads = [p.grad for group in optimizer.groups for _, p in group["params"] if p.grad is not None]
        if not grads:
            raise RuntimeError("no parameter has a gradient to unscale; expected a backward pass before unscale_")
        torch._foreach_mul_(grads, 1.0 / self.factor)
        largest = torch.stack(torch._foreach_norm(grads, float("inf")))  # inf and nan both survive a maximum
        return self.runtime.any(not bool(largest.isfinite().all()))

    def update(self, found_inf: bool) -> None:
        """Set the scale for the next step."""
        self.good_steps = 0 if found_inf else self.good_steps + 1
        if found_inf:
            self.factor *= BACKOFF
        elif self.good_steps == self.growth_interval:
            self.factor, self.good_steps = self.factor * GROWTH, 0

    def state_dict(self) -> dict[str, float | int]:
        return {"scale": self.factor, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        if set(state) != {"scale", "good_steps"}:
            raise UserError(
                f"loss scaler state has {sorted(state)}; expected good_steps, scale; resume with the dtype of the"
                " saved run"
            )
        self.factor, self.good_steps = float(state["scale"]), int(state["good_steps"])
