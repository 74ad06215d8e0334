"""One trunk, many roles: policy, reference, reward, judge and value over one set of base weights.

*reference* is the trunk with every adapter off. Each other role has a LoRA adapter of its own (or, when a small model
is trained in full, a copy of the trunk), and the heads that it reads. A role is entered, used for forward *and*
backward, and left::

    with trunk.use("policy", training=True) as policy:
        hidden_TD = policy.hidden(forest)
        loss = -policy.logprobs(hidden_TD, branch_targets(forest)).sum()
        loss.backward()

A backward outside its role raises: with activation checkpointing another adapter would be recomputed, silently.
Whenever another role is entered, every ``requires_grad`` is restored from the trunk's own table, since peft flips them
when adapters are switched. Leave the role before the optimizer steps: cast copies of the weights are kept until then.

Legend: T tokens of a row, N scored tokens, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from stackllama.errors import ModelError
from stackllama.model import llama
from stackllama.model.attention import ForestPlan, KeyValueCache
from stackllama.model.heads import ScalarHead
from stackllama.model.logprobs import TokenLoss, summed_loss, token_logprobs
from stackllama.model.nf4 import is_quantized
from stackllama.model.plans import RowPlan
from stackllama.tokens.batches import on_device
from stackllama.tokens.forest import Forest, Targets

REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class LoRA:
    """A low-rank adapter: y = W x + alpha / rank * B A x (Hu et al. 2021), on the linear layers whose names end in
    targets.
    """

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


class Role:
    """A role that has been entered: what the objectives, the sampler and the evaluation compute with.

    Rows and targets may lie on the CPU; what is computed lies on the trunk's device.
    """

    def __init__(self, trunk: Trunk, name: str, model: PreTrainedModel) -> None:
        self._trunk = trunk
        self._model = model
        self.name = name

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._trunk.device

    def hidden(self, forest: Forest, *, cache: KeyValueCache | None = None) -> Tensor:
        """Final hidden states (T, D) of a packed row, in the compute precision; ``cache`` keeps its keys and values."""
        return self._read(forest, cache, None)

    def hidden_at(self, forest: Forest, places_N: Tensor) -> Tensor:
        """Final hidden states (N, D) at some places of a packed row; the last layer works for these alone."""
        return self._read(forest, None, places_N.to(self._trunk.device, non_blocking=True))

    def _read(self, forest: Forest, cache: KeyValueCache | None, places_N: Tensor | None) -> Tensor:
        tokens, positions = (
            one[None].to(self.device, non_blocking=True) for one in (forest.tokens_T, forest.positions_T)
        )
        return self._forward(tokens, positions, RowPlan(forest, self.device), cache, places_N)[0]

    def next_hidden(self, tokens_R: Tensor, positions_R: Tensor, cache: KeyValueCache) -> Tensor:
        """Final hidden states (R, D) of one new token for each of R cached sequences."""
        return self._forward(tokens_R[:, None], positions_R[:, None], None, cache, None)[:, 0]

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        plan: ForestPlan | None,
        cache: KeyValueCache | None,
        places_N: Tensor | None,
    ) -> Tensor:
        decoder = self._model.base_model
        if llama.reads(decoder):
            how = llama.Pass(self._trunk.precision, plan, cache, self._trunk.cast)
            hidden = llama.hidden_states(decoder, tokens, positions, how, places_N)
        else:
            output = decoder(
                input_ids=tokens, position_ids=positions, use_cache=False, forest_plan=plan, key_value_cache=cache
            )
            hidden = cast("Tensor", output.last_hidden_state)
            hidden = hidden if places_N is None else hidden[:, places_N]
        if hidden.requires_grad:
            hidden.register_hook(self._trunk.backward_check(self.name))
        return hidden

    def logprobs(self, hidden_TD: Tensor, targets: Targets) -> Tensor:
        """Log-probabilities (N,) in nats, fp32, of the scored tokens."""
        targets = on_device(targets, self._trunk.device)
        return self.label_logprobs(hidden_TD[targets.predictor_N], targets.label_N)

    def label_logprobs(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """Log-probabilities (N,) of one label for each hidden state."""
        weight_VD, label_N = self._output_matrix(), label_N.to(self.device, non_blocking=True)
        return token_logprobs(hidden_ND.to(weight_VD.dtype), weight_VD, label_N, softcap=self._softcap)

    def summed_loss(
        self, hidden_ND: Tensor, label_N: Tensor, loss: TokenLoss, *, with_entropies: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum () of a loss of each label, which alone has a gradient; log-probabilities and entropies (N,), the
        latter 0 where they are not asked for.
        """
        weight_VD = self._output_matrix()
        return summed_loss(
            hidden_ND.to(weight_VD.dtype),
            weight_VD,
            label_N.to(self.device, non_blocking=True),
            loss,
            softcap=self._softcap,
            with_entropies=with_entropies,
        )

    def all_logprobs(self, hidden_RD: Tensor) -> Tensor:
        """The whole distribution (R, V) in fp32 for the few rows of a decoding step."""
        weight_VD = self._output_matrix()
        logits = nn.functional.linear(hidden_RD.to(weight_VD.dtype), weight_VD).float()
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return torch.log_softmax(logits, dim=-1)

    def score(self, head: str, hidden_ND: Tensor) -> Tensor:
        """The scalar head's numbers (N,), fp32."""
        scores: Tensor = self._trunk.heads[_head_key(self.name, head)](hidden_ND)
        return scores

    def _output_matrix(self) -> Tensor:
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight.to(self._trunk.precision)

    @property
    def _softcap(self) -> float | None:
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        return None if cap is None else float(cap)


