from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from stackllama.errors import RecipeError
from stackllama.recipe import Recipe, is_size
from stackllama.recipe_load import (
    REFUSED,
    find_recipe,
    flatten,
    known_keys,
    load_recipe,
    packaged_recipes,
    section_of,
    to_yaml,
)
from stackllama.recipe_reference import reference

ROOT = Path(__file__).resolve().parent.parent
SMALL = "data: {source: embedded}\n"


def write(folder: Path, text: str, name: str = "try.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problem(folder: Path, text: str, **overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), {key.replace("__", "."): value for key, value in overrides.items()})
    return str(caught.value)


def test_the_original_recipe_can_be_stated(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(
            tmp_path,
            """
            base: huggyllama/llama-7b
            data: {source: [a.7z, b], titles: false, max_pairs: 10}
            sft:
              lora: {rank: 16, alpha: 32, dropout: 0.05, targets: [q_proj, v_proj]}
              learning_rate: 1e-5
              max_steps: 5000
              loss_on: all
            ppo: {lambda: 0.95, gamma: 1, kl: {coefficient: 0.2, target: 6, horizon: 10000, controller: adaptive}}
            """,
        )
    )
    assert recipe.name == "try"
    assert recipe.base.model == "huggyllama/llama-7b"
    assert recipe.data.source == ("a.7z", "b")
    assert recipe.sft.learning_rate == 0.00001  # YAML 1.1 reads 1e-5 as text
    assert recipe.sft.lora.targets == ("q_proj", "v_proj")
    assert recipe.ppo.gae_lambda == 0.95
    assert recipe.stages == ("data", "sft", "reward", "judge", "ppo", "evaluate")


def test_the_bare_word_off_is_a_choice(tmp_path: Path) -> None:
    text = "data: {source: a.7z, links: off, preferences: {time: off}, cleaning: {emails: off, language: off}}"
    data = load_recipe(write(tmp_path, text)).data  # YAML 1.1 reads off as false
    assert (data.links, data.preferences.time, data.cleaning.emails, data.cleaning.language) == ("off",) * 4
    assert "data.links = True is not allowed" in problem(tmp_path, "data: {source: a.7z, links: on}")


@pytest.mark.parametrize("name", ["quickstart", "embedded-base", "smollm2-beer"])
def test_packaged_recipes_load_and_state_only_differences(name: str) -> None:
    path = packaged_recipes()[name]
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(path.read_text("utf-8").splitlines()) <= 40
    minimal: dict[str, Any] = {"name": name, "data": {"source": "embedded"}}
    defaults = flatten(Recipe.model_validate(minimal))
    for key, value in flatten_yaml(yaml.safe_load(path.read_text("utf-8"))).items():
        assert key == "data.source" or defaults[key] != value or key == "base.model", f"{key} is the default"


def flatten_yaml(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten_yaml(value, f"{prefix}{key}.")
        else:
            flat["base.model" if key == "base" else f"{prefix}{key}"] = value
    return flat


def test_every_recipe_of_the_repository_is_packaged() -> None:
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == set(packaged_recipes())


def test_an_unknown_key_names_the_nearest_and_its_line(tmp_path: Path) -> None:
    message = problem(tmp_path, SMALL + "ppo:\n  kl:\n    targt: 6\n")
    assert message.startswith(f"{tmp_path / 'try.yaml'}:4: ppo.kl.targt is not a key")
    assert "did you mean ppo.kl.target?" in message


def test_a_key_in_the_wrong_section_is_found_in_the_right_one(tmp_path: Path) -> None:
    assert "did you mean ppo.kl.horizon?" in problem(tmp_path, SMALL + "ppo: {horizon: 3}")


def test_an_unknown_key_that_resembles_none_lists_what_is_allowed(tmp_path: Path) -> None:
    message = problem(tmp_path, SMALL + "zzz: 1")
    assert "allowed here: name, folder, seed, base" in message


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("top_p", "ppo.kl.coefficient"),
        ("top_k", "ppo.reward_clip"),
        ("temperature", "train SFT longer"),
        ("min_length", "ppo.missing_eos_penalty"),
        ("min_new_tokens", "reward.length_penalty"),
        ("suppress_eos", "ppo.missing_eos_penalty"),
        ("repetition_penalty", "watch.limits.repetition"),
    ],
)
def test_settings_that_would_bias_the_ratio_are_refused_with_the_reason(
    tmp_path: Path, name: str, instead: str
) -> None:
    message = problem(tmp_path, SMALL + f"ppo: {{{name}: 1}}")
    assert message.startswith(f"{tmp_path / 'try.yaml'}:2: ppo.{name} is refused: PPO samples from the policy itself")
    assert "another distribution" in message
    assert instead in message
    assert problem(tmp_path, SMALL, **{f"ppo__{name}": "1"}).startswith(f"--ppo.{name}: ppo.{name} is refused")
    assert "is not a key of a recipe" in problem(tmp_path, SMALL + f"sft: {{{name}: 1}}")


