"""EVA (arXiv:2410.07170): A starts as the principal directions of a layer's inputs, on the data of the training.

The data runs through the model until each layer's directions stand still. Layers whose inputs spread over more
directions get a higher rank, at the cost of others: the sum of the ranks stays as configured.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import cycle
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.configs import LoraConfig
from fastpeft.layers import Linear, LoraLayer
from fastpeft.prepare.pca import IncrementalPCA
from fastpeft.prepare.targets import linear_targets
from fastpeft.tuner.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from fastpeft.tuner.targets import find_minimal_target_modules, pattern_value
from fastpeft.tuner.walk import named_modules

PrepareInput = Callable[[Any, Any, str], Tensor]
_MAX_RHO = 1000  # a greater one means: as many directions as the widest weight allows


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """Indices (M, 2) of the tokens that count: not padding, and not without label if the config says so."""
    if not isinstance(model_input, Mapping):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary")
    options: Any = peft_config.eva_config
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    if options.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != options.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """The rows of a layer's input at the indices that `prepare_model_inputs_fn_language_modeling` chose."""
    return _tensor(layer_input, layer_name)[model_input.T.unbind()]


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """model(**inputs)."""
    return model(**inputs)


def _tensor(layer_input: Any, layer_name: str) -> Tensor:
    layer_input = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    if not isinstance(layer_input, Tensor):
        raise TypeError(
            f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer {layer_name}, please "
            "provide a custom prepare_layer_inputs_fn"
        )
    return layer_input