def _head_key(role: str, head: str) -> str:
    return f"{role}/{head}"


class Trunk:
    """Base weights, and the roles over them.

    model: a causal language model loaded with attention "forest". precision: of the matrix products (bf16 through
    autocast: what is trained stays fp32). frozen: adapters that stay live under every role, the reference too (an SFT
    adapter that was not merged).
    """

    def __init__(self, model: PreTrainedModel, *, precision: torch.dtype) -> None:
        self.model = model
        self.precision = precision
        self.heads = nn.ModuleDict()
        self.frozen: tuple[str, ...] = ()
        self._adapters: dict[str, LoRA] = {}
        self._copies: dict[str, PreTrainedModel] = {}
        self._active: str | None = None
        self._stands_for: tuple[str, bool] | None = None  # role and mode that the modules are set for
        self.cast: llama.CastLayers = {}  # while a role is entered
        model.requires_grad_(False)

    def recompute_activations(self) -> None:
        """Keep one state of each layer for a backward, which computes the others again (activation checkpointing)."""
        # The newer name of transformers, or the older one.
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})

    def add_adapter(self, role: str, lora: LoRA, *, seed: int) -> None:
        """Give a role a LoRA adapter with fp32 weights; B starts at 0, so the role starts as the trunk.

        Raises:
            ModelError: when no linear layer has one of the target names.
        """
        self._stands_for = None
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.targets),
            bias="none",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, self.model, adapter_name=role)
                # The trunk's own table says which adapters there are; peft warns when it finds its table a second time.
                del self.model.peft_config
            except ValueError as error:
                raise ModelError(
                    f"no linear layer of {type(self.model).__name__} is named like {', '.join(lora.targets)}; "
                    f"set lora.targets to names that this model has ({error})"
                ) from error
        self._adapters[role] = lora
        for parameter in self._adapter_parameters(role).values():
            parameter.data = parameter.data.float()

    def add_copy(self, role: str) -> None:
        """Give a role a trainable fp32 copy of the trunk, frozen adapters folded in: to train small models in full.

        Raises:
            ModelError: when the trunk's weights are in 4 bits.
        """
        self._check_dense(role)
        self._stands_for = None
        copied = copy.deepcopy(self.model).float()
        for name, layer in _lora_layers(copied):
            for frozen in self.frozen:
                layer.get_base_layer().weight.data += layer.get_delta_weight(frozen)
            copied.set_submodule(name, layer.get_base_layer())
        self._copies[role] = copied

    def train_in_place(self, role: str) -> None:
        """Let a role train the trunk's own weights, in fp32 (SFT and pretraining in full).

        Raises:
            ModelError: when the trunk's weights are in 4 bits.
        """
        self._check_dense(role)
        self._stands_for = None
        self._copies[role] = self.model.float()

    def add_head(self, role: str, head: str, *, spread: float, seed: int) -> None:
        """Give a role a scalar head; see `ScalarHead` for ``spread``."""
        self._stands_for = None
        generator = torch.Generator().manual_seed(seed)
        made = ScalarHead(self.hidden_size, spread=spread, generator=generator)
        self.heads[_head_key(role, head)] = made.to(self.device)

    @property
    def quantized(self) -> bool:
        """Whether the trunk's weights are in 4 bits: frozen, and nothing can be merged into them."""
        return is_quantized(self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are, and all that a role computes."""
        return next(self.model.parameters()).device

    @property
    def hidden_size(self) -> int:
        """D."""
        return int(self.model.config.get_text_config().hidden_size)

    @contextmanager
    def use(self, role: str, *, training: bool = False) -> Iterator[Role]:
        """Enter a role; gradients are on exactly when ``training``.

        Raises:
            RuntimeError: when another role is still entered, or the role was never added.
        """
        if self._active is not None:
            raise RuntimeError(
                f"role {role} was entered while {self._active} is in use; leave it (after its backward) first"
            )
        if role != REFERENCE and role not in self._adapters and role not in self._copies:
            raise RuntimeError(f"no role {role} on this trunk; it has {', '.join([*self._adapters, *self._copies])}")
        model = self._copies.get(role, self.model)
        if self._stands_for != (role, training):
            self._turn_to(role, model, training=training)
        self._active = role
        device = next(model.parameters()).device.type
        try:
            mixed = self.precision != torch.float32
            with torch.set_grad_enabled(training), torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
                yield Role(self, role, model)
        finally:
            self._active = None
            self.cast.clear()

    def backward_check(self, role: str) -> _BackwardCheck:
        """A hook for a role's hidden states that raises when the backward comes outside the role."""
        return _BackwardCheck(self, role)

    @property
    def active(self) -> str | None:
        """The role in use."""
        return self._active

    def trainable(self, role: str) -> dict[str, nn.Parameter]:
        """The role's trainable parameters by name: its adapter or copy, and its heads."""
        copied = self._copies.get(role)
        own = dict(copied.named_parameters()) if copied is not None else self._adapter_parameters(role)
        for key, head in self.heads.items():
            if key.startswith(f"{role}/"):
                own |= {f"head.{key.split('/')[1]}.{name}": parameter for name, parameter in head.named_parameters()}
        return own

    def state(self, role: str) -> dict[str, Tensor]:
        """The role's own tensors by name, detached, for saving."""
        return {name: parameter.detach() for name, parameter in self.trainable(role).items()}

    def load_state(self, role: str, tensors: Mapping[str, Tensor]) -> None:
        """Put saved tensors into the role.

        Raises:
            ModelError: when names or shapes are not exactly the role's own.
        """
        own = self.trainable(role)
        wrong = sorted(set(own) ^ set(tensors)) or [n for n, p in own.items() if p.shape != tensors[n].shape]
        if wrong:
            raise ModelError(
                f"the saved {role} does not fit the model: {wrong[0]} and {len(wrong) - 1} more differ; was it made "
                "with other LoRA settings?"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    @torch.no_grad()
    def merge(self, role: str) -> dict[str, Tensor]:
        """Fold a role's adapter into the trunk, in fp32 and rounded once, and remove it; gives the old weights."""
        assert not self.quantized, "an adapter over 4-bit weights stays live: see `freeze_under`"
        self._stands_for = None
        before: dict[str, Tensor] = {}
        for name, layer in _lora_layers(self.model):
            if role in layer.lora_A:
                weight = layer.get_base_layer().weight
                before[f"{name}.weight"] = weight.clone()
                merged = weight.float() + layer.get_delta_weight(role).float()
                weight.copy_(merged.to(weight.dtype))
        self.drop(role)
        return before

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Put back the weights that `merge` gave, while no adapter wraps their layers."""
        for name, weight in weights.items():
            self.model.get_parameter(name).copy_(weight)

    def drop(self, role: str) -> None:
        """Forget a role; peft's layers give way to the base layers when the last adapter is gone."""
        self._stands_for = None
        self._copies.pop(role, None)
        for key in [key for key in self.heads if key.startswith(f"{role}/")]:
            del self.heads[key]
        if self._adapters.pop(role, None) is None:
            return
        for name, layer in _lora_layers(self.model):
            layer.set_adapter([])  # peft warns when an active adapter goes
            layer.delete_adapter(role)
            if not self._adapters:
                self.model.set_submodule(name, layer.get_base_layer())

    def freeze_under(self, role: str) -> None:
        """Keep a role's adapter live and frozen under every role, instead of merging it."""
        self._stands_for = None
        self.frozen = (*self.frozen, role)

    @property
    def adapters(self) -> dict[str, LoRA]:
        """The adapters on the trunk, with their shapes."""
        return dict(self._adapters)

    def _check_dense(self, role: str) -> None:
        if self.quantized:
            raise ModelError(
                f"{role} is to train all weights, but those of the trunk are in 4 bits and frozen; train an adapter"
            )

    def _adapter_parameters(self, role: str) -> dict[str, nn.Parameter]:
        marker = (f".lora_A.{role}.", f".lora_B.{role}.")
        return {
            name.replace(f".{role}.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if any(mark in name for mark in marker)
        }

    def _turn_to(self, role: str, model: PreTrainedModel, *, training: bool) -> None:
        """Set every module's mode, adapter and gradients for a role: once, while the same role is entered again."""
        if model is self.model:
            self._switch(role)
        model.train(training)
        for _, layer in _lora_layers(model):
            for frozen in set(self.frozen) & set(layer.lora_dropout):  # what is not trained is not dropped from either
                layer.lora_dropout[frozen].eval()
        self.heads.train(training)
        # On whether training or not: where a decoder goes through transformers, autocast keeps cast copies of those
        # weights alone that require gradients.
        self._restore_gradients(role)
        self._stands_for = (role, training)

    def _switch(self, role: str) -> None:
        wanted = [*self.frozen, *([role] if role in self._adapters else [])]
        for _, layer in _lora_layers(self.model):
            if wanted:
                layer.set_adapter(wanted)
            layer.enable_adapters(bool(wanted))

    def _restore_gradients(self, role: str) -> None:
        for module in (self.model, self.heads, *self._copies.values()):
            module.requires_grad_(False)
        for parameter in self.trainable(role).values():
            parameter.requires_grad_(True)


def _lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


class _BackwardCheck:
    """Called with the gradient of a role's hidden states, before the trunk's backward begins."""

    def __init__(self, trunk: Trunk, role: str) -> None:
        self._trunk = trunk
        self._role = role

    def __call__(self, _: Tensor) -> None:
        if self._trunk.active != self._role:
            raise RuntimeError(
                f"the backward of role {self._role} ran while {self._trunk.active or 'no role'} was in use; "
                "end it inside the role's own `with trunk.use(...)` block"
            )
