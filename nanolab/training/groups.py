"""The two kinds of parameter groups of the optimizer: what a rank owns of each, its messages and its update.

AdamW's parameters of TINY elements or more are split into equal ranges of the flattened parameter, one per rank (any
number of elements works; the last ranks' ranges may be shorter, or empty). Smaller ones are whole on every rank, where
a message would cost more than the arithmetic. Muon's matrices are whole, each on one rank.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nanolab.runtime import Runtime
from nanolab.training.muon import POLAR_EXPRESS, muon_update_

TINY = 1024  # elements; smaller AdamW parameters are replicated
ALIGN = 64  # elements; ranges end on multiples of it, which keeps vector loads aligned on every rank
CHUNK = {"cpu": 1 << 20}  # elements of a stack of matrices updated at once: on a CPU, temporaries stay in its cache
BIG_CHUNK = 1 << 26  # elsewhere: few launches, and temporaries of 256 MB

# torch 2.13 renamed these two and warns about the old names, which are all that 2.9 to 2.12 have. gloo does both.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Piece(NamedTuple):
    """A range of a parameter's state that this rank holds, flattened."""

    key: str  # "<parameter>/<slot>"
    start: int  # this piece is elements [start, stop) of the slot
    tensor: Tensor  # 1-D view of the state
    saved: bool  # whether this rank writes it (of replicated state only rank 0 does)

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


class Group:
    """What both kinds share: the group's dict, its parameters, and the messages of a step that are under way."""

    def __init__(self, group: dict[str, Any], runtime: Runtime):
        self.group, self.rank, self.world = group, runtime.rank, runtime.world_size
        self.names = [name for name, _ in group["params"]]
        self.params = [p for _, p in group["params"]]
        self.forget()

    def forget(self) -> None:
        """Drop this step's messages and reduced gradients."""
        self.messages: list[tuple[dist.Work, Any]] = []  # handle, and every tensor that it reads or writes
        self.grads: list[Tensor] = []  # summed over ranks, of what this rank owns; true once `wait` has returned

    def update_bytes(self) -> int:
        """What `update` makes and drops."""
        return 0

    def sent_bytes(self) -> int:
        """What `gather` adds to that."""
        return 0

    def wait(self) -> None:
        for work, _ in self.messages:
            work.wait()
        self.messages = []


