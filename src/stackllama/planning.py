"""`stackllama plan`: what each stage of a recipe will take of memory, whether it fits, and what to change if not.

Recipe values end here: `model/memory.py` counts from plain numbers.
"""

from __future__ import annotations

import contextlib
import functools
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from stackllama.assembly import device, precision, weight_type
from stackllama.environment import available_memory
from stackllama.errors import ModelError, RecipeError, TooLittleMemoryError
from stackllama.model import memory
from stackllama.model.load import base_config
from stackllama.model.memory import PARTS, Machine, Method, Moment, Shape
from stackllama.model.roles import LoRA, Trunk
from stackllama.objectives.ppo import ValueObjective
from stackllama.objectives.sft import SftObjective
from stackllama.policy_assembly import value_role
from stackllama.recipe import EMBEDDED_TEXT, Recipe, Reward, is_size
from stackllama.recipe_load import with_values
from stackllama.recipe_training import DPO, Optimization
from stackllama.rollout.engine import SLOTS
from stackllama.tokens.batches import SftRow
from stackllama.tokens.forest import Segment, Tree, plant, root_targets
from stackllama.train.optim import make_optimizer

SMALLER = ("smollm2-135m-instruct", "embedded")
"""Bases that come with the package, the larger first."""
FAILED = ("can't allocate memory", "defaultcpuallocator", "not enough memory", "cannot allocate memory", "bad_alloc")
"""What torch says, in lower case, where the system refuses it memory."""


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that makes a recipe fit: dotted keys with their values, and the peak of all stages then, in bytes."""

    values: Mapping[str, str]
    peak: int

    def __str__(self) -> str:
        """Such as `compute.row_tokens: 1024 would fit (7.9 GB)`."""
        told = " with ".join(f"{key}: {value}" for key, value in self.values.items())
        return f"{told} would fit ({human(self.peak)})"


def human(count: float) -> str:
    """Bytes as text: MB below a GB; powers of 1,000, as machines are sold."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def program_bytes() -> int:
    """Bytes that a process of ours takes without any model: measured in a fresh one, which makes one tiny step, since
    libraries come into memory as they are used. Takes some seconds.

    Raises:
        OSError, CalledProcessError: where there is no memory for that either.
    """
    code = "from stackllama.planning import measured_program; print(measured_program())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    return int(done.stdout.split()[-1])


def measured_program() -> int:
    """Bytes of this process once it has everything imported and has trained a model of two small layers."""
    import stackllama.stages.table  # noqa: F401  (what every stage imports)

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=128, **shape), attn_implementation="forest")
    trunk = Trunk(model, precision=torch.float32)
    trunk.add_adapter("sft", LoRA(2, 4.0, 0.0, ("q_proj",)), seed=0)
    forest = plant([Tree(tuple(range(64)))])
    optimizer = make_optimizer(trunk.trainable("sft"), learning_rate=1e-3)
    with trunk.use("sft", training=True) as role:
        SftObjective()(role, SftRow(forest, root_targets(forest))).losses["loss"].backward()
    optimizer.step()
    return memory.resident()


def stage_moments(recipe: Recipe, shape: Shape, *, program: int, gpus: int = 0) -> dict[str, list[Moment]]:
    """Stage -> its moments, for the stages that hold a model."""
    quantized = recipe.base.quantization != "off"
    machine = Machine(
        program,
        weight_type(recipe).itemsize,
        precision(recipe).itemsize,
        gpus,
        quantized,
        recipe.compute.recompute_activations,
    )
    found = {"sft": list(_sft(recipe, shape, machine))}
    if recipe.data.source == (EMBEDDED_TEXT,):
        return found
    for role in ("reward", "judge"):
        found[role] = list(_reward(recipe, shape, machine))
    policy = {"ppo": _ppo, "dpo": _dpo}[recipe.policy]
    found[recipe.policy] = list(policy(recipe, shape, machine))
    found["evaluate"] = list(_evaluate(recipe, shape, machine))
    return found


