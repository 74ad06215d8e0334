from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stackllama.cli import PROCESS_SETTINGS
from stackllama.model import memory
from stackllama.model.load import EMBEDDED, base_config, load_base
from stackllama.model.memory import Machine, Method, Shape

WORKER = Path(__file__).with_name("memory_worker.py")
TINY = Shape(layers=2, hidden=8, heads=2, key_value_heads=1, head_size=4, feed_forward=16, vocabulary=10, tied=True)
CPU = Machine(program=1000, weights=4, products=4)
LORA = Method(2, ("q_proj", "down_proj"))
ROW = memory.row_of([(4, (2,))])


@pytest.mark.parametrize(
    "case",
    [
        ("embedded", "sft", "lora", "1024", "512"),
        ("16m", "reward", "full", "512", "256"),
        ("smollm2-135m-instruct", "reward", "lora", "256", "128", "--steps", "1"),
        ("embedded", "sft", "lora", "1024", "512", "--nf4"),
    ],
    ids=lambda case: " ".join([*case[:3], *case[5:]]),
)
def test_the_measured_peak_is_within_15_percent_of_the_prediction(case: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), *case],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **PROCESS_SETTINGS},
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), found["parts"]


def test_parts_of_a_tiny_shape() -> None:
    # A layer: q 8*8, k and v 8*4 each, o 8*8, gate, up and down 8*16 each: 64 + 64 + 64 + 384 = 576.
    # All: 2*576 + norms (2*2 + 1)*8 + embedding 10*8 = 1152 + 40 + 80 = 1272; 4 bytes each.
    # Adapters: rank 2 on q (8 + 8) and down (16 + 8) = 80 a layer, 160 in all, 4 bytes each.
    # A token keeps, in a layer: 2*8 of the stream, q 8, k 4, v 4, attention's 8, gate and up 32, low-rank 2*2: 76; two
    # layers 152 numbers, 2*2 logarithms of sums, and 2*8 of the last norm: 172, 4 bytes each; 6 tokens: 4128.
    parts = memory.training(TINY, CPU, LORA, ROW).parts
    assert TINY.parameters == 1272
    assert parts["program"] == 1000
    assert parts["weights"] == 5088
    assert parts["adapters"] == parts["gradients"] == parts["copies"] == 640
    assert parts["optimizer"] == 1280
    assert parts["activations"] == 4128
    assert parts["head"] == parts.get("cache", 0) == 0
    # Keys are repeated for the 2 query heads of each: a token has in the backward 8 numbers of the queries' gradient;
    # 2*8 of keys and values, 2*8 of their gradients and 2*4 of these summed; 48 numbers, 4 bytes each: 1152.
    assert parts["attention"] == 1152


def test_branches_that_do_not_stand_behind_their_root_are_attended_to_twice() -> None:
    # A root of 4, branches of 2 and 1: the one token of the second is gathered and joined (2*8 numbers, 2*8 in fp32),
    # its root of 4 too (2*4 each): 64 + 64 + 128; and 8 + 4 * 40 numbers of the backward.
    one, two = (memory.training(TINY, CPU, LORA, memory.row_of([(4, branches)])).parts for branches in ((3,), (2, 1)))
    assert two["attention"] - one["attention"] == 256 + 4 * (8 + 4 * 40)


def test_recomputing_keeps_the_input_of_each_layer_and_one_layer_whole() -> None:
    # Of the 172 numbers above: two layers of 78, and 16; now one of 78, two inputs of 8, and 16.
    parts = memory.training(TINY, replace(CPU, recompute=True), LORA, ROW).parts
    assert parts["activations"] == 6 * 4 * (78 + 16 + 16)


def test_a_role_that_learns_in_the_same_step_has_weights_gradients_and_moments_beside() -> None:
    alone, both = (memory.training(TINY, CPU, LORA, ROW, beside=beside).parts for beside in ([], [LORA]))
    changed = {name: both[name] - alone[name] for name in both if both[name] != alone[name]}
    # 160 numbers more of each, two of them moments; only one role's activations are there at a time.
    assert changed == {"adapters": 640, "gradients": 640, "optimizer": 1280}
    full = memory.training(TINY, CPU, LORA, ROW, beside=[Method()]).parts
    assert full["copies"] - alone["copies"] == full["gradients"] - alone["gradients"] == 5088


def test_a_gpu_uses_working_memory_again() -> None:
    of = [memory.training(TINY, replace(CPU, gpus=gpus), LORA, ROW, scored=6).parts for gpus in (0, 1)]
    working = [[parts[name] for name in ("attention", "head", "layers")] for parts in of]
    assert min(working[0]) > 0
    assert sorted(count > 0 for count in working[1]) == [False, False, True]


def test_training_in_full_holds_masters_gradients_moments_and_cast_copies() -> None:
    # Beside the trunk of 1272 numbers in fp32: a copy (4 bytes each), gradients (4), moments (8); in bf16 the linear
    # layers are cast for a row: 2 * 1152.
    parts = memory.training(TINY, replace(CPU, products=2), Method(), ROW).parts
    assert parts["weights"] == parts["gradients"] == 5088
    assert parts["optimizer"] == 10176
    assert parts["copies"] == 5088 + 2304
    in_place = memory.training(TINY, replace(CPU, products=2), Method(), ROW, in_place=True).parts
    assert in_place["copies"] == 2304


