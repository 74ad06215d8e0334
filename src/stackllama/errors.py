"""The error tree of stackllama.

    StackllamaError            a mistake the reader of the message can put right; the command line exits with code 2
    ├── RecipeError            a recipe or an override: unknown key, value out of range, keys that contradict each other
    ├── DumpError              the dump: missing, empty, not a dump, an archive without Posts.xml
    │   └── TruncatedDumpError the dump ends in the middle of a row; `byte` says where
    ├── DataError              the preference data: no usable pair, a store that does not match its manifest
    ├── ModelError             the base model: unknown, not supported, a tokenizer that does not match
    ├── CheckpointError        a checkpoint: incomplete, from another run, a key missing or too many
    ├── RunError               the run folder: locked, other recipe, stage missing, disk full
    ├── TrainingError          training itself: NaN, a role entered out of order, nothing to train on
    ├── JudgeError             a judge behind an address: not reached, refuses, answers with something else
    └── TooLittleMemoryError   memory ran out: what was done, what it needs, what there is, the setting to change

Each message says what was given, what is wrong with it, and what to do. Broken invariants of the code itself are
`assert`s and stay outside this tree.
"""

from __future__ import annotations


class StackllamaError(Exception):
    """Base of every error that a user can put right."""

    exit_code: int = 2

    def __str__(self) -> str:
        """The message, fit for a terminal: what is quoted of hostile files has no control characters any more."""
        return "".join(
            sign if sign.isprintable() or sign == "\n" else sign.encode("unicode_escape").decode()
            for sign in super().__str__()
        )


class RecipeError(StackllamaError):
    """A recipe, or an override of one, cannot be used."""


class DumpError(StackllamaError):
    """A dump cannot be read."""


class TruncatedDumpError(DumpError):
    """A dump ends in the middle of a row.

    `byte` is the offset, in the decompressed table, after the last complete row.
    """

    def __init__(self, message: str, *, byte: int) -> None:
        super().__init__(message)
        self.byte = byte

    def __reduce__(self) -> tuple[object, ...]:  # it travels between processes
        return _truncated, (self.args[0], self.byte)


def _truncated(message: str, byte: int) -> TruncatedDumpError:
    return TruncatedDumpError(message, byte=byte)


class DataError(StackllamaError):
    """Preference data cannot be built, read or trusted."""


class ModelError(StackllamaError):
    """A base model cannot be loaded or does not fit."""


class CheckpointError(StackllamaError):
    """A checkpoint cannot be read or belongs to something else."""


class RunError(StackllamaError):
    """A run folder cannot be opened, continued or written."""


class TrainingError(StackllamaError):
    """Training cannot go on."""


class JudgeError(StackllamaError):
    """A judge behind an address cannot be asked."""


class TooLittleMemoryError(StackllamaError):
    """The machine, or a GPU of it, has less memory than a stage needs."""