def method(section: Optimization) -> Method:
    """How a section trains its role."""
    return Method() if section.method == "full" else Method(section.lora.rank, tuple(section.lora.targets))


def _live(recipe: Recipe) -> list[Method]:
    """The SFT adapter where it stays live under the later roles: 4-bit weights have nothing merged into them."""
    return [] if recipe.base.quantization == "off" else [method(recipe.sft)]


def _loading(recipe: Recipe, shape: Shape, machine: Machine, *, first: bool) -> Iterator[Moment]:
    # The base's files may be in any precision, fp32 at worst; what SFT leaves is in that of the trunk.
    stored = memory.FP32 if first and not is_size(recipe.base.model) else machine.weights
    yield memory.loading(shape, machine, stored=stored)
    if machine.quantized:
        yield memory.quantizing(shape, machine)


def _sft(recipe: Recipe, shape: Shape, machine: Machine) -> Iterator[Moment]:
    section = recipe.sft
    row = memory.full_row(min(recipe.compute.row_tokens, section.tokens_per_step), section.max_tokens)
    how, scored = method(section), row[-1].stop
    yield from _loading(recipe, shape, machine, first=True)
    yield memory.training(shape, machine, how, row, in_place=True, scored=scored)
    if how.rank is not None and not machine.quantized:
        yield memory.merging(shape, machine, how)


def _reward(recipe: Recipe, shape: Shape, machine: Machine) -> Iterator[Moment]:
    row = _paired_row(recipe, recipe.reward)
    yield from _loading(recipe, shape, machine, first=False)
    yield memory.training(shape, machine, method(recipe.reward), row, under=_live(recipe))


def _dpo(recipe: Recipe, shape: Shape, machine: Machine) -> Iterator[Moment]:
    row = _paired_row(recipe, recipe.dpo)
    scored = sum(segment.length for segment in row if not segment.is_root)
    yield from _loading(recipe, shape, machine, first=False)
    watching = _watching(recipe, machine)
    others = [method(recipe.reward), *watching] if watching else []
    if watching:
        roles = [*others, method(recipe.dpo), *_live(recipe)]
        yield from _answering(recipe, shape, machine, recipe.watch.prompts, recipe.ppo.max_new_tokens, roles)
    yield memory.training(shape, machine, method(recipe.dpo), row, scored=scored, others=others, under=_live(recipe))


def _watching(recipe: Recipe, machine: Machine) -> list[Method]:
    """What watching puts beside the reward model and the policy: the judge; and the best weights so far, on the CPU."""
    if recipe.watch.every is None:
        return []
    return [method(recipe.reward)] if machine.gpus else [method(recipe.reward), method(recipe.policy_section)]


