"""Prefetch: packing and tokenising run ahead of training in a thread of their own."""

import queue
import threading
from typing import Any, Protocol

import torch

from nanolab.data.packing import Batch, Position
from nanolab.runtime import Runtime

AHEAD = 4  # micro-batches that are made beyond those of the next step


class Source(Protocol):
    """Batches of one rank: `PackedBatches` and its like."""

    @property
    def position(self) -> Position: ...  # after the last batch
    def next(self) -> Batch: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Prefetch:
    """The batches of a `Source` on the runtime's device, made up to `depth` ahead: the micro-batches of a step and
    AHEAD more.

    A step takes all its micro-batches at once, so a shorter queue would empty at every step. A batch of B rows of T
    tokens is 16 B T bytes, on a GPU once there and once in pinned memory: 1 MiB for 32 rows of 2,048, 12 MiB ahead of
    steps of 8 micro-batches. `position` is that of the batch that `next` returned last, not of those made ahead.
    `waits`: calls of `next` that found none ready."""

    def __init__(self, source: Source, runtime: Runtime, depth: int = 1 + AHEAD) -> None:
        self._source, self._runtime, self._depth = source, runtime, depth
        self.waits, self.position = 0, source.position
        self._thread: threading.Thread | None = None

    def next(self) -> Batch:
        """The next micro-batch of this rank. Raises what went wrong in the thread, now and at each later call."""
        if self._thread is None:
            self._stop, self._queue = threading.Event(), queue.Queue(self._depth)
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()
        self.waits += self._queue.empty()
        batch, copied = self._queue.get()
        if isinstance(batch, BaseException):
            self._queue.put((batch, copied))
            raise batch
        if copied is not None:
            stream = torch.cuda.current_stream(self._runtime.device)
            stream.wait_event(copied)
            for tensor in batch[:2]:
                # its memory belongs to the copying stream: not to be reused before this one is done
                tensor.record_stream(stream)
        self.position = batch.position
        return batch

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batch that `state` was taken at; batches made ahead are dropped."""
        self.close()
        self._source.load_state_dict(state)
        self.position = self._source.position

    def close(self) -> None:
        """End the thread. What it made ahead is lost: to go on after this, load a state."""
        if self._thread is None:
            return
        self._stop.set()
        while self._thread.is_alive():  # it may be waiting for a free place
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                pass
        self._thread = None

    def _work(self) -> None:
        try:
            device, stream = self._runtime.device, None
            if device.type == "cuda":
                torch.cuda.set_device(device)  # it is 0 in every new thread, and leaving a stream goes back to it
                stream = torch.cuda.Stream(device)
            while not self._stop.is_set():
                batch, copied = self._source.next(), None
                if stream is None:
                    inputs, targets = (t.to(device) for t in batch[:2])
                else:
                    # Each batch has pinned memory of its own, which torch's allocator hands out again only once the
                    # copy that reads it is done; the copy runs beside the computation, and `next` lets that wait for
                    # it.
                    with torch.cuda.stream(stream):
                        inputs, targets = (t.pin_memory().to(device, non_blocking=True) for t in batch[:2])
                        copied = stream.record_event()
                self._queue.put((batch._replace(inputs=inputs, targets=targets), copied))
        except BaseException as error:  # not swallowed: `next` raises it where it can be handled
            self._queue.put((error, None))
