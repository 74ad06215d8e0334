"""`stackllama chat`: questions in the terminal, answers as they are sampled.

Every question stands alone: the training data has no second turns, and the template has none. Output is stripped of
control characters, so a model cannot write to the terminal what the terminal would obey.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

from stackllama.assembly import Assembled, load_roles, load_trunk, prepare_machine
from stackllama.errors import DataError, ModelError, RecipeError
from stackllama.model.roles import REFERENCE
from stackllama.recipe_load import load_recipe
from stackllama.rollout.engine import Request, Sampling, stream
from stackllama.rollout.experience import POLICY
from stackllama.scoring import check_context, check_text
from stackllama.tokens.template import encode_root
from stackllama.tokens.tokenizer import Tokenizer

TEMPERATURE, TOP_P = 0.7, 0.9
# A character may take several tokens: text is held back while its end does not decode to whole characters.
UNFINISHED = "\ufffd"


def chat(
    folder: Path, *, stage: str | None = None, seed: int = 0, max_new_tokens: int = 256, question: str | None = None
) -> None:
    """Answer one question, or ask for questions until an empty line or the end of input. stage: whose weights; None:
    those of the policy.

    At a terminal, a question that cannot be answered is told, and the next one is asked for.

    Raises:
        RecipeError: for a stage other than "sft" or the one that makes the run's policy.
        DataError: for a question that is empty or no Unicode.
        RunError: when the run has no such model yet.
        ModelError: when the question and the longest answer are beyond the model's context.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    roles = {recipe.policy: POLICY, "sft": REFERENCE}
    stage = recipe.policy if stage is None else stage
    if stage not in roles:
        raise RecipeError(f"chat with {folder} has no stage {stage}; allowed: {', '.join(roles)}")
    prepare_machine(recipe)
    assembled = load_trunk(recipe, folder)
    if roles[stage] == POLICY:
        load_roles(assembled, folder, POLICY)
    interactive = question is None and sys.stdin.isatty()
    questions = [question] if question is not None else _asked(interactive=interactive)
    for number, text in enumerate(questions):
        try:
            for piece in answer(assembled, roles[stage], text, seed=seed, number=number, max_new_tokens=max_new_tokens):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except (DataError, ModelError) as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            sys.stdout.write("\n")


def answer(
    assembled: Assembled, role: str, question: str, *, seed: int, number: int, max_new_tokens: int
) -> Iterator[str]:
    """Pieces of the answer's text, as they come. number: of the question in the conversation; it keys the noise.

    Raises:
        DataError: for a question that is empty or no Unicode.
        ModelError: when the question and the longest answer are beyond the model's context.
    """
    check_text("question", question)
    tokenizer = assembled.tokenizer
    how = Sampling(seed, max_new_tokens, tokenizer.eos_id, slots=1, temperature=TEMPERATURE, top_p=TOP_P)
    request = Request(number, tuple(encode_root(tokenizer, question)))
    check_context(assembled.trunk, {"a question": len(request.prompt), "an answer": max_new_tokens})
    with assembled.trunk.use(role) as policy:
        yield from _pieces(tokenizer, stream(policy, request, how))


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Printable text of the growing answer, the leading space left out."""
    ids: list[int] = []
    shown = 0
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids).lstrip()
        if not text.endswith(UNFINISHED):
            yield printable(text[shown:])
            shown = len(text)


def printable(text: str) -> str:
    """The text without characters that a terminal would act upon; line breaks and tabs stay."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")


def _asked(*, interactive: bool) -> Iterator[str]:
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments: what is no UTF-8 is told by its question
    while True:
        if interactive:
            sys.stdout.write("\nquestion> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.strip()
