from __future__ import annotations

import inspect

import pytest

from stackllama import errors
from stackllama.errors import StackllamaError, TruncatedDumpError

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_is_one_of_ours_and_is_drawn_in_the_tree(kind: type[Exception]) -> None:
    assert issubclass(kind, StackllamaError)
    assert kind.__name__ in (errors.__doc__ or "")
    assert kind.__doc__


def test_a_truncated_dump_says_where() -> None:
    error = TruncatedDumpError("breaks off", byte=1234)
    assert (error.byte, str(error), error.exit_code) == (1234, "breaks off", 2)


def test_what_is_quoted_of_a_hostile_file_cannot_steer_a_terminal() -> None:
    error = StackllamaError("naïve 日本\n\x1b[2J\x00\x9b\u202e\ud800.xml")
    assert str(error) == "naïve 日本\n\\x1b[2J\\x00\\x9b\\u202e\\ud800.xml"