def test_the_old_place_of_watch_is_told(tmp_path: Path) -> None:
    assert "ppo.watch is refused: it is a section of its own" in problem(tmp_path, SMALL + "ppo: {watch: {every: 5}}")


def test_what_a_refusal_names_instead_exists() -> None:
    keys = {key for key, _ in known_keys()}
    named = {key for reason in REFUSED.values() for key in re.findall(r"\b(?:ppo|reward|watch)\.[a-z_.]*[a-z]", reason)}
    assert len(named) > 4
    assert named <= keys


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ppo: {kl: {target: -1}}", ["ppo.kl.target = -1", "above 0", "nats"]),
        ("ppo: {kl: {target: .inf}}", ["ppo.kl.target = inf", "finite"]),
        ("sft: {epochs: two}", ["sft.epochs = two", "must be a number"]),
        ("ppo: {steps: 1.5}", ["ppo.steps = 1.5", "whole number"]),
        ("ppo: {clip: 1}", ["ppo.clip = 1", "below 1"]),
        ("sft: {method: qlora}", ["sft.method = qlora", "'lora' or 'full'"]),
        ('sft: {lora: {targets: [q_proj, "q proj"]}}', ["sft.lora.targets = q proj"]),
        ("name: ../up", ["name = ../up", "letters, digits"]),
        ("ppo: 3", ["ppo = 3", "section"]),
        ("seed: -1", ["seed = -1", "at least 0"]),
        ("ppo: {betas: [0.9, 1]}", ["ppo.betas = 1", "below 1"]),
        ("guard: {clip: 0}", ["guard.clip = 0", "above 0"]),
        ("guard: {rewind_after: 1}", ["guard.rewind_after = 1", "at least 2"]),
        ("guard: {rewinds: -1}", ["guard.rewinds = -1", "at least 0"]),
        ("guard: {watch: maybe}", ["guard.watch = maybe"]),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_allowed(tmp_path: Path, text: str, words: list[str]) -> None:
    message = problem(tmp_path, SMALL + text)
    assert message.startswith(f"{tmp_path / 'try.yaml'}:2: ")
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: {source: embedded, splits: {sft: 0.5}}", ["data.splits", "= 1.2"]),  # .5 + .35 + .15 + .1 + .1
        ("data: {source: [embedded, x.7z]}", ["`embedded` must stand alone"]),
        ("data: {source: ''}", ["data.source = ['']: an empty name is no dump; the working directory is `.`"]),
        ("data: {source: [x.7z, '']}", ["data.source = ['x.7z', '']: an empty name is no dump"]),
        ("data: {source: embedded, splits: {sft: 0.65, reward: 0}}", ["data.splits.reward = 0"]),
        ("data: {source: embedded-text}", ["sft.loss_on must be all"]),
        (SMALL + "ppo: {minibatches: 5}", ["ppo.minibatches = 5", "prompts_per_step = 32", "1, 2, 4, 8, 16, 32"]),
        (SMALL + "ppo: {prompts_per_step: 1, samples_per_prompt: 1, minibatches: 1}", ["ppo.whiten"]),
        (SMALL + "sft: {max_tokens: 9000}\ncompute: {row_tokens: 9000}", ["sft.tokens_per_step = 8192"]),
        (SMALL + "sft: {max_tokens: 2049}", ["compute.row_tokens = 2048", "at least 2049"]),
        (SMALL + "reward: {max_answer_tokens: 769}", ["at least 2050"]),  # 512 + 2 * 769
        (SMALL + "ppo: {max_prompt_tokens: 1920}", ["ppo.max_prompt_tokens", "at least 2049"]),  # 1920 + 128 + an EOS
        (SMALL + "evaluate: {max_new_tokens: 1536}", ["evaluate.max_new_tokens", "at least 2049"]),  # 512 + 1536 + 1
        (SMALL + "ppo: {kl: {coefficient: 0}}", ["ppo.kl.coefficient = 0", "ppo.kl.controller to fixed"]),
        (SMALL + "guard: {window: 40}", ["guard.warmup = 50", "guard.window = 40", "lower warmup"]),
        (SMALL + "guard: {skip: 8}", ["guard.skip = 8 is not above guard.clip = 8"]),
        (SMALL + "ppo: {kl: {horizon: 12.8}}", ["ppo.kl.horizon = 12.8", "64 episodes", "more than 12.8"]),  # 64 / 5
        (SMALL + "watch: {kl_bound: 5}", ["watch.kl_bound = 5 is below ppo.kl.target = 6"]),
        (SMALL + "evaluate: {best_of: 1}", ["evaluate.best_of = 1", "at least 2, or 0"]),
        (SMALL + "ppo: {advantage: rloo, samples_per_prompt: 1}", ["ppo.advantage = rloo", "samples_per_prompt = 1"]),
        (SMALL + "ppo: {advantage: grpo, samples_per_prompt: 1}", ["ppo.advantage = grpo", "to at least 2"]),
        (
            SMALL + "ppo: {advantage: reinforce, prompts_per_step: 1, samples_per_prompt: 1, minibatches: 1}",
            ["ppo.advantage = reinforce", "raise ppo.prompts_per_step"],
        ),
        (SMALL + "ppo: {advantage: best}", ["ppo.whiten = true", "set whiten to false"]),
        (
            SMALL + "ppo: {advantage: best, whiten: false, samples_per_prompt: 1}",
            ["ppo.advantage = best", "at least 2"],
        ),
        (SMALL + "ppo: {steps: 20, value_warmup: 20}", ["ppo.value_warmup = 20", "none of ppo.steps = 20"]),
        (SMALL + "ppo: {value_warmup: 2, value_coefficient: 0}", ["ppo.value_warmup = 2 would learn nothing"]),
        (SMALL + "ppo: {kl: {charge: loss, estimator: k3}}", ["ppo.kl.controller = adaptive to fixed"]),
        (SMALL + "ppo: {kl: {charge: loss, controller: fixed}}", ["ppo.kl.estimator = k1", "set it to k3"]),
        (SMALL + "ppo: {sampler: vllm, method: full}", ["ppo.sampler = vllm", "ppo.method = full", "set it to lora"]),
        (
            SMALL + "base: {quantization: nf4}\nppo: {sampler: vllm}",
            ["vllm cannot sample over base.quantization = nf4"],
        ),
        (SMALL + "ppo: {importance_cap: 3}", ["ppo.importance_cap = 3", "leave it at 2", "ppo.sampler to vllm"]),
        (SMALL + "policy: dpo\ndpo: {loss: ipo, label_smoothing: 0.1}", ["dpo.label_smoothing = 0.1", "set it to 0"]),
        (SMALL + "policy: dpo\ndpo: {label_smoothing: 0.5}", ["dpo.label_smoothing = 0.5", "below 0.5"]),
        (SMALL + "policy: dpo\ndpo: {beta: 0}", ["dpo.beta = 0", "above 0", "nat"]),
        (SMALL + "policy: rlhf", ["policy = rlhf", "'ppo' or 'dpo'"]),
        (SMALL + "policy: dpo\nppo: {max_prompt_tokens: 1920}", ["ppo.max_prompt_tokens", "at least 2049"]),
        (SMALL + "policy: dpo\nbase: {quantization: nf4}\ndpo: {method: full}", ["dpo.method = full trains all"]),
        (SMALL + "base: 3m", ["sft.method must be full"]),
        (SMALL + "base: {quantization: nf4}\nppo: {method: full}", ["base.quantization = nf4", "ppo.method = full"]),
        (SMALL + "base: {quantization: nf4}\nsft: {method: full}\nreward: {method: full}", ["sft.method, reward.meth"]),
        (SMALL + "base: {model: 3m, quantization: nf4}", ["base.model = 3m starts from random weights"]),
    ],
)
def test_keys_that_contradict_each_other(tmp_path: Path, text: str, words: list[str]) -> None:
    message = problem(tmp_path, text)
    assert [word for word in words if word not in message] == []


