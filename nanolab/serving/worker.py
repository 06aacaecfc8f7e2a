"""Worker threads: each replica of a model runs its engine in a thread; all replicas share one queue.

Requests come from the event loop's thread and tokens go back to it: one call of `post` after each step. No lock is held
while an engine computes, so that the event loop never waits for one."""

import logging
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nanolab.inference.engine import Engine, Request, TokenOutput
from nanolab.runtime import out_of_memory
from nanolab.serving.errors import RETRY_AFTER, ApiError, broken, draining, overloaded

log = logging.getLogger(__name__)

FAILURES = 20

# (function, *arguments): have the function called in the thread that submits, as call_soon_threadsafe does
Post = Callable[..., Any]
# (row of the submission, its next token, or why there will be none)
Deliver = Callable[[int, "TokenOutput | ApiError"], None]


class RowFailed(ApiError):
    """This row gets no further token; the engine goes on. code: out_of_memory, non_finite_logits or engine_failed."""

    def __init__(self, code: str, why: str):
        memory = code == "out_of_memory"
        super().__init__(503 if memory else 500, why, code=code, headers=RETRY_AFTER if memory else None)


class Pending:
    """One row from the queue to its last token. replica: None while it waits. number: the engine's; -1: it has none
    yet.

    done: nothing will be delivered any more.
    """

    def __init__(self, request: Request, index: int, deliver: Deliver):
        self.request, self.index, self.deliver = request, index, deliver
        self.replica: Replica | None = None
        self.number = -1
        self.done = False

    def hand_over(self, item: "TokenOutput | ApiError") -> None:
        """Called in the submitting thread."""
        if not self.done:
            self.done = isinstance(item, ApiError) or item.finish is not None
            self.deliver(self.index, item)


class ModelServer:
    """A model under its name: replicas on as many threads, and a queue of at most `queue` rows beside those that run.

    kind: base, sft or rl.
    """

    def __init__(self, name: str, engines: Sequence[Engine], queue: int, kind: str):
        self.name, self.size, self.kind = name, queue, kind
        self.tokenizer, self.limit = engines[0].tokenizer, engines[0].limit
        self.longest = int(self.tokenizer.token_bytes().max())  # bytes of a token
        self.changed = threading.Condition()  # guards all that follows
        self.queue: deque[Pending] = deque()
        self.replicas = [Replica(self, engine) for engine in engines]
        self.draining = self.stopping = False
        self.post: Post

    def start(self, post: Post) -> None:
        self.post = post
        for replica in self.replicas:
            replica.start()

    def submit(self, requests: Sequence[Request], deliver: Deliver) -> list[Pending]:
        """Queue all of these rows or none. `deliver` is called, in the thread that `post` calls in, for every token.

        Raises UserError for a request that the engine would refuse, and ApiError: queue_full, draining, engine_failed
        when no replica is left."""
        for request in requests:
            request.check(self.limit)
        with self.changed:
            self.admit(len(requests))
            jobs = [Pending(request, i, deliver) for i, request in enumerate(requests)]
            self.queue.extend(jobs)
            self.changed.notify_all()
        return jobs

    def admit(self, rows: int) -> None:
        """Raise what `submit` would for so many rows."""
        if self.draining:
            raise draining()
        if not self.alive:
            raise broken("; ".join(self.errors))
        if self.running + len(self.queue) + rows > self.places:
            raise overloaded()

    def cancel(self, jobs: Sequence[Pending]) -> bool:
        """Nothing more is delivered, and the rows' places are free before the next step. Whether any was still going
        on.
        """
        with self.changed:
            going = [job for job in jobs if not job.done]
            for job in going:
                job.done = True
                if job.replica:
                    job.replica.cancelled.append(job)
                elif job in self.queue:
                    self.queue.remove(job)
            self.changed.notify_all()
        return bool(going)

    def stop(self) -> None:
        """End the threads after their current step; whoever still waits is told so. Does not wait for them."""
        with self.changed:
            self.draining = self.stopping = True
            self.changed.notify_all()

    def join(self) -> None:
        for replica in self.replicas:
            replica.join()

    @property
    def alive(self) -> list["Replica"]:
        return [replica for replica in self.replicas if not replica.error]

    @property
    def errors(self) -> list[str]:
        return [replica.error for replica in self.replicas if replica.error]

    @property
    def running(self) -> int:
        return sum(len(replica.jobs) for replica in self.replicas)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.queue)

    @property
    def places(self) -> int:
        """Rows that may be running and waiting together."""
        return self.size + sum(replica.engine.max_rows for replica in self.alive)


