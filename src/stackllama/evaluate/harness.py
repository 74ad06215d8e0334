"""What the lm-evaluation-harness asks of a language model, answered by a role of the trunk.

It asks for three things: the log-probability of a continuation behind a context, that of a whole document, and a
continuation of its own. A question with four options is four requests with one context; read one by one, as other
models of the harness read them, the context is computed four times. Here a context is the root of a tree and its
continuations are the branches, so it is computed once, and trees are packed into rows without padding::

    request     "2+2=" " 3", "2+2=" " 4", "2+2=" " 22"          (a token a sign; of " 22" two)
    tree        2 + 2 = | 2
    scored      " 3", " 4" and the first of " 22" at "=", its second at the branch's "2"

A continuation's last token is predicted and never read, so options of one token cost nothing but their context. The
text is the task's own: the template of questions and answers is not put around it.

Where the harness and this package could differ, the harness is followed (its `TemplateLM` and `HFLM`): spaces at the
end of a context belong to the continuation, the two are encoded as one text, contexts are cut from the left. BOS begins
every context where the model has one, and a context of no text is BOS, or EOS where there is none. Two things are
otherwise: control text in a document is text, and a whole document has one BOS in front, where `HFLM` puts a second one
before it and scores the first.

Left out: roots that share a beginning (the same examples before each question), chat templates, images.

Legend: N scored tokens, C of them at a time, R continuations of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from stackllama.errors import DataError, ModelError
from stackllama.model.logprobs import CHUNK_ELEMENTS
from stackllama.model.roles import Role, Trunk
from stackllama.model.support import usable_context
from stackllama.objectives.masked import sum_per_sequence
from stackllama.rollout.engine import SLOTS, Request, Sampling, sample
from stackllama.tokens.forest import Forest, Targets, Tree, plant
from stackllama.tokens.packing import pack
from stackllama.tokens.tokenizer import Tokenizer

Ids = tuple[int, ...]

LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the most tokens of an answer; the first that is there counts, as in the harness."""
USUAL_LENGTH = 256
UNDERSTOOD = {*LENGTH_NAMES, "until", "do_sample", "temperature", "top_p"}
"""What may be asked of a generated text. Anything else would be sampled otherwise than the task says."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A context and the continuations that are scored behind it, all distinct and none empty."""

    context: Ids
    continuations: tuple[Ids, ...]

    @property
    def tree(self) -> Tree:
        """What is read: of each continuation all but its last token."""
        return Tree(self.context, tuple(one[:-1] for one in self.continuations if len(one) > 1))

    def __len__(self) -> int:
        """Tokens that are read."""
        return len(self.context) + sum(len(one) - 1 for one in self.continuations)


@dataclass(frozen=True, slots=True)
class Scored:
    """The log-probability of a continuation in nats, and whether each of its tokens is the likeliest at its place."""

    logprob: float
    greedy: bool


Progress = Callable[[Sequence[list[Asked]]], Iterable[list[Asked]]]
"""Goes through rows, and may tell how far it has come."""


def silently(rows: Sequence[list[Asked]]) -> Iterable[list[Asked]]:
    """The rows, telling nothing."""
    return rows