def _all_rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    x = _tensor(layer_input, layer_name)
    return x.reshape(-1, x.shape[-1]) if x.dim() > 2 else x


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareInput
    | Mapping[str, PrepareInput]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Layer name → A (rank, K): the principal directions of the layer's inputs, as many as it deserves.

    Args:
        model: a `PeftModel`, measured without its adapters, or a model to adapt.
        dataloader: gives batches, again and again until the directions have converged.
        peft_config: with an `eva_config`; None: that of the adapter.
        forward_fn: runs the model on a batch.
        prepare_model_inputs_fn: (batch, config) → what `prepare_layer_inputs_fn` is given. None: the batch.
        prepare_layer_inputs_fn: (layer's input, that, layer's name) → rows (M, K) to learn from; one function, or one
            for each layer's name. None: all rows.
        adapter_name: the adapter whose config is used.
        gather_distributed_inputs: learn from the inputs of all processes, if there are several.
        show_progress_bar: show how many layers have converged.

    Raises `ValueError` without config or data, or if a name in `prepare_layer_inputs_fn` is none of a layer.
    """
    adapted = hasattr(model, "peft_config")
    config: Any = model.peft_config[adapter_name] if adapted and peft_config is None else peft_config  # type: ignore[index, union-attr]
    if config is None:
        raise ValueError("peft_config is required if model is not a PeftModel")
    if len(dataloader) == 0:  # type: ignore[arg-type]
        raise ValueError("dataloader is empty")
    if adapted:
        layers = {name: m for name, m in named_modules(model) if isinstance(m, Linear)}
    else:
        layers = linear_targets(model, config)
    functions: dict[str, Any] = dict.fromkeys(layers, prepare_layer_inputs_fn)
    if isinstance(prepare_layer_inputs_fn, Mapping):
        if unknown := prepare_layer_inputs_fn.keys() - layers.keys():
            raise ValueError(
                "prepare_layer_inputs_fn is a mapping but the following module names were not found in the model: "
                f"{sorted(unknown)}"
            )
        functions = {name: prepare_layer_inputs_fn.get(name) for name in layers}

    def rows(name: str, layer_input: Any, model_input: Any) -> Tensor:
        x = (functions[name] or _all_rows)(layer_input, model_input, name)
        return _gathered(x) if gather_distributed_inputs else x

    measure = _Measurement(model, config, layers, rows, forward_fn, prepare_model_inputs_fn)
    training = model.training
    model.eval()
    try:
        with model.disable_adapter() if adapted else nullcontext():  # type: ignore[operator]
            return measure.run(dataloader, show_progress_bar)
    finally:
        model.train(training)


class _Measurement:
    """The directions of the inputs of some layers, of which those with the very same input share one measurement."""

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        layers: dict[str, Any],
        rows: Callable[[str, Any, Any], Tensor],
        forward_fn: Callable[[nn.Module, Any], Any],
        prepare: Callable[[Any, Any], Any] | None,
    ) -> None:
        self.model, self.config, self.layers, self.rows = model, config, layers, rows
        self.forward_fn, self.prepare = forward_fn, prepare
        rho = config.eva_config.rho
        if rho > _MAX_RHO:
            rho = min(rho, max(max(p.shape) for p in model.parameters()) // config.r)
        ranks = {name: pattern_value(config.rank_pattern, name, config.r) for name in layers}
        self.budget = sum(ranks.values())
        self.limit = {name: round(rank * rho) for name, rank in ranks.items()}

    def run(self, dataloader: Iterable[Any], show_progress: bool) -> dict[str, Tensor]:
        self.leader = self._same_inputs(next(iter(dataloader)))
        leaders = list(dict.fromkeys(self.leader.values()))
        self.pca = {name: IncrementalPCA(self.limit[name]) for name in leaders}
        self.converged = {name: torch.zeros(self.limit[name], dtype=torch.bool) for name in leaders}
        ranks = dict(self.limit)
        for inputs in _progress(cycle(dataloader), show_progress, self._done_of(ranks)):
            moving = [name for name in leaders if not self.converged[name][: ranks[name]].all()]
            if not moving:
                break
            self._forward(inputs, dict.fromkeys(moving, self._learn))
            if all(pca.components is not None for pca in self.pca.values()):
                ranks.update(self._distribute())
        return {name: self._directions(name, rank) for name, rank in ranks.items()}

    def _forward(self, inputs: Any, hooks: Mapping[str, Callable[[str, Tensor], None]]) -> None:
        """Run the model, giving each of these functions the rows of its layer."""
        inputs = _to(inputs, _device(self.model))
        chosen = copy.deepcopy(inputs) if self.prepare is None else self.prepare(inputs, self.config)

        def hook(name: str, function: Callable[[str, Tensor], None]) -> Callable[..., None]:
            return lambda module, args, output: function(name, self.rows(name, args, chosen))

        handles = [self.layers[name].register_forward_hook(hook(name, f)) for name, f in hooks.items()]
        try:
            self.forward_fn(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _same_inputs(self, inputs: Any) -> dict[str, str]:
        """Layer → the first layer that has the same input; they get the same greatest rank."""
        seen: dict[Any, list[str]] = {}

        def note(name: str, x: Tensor) -> None:
            content = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            seen.setdefault((x.shape, hash(content)), []).append(name)

        self._forward(inputs, dict.fromkeys(self.layers, note))
        called = {name for names in seen.values() for name in names}
        if missing := [name for name in self.layers if name not in called]:
            raise ValueError(
                f"EVA: the model does not call {missing[0]} on this data. Exclude it from `target_modules`."
            )
        order = list(self.layers)
        leader = {}
        for names in seen.values():
            names = sorted(set(names), key=order.index)
            for name in names:
                leader[name] = names[0]
                self.limit[name] = max(self.limit[other] for other in names)
        return {name: leader[name] for name in order}

    def _learn(self, name: str, x: Tensor) -> None:
        pca = self.pca[name]
        if x.shape[0] < pca.n_components:
            warnings.warn(
                f"EVA: {name} skips a batch, which has {x.shape[0]} tokens for {pca.n_components} directions.",
                stacklevel=2,
            )
            return
        before = pca.components
        pca.partial_fit(x)
        if before is not None:
            assert pca.components is not None
            self.converged[name] = F.cosine_similarity(pca.components, before) >= self.config.eva_config.tau

    def _distribute(self) -> dict[str, int]:
        """Ranks by explained variance: the budget goes to the directions that explain most, wherever they are."""
        owners, values = [], []
        for name, leader in self.leader.items():
            ratio = self.pca[leader].explained_variance_ratio[: self.limit[name]]
            owners += [name] * len(ratio)
            values.append(ratio)
        best = torch.cat(values).argsort(descending=True)[: self.budget].tolist()
        counts = Counter(owners[i] for i in best)
        ranks = {name: counts.get(name, 0) for name in self.leader}
        for name, leader in self.leader.items():  # who measures has the most directions of those with its input
            if ranks[leader] < ranks[name]:
                ranks[leader], ranks[name] = ranks[name], ranks[leader]
        return ranks

    def _directions(self, name: str, rank: int) -> Tensor:
        pca = self.pca[self.leader[name]]
        assert pca.components is not None
        rows = pca.components[:rank]
        if self.config.eva_config.whiten:
            rows = rows / pca.singular_values[:rank].sqrt().unsqueeze(1)
        return rows.clone()

    def _done_of(self, ranks: dict[str, int]) -> Callable[[], str]:
        def text() -> str:
            done = sum(bool(self.converged[leader][: ranks[leader]].all()) for leader in self.leader.values())
            return f"{done}/{len(self.leader)} layers have converged"

        return text


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, LoraConfig], Any] | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: PrepareInput
    | Mapping[str, PrepareInput]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Set the A's of a `PeftModel` whose config has `init_lora_weights="eva"`, and move rank between its layers.

    The config's target modules, rank and alpha patterns say afterwards how the layers are; a layer of rank 0 is a plain
    layer again. Layers that EVA is not for (embeddings, convolutions) start as with `init_lora_weights=True`.

    Args as of `get_eva_state_dict`, whose result may be given instead of data.

    Raises `ValueError` if the model is not such a model, or has several active adapters.
    """
    if not hasattr(model, "peft_config"):
        raise ValueError("model must be a PeftModel")
    if len(model.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    if model.peft_config[adapter_name].init_lora_weights != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            forward_fn=forward_fn,
            prepare_model_inputs_fn=prepare_model_inputs_fn,
            prepare_layer_inputs_fn=prepare_layer_inputs_fn,
            adapter_name=adapter_name,
            gather_distributed_inputs=gather_distributed_inputs,
            show_progress_bar=show_progress_bar,
        )
    _set_directions(model, eva_state_dict, adapter_name)


