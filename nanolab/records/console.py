"""The step line on the terminal: the same width at every step, and the time that is left."""

import statistics
from collections import deque


def clock(seconds: float | None) -> str:
    """Seconds as h:mm:ss in 9 columns; dashes where unknown."""
    if seconds is None:
        return f"{'-:--:--':>9}"
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60:3d}:{minutes % 60:02d}:{s:02d}"


def mfu_text(mfu: float | None) -> str:
    """Percent of the device's peak FLOP/s in 7 columns; "unknown" where the peak is."""
    return "unknown" if mfu is None else f"{mfu:6.1f}%"


def step_line(
    step: int,
    total: int | None,
    *,
    progress: float,
    loss: float,
    lrm: float,
    dt: float,
    tokens: int,
    mfu: float | None,
    epoch: float,
    elapsed: float,
    left: float | None,
) -> str:
    """One line for a finished step. dt, elapsed, left: seconds. tokens: of this step, all ranks. total: None if the
    clock ends the run.
    """
    width = max(5, len(str(total or 0)))
    of = f"/{total:0{width}d}" if total is not None else ""
    return (
        f"step {step:0{width}d}{of} {100 * progress:5.1f}% | loss {loss:8.4f} | lrm {lrm:4.2f} | {1000 * dt:9.1f} ms | "
        f"{tokens / dt:11,.0f} tok/s | mfu {mfu_text(mfu)} | epoch {epoch:6.2f} | {clock(elapsed)} | eta {clock(left)}"
    )


class Eta:
    """Seconds left, from the median of the last steps: the slow first ones (compilation, cold caches) do not count for
    long.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=50)

    def after(self, dt: float, steps_left: int) -> float | None:
        """Note a step of `dt` seconds. None until three steps are known."""
        self._recent.append(dt)
        return steps_left * statistics.median(self._recent) if len(self._recent) >= 3 else None
