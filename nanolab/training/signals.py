"""SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C as a request to save and leave: after the current step, or in the midst
of an evaluation.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# a closed terminal hangs up; schedulers send SIGUSR1 or 2
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Inside `with`, the first of NUMBERS is only noted in `.number`; a later SIGINT ends the process at once.

    A SIGHUP, SIGUSR1 or SIGUSR2 that was ignored before stays ignored, as under nohup. Ending at once is safe at any
    moment: what is on disk is written so that a kill cannot damage it."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            taken = [
                n for n in NUMBERS if n in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(n) != signal.SIG_IGN
            ]
            self._before = {n: signal.signal(n, self._note) for n in taken}
        return self

    def asked(self) -> bool:
        """Whether this process was asked to stop. The ranks agree where they meet next."""
        return self.number > 0

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.number = self.number or number
        text = (
            f"\n{signal.Signals(number).name}: finishing this step (an evaluation is left), then saving and leaving;"
            " Ctrl-C again leaves at once\n"
        )
        os.write(2, text.encode())  # not print: a handler may interrupt a print
