"""study/turns.py: the order of turns."""
from study.turns import in_turn


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