class Replica(threading.Thread):
    """An engine and its thread. Of several replicas the one with the fewest rows takes the next from the queue.

    A step that fails ends the rows it was for, and the engine begins anew. The replica ends where that fails too, and
    after FAILURES such steps without a reply that came to its end."""

    def __init__(self, served: ModelServer, engine: Engine):
        super().__init__(daemon=True, name=f"engine of {served.name}")
        self.served, self.engine = served, engine
        self.jobs: list[Pending] = []
        self.cancelled: list[Pending] = []
        self.rows: dict[int, Pending] = {}  # by the engine's number of the row; of this thread alone
        self.error = ""
        self.failures = 0  # steps that failed since a reply came to its end

    def run(self) -> None:
        if self.engine.runtime.device.type == "cuda":
            torch.cuda.set_device(self.engine.runtime.device)
        served = self.served
        try:
            while self._exchange():
                try:
                    self._step()
                except Exception as error:
                    self._recover(error)
                while not (self.jobs or served.queue or served.stopping) and self.engine.prepare():
                    pass
        except BaseException as error:
            traceback.print_exception(error)
            self._fail(error)
        finally:
            self.engine.close()

    def _step(self) -> None:
        step = self.engine.step()
        failed, self.engine.failed = self.engine.failed, []
        out = [(self.rows[new.row], new) for new in step] + [
            (self.rows[row], RowFailed(code, text)) for row, code, text in failed
        ]
        if any(new.finish for new in step):
            self.failures = 0
        self._drop([job for job, new in out if isinstance(new, ApiError) or new.finish])
        self._post(out)

    def _recover(self, error: Exception) -> None:
        """Begin anew without the rows of the step that failed."""
        self.failures += 1
        if self.failures >= FAILURES:
            raise error
        traceback.print_exception(error)
        self.engine.live.clear()
        self.engine.reset()
        jobs = list(self.rows.values())
        self._drop(jobs)
        self._post([(job, RowFailed("engine_failed", described(error))) for job in jobs])

    def _drop(self, jobs: Sequence[Pending]) -> None:
        """Give the places of these jobs free."""
        if not jobs:
            return
        for job in jobs:
            self.rows.pop(job.number, None)
        gone = {id(job) for job in jobs}
        with self.served.changed:
            self.jobs = [job for job in self.jobs if id(job) not in gone]

    def _exchange(self) -> bool:
        """Wait for something to do; drop the rows that were cancelled, take new ones. False: time to end."""
        served = self.served
        with served.changed:
            served.changed.wait_for(lambda: served.stopping or self.jobs or (served.queue and self._is_next))
            if served.stopping:
                self._post([(job, draining()) for job in (*self.jobs, *served.queue)])
                self.jobs.clear()
                served.queue.clear()
                return False
            cancelled, self.cancelled = self.cancelled, []
        for job in cancelled:
            self.engine.cancel(job.number)
        self._drop(cancelled)
        taken: list[Pending] = []
        with served.changed:
            while served.queue and len(self.jobs) < self.engine.max_rows and self._is_next:
                job = served.queue.popleft()
                job.replica = self
                self.jobs.append(job)
                taken.append(job)
                served.changed.notify_all()
        for job in taken:
            try:
                job.number = self.engine.add(job.request)
                self.rows[job.number] = job
            except Exception as error:
                log.error("a request could not be taken", exc_info=error)
                self._drop([job])
                self._post(
                    [(job, RowFailed("out_of_memory" if out_of_memory(error) else "engine_failed", described(error)))]
                )
        return True

    @property
    def _is_next(self) -> bool:
        return len(self.jobs) == min(len(replica.jobs) for replica in self.served.alive)

    def _post(self, out: Sequence[tuple[Pending, "TokenOutput | ApiError"]]) -> None:
        if out:
            self.served.post(hand_over, out)

    def _fail(self, error: BaseException) -> None:
        """Tell everybody whose row this engine had, and those in the queue too if no other engine is left."""
        served = self.served
        with served.changed:
            self.error = described(error)
            jobs, self.jobs = self.jobs, []
            if not served.alive:
                jobs += served.queue
                served.queue.clear()
            served.changed.notify_all()
        self._post([(job, broken(self.error)) for job in jobs])


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def hand_over(out: Sequence[tuple[Pending, "TokenOutput | ApiError"]]) -> None:
    for job, item in out:
        job.hand_over(item)
