"""Many requests to a judge at a time, within a budget: who asks next, what is left to spend, and how it ends.

Threads wait for the server; what comes is handed over one reply at a time. Whether it ends by a failure, at the budget
or by Ctrl-C, no further request is made, and those under way are waited for, since they are paid for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stackllama.evaluate.endpoint import tokens_of
from stackllama.evaluate.replies import Reply

OVERHEAD = 64
"""Tokens that a chat template may add, where the price of a request is bounded."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be asked. key: of its reply; body: what is posted; again: whether it is asked a second time, since the
    first reply could not be read; about: what a reader of the replies may want to know.
    """

    key: str
    body: dict[str, Any]
    about: Mapping[str, str | int] = field(default_factory=dict)
    again: bool = False


@dataclass(frozen=True, slots=True)
class Prices:
    """Money for a million tokens, read and written, in whatever currency."""

    read: float
    written: float

    def of(self, tokens_in: float, tokens_out: float) -> float:
        """The money that so many tokens cost."""
        return (tokens_in * self.read + tokens_out * self.written) / 1e6


class Budget:
    """What may be spent, and has been. limit: None for no bound; longest: tokens that a reply has at most.

    A request under way counts with the most that it may cost: two bytes a token, which no text of words needs, and a
    reply of full length. So the limit is not passed.
    """

    def __init__(self, prices: Prices | None, limit: float | None, *, longest: int) -> None:
        self.prices, self.limit, self.longest = prices, limit, longest
        self.spent = 0.0
        self._under_way = 0.0

    def take(self, request: Request) -> bool:
        """Put the money for a request aside; False where there is not enough."""
        most = self._most(request)
        if self.limit is not None and self.spent + self._under_way + most > self.limit:
            return False
        self._under_way += most
        return True

    def settle(self, request: Request, reply: Reply | None) -> None:
        """Pay for a request that was taken; None: nothing came of it."""
        self._under_way -= self._most(request)
        if reply is not None and self.prices is not None:
            self.spent += self.prices.of(reply.tokens_in, reply.tokens_out)

    def _most(self, request: Request) -> float:
        if self.prices is None:
            return 0.0
        read = sum(len(message["content"].encode()) for message in request.body["messages"]) / 2 + OVERHEAD
        return self.prices.of(max(read, tokens_of(request.body)), self.longest)


class Asking:
    """Requests that are asked by `at_once` threads.

    ask: gives the reply to a request, None where it was given up because `stopped` is set. arrived: takes each reply,
    one at a time, and gives the requests that follow from it.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        *,
        ask: Callable[[Request], Reply | None],
        arrived: Callable[[Request, Reply], Sequence[Request]],
        budget: Budget,
        at_once: int,
    ) -> None:
        self.stopped = threading.Event()
        self._waiting = deque(requests)
        self._ask, self._arrived, self._budget, self._at_once = ask, arrived, budget, at_once
        self._changed = threading.Condition()
        self._under_way = 0
        self._failure: BaseException | None = None
        self._short = False

    def run(self, interrupted: Callable[[int], None]) -> bool:
        """Ask all; True where the budget ended it. interrupted: is told at Ctrl-C how many requests are under way.

        Errors: the first that `ask` or `arrived` raised; KeyboardInterrupt after Ctrl-C, at once where it comes twice.
        """
        ended = [threading.Event() for _ in range(self._at_once)]
        for event in ended:
            threading.Thread(target=self._work, args=(event,), daemon=True).start()
        try:
            _wait(ended)
        except KeyboardInterrupt:
            self.stopped.set()
            with self._changed:
                self._changed.notify_all()
                under_way = self._under_way
            interrupted(under_way)
            _wait(ended)
            raise
        if self._failure is not None:
            raise self._failure
        return self._short

    def _work(self, ended: threading.Event) -> None:
        try:
            self._ask_on()
        except BaseException as error:
            with self._changed:
                self._fail(error)
        finally:
            ended.set()

    def _fail(self, failure: BaseException) -> None:
        self._failure = self._failure or failure
        self.stopped.set()
        self._changed.notify_all()

    def _ask_on(self) -> None:
        while (request := self._next()) is not None:
            reply: Reply | None = None
            failure: BaseException | None = None
            try:
                reply = self._ask(request)
            except BaseException as error:  # `run` raises it
                failure = error
            with self._changed:
                self._under_way -= 1
                try:
                    if reply is not None:  # kept before anything else: it is paid for
                        self._waiting.extendleft(self._arrived(request, reply))
                    self._budget.settle(request, reply)
                except BaseException as error:  # such as a full disk
                    failure = error
                if failure is not None:
                    self._fail(failure)
                self._changed.notify_all()

    def _next(self) -> Request | None:
        """The next request, its money put aside; waits while others are under way, which may bring more of both."""
        with self._changed:
            while not self.stopped.is_set():
                if self._waiting and self._budget.take(self._waiting[0]):
                    self._under_way += 1
                    return self._waiting.popleft()
                if not self._under_way:
                    self._short = bool(self._waiting)
                    self._changed.notify_all()
                    return None
                self._changed.wait()
            return None


def _wait(ended: Sequence[threading.Event]) -> None:
    # Not by joining the threads: a join that Ctrl-C interrupts takes its thread for ended (Python 3.11).
    for event in ended:
        while not event.wait(0.2):  # not for ever, so that Ctrl-C is seen
            pass
