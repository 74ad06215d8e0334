"""The sampler agrees with the trainer's full forward, and its noise belongs to the request."""

from __future__ import annotations

import pytest
import torch

from stackllama.model.roles import REFERENCE, Trunk
from stackllama.rollout.engine import Engine, Request, Response, Sampling, sample, stream
from stackllama.tokens.forest import Tree, branch_targets, plant
from tests.model.tiny import CONFIGS, tiny_model

EOS = 2
PROMPTS = ((5, 6, 7), (8, 9, 10, 11, 12, 13, 14), (5, 6, 7), (20,) * 11)
HOW = Sampling(seed=3, max_new_tokens=12, eos_id=EOS)


def responses(trunk: Trunk, requests: list[Request], how: Sampling = HOW) -> list[Response]:
    with trunk.use(REFERENCE) as role:
        return sample(role, requests, how)


@pytest.mark.parametrize("kind", CONFIGS)
def test_cached_sampling_equals_the_full_forward(kind: str) -> None:
    trunk = Trunk(tiny_model(kind), precision=torch.float32)
    found = responses(trunk, [Request(at, prompt) for at, prompt in enumerate(PROMPTS)])
    forest = plant([Tree(prompt, (one.tokens,)) for prompt, one in zip(PROMPTS, found, strict=True)])
    with trunk.use(REFERENCE) as role:
        expected = role.logprobs(role.hidden(forest), branch_targets(forest))
    sampled = torch.tensor([logprob for one in found for logprob in one.logprobs])
    assert (sampled - expected).norm() <= 1e-5 * expected.norm()


def test_a_requests_tokens_do_not_depend_on_its_company_or_slot() -> None:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    requests = [Request(at, PROMPTS[at % 4]) for at in range(10)]
    together = responses(trunk, requests)
    few_slots = responses(trunk, requests, Sampling(seed=3, max_new_tokens=12, eos_id=EOS, slots=3))
    backwards = responses(trunk, requests[::-1])[::-1]
    alone = [responses(trunk, [request])[0] for request in requests]
    for other in (few_slots, backwards, alone):
        assert [one.tokens for one in other] == [one.tokens for one in together]


def test_requests_that_come_while_others_run_take_the_slots_that_these_leave() -> None:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    requests = [Request(at, PROMPTS[at % 4]) for at in range(12)]
    expected = responses(trunk, requests)
    with trunk.use(REFERENCE) as role:
        engine = Engine(role, HOW, slots=3, longest=11)
        late = iter(requests)
        sequences = [engine.submit(next(late))]
        steps = 0
        while not engine.is_idle:
            grown = engine.step()
            steps += 1
            assert len(grown) <= 3
            assert all(one.stopped is None for one in grown if one in engine._running)
            sequences += [engine.submit(one) for one in [next(late, None)] if one is not None]
    assert [tuple(one.tokens) for one in sequences] == [one.tokens for one in expected]
    # No slot stays empty while a request waits: so few steps are enough.
    total = sum(len(one.tokens) for one in sequences)
    assert steps <= total / 3 + 12 + 3


def test_other_seeds_and_requests_draw_other_tokens() -> None:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    one, same_prompt = responses(trunk, [Request(0, PROMPTS[0]), Request(1, PROMPTS[0])])
    other_seed = responses(trunk, [Request(0, PROMPTS[0])], Sampling(seed=4, max_new_tokens=12, eos_id=EOS))[0]
    assert len({one.tokens, same_prompt.tokens, other_seed.tokens}) == 3


def test_responses_say_why_they_stopped_and_keep_their_eos() -> None:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    found = responses(trunk, [Request(at, PROMPTS[at % 4]) for at in range(200)])
    ended = [one for one in found if one.stopped == "eos"]
    cut = [one for one in found if one.stopped == "length"]
    assert ended
    assert cut
    assert all(one.tokens[-1] == EOS and EOS not in one.tokens[:-1] for one in ended)
    assert all(len(one.tokens) == 12 and EOS not in one.tokens for one in cut)
    assert all(len(one.tokens) == len(one.logprobs) for one in found)


def test_streaming_gives_the_tokens_of_sampling_without_the_eos() -> None:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    for number in range(30):
        request = Request(number, PROMPTS[1])
        expected = [token for token in responses(trunk, [request])[0].tokens if token != EOS]
        with trunk.use(REFERENCE) as role:
            assert list(stream(role, request, HOW)) == expected


def test_temperature_zero_is_greedy() -> None:
    trunk = Trunk(tiny_model(), precision=torch.float32)
    how = Sampling(seed=3, max_new_tokens=5, eos_id=-1, temperature=0.0)
    tokens = responses(trunk, [Request(0, PROMPTS[0])], how)[0].tokens
    for length in range(5):
        forest = plant([Tree((*PROMPTS[0], *tokens[:length]))])
        with trunk.use(REFERENCE) as role:
            assert int(role.all_logprobs(role.hidden(forest)[-1:]).argmax()) == tokens[length]