def _paired_row(recipe: Recipe, section: Reward | DPO) -> list[Segment]:
    """The longest row of questions with their answers."""
    question, answer = recipe.reward.max_question_tokens, recipe.reward.max_answer_tokens
    answers = (answer,) * section.answers_per_question
    tokens = min(recipe.compute.row_tokens, section.questions_per_step * (question + sum(answers)))
    # A question that outgrows the row is dealt to several; as many answers stand in one as fit, two at least.
    fitting = max(2, (tokens - question) // answer)
    return memory.full_row(tokens, question, answers[:fitting])


def _ppo(recipe: Recipe, shape: Shape, machine: Machine) -> Iterator[Moment]:
    section = recipe.ppo
    others = [method(recipe.reward), *_watching(recipe, machine)]
    values = [method(recipe.reward)] if value_role(recipe) == ValueObjective.role else []  # it is a second reward model
    requests = section.prompts_per_step * section.samples_per_prompt
    sequences = min(SLOTS, requests)
    tree = section.max_prompt_tokens + section.samples_per_prompt * section.max_new_tokens
    tokens = min(recipe.compute.row_tokens, tree * math.ceil(section.prompts_per_step / section.minibatches))
    samples = min(section.samples_per_prompt, max(1, (tokens - section.max_prompt_tokens) // section.max_new_tokens))
    row = memory.full_row(tokens, section.max_prompt_tokens, (section.max_new_tokens,) * samples)
    yield from _loading(recipe, shape, machine, first=False)
    yield memory.sampling(
        shape,
        machine,
        sequences=sequences,
        prompts=math.ceil(sequences / section.samples_per_prompt),
        prompt_tokens=section.max_prompt_tokens,
        new_tokens=section.max_new_tokens,
        roles=[*others, *values, method(section), *_live(recipe)],
    )
    scored = sum(segment.length for segment in row if not segment.is_root)
    policy, live = method(section), _live(recipe)
    yield memory.training(shape, machine, policy, row, scored=scored, others=others, under=live, beside=values)
    for value in values:
        yield memory.training(shape, machine, value, row, others=others, under=live, beside=[policy])


def _evaluate(recipe: Recipe, shape: Shape, machine: Machine) -> Iterator[Moment]:
    roles = [method(recipe.reward), method(recipe.reward), method(recipe.policy_section), *_live(recipe)]
    requests = recipe.evaluate.prompts * max(1, recipe.evaluate.best_of)
    yield from _loading(recipe, shape, machine, first=False)
    new = recipe.evaluate.max_new_tokens or recipe.ppo.max_new_tokens
    yield from _answering(recipe, shape, machine, requests, new, roles)


def _answering(
    recipe: Recipe, shape: Shape, machine: Machine, requests: int, new: int, roles: Sequence[Method]
) -> Iterator[Moment]:
    """Answers of up to `new` tokens to the exam's prompts, or to those that are watched, and reading them."""
    sequences, prompt = min(SLOTS, requests), recipe.ppo.max_prompt_tokens
    yield memory.sampling(
        shape, machine, sequences=sequences, prompts=sequences, prompt_tokens=prompt, new_tokens=new, roles=roles
    )
    row = memory.full_row(recipe.compute.row_tokens, prompt, (new,))
    yield memory.reading(shape, machine, row, scored=row[-1].stop, roles=roles)


def base_shape(recipe: Recipe) -> Shape:
    """The shape of a recipe's base, from its configuration alone.

    Raises:
        ModelError: where there is no such base.
    """
    base = recipe.base
    return _shape(base.model, base.revision, base.vocabulary)


@functools.cache
def _shape(model: str, revision: str | None, vocabulary: int) -> Shape:
    return memory.shape_of(base_config(model, revision=revision, vocabulary=vocabulary))


def peaks(recipe: Recipe, *, program: int, gpus: int = 0) -> dict[str, Moment]:
    """Stage -> its largest moment."""
    found = stage_moments(recipe, base_shape(recipe), program=program, gpus=gpus)
    return {stage: max(moments, key=lambda moment: moment.peak) for stage, moments in found.items()}


def setting_to_change(
    recipe: Recipe, limit: int, *, program: int, gpus: int = 0, stage: str | None = None
) -> Change | None:
    """The first change that makes every stage, or the one named, fit into so many bytes, tried by predicting again;
    None: nothing does.

    Tried in this order, each on top of nothing: shorter rows, adapters instead of all weights, a base in 4 bits under
    adapters, smaller bases; each of these with shorter rows after it.
    """
    for values in _changes(recipe):
        try:
            changed = with_values(recipe, values)
            found = peaks(changed, program=program, gpus=gpus)
            peak = max(moment.peak for name, moment in found.items() if stage in (None, name))
        except (RecipeError, ModelError):  # such as rows shorter than the longest text, or a base that is not installed
            continue
        if peak <= limit:
            return Change(values, peak)
    return None


def _changes(recipe: Recipe) -> Iterator[dict[str, str]]:
    full_row = recipe.compute.row_tokens
    rows = [{"compute.row_tokens": str(full_row * eighths // 8)} for eighths in range(7, 0, -1)]
    yield from rows
    if not recipe.compute.recompute_activations:
        yield {"compute.recompute_activations": "true"}
    full = [name for name in ("sft", "reward", "ppo", "dpo") if getattr(recipe, name).method == "full"]
    adapters = {f"{name}.method": "lora" for name in full}
    if adapters:
        yield adapters
        yield from ({**adapters, **row} for row in rows)
    if recipe.base.quantization == "off":
        packed = {**adapters, "base.quantization": "nf4"}
        yield packed
        yield from ({**packed, **row} for row in rows)
    for base in SMALLER:
        yield {"base.model": base}
        yield from ({"base.model": base, **row} for row in rows)


def table(found: Mapping[str, Moment]) -> Iterator[str]:
    """Lines of a table: a stage, its peak, the moment that has it, and the parts of that, the largest first."""
    for stage, moment in found.items():
        yield f"{stage:<9} {human(moment.peak):>8}  while {moment.what}"
        for part, count in sorted(moment.parts.items(), key=lambda item: -item[1]):
            if count >= 1e6:
                yield f"          {human(count):>8}  {part:<12} {PARTS[part]}"


def plan(recipe: Recipe, *, gpus: int | None, limit: int | None) -> Iterator[str]:
    """Lines to print: the table, whether it fits, and what to change. gpus: 0 for the CPU; None: where the recipe would
    run here. limit: bytes of each GPU, or of the machine; None: what this machine has.
    """
    gpus = int(device(recipe).type == "cuda") if gpus is None else gpus
    program = program_bytes()
    if limit is None:
        limit = torch.cuda.get_device_properties(0).total_memory if gpus and torch.cuda.is_available() else None
    there = available_memory() if limit is None and not gpus else limit
    found = peaks(recipe, program=program, gpus=gpus)
    yield from table(found)
    yield ""
    where = f"on each of {gpus} GPUs" if gpus > 1 else "on one GPU" if gpus else "on this CPU"
    most = max(found, key=lambda stage: found[stage].peak)
    peak = found[most].peak
    told = f"{most} has the highest peak, {human(peak)} {where}"
    if there is None:
        yield f"{told}; there is no GPU here: --memory GB says what yours has"
    elif peak <= there:
        yield f"{told}; there are {human(there)}: it fits"
    else:
        yield f"{told}; there are {human(there)}: it does not fit"
        yield advice(recipe, there, program=program, gpus=gpus)


def advice(recipe: Recipe, limit: int, *, program: int, gpus: int = 0, stage: str | None = None) -> str:
    """A sentence that names the setting to change so that a recipe, or one stage, fits into so many bytes."""
    change = setting_to_change(recipe, limit, program=program, gpus=gpus, stage=stage)
    if change is None:
        return f"no setting makes it fit into {human(limit)}; take a machine with more memory"
    return str(change)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was asked for and refused."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in FAILED)


def explain_out_of_memory(error: BaseException, recipe: Recipe, command: str) -> TooLittleMemoryError:
    """The error that tells what was done, what the prediction says it needs, what there is, and what to change."""
    there, program = available_memory(), memory.resident()
    # Where not even a small process can be started, what this one holds is the next best.
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        program = program_bytes()
    gpus = int(isinstance(error, torch.OutOfMemoryError))
    if gpus:
        there = torch.cuda.get_device_properties(0).total_memory
    moment = peaks(recipe, program=program, gpus=gpus)[command]
    told = advice(recipe, min(there, moment.peak - 1), program=program, gpus=gpus, stage=command)
    return TooLittleMemoryError(
        f"memory ran out in {command}, which is predicted to need {human(moment.peak)} (most of it while "
        f"{moment.what}); there are {human(there)}. {told}. "
        f"`stackllama plan` shows the parts ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    )
