r"""The prompt and the stop rule, in one place. Nobody else spells them.

    Question: {question}\n\nAnswer:| {answer}<EOS>
    root, after BOS where the model has one | branch

The root ends at the colon and the space belongs to the branch, so no token spans the two and a question is encoded
once for all of its answers. Questions and answers are stripped. An answer ends in EOS, and its score is read there.

**Borders.** tokens(root) + tokens(branch) = tokens(root + branch) as one text. Byte-level tokenizers cut text into
words before they merge, and a word starts at its space: the border holds for any answer. SentencePiece tokenizers
write a marker before a text's first word, so a branch cannot be encoded alone: it is encoded behind the fixed anchor
"Answer:", whose ids are then cut off. Where a tokenizer has a token that spans the border (possible if it merges
across words), the anchor's ids are not a prefix, and the equality cannot hold for any rule that shares the root; the
branch is then the encoding, alone, of the spelling that reads " answer" behind the root. Every stage builds sequences
from the same root and branch ids, so training, sampling and scoring agree even there.

Source of the wording: the StackLLaMA recipe (2023), `Question: {q}\n\nAnswer: {a}`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from stackllama.tokens.tokenizer import Tokenizer

_ROOT = "Question: {question}\n\nAnswer:"
_ANCHOR = "Answer:"
_GAP = " "

FINGERPRINT = hashlib.sha256(f"{_ROOT}|{_GAP}{{answer}}<EOS>|stripped".encode()).hexdigest()
"""Identity of the template; a stage refuses inputs made with another one."""


def question_text(title: str, body: str) -> str:
    """A question as the model reads it: the title, an empty line, the body. Either may be empty."""
    return "\n\n".join(part for part in (title.strip(), body.strip()) if part)


def root_text(question: str) -> str:
    """The text of a root: the prompt up to and including `Answer:`."""
    return _ROOT.format(question=question.strip())


def encode_root(tokenizer: Tokenizer, question: str) -> list[int]:
    """Token ids of a root, BOS first where the model has one."""
    return _bos(tokenizer) + tokenizer.encode(root_text(question))


def encode_branch(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Token ids of a branch: space, answer, EOS. An empty answer is EOS alone."""
    answer = answer.strip()
    return [*(encode_behind_root(tokenizer, _GAP + answer) if answer else []), tokenizer.eos_id]


def encode_document(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a plain document: BOS where the model has one, text, EOS."""
    return [*_bos(tokenizer), *tokenizer.encode(text), tokenizer.eos_id]


def decode_answer(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The answer in a branch's ids: what stands before the first EOS, stripped."""
    text: list[int] = []
    for number in ids:
        if number == tokenizer.eos_id:
            break
        text.append(number)
    return tokenizer.decode(text).strip()


def encode_behind_root(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of `text` where it stands behind a root's colon, without BOS and EOS (see *Borders* above)."""
    anchor = tokenizer.encode(_ANCHOR)
    whole = tokenizer.encode(_ANCHOR + text)
    if whole[: len(anchor)] == anchor:
        return whole[len(anchor) :]
    # Whether the tokenizer writes the space in front by itself shows in what it reads back.
    spellings = [tokenizer.encode(text), tokenizer.encode(text.removeprefix(_GAP))]
    for ids in spellings:
        if tokenizer.decode(anchor + ids) == _ANCHOR + text:
            return ids
    return spellings[0]


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]
