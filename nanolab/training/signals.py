"""SIGTERM and Ctrl-C as a request to stop after the current step."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Inside `with`, the first SIGTERM or SIGINT is only noted in `.number`; a later SIGINT ends the process at once.

    Ending at once is safe at any moment: what is on disk is written so that a kill cannot damage it.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.number = self.number or number
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving and leaving; Ctrl-C again leaves at once\n"
        os.write(2, text.encode())  # not print: a handler may interrupt a print
