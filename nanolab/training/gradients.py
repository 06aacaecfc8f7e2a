"""The gradients of one optimizer step: the mean loss over the global batch, checked before anything is updated."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from nanolab.cli import UserError
from nanolab.data.packing import Position
from nanolab.runtime import Runtime
from nanolab.training.scaler import LossScaler

Loss = Callable[[nn.Module, Any], torch.Tensor]  # (the model that is trained, micro-batch) -> SUM of nats


class Batches(Protocol):
    """Where training rows come from."""

    @property
    def position(self) -> Position: ...  # after the last batch that `next` returned
    # one micro-batch of this rank: inputs (B, T), perhaps of no rows, n_targets: int, position
    def next(self) -> Any: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...  # position.json() of any number of ranks


class NonFinite(UserError):
    """Loss or gradient is inf or nan; raised on all ranks before the update."""


def nats(model: nn.Module, batch: Any) -> torch.Tensor:
    """The sum over the batch's targets: the loss of pretraining and fine-tuning."""
    return model(batch.inputs, batch.targets, reduction="sum")


def gather(batches: Batches, grad_accum: int) -> list[Any]:
    """Take a step's micro-batches, all at once: the loss counts the targets of the whole step. The last ones of a rank
    with a smaller share may be empty and are left out.
    """
    return [batch for batch in (batches.next() for _ in range(grad_accum)) if len(batch.inputs)]


def accumulate(
    model: nn.Module,
    params: Iterable[nn.Parameter],
    micro: Sequence[Any],
    loss_fn: Loss,
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
    n_targets = torch.tensor(sum(b.n_targets for b in micro), device=runtime.device)
    n_targets = runtime.all_reduce_(n_targets)
    losses = []
    for batch in micro:
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
        raise NonFinite(_report(step, runtime, bool(bad), [x.item() for x in losses], micro, int(n_targets)))
    return mean, n_stop > 0


def _report(step: int, runtime: Runtime, bad: bool, losses: list[float], micro: Sequence[Any], n_targets: int) -> str:
    """What went wrong, on which rank, in which micro-batch. A collective call."""
    mine = ""
    if bad:
        culprit = next((i for i, x in enumerate(losses) if x - x != 0), None)
        seen = "a gradient" if culprit is None else f"the loss of micro-batch {culprit + 1} of {len(losses)}"
        value = "" if culprit is None else f" ({losses[culprit]})"
        docs = "; ".join(batch.position.where() for batch in (micro if culprit is None else [micro[culprit]]))
        mine = f"{seen}{value} on rank {runtime.rank}, made of {docs}"
    found = "; ".join(text for text in runtime.gather_objects(mine) if text)
    empty = " The global batch has no target at all." if n_targets == 0 else ""
    return (
        f"step {step} is not finite: {found}.{empty} Expected finite numbers; the weights were not updated. Look at"
        " these documents, or try lower learning rates in a new run (--matrix-lr, --embedding-lr); the last checkpoint"
        " is whole (--resume)"
    )
