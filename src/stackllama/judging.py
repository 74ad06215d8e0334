"""`stackllama judge`: a judge behind an OpenAI-compatible address compares the answers that the exam kept.

What is asked and how a reply is read is `evaluate/verdicts.py`; what it comes to, `evaluate/pairwise.py`. No torch.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stackllama.errors import JudgeError, RecipeError, RunError
from stackllama.evaluate import verdicts
from stackllama.evaluate.asking import Asking, Budget, Prices, Request
from stackllama.evaluate.comparisons import Comparison, again, compare, outcomes, read, read_samples, steps
from stackllama.evaluate.endpoint import Endpoint, ask, open_endpoint, patiently, tokens_of
from stackllama.evaluate.pairwise import numbers
from stackllama.evaluate.replies import MOST_TOKENS, Replies, Reply
from stackllama.evaluate.statistics import Resampling
from stackllama.files import atomic_write_json, digest_file, take_lock
from stackllama.recipe_load import load_recipe
from stackllama.report.judged import money, sentences, table
from stackllama.run import find_run
from stackllama.terminal import visible
from stackllama.train.metrics import progress

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further try of a request that failed in a way that may pass."""
REPLY_TOKENS = 150
"""Tokens of a reply, for the estimate, while none is known."""
LIMITS = ("max_tokens", "max_completion_tokens")
"""What services call the tokens that a reply has at most."""


def judge(options: Namespace) -> Path:
    """Ask what has not been asked yet, write RUN/asked/judge.json, and print it; gives the run's folder.

    Errors: RunError where there is no exam; RecipeError for options that cannot be used; JudgeError where the judge
    cannot be asked, which says what is kept.
    """
    folder = find_run(options.run)
    evaluate, asked, how = folder / "evaluate", folder / "asked", _how(folder)
    samples = read_samples(evaluate / "samples.json", folder)
    digest = digest_file(evaluate / "samples.json")
    endpoint = _endpoint(options)
    prices = _prices(options)
    parameters = _parameters(options)
    longest = _longest(parameters) if options.max_cost is not None else 0
    chosen = samples[: options.limit]
    comparisons = list(
        compare(
            chosen,
            address=endpoint.address,
            model=options.model,
            parameters=parameters,
            system=_system(options.prompt),
        )
    )
    if not comparisons:
        raise RunError(
            f"{evaluate}/samples.json has no answer of a policy beside one of the SFT model; evaluate it again"
        )
    descriptor = take_lock(asked / ".lock", asked, "judge another run")
    try:
        replies = Replies(asked / "replies.jsonl")
        cached = sum(reply is not None for _, reply in steps(comparisons, replies, endpoint.address))
        budget = Budget(prices, options.max_cost, longest=longest)
        _ask_all(comparisons, replies, endpoint, budget, options, left=len(samples) - len(chosen))
        found = {
            "model": options.model,
            "url": endpoint.address,
            "samples": digest,
            "questions": len(chosen),
            "left": len(samples) - len(chosen),
            "prompt": options.prompt,
            **_spending(comparisons, replies, endpoint, prices, cached),
            **_numbers(comparisons, replies, endpoint, how),
        }
        atomic_write_json(asked / "judge.json", found)
    finally:
        os.close(descriptor)
    _show(found, options.max_cost)
    return folder


def _endpoint(options: Namespace) -> Endpoint:
    endpoint = open_endpoint(
        options.url, key=os.environ.get(options.key_from), key_from=options.key_from, timeout=options.timeout
    )
    if endpoint.sent and not endpoint.loopback:
        clear = "" if endpoint.address.startswith("https:") else ", and on its way anybody may read it (no https)"
        clear += "; it passes the proxy in http_proxy" if endpoint.proxy else ""
        _say(f"{endpoint.host} is sent {endpoint.sent}{clear}")
    return endpoint


def _prices(options: Namespace) -> Prices | None:
    if options.max_cost is not None and (options.price_in is None or options.price_out is None):
        raise RecipeError("--max-cost needs both prices to count with; add --price-in and --price-out")
    if options.price_in is None and options.price_out is None:
        return None
    return Prices(options.price_in or 0.0, options.price_out or 0.0)


def _parameters(options: Namespace) -> dict[str, Any]:
    """What stands in a request beside model and messages."""
    settings = {"temperature": 0, "max_tokens": options.max_tokens, **dict(options.parameter)}
    return {name: value for name, value in settings.items() if value is not None}


def _longest(parameters: Mapping[str, Any]) -> int:
    """Tokens that a reply has at most, by what the requests say of it. Raises RecipeError where that is no bound."""
    said = [parameters[name] for name in LIMITS if name in parameters]
    bounds = [value for value in said if type(value) is int and 0 < value < MOST_TOKENS]
    if not bounds or len(bounds) < len(said):
        raise RecipeError(
            f"--max-cost needs a bound on the length of a reply; give {' or '.join(LIMITS)} a whole number above 0, "
            "by --max-tokens or --parameter"
        )
    return max(bounds)


def _system(path: str | None) -> str:
    if path is None:
        return verdicts.SYSTEM
    try:
        text = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--prompt {path} cannot be read: {error}; give a text file in UTF-8") from error
    if not text:
        raise RecipeError(f"--prompt {path} is empty; say in it how to judge, and to end with [[A]], [[B]] or [[C]]")
    return text