def test_a_bound_of_kl_below_the_target_is_no_contradiction_where_neither_is_used(tmp_path: Path) -> None:
    for text in (
        "watch: {kl_bound: 5, every: null}",
        "watch: {kl_bound: 5}\nppo: {kl: {controller: fixed}}",
        "watch: {kl_bound: 5}\npolicy: dpo",
    ):
        assert load_recipe(write(tmp_path, SMALL + text)).watch.kl_bound == 5


@pytest.mark.parametrize(
    "text",
    [
        # What is set for values is not used without them, so that one key turns PPO into a rival.
        "ppo: {advantage: rloo, value: own, value_clip: 5, value_warmup: 2, value_coefficient: 0, lambda: 1}",
        "ppo: {advantage: reinforce, samples_per_prompt: 1}",
        "ppo: {advantage: grpo, kl: {charge: loss, controller: fixed, estimator: k3, coefficient: 0.04}}",
        "ppo: {reward_scaling: true, reward_clip: 5, entropy_bonus: 0.01}",
        "ppo: {kl: {controller: stop, coefficient: 0, target: 3}}\nwatch: {kl_bound: 2}",
        "ppo: {kl: {controller: stop, charge: loss, estimator: k3, horizon: 1}}",
        "ppo: {kl: {controller: fixed, charge: loss, estimator: k2}}",
        "ppo: {kl: {estimator: k2}}",
        "ppo: {advantage: best, whiten: false}",
        "ppo: {sampler: vllm, importance_cap: null, sampler_difference_limit: 0.5}",
        "policy: dpo\ndpo: {label_smoothing: 0.1}\nppo: {minibatches: 5}",  # PPO has no part in this one
        "policy: dpo\ndpo: {loss: ipo, beta: 0.01, method: full}",
        "dpo: {loss: ipo, label_smoothing: 0.1}",
    ],
)
def test_settings_of_the_rivals_that_hold_together(tmp_path: Path, text: str) -> None:
    recipe = load_recipe(write(tmp_path, SMALL + text))
    assert load_recipe(write(tmp_path, to_yaml(recipe), "recipe.yaml")) == recipe


