"""study/turns.py: the order of turns, and what their times say."""
from study.turns import in_turn, overlap, quartiles


def test_turns_change_their_order():
    order = []

    class FakeWorker:
        def __init__(self, name):
            self.name = name

        def ask(self, command):
            order.append(self.name)
            return [command]
    answers, = in_turn({name: FakeWorker(name) for name in "abc"}, 3, ("train",))
    assert "".join(order) == "abcbcacab"
    assert answers == {name: ["train"] * 3 for name in "abc"}


def test_quartiles_and_whether_they_overlap():
    assert quartiles([3.0]) == (3, 3, 3)
    assert quartiles([5.0, 1.0, 2.0, 4.0, 3.0]) == (2, 3, 4)
    assert overlap((2, 3, 4), (4, 5, 6)) and overlap((4, 5, 6), (2, 4)) and overlap((1, 9), (2, 3))
    assert not overlap((2, 3, 4), (4.5, 5, 6)) and not overlap((4.5, 6), (2, 3, 4))
