"""study/turns.py: the order of turns, and what their times say."""
import pytest

from engine.options import UserError
from study.turns import Worker, in_turn, overlap, quartiles


class Careful:
    """A Worker's object that finds a mistake, late."""

    def __init__(self, number):
        self.number = number

    def double(self, times):
        if times > 1:
            raise UserError("no compiler: install one")
        return 2 * self.number


@pytest.mark.slow
def test_a_mistake_in_a_worker_is_a_line(capfd):
    worker = Worker(Careful, 21)
    try:
        assert worker.ask("double", 1) == 42
        with pytest.raises(UserError, match="exit code 2"):
            worker.ask("double", 2)
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].endswith("error: no compiler: install one")
    finally:
        worker.close()


def test_turns_change_their_order():
    order = []

    class FakeWorker:
        def __init__(self, name):
            self.name = name

        def ask(self, command):
            order.append(self.name)
            return [command]
    answers = in_turn({name: FakeWorker(name) for name in "abc"}, 3, "train")
    assert "".join(order) == "abcbcacab"
    assert answers == {name: ["train"] * 3 for name in "abc"}


def test_quartiles_and_whether_they_overlap():
    assert quartiles([3.0]) == [3, 3, 3]
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == [2, 3, 4]
    assert overlap((2, 3, 4), (4, 5, 6)) and overlap((4, 5, 6), (2, 4)) and overlap((1, 9), (2, 3))
    assert not overlap((2, 3, 4), (4.5, 5, 6)) and not overlap((4.5, 6), (2, 3, 4))
