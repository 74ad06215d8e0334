"""Many requests at a time: whatever fails, no reply is lost and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from stackllama.evaluate.asking import Asking, Budget, Prices, Request
from stackllama.evaluate.replies import Reply

REQUESTS = [Request(str(at), {"messages": [{"role": "user", "content": "?"}]}) for at in range(9)]


def run(asking: Asking) -> list[BaseException]:
    """What it raised; fails where it does not end."""
    raised: list[BaseException] = []

    def end(action: Callable[[Callable[[int], None]], bool]) -> None:
        try:
            action(lambda _: None)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=end, args=(asking.run,), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "somebody waits for ever"
    return raised


@pytest.mark.parametrize("fails", ["settle", "take"])
def test_where_the_budget_fails_the_reply_is_kept_and_all_end(fails: str) -> None:
    budget = Budget(Prices(1.0, 1.0), 1.0, longest=10)
    good = getattr(budget, fails)
    left = [2]

    def bad(*given: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise OverflowError("integer division result too large for a float")
        return good(*given)

    setattr(budget, fails, bad)
    asked: list[str] = []
    kept: list[str] = []
    lock = threading.Lock()

    def ask(request: Request) -> Reply:
        with lock:
            asked.append(request.key)
        return Reply("[[A]]", False, 1, 1, counted=True)

    def arrived(request: Request, _: Reply) -> Sequence[Request]:
        kept.append(request.key)
        return []

    raised = run(Asking(REQUESTS, ask=ask, arrived=arrived, budget=budget, at_once=3))
    assert [type(error) for error in raised] == [OverflowError]
    assert sorted(kept) == sorted(asked)
    assert len(kept) < len(REQUESTS)