def _set_directions(model: Any, directions: Mapping[str, Tensor], adapter_name: str) -> None:
    config, plain = model.peft_config[adapter_name], copy.copy(model.peft_config[adapter_name])
    plain.init_lora_weights = True
    targets, others, without = [], [], []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in list(named_modules(model)):
        short = name.replace("base_model.model.", "")
        if not isinstance(layer, LoraLayer):
            others.append(short)
            continue
        r = rank = pattern_value(config.rank_pattern, name, config.r)
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        rows = directions.get(name)
        if rows is None:
            layer.update_layer(adapter_name, r=r, lora_alpha=alpha, config=plain)
            without.append(short)
        else:
            rank = rows.shape[0]
            if rank == 0:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, layer.get_base_layer())
                continue
            if rank != r and config.eva_config.adjust_scaling_factors:
                alpha *= rank / r
            A: Any = layer.lora_A[adapter_name]
            if rank != r or A.weight.is_meta:
                layer.update_layer(adapter_name, r=rank, lora_alpha=alpha, config=config)  # type: ignore[arg-type]
                A = layer.lora_A[adapter_name]
            A.weight.copy_(rows)
            targets.append(short)
        if rank != config.r:
            ranks[short] = rank
        if alpha != config.lora_alpha:
            alphas[short] = alpha
    targets += without
    if len(targets) >= MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        targets = list(find_minimal_target_modules(targets, others))
    config.target_modules, config.rank_pattern, config.alpha_pattern = targets, ranks, alphas
    if without:
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {without}\ncurrently EVA is for linear layers only",
            stacklevel=3,
        )


def _device(model: nn.Module) -> torch.device | None:
    devices = {p.device for p in model.parameters() if not p.is_meta}
    if len(devices) == 1:
        return devices.pop()
    warnings.warn(f"Could not determine device, model has multiple devices: {devices}", stacklevel=2)
    return None


def _to(inputs: Any, device: torch.device | None) -> Any:
    if device is None:
        return inputs
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return type(inputs)({key: _to(value, device) for key, value in inputs.items()})  # type: ignore[call-arg]
    if isinstance(inputs, tuple | list):
        return type(inputs)(_to(value, device) for value in inputs)
    return inputs


def _gathered(x: Tensor) -> Tensor:
    """The rows of all processes."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([x.shape[0]], device=x.device))
    counts = [int(size) for size in sizes]
    padded = F.pad(x, (0, 0, 0, max(counts) - x.shape[0])).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts)])


def _progress(batches: Iterator[Any], show: bool, text: Callable[[], str]) -> Iterator[Any]:
    if not show or (dist.is_available() and dist.is_initialized() and dist.get_rank() != 0):
        yield from batches
        return
    from tqdm.auto import tqdm

    with tqdm(batches, position=0, leave=False) as bar:
        for batch in bar:
            bar.set_description(text())
            yield batch