class AdamWGroup(Group):
    """AdamW with decoupled decay, bias correction, and eps outside the root, on flat ranges of the parameters.

    torch's fused kernel does exactly that, in one pass over memory, which is what bounds it; on CPU it was several
    times as fast as the same in-place operators on cache-sized chunks or its foreach version."""

    def __init__(self, group: dict[str, Any], runtime: Runtime):
        super().__init__(group, runtime)
        self.flat = [p.detach().view(-1) for p in self.params]
        self.split = [self.world > 1 and p.numel() >= TINY for p in self.params]
        self.width = [self._width(f.numel()) if split else f.numel() for f, split in zip(self.flat, self.split)]
        self.start = [
            min(self.rank * w, f.numel()) if split else 0 for f, w, split in zip(self.flat, self.width, self.split)
        ]
        self.own = [f[s : s + w] for f, s, w in zip(self.flat, self.start, self.width)]
        self.exp_avg = [own.new_zeros(own.shape) for own in self.own]  # zeros_like on meta imports sympy, two seconds
        self.exp_avg_sq = [own.new_zeros(own.shape) for own in self.own]
        # what the fused kernel wants: one per tensor, on its device
        self.steps = [torch.zeros((), device=own.device) for own in self.own]

    def _width(self, numel: int) -> int:
        return -(-numel // (self.world * ALIGN)) * ALIGN

    def reduce(self) -> None:
        """Launch the sums over ranks of this rank's ranges."""
        grads = [_grad(name, p).reshape(-1) for name, p in zip(self.names, self.params)]
        if self.world == 1:
            self.grads = grads
            return
        whole = [g for g, split in zip(grads, self.split) if not split]
        shared = torch.cat(whole) if whole else None
        replicated = iter(shared.split([g.numel() for g in whole]) if whole else ())
        if shared is not None:
            self.messages.append((dist.all_reduce(shared, async_op=True), shared))
        for g, own, width, split in zip(grads, self.own, self.width, self.split):
            if not split:
                self.grads.append(next(replicated))
                continue
            source, target = _padded(g, width * self.world), g.new_empty(width)
            self.messages.append((_reduce_scatter(target, source, async_op=True), (source, target)))
            self.grads.append(target[: own.numel()])

    def counted_grads(self) -> list[Tensor]:
        """This rank's share of the summed gradients: over all ranks every element is in exactly one share."""
        return [g for g, split in zip(self.grads, self.split) if split or self.rank == 0]

    def update(self, step: int) -> None:
        g, (beta1, beta2) = self.group, self.group["betas"]
        held = [i for i, own in enumerate(self.own) if own.numel()]
        for i in held:
            self.steps[i].fill_(step - 1)  # the kernel counts up before it uses it
        lists = [[column[i] for i in held] for column in (self.own, self.grads, self.exp_avg, self.exp_avg_sq)]
        adamw(
            *lists,
            [],
            [self.steps[i] for i in held],
            fused=True,  # pyrefly: ignore[bad-keyword-argument]
            amsgrad=False,
            maximize=False,
            lr=g["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=g["eps"],
            weight_decay=g["weight_decay"],
        )

    def gather(self) -> None:
        """Launch the exchange of updated ranges, straight into the parameter where the ranges fill it exactly."""
        self.arrivals: list[tuple[Tensor, Tensor]] = []
        for flat, own, width, split in zip(self.flat, self.own, self.width, self.split):
            if not split:
                continue
            if flat.numel() == width * self.world:
                self.messages.append((_all_gather(flat, own, async_op=True), (flat, own)))
                continue
            source, target = _padded(own, width), flat.new_empty(width * self.world)
            self.messages.append((_all_gather(target, source, async_op=True), (source, target)))
            self.arrivals.append((flat, target))

    def finish(self) -> None:
        self.wait()
        for flat, target in self.arrivals:
            flat.copy_(target[: flat.numel()])
        self.forget()

    def step_bytes(self) -> int:
        """What a step holds beside parameters, gradients and state: this rank's sums, and where ranges do not fill a
        parameter a copy of it with zeros after it.
        """
        widths = [(width, f.numel()) for f, width, split in zip(self.flat, self.width, self.split) if split]
        padded = sum(width * self.world for width, numel in widths if width * self.world != numel)
        whole = sum(f.numel() for f, split in zip(self.flat, self.split) if not split) if self.world > 1 else 0
        return 4 * (sum(width for width, _ in widths) + padded + whole)

    def sent_bytes(self) -> int:
        """What joins it after the update: the ranges that zeros have to fill, of the last rank."""
        return 4 * sum(
            width
            for f, width, split in zip(self.flat, self.width, self.split)
            if split and width * self.world != f.numel()
        )

    def pieces(self) -> Iterator[Piece]:
        for i, name in enumerate(self.names):
            for slot, state in (("exp_avg", self.exp_avg[i]), ("exp_avg_sq", self.exp_avg_sq[i])):
                saved = state.numel() > 0 and (self.split[i] or self.rank == 0)
                yield Piece(f"{name}/{slot}", self.start[i], state, saved)

    def state(self) -> list[Tensor]:
        return [*self.exp_avg, *self.exp_avg_sq]

    def sizes(self) -> dict[str, int]:
        """Elements of every slot, of all ranks."""
        return {
            f"{name}/{slot}": f.numel() for name, f in zip(self.names, self.flat) for slot in ("exp_avg", "exp_avg_sq")
        }


class MuonGroup(Group):
    """Muon on whole matrices of one shape; rank r owns the r-th run of ceil(K / world) of the K matrices."""

    def __init__(self, group: dict[str, Any], runtime: Runtime):
        super().__init__(group, runtime)
        self.dtype = torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float32  # fp16 has too little range
        shapes = {tuple(p.shape) for p in self.params}
        if len(shapes) != 1 or len(min(shapes)) != 2:
            raise ValueError(
                f"Muon group {group['name']!r} holds shapes {sorted(shapes)}; expected matrices of one shape; make one"
                " group per shape"
            )
        if not 1 <= group["ns_steps"] <= len(POLAR_EXPRESS):
            raise ValueError(
                f"ns_steps of group {group['name']!r} is {group['ns_steps']}; expected 1 to {len(POLAR_EXPRESS)}"
            )
        self.shape = m, n = min(shapes)
        self.per_rank = -(-len(self.params) // self.world)
        first = self.rank * self.per_rank
        self.own = self.params[first : first + self.per_rank]
        self.own_names = self.names[first : first + self.per_rank]
        like = self.params[0].detach()
        self.momentum = like.new_zeros(len(self.own), m, n)
        self.second = like.new_zeros((len(self.own), m, 1) if m >= n else (len(self.own), 1, n))
        self.chunk = max(1, CHUNK.get(runtime.device.type, BIG_CHUNK) // (m * n))

    def forget(self) -> None:
        super().forget()
        self.stack: Tensor | None = None

    def reduce(self) -> None:
        """Launch the sums over ranks of this rank's matrices."""
        grads = [_grad(name, p) for name, p in zip(self.names, self.params)]
        if self.world == 1:
            self.grads = grads
            return
        # what lies past the last matrix is never read
        self.stack = grads[0].new_empty(self.per_rank * self.world, *self.shape)
        torch.stack(grads, out=self.stack[: len(grads)])
        target = torch.empty_like(self.stack[: self.per_rank])
        self.messages.append((_reduce_scatter(target, self.stack, async_op=True), (self.stack, target)))
        self.grads = list(target[: len(self.own)].unbind())

    def counted_grads(self) -> list[Tensor]:
        """This rank's share of the summed gradients: over all ranks every element is in exactly one share."""
        return self.grads

    def update(self, step: int) -> None:
        g = self.group
        for i in range(0, len(self.own), self.chunk):
            run = slice(i, i + self.chunk)
            p = _stacked(self.own[run])
            muon_update_(
                p,
                _stacked(self.grads[run]),
                self.momentum[run],
                self.second[run],
                lr=g["lr"],
                mu=g["momentum"],
                beta2=g["beta2"],
                weight_decay=g["weight_decay"],
                steps=g["ns_steps"],
                dtype=self.dtype,
            )
            if len(p) > 1:
                torch._foreach_copy_(self.own[run], p.unbind())

    def gather(self) -> None:
        """Launch the exchange of updated matrices, into the memory that the gradients came in."""
        if self.world == 1:
            return
        source = torch.empty_like(self.stack[: self.per_rank])
        if self.own:
            torch.stack(self.own, out=source[: len(self.own)])
        self.messages.append((_all_gather(self.stack, source, async_op=True), (self.stack, source)))

    def finish(self) -> None:
        self.wait()
        if self.world > 1:
            torch._foreach_copy_(self.params, self.stack[: len(self.params)].unbind())
        self.forget()

    def step_bytes(self) -> int:
        """What a step holds beside parameters, gradients and state: all gradients in one stack, and this rank's
        sums.
        """
        m, n = self.shape
        return 4 * self.per_rank * m * n * (self.world + 1) if self.world > 1 else 0

    def sent_bytes(self) -> int:
        """What joins it after the update: this rank's matrices on their way to the others."""
        m, n = self.shape
        return 4 * self.per_rank * m * n if self.world > 1 else 0

    def update_bytes(self) -> int:
        """Of the stack of matrices that are updated at once: itself and its gradients, the mean of gradient and
        momentum, three powers of that, two products.
        """
        m, n = self.shape
        matrices = min(self.chunk, len(self.own))
        stacks = 8 if matrices > 1 else 0  # bytes; one matrix is a view
        return matrices * (m * n * (stacks + 4 + 3 * self.dtype.itemsize) + 2 * min(m, n) ** 2 * self.dtype.itemsize)

    def pieces(self) -> Iterator[Piece]:
        for i, name in enumerate(self.own_names):
            for slot, state in (("momentum", self.momentum[i]), ("second_moment", self.second[i])):
                yield Piece(f"{name}/{slot}", 0, state.view(-1), True)

    def state(self) -> list[Tensor]:
        return [self.momentum, self.second]

    def sizes(self) -> dict[str, int]:
        """Elements of every slot, of all ranks."""
        m, n = self.shape
        return {
            f"{name}/{slot}": size
            for name in self.names
            for slot, size in (("momentum", m * n), ("second_moment", m if m >= n else n))
        }


KINDS = {"adamw": AdamWGroup, "muon": MuonGroup}


def _grad(name: str, p: nn.Parameter) -> Tensor:
    if p.grad is None:
        raise RuntimeError(
            f"parameter {name} has no gradient; expected one for every parameter of the optimizer; use it in forward or"
            " leave it out of param_groups"
        )
    return p.grad


def _padded(x: Tensor, numel: int) -> Tensor:
    """x (1-D, contiguous) with zeros after it; x itself where it has that length."""
    return x if x.numel() == numel else torch.cat((x, x.new_zeros(numel - x.numel())))


def _stacked(tensors: list[Tensor]) -> Tensor:
    """(k, ...): a new tensor, but a view where there is only one."""
    return tensors[0].detach()[None] if len(tensors) == 1 else torch.stack(tensors)
