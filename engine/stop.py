"""Ctrl-C and SIGTERM, which a run answers after the step that it is in."""
import signal


class StopSignal:
    """A context in which Ctrl-C and SIGTERM only set `number`, for the loop to finish its step.

    A second Ctrl-C aborts a run of one process.
    """

    def __init__(self, alone: bool):
        self.alone = alone
        self.number = 0

    def __enter__(self):
        numbers = signal.SIGINT, signal.SIGTERM
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame):
        if self.number and self.alone:
            raise KeyboardInterrupt
        self.number = number
