"""The gradients of one optimizer step: the mean loss over the global batch, checked before anything is updated."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from nanolab.cli import UserError
from nanolab.runtime import Runtime
from nanolab.training.scaler import LossScaler


class Batches(Protocol):
    """Where training rows come from. `state_dict` is small JSON, the same on every rank, and exact after `next`."""

    epoch: float

    def next(
        self,
    ) -> Any: ...  # one micro-batch of this rank, with inputs (B, T), perhaps of no rows, and n_targets: int
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def where(self) -> str: ...  # which documents the last micro-batch came from


class NonFinite(UserError):
    """Loss or gradient is inf or nan; raised on all ranks before the update."""


class Micro(NamedTuple):
    """The micro-batches of one step of this rank, and the documents that each was made of."""

    batches: list[Any]
    where: list[str]


def gather(batches: Batches, grad_accum: int) -> Micro:
    """Take a step's micro-batches, all at once: the loss counts the targets of the whole step."""
    micro = Micro([], [])
    for _ in range(grad_accum):
        batch = batches.next()
        if len(batch.inputs):  # the last ones of a rank with a smaller share may be empty
            micro.batches.append(batch)
            micro.where.append(batches.where())
    return micro


def accumulate(
    model: nn.Module,
    params: Iterable[nn.Parameter],
    micro: Micro,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    *,
    step: int,
    runtime: Runtime,
    scaler: LossScaler | None,
    stop: Callable[[], bool],
) -> tuple[float, bool]:
    """Run forward and backward over this rank's micro-batches of a step.

    Returns (mean nats per target over the global batch, whether `stop()` is true on some rank). Each micro-batch counts
    by its targets: its summed loss is divided by the number of targets of all micro-batches of all ranks, so that the
    ranks' gradients only have to be summed. Raises NonFinite on every rank if a loss or gradient of one rank is not
    finite; with a loss scaler, which has its own answer to infinite gradients, only losses are looked at."""
    n_targets = torch.tensor(sum(b.n_targets for b in micro.batches), device=runtime.device)
    n_targets = runtime.all_reduce_(n_targets)
    losses = []
    for batch in micro.batches:
        loss = loss_fn(model, batch) / n_targets
        (scaler.scale(loss) if scaler else loss).backward()
        losses.append(loss.detach().float())
    total = torch.stack(losses).sum()
    bad = ~total.isfinite()
    if scaler is None:
        grads = [p.grad for p in params if p.grad is not None]
        bad = bad | ~torch.nn.utils.get_total_norm(grads).isfinite()
    # One message and one wait for the device per step: the loss, and what all ranks have to agree on.
    mean, n_bad, n_stop = runtime.all_reduce_(
        torch.stack([total, bad.float(), torch.tensor(float(stop()), device=total.device)])
    ).tolist()
    if n_bad:
        raise NonFinite(_report(step, runtime, bool(bad), [x.item() for x in losses], micro.where, int(n_targets)))
    return mean, n_stop > 0


def _report(step: int, runtime: Runtime, bad: bool, losses: list[float], where: list[str], n_targets: int) -> str:
    """What went wrong, on which rank, in which micro-batch. A collective call."""
    mine = ""
    if bad:
        culprit = next((i for i, x in enumerate(losses) if x - x != 0), None)
        seen = "a gradient" if culprit is None else f"the loss of micro-batch {culprit + 1} of {len(losses)}"
        value = "" if culprit is None else f" ({losses[culprit]})"
        docs = "; ".join(where) if culprit is None else where[culprit]
        mine = f"{seen}{value} on rank {runtime.rank}, made of {docs}"
    found = "; ".join(text for text in runtime.gather_objects(mine) if text)
    empty = " The global batch has no target at all." if n_targets == 0 else ""
    return (
        f"step {step} is not finite: {found}.{empty} Expected finite numbers; the weights were not updated. Look at"
        " these documents, or try lower learning rates in a new run (--matrix-lr, --embedding-lr); the last checkpoint"
        " is whole (--resume)"
    )