def test_the_policy_says_which_stages_there_are(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL + "policy: dpo"))
    assert recipe.stages == ("data", "sft", "reward", "judge", "dpo", "evaluate")
    assert recipe.policy_section is recipe.dpo
    plain = load_recipe(write(tmp_path, SMALL))
    assert plain.policy_section is plain.ppo
    # Nothing is sampled in training: where it is not watched either, the ppo split may be empty.
    text = "data: {source: embedded, splits: {sft: 0.4, ppo: 0}}\n"
    assert load_recipe(write(tmp_path, text + "policy: dpo\nwatch: {every: null}")).data.splits.ppo == 0
    assert "data.splits.ppo = 0" in problem(tmp_path, text + "watch: {every: null}")
    watched = problem(tmp_path, text + "policy: dpo")
    assert "data.splits.ppo = 0: training is watched on questions of it; make it more, or watch.every null" in watched


def test_sections_of_stages_that_a_recipe_does_not_have_contradict_nothing(tmp_path: Path) -> None:
    text = "data: {source: embedded-text}\nsft: {loss_on: all, max_tokens: 256}\ncompute: {row_tokens: 256}\n"
    path = tmp_path / "plain.yaml"
    path.write_text(text + "ppo: {minibatches: 5}\n", encoding="utf-8")
    assert load_recipe(path).stages == ("data", "sft")
    path.write_text(text + "base: {quantization: nf4}\nppo: {method: full}\n", encoding="utf-8")
    assert load_recipe(path).base.quantization == "nf4"


