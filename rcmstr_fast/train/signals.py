"""Signals that end a run in good order: the step is finished, the state saved."""

import signal
import threading
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """While entered, SIGTERM, SIGINT, SIGUSR1 and SIGHUP are remembered in `received` instead of ending the process.

    A second SIGINT raises KeyboardInterrupt at once. A SIGHUP that is ignored (`nohup`) stays ignored. Outside the main
    thread nothing is installed.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, object] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            wanted = [s for s in STOPPING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
            self._before = {s: signal.signal(s, self._handle) for s in wanted}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
