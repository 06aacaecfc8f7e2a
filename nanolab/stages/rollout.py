"""Reinforcement learning's batches: prompts -> replies of the model itself -> rewards -> rows to train on.

A rollout is `examples_per_step` prompts with `num_samples` replies each, drawn from the model as it is. `Rollouts`
makes one whenever the loop asks for a micro-batch and the last one has been used up, which is after `updates_per_batch`
passes over it, each of them one optimizer step. A reply depends on the weights, the seed and its place (rollout,
prompt, sample) alone: not on the number of ranks, on the other replies or on what was drawn before. So the state is a
number; between two updates on the same rollout it holds the rollout too, because the weights that drew it are gone.

The probabilities trained are the model's own, at temperature 1 over the whole vocabulary, with every dropout off. With
another --temperature, or with --top-k, the replies come from a sharper distribution than that.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from nanolab.cli import UserError
from nanolab.data.chat import parse_reply, render_prompt
from nanolab.files import key_seed
from nanolab.inference.engine import Engine, Request
from nanolab.runtime import Runtime, print0
from nanolab.stages.config import RLConfig
from nanolab.stages.reward import reward_parts
from nanolab.stages.rl_plan import micro_batches
from nanolab.stages.rollout_log import FILE, UNWRITTEN, RolloutLog, rollout_metrics
from nanolab.stages.work import Work, generating_flops, training_flops
from nanolab.training.guards import undisturbed
from nanolab.training.policy import ADVANTAGES, NORMALISERS, Objective, logprobs


class ScoredTask(Protocol):
    """What is asked of a task; see tasks/common.py."""

    name: str

    def __len__(self) -> int: ...
    def example(self, i: int) -> Any: ...  # .messages end with the reference's turn
    def rewards(
        self, example: Any, content: Any
    ) -> dict[str, float]: ...  # content: an assistant's, as chat.parse_reply gives it


@dataclass
class RolloutReply:
    """One reply to one prompt, and what training needs to know of it; JSON as it is."""

    place: int  # in the rollout: prompt * num_samples + sample
    example: int  # of the task
    prompt: list[int]
    ids: list[int]  # with the end of turn, if the model came to it
    trained: list[bool]  # of each id: drawn from the model, not put there by a tool
    advantage: float = 0.0
    # log probabilities under the policy that drew it; empty before the first update
    old: list[float] = dataclasses.field(default_factory=list)
    # the same under the start model, where there is a --kl
    reference: list[float] = dataclasses.field(default_factory=list)


@dataclass
class MicroBatch:
    """Rows of one forward pass, padded to the longest: prompt and reply, with the trained tokens as targets."""

    replies: list[RolloutReply]
    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, -1 where nothing is trained
    advantages: Tensor  # (B,) fp32
    n_targets: int  # its share of the normaliser's Z
    old: Tensor | None = None  # (B, T) fp32, 0 where nothing is trained; None: this is the first update
    reference: Tensor | None = None
    position: Any = None  # RolloutPosition


class RolloutPosition(NamedTuple):
    """Where `Rollouts` stand. They are made when they are asked for, so that this is always after the last batch."""

    rollouts: "Rollouts"
    replies: list[RolloutReply]  # of the batch

    def json(self, runtime: Runtime | None = None) -> dict[str, Any]:
        """The same on every rank; a collective call."""
        return self.rollouts.state_dict()

    @property
    def epoch(self) -> float:
        return self.rollouts.made * self.rollouts.cfg.examples_per_step / len(self.rollouts.task)

    def where(self) -> str:
        examples = sorted({reply.example for reply in self.replies})
        return f"replies to {self.rollouts.task.name} examples {', '.join(map(str, examples))}"


def rollout_request(cfg: RLConfig, tools: Any) -> Request:
    """How replies are drawn, for training and for evaluations."""
    return Request(
        max_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_k=cfg.top_k, seed=cfg.seed, tools=tools
    )


class Rollouts:
    """`fit`'s batches. Rank r of W answers the prompts r, r + W, ... of each rollout; all samples of a prompt are on
    one rank.
    """

    def __init__(
        self,
        cfg: RLConfig,
        objective: Objective,
        model: nn.Module,
        engine: Engine,
        task: ScoredTask,
        runtime: Runtime,
        folder: Path,
        tools: Callable[[str], str] | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        """folder: where rollouts.jsonl is written. reference: the start model, where objective.kl is not 0."""
        self.cfg, self.objective, self.model, self.engine, self.task, self.runtime = (
            cfg,
            objective,
            model,
            engine,
            task,
            runtime,
        )
        self.tools, self.reference = tools, reference
        self.tokenizer = engine.tokenizer
        self._passed_over = False  # whether it was said that prompts are
        self.room = engine.limit - cfg.max_new_tokens  # tokens of a prompt at most
        self._nth(0)  # where no prompt fits, it is said now
        first = task.example(0)
        self.parts = reward_parts(cfg.reward, list(task.rewards(first, first.messages[-1]["content"])))
        self.made = 0  # rollouts so far
        self.micro: list[MicroBatch] = []  # this rank's, of the last rollout
        self.handed = 0  # micro-batches of the last rollout that `next` has returned, over all passes
        self.work, self.lengths = Work(), []  # lengths: tokens of each text of the last rollout, of all ranks
        self._metrics: dict[str, float] = {}  # of a rollout just made
        self._log = RolloutLog(folder / FILE) if runtime.is_main else None
        self._warned = False  # of a rollout without a gradient; its line says so each time

    @property
    def updates(self) -> int:
        """Passes over the last rollout that have been handed out."""
        return self.handed // len(self.micro) if self.micro else self.cfg.updates_per_batch

    @property
    def position(self) -> RolloutPosition:
        return RolloutPosition(self, [])

    def next(self) -> MicroBatch:
        """The next micro-batch of this rank; a new rollout when the last one is used up. A collective call then."""
        if self.updates == self.cfg.updates_per_batch:
            self._roll()
        if self.handed % len(self.micro) == 0:
            self.work.tokens += sum(self.lengths)
            self.work.training_flops += training_flops(self.model.config, self.lengths)
        self.handed += 1
        return self.micro[(self.handed - 1) % len(self.micro)]

    def measure(self) -> dict[str, float]:
        """Means over the rollout that the last step began with, over all ranks; nothing where it went on with an older
        one.
        """
        metrics, self._metrics = self._metrics, {}
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank; a collective call. Between two updates on one rollout it holds that rollout."""
        if self._log:
            self._log.sync()
        if self.updates == self.cfg.updates_per_batch:
            return {
                "made": self.made,
                "updates": self.cfg.updates_per_batch,
                "replies": [],
                "work": dataclasses.asdict(self.work),
            }
        mine = [dataclasses.asdict(reply) for batch in self.micro for reply in remembered(batch)]
        return {
            "made": self.made,
            "updates": self.updates,
            "replies": self._gathered(mine),
            "work": dataclasses.asdict(self.work),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.made, self.micro, self.handed = state["made"], [], 0
        replies = [RolloutReply(**reply) for reply in state["replies"]]
        self.lengths, self.work = [len(r.prompt) + len(r.ids) for r in replies], Work(**state.get("work", {}))
        if "work" not in state:
            print0(
                "note: tokens and FLOPs are counted from here on: an earlier version, which made this checkpoint, did"
                " not count them"
            )
        if replies:
            mine = [
                r for r in replies if r.place // self.cfg.num_samples % self.runtime.world_size == self.runtime.rank
            ]
            self.micro = self._batched(mine)
            self.handed = state["updates"] * len(self.micro)

    def close(self) -> None:
        if self._log:
            self._log.close()

    def _gathered(self, mine: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The records of all ranks in order of their place."""
        return sorted((r for part in self.runtime.gather_objects(mine) for r in part), key=lambda r: r["place"])

    def _roll(self) -> None:
        """Draw, score and batch a rollout; record it."""
        began, G = time.perf_counter(), self.cfg.num_samples
        with undisturbed(self.model, self.runtime.device):
            replies, flops = self._draw()
        rows = [self._scored(reply) for reply in replies]
        rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64).view(-1, G)
        for reply, row, advantage in zip(
            replies, rows, ADVANTAGES[self.objective.advantage](rewards).flatten().tolist()
        ):
            reply.advantage = row["advantage"] = advantage
        self.micro, self.handed = self._batched(replies), 0
        everywhere = self._gathered(rows)
        self.lengths = [row["length"] for row in everywhere]
        self.work.drawn += sum(row["drawn"] for row in everywhere)
        self.work.generating_flops += sum(self.runtime.gather_objects(flops))
        if self.reference is not None:
            self.work.training_flops += training_flops(self.model.config, self.lengths) // 3
        if self._log:
            self._log.write([{k: v for k, v in row.items() if k not in UNWRITTEN} for row in everywhere])
        self.made += 1
        self._metrics = rollout_metrics(everywhere, G) | {"rl/rollout_seconds": time.perf_counter() - began}
        self._tell(self._metrics)

    def _draw(self) -> tuple[list[RolloutReply], int]:
        """This rank's replies of the next rollout, and the FLOPs of drawing them."""
        cfg, P, G = self.cfg, self.cfg.examples_per_step, self.cfg.num_samples
        replies, seeds, flops = [], [], 0
        for p in range(self.runtime.rank, P, self.runtime.world_size):
            example, prompt = self._nth(self.made * P + p)
            for g in range(G):
                replies.append(RolloutReply(p * G + g, example, prompt, [], []))
                seeds.append(key_seed("reply", cfg.seed, self.made, p, g))
        size = cfg.rollout_batch_size or len(replies)
        for lo in range(0, len(replies), size):
            part = replies[lo : lo + size]
            for step in self.engine.generate(
                [r.prompt for r in part], rollout_request(cfg, self.tools), seeds[lo : lo + size]
            ):
                for new in step:
                    part[new.row].ids.append(new.token)
                    part[new.row].trained.append(not new.forced)
            flops += generating_flops(self.model.config, part)
        return replies, flops

    def _nth(self, n: int) -> tuple[int, list[int]]:
        """The n-th example of the run and its prompt's ids: every epoch is another shuffle of all.

        A prompt that leaves no room for a reply is passed over: the next one that fits is asked in its place as well.
        """
        N = len(self.task)
        epoch, at = divmod(n, N)
        key = key_seed("order", self.cfg.seed, epoch)
        order = np.random.RandomState([key >> 32, key % 2**32]).permutation(N)  # its stream is frozen (NEP 19)
        for k in range(N):
            i = int(order[(at + k) % N])
            prompt = render_prompt(self.tokenizer, self.task.example(i).messages[:-1])
            if len(prompt) <= self.room:
                return i, prompt
            if not self._passed_over:
                print0(
                    f"{self.task.name}: prompts of more than {self.room} tokens, which leave no room for"
                    f" --max-new-tokens {self.cfg.max_new_tokens}, are passed over"
                )
            self._passed_over = True
        raise UserError(
            f"task {self.task.name}: not one of {N} prompts has at most {self.room} tokens, what --max-new-tokens"
            f" {self.cfg.max_new_tokens} leaves of the {self.engine.limit} that the model reads; expected prompts that"
            " fit; lower --max-new-tokens, or take another task"
        )

    def _scored(self, reply: RolloutReply) -> dict[str, Any]:
        """The record of one reply: what rollouts.jsonl holds, its place and its length."""
        example = self.task.example(reply.example)
        values = self.task.rewards(example, parse_reply(self.tokenizer, reply.ids))
        return {
            "step": self.made * self.cfg.updates_per_batch,
            "place": reply.place,
            "example": reply.example,
            "sample": reply.place % self.cfg.num_samples,
            "prompt": self.tokenizer.decode(reply.prompt),
            "reply": self.tokenizer.decode(reply.ids),
            "tokens": sum(reply.trained),
            "length": len(reply.prompt) + len(reply.ids),
            "drawn": len(reply.ids),
            "ended": reply.ids[-1] == self.tokenizer.special("<|assistant_end|>"),
            "parts": {name: float(v) for name, v in values.items()},
            "reward": sum(part.of(values) for part in self.parts),
        }

    def _batched(self, replies: list[RolloutReply]) -> list[MicroBatch]:
        """Micro-batches of rows of like lengths, so that little is padded."""
        B, ordered = self.cfg.device_batch_size, sorted(replies, key=lambda r: (len(r.prompt) + len(r.ids), r.place))
        batches = [self._rows(ordered[i : i + B]) for i in range(0, len(ordered), B)]
        nothing, none = (
            torch.zeros(0, 1, dtype=torch.int64, device=self.runtime.device),
            torch.zeros(0, device=self.runtime.device),
        )
        empty = [MicroBatch([], nothing, nothing, none, 0)] * (
            micro_batches(self.cfg, self.runtime.world_size) - len(batches)
        )
        if self.reference is not None:
            with torch.no_grad():
                for batch in batches:
                    if batch.reference is None:
                        batch.reference = logprobs(self.reference, batch.inputs, batch.targets)
        return batches + empty

    def _rows(self, replies: list[RolloutReply]) -> MicroBatch:
        T = max(len(r.prompt) + len(r.ids) for r in replies) - 1
        inputs, targets = np.full((len(replies), T), self.tokenizer.bos), np.full((len(replies), T), -1)
        for row, r in enumerate(replies):
            ids, at = r.prompt + r.ids, len(r.prompt) - 1  # the last prompt token's target is the reply's first
            inputs[row, : len(ids) - 1] = ids[:-1]
            targets[row, at : at + len(r.ids)] = np.where(r.trained, r.ids, -1)
        device = self.runtime.device
        batch = MicroBatch(
            replies,
            torch.from_numpy(inputs).to(device),
            torch.from_numpy(targets).to(device),
            torch.tensor([r.advantage for r in replies], dtype=torch.float32, device=device),
            NORMALISERS[self.objective.normaliser].total(torch.from_numpy(targets >= 0)),
            position=RolloutPosition(self, replies),
        )
        for name in ("old", "reference"):
            if getattr(replies[0], name):
                setattr(batch, name, torch.stack([_padded(r, getattr(r, name), T) for r in replies]).to(device))
        return batch

    def _tell(self, m: dict[str, float]) -> None:
        """One line of what the model did, as often as steps are logged; and a warning where nothing can be learnt from
        it.
        """
        parts = " | ".join(f"{k.removeprefix('rl/part/')} {v:.3f}" for k, v in m.items() if k.startswith("rl/part/"))
        if self.cfg.log_every > 0 and (self.made - 1) * self.cfg.updates_per_batch % self.cfg.log_every == 0:
            print0(
                f"rollout {self.made:05d} | reward {m['rl/reward']:7.4f} | {parts} | {m['rl/tokens']:5.1f} tokens |"
                f" ended {m['rl/ended']:4.0%} | mixed groups {m['rl/mixed']:4.0%} | {m['rl/rollout_seconds']:.1f} s"
            )
        if not m["rl/mixed"] and not self._warned:
            self._warned = True
            why = "with --kl alone to move the weights" if self.objective.kl else "the gradient is zero"
            print0(
                f"warning: all {self.cfg.num_samples} replies to each of the {self.cfg.examples_per_step} prompts have"
                f" the same reward, so every advantage is 0: {why}. Expected some that differ; try easier or harder"
                " examples, more --num-samples, a higher --temperature, or other --reward parts"
            )


def _padded(reply: RolloutReply, values: list[float], T: int) -> Tensor:
    """(T,) fp32: the values of a reply's ids at their places in a row."""
    row = torch.zeros(T)
    row[len(reply.prompt) - 1 : len(reply.prompt) - 1 + len(values)] = torch.tensor(values)
    return row


def remembered(batch: MicroBatch) -> list[RolloutReply]:
    """The replies with the log probabilities that the batch has got since."""
    found = []
    for row, r in enumerate(batch.replies):
        span = slice(len(r.prompt) - 1, len(r.prompt) - 1 + len(r.ids))
        old, reference = ([] if t is None else t[row, span].tolist() for t in (batch.old, batch.reference))
        found.append(dataclasses.replace(r, old=old, reference=reference))
    return found
