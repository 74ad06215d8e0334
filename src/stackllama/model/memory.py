"""How much memory a stage will take, counted from the shape of its model before any weight is loaded.

A stage is a few *moments* (loading, training, sampling, ...). A moment is bytes by named part, all alive together; the
stage's peak is its largest moment. Counted from what the code keeps, per token of a row and per layer, in numbers of
the products' precision (the residual stream, marked *, in that of the weights):

    2 D*           the stream before attention and before the feed-forward (`Normed` makes the layers' inputs again)
    (H + 2 K) E    queries and keys after their rotation, and values
    H E + H        what attention gave, and the logarithms of its sums (in fp32)
    2 F            gate and up (`Gated` makes their product again)
    r              for each adapter, its low-rank intermediate

What is alive only inside one operator is *working memory*: keys for each head, the chunk of logits, gradients on their
way through the widest layer. On the CPU they are added up, though they follow one another: the C library's heap seldom
finds the hole that one leaves fit for the next, since kept activations lie in it. Between kept activations, too, it
leaves holes; their share, `HOLES`, is the one number here that was measured and not counted.

Left out on purpose: what data take (texts and token ids, known only once they are read), and texts shorter than the
recipe lets in: a plan is for full rows of the longest texts.

Legend: T tokens of a row, D hidden size, H query heads, K key/value heads, E head size, F feed-forward, V vocabulary,
r rank.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import psutil

from stackllama.model.logprobs import CHUNK_ELEMENTS
from stackllama.tokens.forest import Segment

PARTS = {
    "program": "the program and its libraries; on a GPU, CUDA's context",
    "weights": "the weights of the base, with the SFT adapter in them",
    "copies": "weights of roles that are trained in full; weights cast for the products",
    "adapters": "low-rank adapters, in fp32",
    "gradients": "of what is trained, in fp32",
    "optimizer": "AdamW's two moments, in fp32",
    "activations": "what the backward will need of a row",
    "attention": "keys and values for each head, and gradients inside attention",
    "head": "the chunk of logits, and what is made of it",
    "layers": "inputs and gradients inside the widest layer",
    "cache": "keys and values of the sampler",
    "heap": "holes in the C library's heap between what is kept",
}
"""Named parts, in the order in which they are shown."""

FP32 = 4
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a number of a 4-bit weight with its scales: see `nf4.py`."""
PACKING = 16
"""Bytes for a number while its weight is packed on the CPU: it, its size, it by its scale, bounded, and its level."""
CONTEXT = 600 << 20
"""Bytes of CUDA's context and of its libraries' workspaces."""
HOLES = 0.45
"""Bytes of holes for each byte of kept activations, under glibc: 0.36 to 0.52 in three runs. With every block mapped by
itself (MALLOC_MMAP_THRESHOLD_=65536) it is 0, and training slower.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama: D, H, K, E, F and V of the legend, and whether the output matrix is the embedding (`tied`)."""

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear layer -> (features in, features out)."""
        across, narrow = self.heads * self.head_size, self.key_value_heads * self.head_size
        return {
            "q_proj": (self.hidden, across),
            "k_proj": (self.hidden, narrow),
            "v_proj": (self.hidden, narrow),
            "o_proj": (across, self.hidden),
            "gate_proj": (self.hidden, self.feed_forward),
            "up_proj": (self.hidden, self.feed_forward),
            "down_proj": (self.feed_forward, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's linear layers."""
        return sum(ins * outs for ins, outs in self.linears.values())

    @property
    def matrix(self) -> int:
        """Elements of the embedding, and of the output matrix."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied output matrix counts once, two norms a layer and the last one."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.layer_parameters + norms + self.matrix * (1 if self.tied else 2)


@dataclass(frozen=True, slots=True)
class Method:
    """How a role is trained: an adapter of `rank` on the layers named by `targets`; rank None: all weights."""

    rank: int | None = None
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it runs. program: bytes that the process has before it loads anything; weights, products: bytes of a number
    of the trunk and of the matrix products; gpus: 0 for the CPU; of several, each holds its share of the weights, the
    gradients and the optimizer, and rows of its own. quantized: the trunk's linear layers are in NF4; recompute: a
    layer keeps its input alone, and the backward computes the rest of it again.
    """

    program: int
    weights: int
    products: int
    gpus: int = 0
    quantized: bool = False
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Moment:
    """What is alive together in a moment: part (a key of `PARTS`) -> bytes."""

    what: str
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def shape_of(config: Any) -> Shape:
    """The shape that a transformers configuration describes."""
    heads = int(config.num_attention_heads)
    return Shape(
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        heads=heads,
        key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_size=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        feed_forward=int(config.intermediate_size),
        vocabulary=int(config.vocab_size),
        tied=bool(config.tie_word_embeddings),
    )


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Bytes that this process held at most; `ru_maxrss` alone also knows what the process held that started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in status.read_text("ascii").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def row_of(trees: Iterable[tuple[int, Sequence[int]]]) -> list[Segment]:
    """The segments of a row of trees, each given as the length of its root and those of its branches."""
    segments: list[Segment] = []
    end = 0
    for root, branches in trees:
        root_stop = end + root
        ends = list(accumulate(branches, initial=root_stop))
        segments.append(Segment(end, root_stop, end, root_stop))
        segments += [Segment(start, stop, end, root_stop) for start, stop in pairwise(ends)]
        end = ends[-1]
    return segments