def _ask_all(
    comparisons: Sequence[Comparison],
    replies: Replies,
    endpoint: Endpoint,
    budget: Budget,
    options: Namespace,
    *,
    left: int,
) -> None:
    """Ask what there is no reply to yet; says before what it will take, and shows how far it is."""
    wanted = steps(comparisons, replies, endpoint.address)
    missing = [request for request, reply in wanted if reply is None]
    known = [reply for _, reply in wanted if reply is not None]
    prices = budget.prices
    budget.spent = sum(prices.of(reply.tokens_in, reply.tokens_out) for reply in known) if prices else 0.0
    _say(_estimate(missing, known, endpoint, prices, options.model))
    if replies.damaged:
        _say(f"{replies.path}: {replies.damaged} damaged lines are passed over; what they answered is asked again")
    if left:
        _say(f"--limit {options.limit}: {left:,} questions of the exam are left out")
    if not missing:
        return
    with progress("judge", len(wanted), "requests", len(known), stream=sys.stderr) as shown:

        def arrived(request: Request, reply: Reply) -> list[Request]:
            replies.keep(request.key, reply, {**request.about, "model": options.model})
            more = [again(endpoint.address, request)] if not request.again and read(reply) is None else []
            shown.total += len(more)
            cost = {"cost": budget.spent + prices.of(reply.tokens_in, reply.tokens_out)} if prices else {}
            shown.advance(1, **cost)
            return more

        told: set[str] = set()

        def note(text: str) -> None:  # many wait for the same server: what it does is said once
            if text not in told:
                told.add(text)
                shown.note(text)

        def answer(request: Request) -> Reply | None:
            return patiently(lambda: ask(endpoint, request.body), WAITS, pause=asking.stopped.wait, note=note)

        asking = Asking(missing, ask=answer, arrived=arrived, budget=budget, at_once=options.concurrency)
        try:
            asking.run(
                lambda under_way: shown.note(f"waiting for {under_way} requests under way; Ctrl-C again drops them")
            )
        except JudgeError as error:
            raise JudgeError(
                f"{error}; {len(replies):,} replies are kept in {replies.path}, and the same command goes on from there"
            ) from error


def _estimate(
    missing: Sequence[Request], known: Sequence[Reply], endpoint: Endpoint, prices: Prices | None, model: str
) -> str:
    """What it will take, in a sentence."""
    kept = f"{len(known):,} replies are there already" if known else ""
    if not missing:
        return f"{kept}: nothing is left to ask" if kept else "there is nothing to ask: all answers are the same"
    to_read = sum(tokens_of(request.body) for request in missing)
    usual = sum(reply.tokens_out for reply in known) / len(known) if known else REPLY_TOKENS
    written = round(usual * len(missing))
    cost = f", about {money(prices.of(to_read, written))} in your currency" if prices else ""
    there = f"; {kept}" if kept else ""
    return (
        f"asking {model} at {endpoint.host}: {len(missing):,} requests, about {to_read:,} tokens to read and "
        f"{written:,} to write{cost}{there}"
    )


def _spending(
    comparisons: Sequence[Comparison], replies: Replies, endpoint: Endpoint, prices: Prices | None, cached: int
) -> dict[str, Any]:
    """Replies and tokens that the result stands on, and what they cost in all; cached: those of earlier commands."""
    known = [reply for _, reply in steps(comparisons, replies, endpoint.address) if reply is not None]
    tokens_in, tokens_out = sum(reply.tokens_in for reply in known), sum(reply.tokens_out for reply in known)
    return {
        "requests": len(known) - cached,
        "cached": cached,
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "tokens_counted": all(reply.counted for reply in known),
        "price_in": prices.read if prices else None,
        "price_out": prices.written if prices else None,
        "cost": prices.of(tokens_in, tokens_out) if prices else None,
    }


def _numbers(
    comparisons: Sequence[Comparison], replies: Replies, endpoint: Endpoint, how: Resampling
) -> dict[str, Any]:
    found, unasked = outcomes(comparisons, replies, endpoint.address)
    return {
        "unasked": unasked,
        "confidence": how["confidence"],
        "policies": {name: numbers(compared, how) for name, compared in found.items()},
    }


def _how(folder: Path) -> Resampling:
    recipe = load_recipe(folder / "recipe.yaml")
    return {"resamples": recipe.evaluate.resamples, "confidence": recipe.evaluate.confidence, "seed": recipe.seed}


def _show(found: Mapping[str, Any], max_cost: float | None) -> None:
    """Print the table on stdout, and what is to be known of it."""
    from stackllama.report.tables import lines  # it brings a database along: seconds

    for line in lines(table(found)):
        print(visible(line))
    for sentence in sentences(found):
        print(visible(sentence))
    if found["unasked"]:
        _say(
            f"stopped before {max_cost:g} were passed: {found['unasked']:,} comparisons are left out; with a higher "
            "--max-cost the same command goes on"
        )


def _say(text: str) -> None:
    print(visible(text), file=sys.stderr, flush=True)