def test_a_contradiction_of_quantization_is_told_once(tmp_path: Path) -> None:
    text = SMALL + "base: {quantization: nf4}\nsft: {method: full}\nreward: {method: full}\nppo: {method: full}"
    assert len(problem(tmp_path, text).splitlines()) == 1


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    assert len(problem(tmp_path, SMALL + "seed: -1\nppo: {clip: 2, nope: 1}").splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no keys"),
        ("- a\n- b", "holds no keys"),
        ("a: [1", "line 1"),
        ("data: {source: x}\nseed: 1\nseed: 2", ":3: seed is written twice; it stands on line 2"),
        ("data: &d {source: x}\nsft: *d", "anchors"),
        ("data: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("sft: {epochs: 1}", "data is missing"),
        ("data: {titles: true}", "data.source is missing"),
        ("\0", "is not YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in problem(tmp_path, text)


def test_a_missing_recipe_lists_the_packaged_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"does not exist.*quickstart"):
        load_recipe(tmp_path / "nope.yaml")


def test_a_huge_file_is_no_recipe(tmp_path: Path) -> None:
    assert "is no recipe" in problem(tmp_path, "#" * (1 << 21))


def test_overrides_reach_every_depth_and_every_type(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL + "base: {model: embedded, vocabulary: 512}")
    recipe = load_recipe(
        path,
        {
            "ppo.kl.target": "7.5",
            "ppo.policy_kl_stop": "null",
            "ppo.whiten": "false",
            "sft.lora.targets": "[q_proj]",
            "data.source": "no",
            "name": "1e5",
            "base": "some/model",
            "seed": "3",
        },
    )
    assert (recipe.ppo.kl.target, recipe.ppo.policy_kl_stop, recipe.ppo.whiten) == (7.5, None, False)
    assert recipe.sft.lora.targets == ("q_proj",)
    assert recipe.data.source == ("no",)
    assert (recipe.name, recipe.seed) == ("1e5", 3)
    assert (recipe.base.model, recipe.base.vocabulary) == ("some/model", 512)


def test_an_override_goes_into_a_short_base(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, SMALL + "base: embedded"), {"base.vocabulary": "300"})
    assert (recipe.base.model, recipe.base.vocabulary) == ("embedded", 300)


def test_a_bad_override_is_named_as_it_was_typed(tmp_path: Path) -> None:
    assert problem(tmp_path, SMALL, ppo__kl__target="0").startswith("--ppo.kl.target: ppo.kl.target = 0")
    assert "did you mean name?" in problem(tmp_path, SMALL, nam="x")
    assert "is not a list" in problem(tmp_path, SMALL, data__source="[a")


@pytest.mark.parametrize(
    ("text", "reason"),
    [("[2024-13-45]", "month must be in 1..12"), (f"[{'9' * 5000}]", "4300 digits"), ("[" * 5000, "recursion")],
)
def test_an_override_that_yaml_cannot_make_a_value_of_is_one_short_line(tmp_path: Path, text: str, reason: str) -> None:
    message = problem(tmp_path, SMALL, data__source=text)
    assert message.startswith("the value [")
    assert "is not a list" in message
    assert reason in message
    assert len(message) < 400
    assert len(message.splitlines()) == 1


def test_recipes_do_not_change_after_loading() -> None:
    recipe = load_recipe("quickstart")
    with pytest.raises(ValidationError):
        recipe.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        recipe.ppo.kl.target = 3.0  # type: ignore[misc]


def test_a_recipe_on_plain_documents_ends_after_sft() -> None:
    assert load_recipe("embedded-base").stages == ("data", "sft")


@pytest.mark.parametrize("name", ["quickstart", "embedded-base", "smollm2-beer"])
def test_a_resolved_recipe_loads_to_itself(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, {"seed": "5"})
    assert load_recipe(write(tmp_path, to_yaml(recipe), "recipe.yaml")) == recipe


@given(
    rate=st.floats(1e-12, 1, allow_subnormal=False),
    target=st.floats(1e-6, 1e6),
    source=st.lists(st.text(min_size=1).filter(lambda text: text not in ("embedded", "embedded-text")), min_size=1),
)
def test_any_value_survives_being_written(rate: float, target: float, source: list[str]) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "data": {"source": source},
            "sft": {"learning_rate": rate},
            "ppo": {"kl": {"target": target}},
            "watch": {"kl_bound": 2 * target},
        }
    )
    assert Recipe.model_validate(yaml.safe_load(to_yaml(recipe))) == recipe


def test_a_run_folder_stands_for_its_recipe(tmp_path: Path) -> None:
    write(tmp_path, SMALL, "recipe.yaml")
    assert find_recipe(str(tmp_path)) == tmp_path / "recipe.yaml"
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"without a recipe\.yaml"):
        find_recipe(str(tmp_path / "empty"))


def test_a_packaged_recipe_is_found_whatever_lies_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert find_recipe("quickstart") == packaged_recipes()["quickstart"]
    write(tmp_path / "quickstart", SMALL, "recipe.yaml")
    assert find_recipe("quickstart") == packaged_recipes()["quickstart"]
    assert find_recipe("./quickstart") == Path("quickstart/recipe.yaml")


def test_every_key_has_a_sentence_and_every_section_a_title() -> None:
    keys = dict(known_keys())
    assert len(keys) > 80
    for key, field in keys.items():
        assert re.fullmatch(r"(?s)[A-Z`].*\.", field.description or ""), key
        section = section_of(field)
        assert section is None or section.__doc__, key


def test_the_reference_is_up_to_date() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text("utf-8")
    assert page == reference(), "write it again: stackllama recipe reference > docs/recipe.md"
    sections = [key for key, field in known_keys() if section_of(field) is not None]
    for key, _ in known_keys():
        assert key in sections or f"| `{key}` |" in page


@pytest.mark.parametrize(
    ("text", "size"), [("3m", True), ("0.5B", True), ("m", False), ("org/3m", False), ("3m.gguf", False)]
)
def test_sizes(text: str, size: bool) -> None:
    assert is_size(text) is size


def test_a_name_that_no_file_can_have_is_refused_in_one_line() -> None:
    with pytest.raises(RecipeError, match=r"recipe x+.* (cannot be looked for|does not exist)"):
        find_recipe("x" * 5000)