class HarnessModel:
    """One role of a trunk as the harness sees a model. Requests are answered in their order.

    row_tokens: of a packed row; one request that is longer has a row of its own. seed: of sampled answers, where a task
    asks for such. progress: sees the rows go by.
    """

    def __init__(
        self,
        trunk: Trunk,
        role: str,
        tokenizer: Tokenizer,
        *,
        row_tokens: int,
        seed: int = 0,
        progress: Progress = silently,
    ) -> None:
        self._trunk, self._role, self._tokenizer = trunk, role, tokenizer
        self._row_tokens, self._seed, self._progress = row_tokens, seed, progress
        self.context = usable_context(trunk.model.config)

    @property
    def prefix(self) -> int:
        """What stands for a context of no text: BOS, or EOS where the model has no BOS."""
        return self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    def loglikelihood(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-probability of the continuation in nats, and whether greedy decoding
        would write it.

        Raises:
            ModelError: for a continuation that is beyond the model's context, or has no token of its own.
        """
        pairs = [self._fitted(*self.encode_pair(context, continuation)) for context, continuation in requests]
        return [(one.logprob, one.greedy) for one in self._scored(pairs)]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each whole text in nats, every token predicted once; 0 for an empty text."""
        pairs, owners = [], []
        for owner, text in enumerate(texts):
            for pair in windows(tuple(self._tokenizer.encode(text)), prefix=self.prefix, context=self.context):
                pairs.append(pair)
                owners.append(owner)
        sums = [0.0] * len(texts)
        for owner, one in zip(owners, self._scored(pairs), strict=True):
            sums[owner] += one.logprob
        return sums

    def generate_until(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """For each (context, how to generate): what the model writes, up to a stop string, its EOS, or its length.

        The likeliest token each time, unless a task asks for samples; then the noise is keyed by the request's place,
        so that all models draw with the same. Stop strings are cut off when all is written.

        Raises:
            DataError: for a way to generate that the sampler does not have.
            ModelError: for a length that leaves no room for a context.
        """
        groups: dict[Sampling, list[int]] = {}
        for at, (_, how) in enumerate(requests):
            groups.setdefault(self._sampling(how), []).append(at)
        texts = [""] * len(requests)
        for sampling, places in groups.items():
            prompts = [self._prompt(requests[at][0], self.context - sampling.max_new_tokens) for at in places]
            written = self._written([Request(*one) for one in zip(places, prompts, strict=True)], sampling)
            for at, text in zip(places, written, strict=True):
                texts[at] = stopped(text, requests[at][1].get("until"))
        return texts

    def encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Token ids of a context and of its continuation, as the harness's `TemplateLM._encode_pair` cuts them."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self._tokenizer.encode(context)
        whole = self._tokenizer.encode(context + continuation)
        return (*self._bos(before), *before), tuple(whole[len(before) :])

    def _bos(self, ids: Sequence[int]) -> Ids:
        return (self.prefix,) if self._tokenizer.bos_id is not None or not ids else ()

    def _fitted(self, context: Ids, continuation: Ids) -> tuple[Ids, Ids]:
        """The pair with its context cut from the left, so that what is read fits the model."""
        if not continuation:
            raise ModelError("a task asks for a continuation that has no token of its own; leave the task out")
        if len(continuation) > self.context:
            raise ModelError(
                f"a task asks for a continuation of {len(continuation)} tokens, but the model has a context of "
                f"{self.context}; leave the task out"
            )
        return context[-(self.context + 1 - len(continuation)) :], continuation

    def _scored(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scored]:
        """What each (context, continuation) gets. Equal contexts are read once, and so are equal pairs."""
        rows = pack_asked(pairs, self._row_tokens)
        found: dict[tuple[Ids, Ids], Scored] = {}
        with self._trunk.use(self._role) as reader:
            for row in self._progress(rows):
                keys = [(one.context, continuation) for one in row for continuation in one.continuations]
                found |= zip(keys, read_row(reader, row, self._vocabulary), strict=True)
        return [found[pair] for pair in pairs]

    @property
    def _vocabulary(self) -> int:
        return int(self._trunk.model.config.get_text_config().vocab_size)

    def _sampling(self, how: Mapping[str, Any]) -> Sampling:
        """How to sample what a task asks for."""
        unknown = sorted(name for name in set(how) - UNDERSTOOD if how[name] is not None)
        if unknown:
            raise DataError(
                f"a task generates text with {', '.join(unknown)}, which the sampler does not have (it has "
                f"{', '.join(sorted(UNDERSTOOD))}); leave the task out"
            )
        length = next((int(how[name]) for name in LENGTH_NAMES if how.get(name) is not None), USUAL_LENGTH)
        if not 0 < length < self.context:
            raise ModelError(
                f"a task asks for texts of up to {length} tokens, but the model has a context of {self.context}, in "
                "which the task's own text stands too; leave the task out"
            )
        heat, sampled = how.get("temperature"), how.get("do_sample")
        if sampled is None:
            sampled = bool(heat)
        if not sampled:
            return Sampling(self._seed, length, self._tokenizer.eos_id, temperature=0.0)
        top = how.get("top_p")
        temperature, top_p = (1.0 if value is None else float(value) for value in (heat, top))
        return Sampling(self._seed, length, self._tokenizer.eos_id, temperature=temperature, top_p=top_p)

    def _prompt(self, text: str, most: int) -> Ids:
        ids = self._tokenizer.encode(text)
        return (*self._bos(ids), *ids)[-most:]

    def _written(self, requests: Sequence[Request], how: Sampling) -> list[str]:
        """The texts, sampled a few at a time: the prompts that come in together are one row."""
        longest = max(len(one.prompt) for one in requests)
        slots = min(SLOTS, max(1, self._row_tokens // longest))
        how = replace(how, slots=slots)
        with self._trunk.use(self._role) as writer:
            responses = sample(writer, requests, how)
        return [self._tokenizer.decode(one.tokens) for one in responses]


def windows(tokens: Ids, *, prefix: int, context: int) -> Iterator[tuple[Ids, Ids]]:
    """Cut a text into (context, continuation) so that each token is in one continuation, and each window reads as much
    as the model can (lm-eval's `get_rolling_token_windows` with a context of 1, made disjoint). A context of 4::

        text 0 1 2 3 4 5 6 7 8 9    P | 0 1 2 3    3 | 4 5 6 7    5 6 7 | 8 9
    """
    for start in range(0, len(tokens), context):
        stop = min(start + context, len(tokens))
        begin = max(0, stop - context - 1)  # one more than is read, since the last token is not
        yield (tokens[begin:start] if start else (prefix,)), tokens[start:stop]


def pack_asked(pairs: Iterable[tuple[Ids, Ids]], row_tokens: int) -> list[list[Asked]]:
    """Rows of contexts with their continuations, each of at most `row_tokens` tokens that are read, or of one pair.

    A context whose continuations outgrow a row stands in several.
    """
    by_context: dict[Ids, dict[Ids, None]] = {}
    for context, continuation in pairs:
        by_context.setdefault(context, {})[continuation] = None
    longest = max((len(c) + len(one) - 1 for c, ones in by_context.items() for one in ones), default=0)
    budget = max(row_tokens, longest)
    return pack([asked for context, ones in by_context.items() for asked in _dealt(context, ones, budget)], budget)


def _dealt(context: Ids, continuations: Iterable[Ids], budget: int) -> Iterator[Asked]:
    chosen: list[Ids] = []
    size = len(context)
    for one in continuations:
        if chosen and size + len(one) - 1 > budget:
            yield Asked(context, tuple(chosen))
            chosen, size = [], len(context)
        chosen.append(one)
        size += len(one) - 1
    yield Asked(context, tuple(chosen))


def continuation_targets(forest: Forest, asked: Sequence[Asked]) -> Targets:
    """Every token of every continuation; owners count the continuations along the row.

    forest: planted of the trees of `asked`, in their order.
    """
    segments = iter(forest.segments)
    predictors: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    owner = 0
    for one in asked:
        root = next(segments)
        for continuation in one.continuations:
            own = next(segments) if len(continuation) > 1 else None
            predictors += [root.stop - 1, *(range(own.start, own.stop) if own else ())]
            labels += continuation
            owners += [owner] * len(continuation)
            owner += 1
    predictor_N, label_N, owner_N = (torch.tensor(each, dtype=torch.int64) for each in (predictors, labels, owners))
    return Targets(predictor_N, label_N, owner_N)


def read_row(reader: Role, asked: Sequence[Asked], vocabulary: int) -> list[Scored]:
    """What each continuation of a row gets (R), in their order. Whole distributions are there for a few tokens at a
    time, since the likeliest token is asked for too.
    """
    forest = plant([one.tree for one in asked])
    targets = continuation_targets(forest, asked)
    hidden_ND = reader.hidden_at(forest, targets.predictor_N)
    label_N = targets.label_N.to(hidden_ND.device)
    at_once = max(1, CHUNK_ELEMENTS[hidden_ND.device.type] // vocabulary)
    logprobs, misses = [], []
    for hidden_CD, label_C in zip(hidden_ND.split(at_once), label_N.split(at_once), strict=True):
        logprob_CV = reader.all_logprobs(hidden_CD)
        logprobs.append(logprob_CV.gather(1, label_C[:, None]).squeeze(1))
        misses.append(logprob_CV.argmax(-1) != label_C)
    count = sum(len(one.continuations) for one in asked)
    logprob_R, missed_R = (
        sum_per_sequence(torch.cat(parts).double().cpu(), targets.branch_N, count).tolist()
        for parts in (logprobs, misses)
    )
    return [Scored(logprob, missed == 0) for logprob, missed in zip(logprob_R, missed_R, strict=True)]


def stopped(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stop strings."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.split(stop)[0]
    return text