def full_row(tokens: int, root: int, branches: Sequence[int] = ()) -> list[Segment]:
    """A row of as many trees of these lengths as fit into so many tokens, one at least."""
    return row_of([(root, branches)] * max(1, tokens // (root + sum(branches))))


def adapter_parameters(shape: Shape, method: Method) -> int:
    """Parameters of an adapter: r (in + out) for each layer that has one; 0 for a role trained in full."""
    widths = (sum(shape.linears[name]) for name in method.targets if name in shape.linears)
    return shape.layers * (method.rank or 0) * sum(widths)


def loading(shape: Shape, machine: Machine, *, stored: int) -> Moment:
    """Reading weights from files of numbers of `stored` bytes: the file's pages count until all is converted."""
    if not machine.gpus:
        machine = replace(machine, quantized=False)  # that comes after
    converted = stored if stored != machine.weights and not machine.gpus else 0
    return Moment("loading", _held(shape, machine) | {"copies": shape.parameters * converted})


def quantizing(shape: Shape, machine: Machine) -> Moment:
    """Putting loaded weights into 4 bits: the dense ones lie in a mapped file, whose pages stay until the last one is
    packed; a GPU gets one layer of them at a time.
    """
    widest = _widest(shape)
    dense = machine.weights * (widest if machine.gpus else shape.parameters)
    return Moment("quantizing", _held(shape, machine) | {"copies": dense, "layers": PACKING * widest})


def training(
    shape: Shape,
    machine: Machine,
    method: Method,
    row: Sequence[Segment],
    *,
    in_place: bool = False,
    scored: int = 0,
    others: Sequence[Method] = (),
    under: Sequence[Method] = (),
    beside: Sequence[Method] = (),
) -> Moment:
    """Steps of a role, row after row. in_place: it trains the trunk's own weights; scored: positions of a row whose
    log-probability is learned; others: roles that stand on the trunk beside it; under: frozen adapters that every role
    passes through; beside: roles that learn in the same step, one after the other.
    """
    full = method.rank is None
    trained = sum(shape.parameters if one.rank is None else adapter_parameters(shape, one) for one in (method, *beside))
    stream = FP32 if full else machine.weights
    roles = [*others, *under, *beside] if full and in_place else [*others, *under, *beside, method]
    held = _held(shape, machine, roles)
    cast = 0 if stream == machine.products else machine.products * shape.layers * shape.layer_parameters
    if scored and stream != machine.products:
        cast += machine.products * shape.matrix
    # An adapter as the products take it, scaled and cast, lives as long as the row's graph.
    cast += machine.products * sum(adapter_parameters(shape, one) for one in (*under, method))
    share = max(1, machine.gpus)
    tokens = row[-1].stop
    kept = tokens * _kept(shape, machine, (*under, method), stream)
    return Moment(
        "training",
        held
        | {
            "copies": held["copies"] + cast,
            "gradients": FP32 * trained // share,
            "optimizer": 2 * FP32 * trained // share,
            "activations": kept,
            **_working(
                machine,
                attention=_attention(shape, machine, row, backward=True),
                head=_head(shape, machine, scored, slopes=True, trained=full),
                layers=tokens * _layer_work(shape, machine, stream, backward=True) + _unpacked(shape, machine),
            ),
            "heap": 0 if machine.gpus else int(HOLES * kept),
        },
    )


def reading(
    shape: Shape, machine: Machine, row: Sequence[Segment], *, scored: int = 0, roles: Sequence[Method] = ()
) -> Moment:
    """A pass over a row without gradients, with so many scored positions."""
    stream = FP32 if any(role.rank is None for role in roles) else machine.weights
    tokens = row[-1].stop
    held = _held(shape, machine, roles)
    return Moment(
        "reading",
        held
        | {
            "copies": held["copies"] + _cast_once(shape, machine, stream),
            "activations": tokens * _passing(shape, machine, stream),
            **_working(
                machine,
                attention=_attention(shape, machine, row, backward=False),
                head=_head(shape, machine, scored, slopes=False, trained=False),
                layers=tokens * _layer_work(shape, machine, stream, backward=False) + _unpacked(shape, machine),
            ),
        },
    )


def sampling(
    shape: Shape,
    machine: Machine,
    *,
    sequences: int,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    roles: Sequence[Method] = (),
) -> Moment:
    """Growing so many sequences at a time on so many distinct prompts, which are read as one row first."""
    read = reading(shape, machine, full_row(prompts * prompt_tokens, prompt_tokens), roles=roles)
    narrow = shape.key_value_heads * shape.head_size
    layer = 2 * sequences * (prompt_tokens + new_tokens) * narrow * machine.products
    cache = layer * shape.layers + layer  # a step copies one layer's
    logits = sequences * shape.vocabulary * (machine.products + 3 * FP32)
    return Moment("sampling", {**read.parts, "cache": cache, "head": logits})


def merging(shape: Shape, machine: Machine, method: Method) -> Moment:
    """Folding an adapter into the trunk, with what it replaces kept until the result is measured."""
    held = _held(shape, machine, [method])
    linear = shape.layers * shape.layer_parameters // max(1, machine.gpus)
    copies = linear * machine.weights
    return Moment("merging", held | {"copies": copies, "layers": 3 * FP32 * _widest(shape)})


def _held(shape: Shape, machine: Machine, roles: Sequence[Method] = ()) -> dict[str, int]:
    """What stands in memory whatever is done: program, trunk, and the roles on it."""
    share = max(1, machine.gpus)
    copies = sum(role.rank is None for role in roles)
    parts = {
        "program": CONTEXT if machine.gpus else machine.program,
        "weights": _trunk(shape, machine) // share,
        "copies": copies * shape.parameters * FP32 // share,
        "adapters": FP32 * sum(adapter_parameters(shape, role) for role in roles) // share,
    }
    if machine.gpus > 1:  # the layer at work is gathered whole, and the next one while it is at work
        parts["copies"] += machine.weights * (2 * shape.layer_parameters + shape.matrix)
    return parts


def _trunk(shape: Shape, machine: Machine) -> int:
    """Bytes of the trunk's weights."""
    linear = shape.layers * shape.layer_parameters
    packed = int(linear * NF4) if machine.quantized else linear * machine.weights
    return (shape.parameters - linear) * machine.weights + packed


def _unpacked(shape: Shape, machine: Machine) -> int:
    """Bytes of the one weight that is unpacked for a product, where weights are packed: the widest."""
    return machine.products * _widest(shape) if machine.quantized else 0


def _widest(shape: Shape) -> int:
    """Numbers of the widest linear layer's weight."""
    return max(ins * outs for ins, outs in shape.linears.values())


def _working(machine: Machine, **parts: int) -> dict[str, int]:
    """Working memory by part; on a GPU, whose allocator uses it again at once, the largest part alone."""
    largest = max(parts, key=parts.__getitem__)
    return {part: count if part == largest or not machine.gpus else 0 for part, count in parts.items()}


def _kept(shape: Shape, machine: Machine, methods: Sequence[Method], stream: int) -> int:
    """Bytes for a token that the backward needs: the table above, and the last norm (input and result, in fp32)."""
    across, narrow = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    low = sum((one.rank or 0) * len([name for name in one.targets if name in shape.linears]) for one in methods)
    numbers = 2 * across + 2 * narrow + 2 * shape.feed_forward + low
    layer = 2 * shape.hidden * stream + numbers * machine.products + shape.heads * FP32
    last = 2 * shape.hidden * FP32
    return layer + shape.layers * shape.hidden * stream + last if machine.recompute else shape.layers * layer + last


def _passing(shape: Shape, machine: Machine, stream: int) -> int:
    """Bytes for a token that are alive in the middle of a layer when nothing is kept."""
    across, narrow = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    return 2 * shape.hidden * stream + machine.products * (2 * across + 2 * narrow + 2 * shape.feed_forward)


def _cast_once(shape: Shape, machine: Machine, stream: int) -> int:
    """Bytes of the weights that are cast while one layer, or the output matrix, is at work."""
    return 0 if stream == machine.products else machine.products * (shape.layer_parameters + shape.matrix)


def _layer_work(shape: Shape, machine: Machine, stream: int, *, backward: bool) -> int:
    """Bytes for a token inside the widest layer.

    Forward: the made input of down (F), or a norm's (D in fp32, and cast). Backward: down's input, its gradient, one
    product and the gradient of gate (4 F), and two gradients of the stream.
    """
    wide, hidden = shape.feed_forward * machine.products, shape.hidden
    forward = max(wide + hidden * machine.products, hidden * (FP32 + machine.products))
    return forward + (4 * wide + 2 * hidden * stream if backward else 0)


def _attention(shape: Shape, machine: Machine, row: Sequence[Segment], *, backward: bool) -> int:
    """Bytes inside attention by flash kernels, for all tokens and for the branches that do not stand behind their root.

    On the CPU, keys and values once for each query head; and in the backward, in fp32: queries, gradients and result
    where they are not so already, keys and values, and the gradients of all three. On a GPU, the gradients, and those
    of the queries once more in fp32. Such branches are gathered, with their roots, and what they get is joined.
    """
    behind = [one for one in row if not one.is_root and one.start != one.root_stop]
    roots = {(one.root_start, one.root_stop) for one in behind}
    tokens, branches = row[-1].stop, sum(one.length for one in behind)
    gathered = (branches, sum(stop - start for start, stop in roots))
    numbers = machine.products
    across, narrow = shape.heads * shape.head_size, shape.key_value_heads * shape.head_size
    repeated = shape.heads != shape.key_value_heads
    cast = numbers != FP32

    def work(queries: int, keys: int) -> int:
        if machine.gpus:
            return queries * across * (numbers + FP32) + keys * 2 * narrow * numbers if backward else 0
        if not backward:
            return keys * 2 * across * numbers * repeated
        wide = queries * across * (3 * cast + 1) + keys * (
            2 * across * (1 + (repeated or cast)) + 2 * narrow * repeated
        )
        return FP32 * wide

    joined = branches * (2 * across * numbers + 2 * across * FP32) + gathered[1] * 2 * narrow * numbers
    return work(tokens, tokens) + (joined + work(*gathered) if behind else 0)


def _head(shape: Shape, machine: Machine, scored: int, *, slopes: bool, trained: bool) -> int:
    """Bytes of the logits and what is made of them, for so many scored positions; 0 for none.

    For each logit of a chunk: itself and its log-probability in fp32, and where the products are in bf16 the logit as
    it came and its slope; while the next chunk begins, the last one's are still there. The hidden states that are read,
    and their slopes; a trained matrix has its gradient (fp32), the share of a chunk, the scaled one and the
    embedding's.
    """
    if not scored:
        return 0
    elements = CHUNK_ELEMENTS["cuda" if machine.gpus else "cpu"]
    chunk = min(scored, max(1, elements // shape.vocabulary))
    cast = 0 if machine.products == FP32 else machine.products
    each = 2 * FP32 + cast + (FP32 + 2 * cast if scored > chunk else 0)
    rows = scored * shape.hidden * machine.products * (2 if slopes else 1)
    return chunk * shape.vocabulary * each + rows + (4 * FP32 * shape.matrix if trained else 0)