def test_in_four_bits_the_linear_layers_take_half_a_byte_a_number() -> None:
    # In bf16: 2 * 576 numbers of linear layers at 0.5 + 1/64 + 4/(64 * 256) = 0.515869140625 bytes: 594; the other 120
    # numbers take 2 bytes each. An SFT adapter stays live under the role: 160 numbers in fp32 of each, cast to bf16; a
    # token keeps two more low-rank pairs in each layer: 2 * 4 * 2 bytes more. The widest layer, 8 * 16, is unpacked.
    machine = replace(CPU, weights=2, products=2)
    dense, packed = (
        memory.training(TINY, machine, LORA, ROW),
        memory.training(TINY, replace(machine, quantized=True), LORA, ROW, under=[LORA]),
    )
    assert packed.parts["weights"] == 594 + 240
    assert packed.parts["adapters"] == 2 * 640
    assert packed.parts["copies"] == 2 * 320
    assert packed.parts["optimizer"] == dense.parts["optimizer"]
    assert packed.parts["activations"] - dense.parts["activations"] == 6 * 2 * 4 * 2
    assert packed.parts["layers"] - dense.parts["layers"] == 2 * 128


def test_weights_that_are_to_be_packed_are_whole_in_the_processors_memory_first() -> None:
    machine = replace(CPU, weights=2, products=2, quantized=True)
    assert memory.loading(TINY, machine, stored=2).parts["weights"] == 2 * 1272
    assert memory.loading(TINY, replace(machine, gpus=1), stored=2).parts["weights"] == 834
    # Then the packed ones come beside them; on a GPU, the widest layer (8 * 16 numbers) at a time.
    both, one = (memory.quantizing(TINY, replace(machine, gpus=gpus)).parts for gpus in (0, 1))
    assert (both["weights"], both["copies"]) == (834, 2544)
    assert (one["weights"], one["copies"]) == (834, 256)


def test_the_cache_of_the_sampler() -> None:
    # 3 sequences of 5 + 7 places, keys and values of 1 head of 4, fp32: 3 * 12 * 2 * 4 * 4 = 1152 a layer; two layers
    # 2304, and one layer's copy in a step: 2304 + 1152.
    parts = memory.sampling(TINY, CPU, sequences=3, prompts=3, prompt_tokens=5, new_tokens=7).parts
    assert parts["cache"] == 3456


def test_gpus_share_what_is_kept_of_weights_but_not_the_rows() -> None:
    # The sums of a GPU are whole numbers, so halves are exact here.
    one, two = (memory.training(TINY, replace(CPU, gpus=n), Method(), ROW, in_place=True).parts for n in (1, 2))
    for part in ("weights", "gradients", "optimizer"):
        assert two[part] == one[part] / 2
    for part in ("program", "activations", "attention", "layers"):
        assert two[part] == one[part]


@pytest.mark.parametrize(
    "field", ["layers", "hidden", "heads", "key_value_heads", "head_size", "feed_forward", "vocabulary"]
)
@pytest.mark.parametrize("method", [LORA, Method()], ids=["lora", "full"])
def test_a_larger_model_takes_more(field: str, method: Method) -> None:
    larger = replace(TINY, **{field: 2 * getattr(TINY, field)})
    for what in (TINY, larger):
        assert set(memory.training(what, CPU, method, ROW, scored=3).parts) <= set(memory.PARTS)
    assert memory.training(larger, CPU, method, ROW).peak > memory.training(TINY, CPU, method, ROW).peak
    assert memory.reading(larger, CPU, ROW).peak > memory.reading(TINY, CPU, ROW).peak


def test_more_work_takes_more() -> None:
    def of(machine: Machine = CPU, method: Method = LORA, tokens: int = 64, longest: int = 16, scored: int = 8) -> int:
        return memory.training(TINY, machine, method, memory.full_row(tokens, longest), scored=scored).peak

    assert of(tokens=128) > of()
    assert of(scored=16) > of()
    assert of(method=Method(4, LORA.targets)) > of()
    assert of(method=Method(2, (*LORA.targets, "up_proj"))) > of()
    assert of(method=Method()) > of()
    assert of(machine=replace(CPU, program=2000)) > of()
    with_other = memory.training(TINY, CPU, LORA, ROW, others=[LORA]).peak
    assert with_other > memory.training(TINY, CPU, LORA, ROW).peak


def test_the_shape_of_a_base_is_that_of_its_weights() -> None:
    shape = memory.shape_of(base_config(EMBEDDED))
    assert shape.parameters == sum(one.numel() for one in load_base(EMBEDDED).model.parameters())
    sized = memory.shape_of(base_config("0.8m", vocabulary=300))
    assert (sized.layers, sized.hidden, sized.vocabulary) == (4, 128, 300)
