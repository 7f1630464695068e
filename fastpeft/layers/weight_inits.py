"""Initialisations of a linear layer's A and B from its weight, its inputs or its gradients.

    pissa       arXiv:2404.02948   c B A = the r greatest singular triples of W ("pissa_niter_k": by k power iterations)
    olora       arXiv:2406.01775   B A = the first r columns of Q times the first r rows of R, W = Q R
    corda       arXiv:2406.05223   the singular triples of W C, C the covariance of the layer's inputs
    lora_ga     arXiv:2407.05000   singular vectors of the weight's gradient
    loftq       arXiv:2310.08659   the r greatest singular triples of what quantising W loses
    orthogonal                     A and B random, with B A = 0: every other row of a rotation in each
    eva         arXiv:2410.07170   B zero; A is set later, by `initialize_lora_eva_weights`
    mica        arXiv:2604.01694   B the r least left singular vectors, frozen; A zero

The first four take c B A out of the base weight, so that the layer computes at first what it did without adapter. Such
an adapter belongs to its changed base: loading it repeats the initialisation. Random draws are PEFT's, in its order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastpeft.layers.init import INIT_METHODS, kaiming_uniform_
from fastpeft.layers.loftq import loftq_factors

if TYPE_CHECKING:
    from fastpeft.configs import LoraConfig
    from fastpeft.layers.lora import LoraLayer

_Factors = tuple[Tensor, Tensor]
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def _method(name: str, *, elsewhere: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(layer, adapter_name, config)` for linear layers.

    An embedding starts as it always does. Other kinds of layer raise `ValueError`; with `elsewhere` they start as with
    `init_lora_weights=True`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        def run(layer: LoraLayer, adapter_name: str, config: LoraConfig | None) -> None:
            from fastpeft.layers.linear import Linear

            if isinstance(layer, Linear):
                with torch.no_grad():
                    function(layer, adapter_name, config)
            elif elsewhere or adapter_name in layer.lora_embedding_A:
                layer._reset_factors(adapter_name, kaiming_uniform_)
            else:
                raise ValueError(
                    f"Unknown initialization init_lora_weights={name!r} for lora.{type(layer).__name__}: it is defined "
                    "for linear layers. Use another one, or do not target this layer."
                )

        INIT_METHODS[name] = run
        return function

    return register


@_method("pissa")
def _pissa(layer: LoraLayer, adapter_name: str, config: LoraConfig) -> None:
    weight, r = _weight(layer, "PiSSA"), layer.r[adapter_name]
    _, _, iterations = str(config.init_lora_weights).partition("_niter_")
    if iterations:
        U, S, V = torch.svd_lowrank(weight, r, niter=int(iterations))
        Vh = V.T
    else:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = (S[:r] / layer.scaling[adapter_name]).sqrt()
    _move_out_of_base(layer, adapter_name, weight, root.unsqueeze(1) * Vh[:r], U[:, :r] * root)


@_method("olora")
def _olora(layer: LoraLayer, adapter_name: str, config: LoraConfig) -> None:
    weight, r = _weight(layer, "OLoRA"), layer.r[adapter_name]
    Q, R = torch.linalg.qr(weight)
    _move_out_of_base(layer, adapter_name, weight, R[:r].contiguous(), Q[:, :r].contiguous())


@_method("corda")
def _corda(layer: LoraLayer, adapter_name: str, config: LoraConfig) -> None:
    base, weight, r = layer.get_base_layer(), _weight(layer, "CorDA"), layer.r[adapter_name]
    if not hasattr(base, "eigens"):
        raise ValueError("`eigens` attribute not found for layer, please run `preprocess_corda` first.")
    U, S, V = base.eigens.U_WC, base.eigens.S_WC, base.eigens.V_WC
    expected = {"S": (S, (r,)), "U": (U, (weight.shape[0], r)), "V": (V, (weight.shape[1], r))}
    for name, (matrix, shape) in expected.items():
        if not matrix.isfinite().all():
            raise ValueError(f"Invalid value found in matrix {name} of CorDA: it is not finite.")
        if matrix.shape != shape:
            raise ValueError(
                f"Matrix {name} size mismatch: {tuple(matrix.shape)} vs. {shape}. Please make sure the `lora_config` "
                "and `model` argument of `preprocess_corda` is consistent with `get_peft_model`, and a cache file was "
                "made with the same model and rank."
            )
    root = (S / layer.scaling[adapter_name]).sqrt()
    _move_out_of_base(layer, adapter_name, weight, (V.T * root.unsqueeze(1)).contiguous(), (U * root).contiguous())
    del base.eigens


@_method("lora_ga", elsewhere=True)
def _lora_ga(layer: LoraLayer, adapter_name: str, config: LoraConfig) -> None:
    base = layer.get_base_layer()
    if not hasattr(base, "_peft_loraga_grad"):  # an adapter being loaded; its file has the factors
        layer._reset_factors(adapter_name, kaiming_uniform_)
        return
    if config.lora_ga_config is None:
        raise ValueError(
            "lora_ga_config must be provided when init_lora_weights='lora_ga'. Please pass "
            "lora_ga_config=LoraGAConfig(...) to LoraConfig."
        )
    weight, r, scaling = _weight(layer, "LoRA-GA"), layer.r[adapter_name], layer.scaling[adapter_name]
    A, B = _gradient_factors(layer, weight, r, scaling, config.lora_ga_config)
    A, B = A.to(base.weight.dtype).contiguous(), B.to(base.weight.dtype).contiguous()
    _set_factors(layer, adapter_name, A, B)
    _set_base(layer, weight - scaling * (B.float() @ A.float()))
    del base._peft_loraga_grad


def _gradient_factors(layer: LoraLayer, weight: Tensor, r: int, scaling: float, options: Any) -> _Factors:
    base = layer.get_base_layer()
    gradient = _as_rows(layer, base._peft_loraga_grad.float())
    if 2 * r > min(gradient.shape):
        raise ValueError(
            f"LoRA-GA takes 2 r singular vectors of the gradient: r={r} is too much for a layer of shape "
            f"{tuple(gradient.shape)}."
        )
    U, S, V = torch.svd_lowrank(gradient, q=min(4 * r, min(gradient.shape)), niter=4)
    order = {
        "ArBr": (range(1, 2 * r, 2), range(0, 2 * r, 2)),
        "A2rBr": (range(r, 2 * r), range(r)),
        "ArB2r": (range(r), range(r, 2 * r)),
    }
    if options.direction in order:
        rows, columns = (torch.tensor(part) for part in order[options.direction])
    else:
        rows = columns = torch.randperm(2 * r)[:r]
    A, B = V.T[rows], U[:, columns] * S[columns]
    if options.scale == "stable":
        B = B * (base.weight.shape[0] ** 0.25 / options.stable_gamma**0.5)
    elif options.scale == "weight_svd":
        greatest = torch.svd_lowrank(weight, q=r, niter=4)[1][0]
        if S[columns][0] > 0:
            B = B * (greatest / S[columns][0])
    elif options.scale == "gd_scale":
        A, B = A / scaling, B / scaling
    return A, B


@_method("loftq")
def _loftq(layer: LoraLayer, adapter_name: str, config: LoraConfig) -> None:
    options: Any = config.loftq_config
    weight, dtype = layer.get_base_layer().weight, layer.get_base_layer().weight.dtype
    quantised, A, B = loftq_factors(
        _as_rows(layer, weight.data), options["loftq_bits"], layer.r[adapter_name], options["loftq_iter"]
    )
    _set_factors(layer, adapter_name, A, B)
    _set_base(layer, quantised.to(dtype))


@_method("orthogonal")
def _orthogonal(layer: LoraLayer, adapter_name: str, config: LoraConfig) -> None:
    r, dtype = layer.r[adapter_name], layer.get_base_layer().weight.dtype
    if r % 2 != 0:
        raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {r} instead.")
    Q = torch.linalg.qr(torch.randn(r, r))[0]
    A = torch.randn(layer.in_features, r // 2).mm(Q[0::2]).T / 10.0  # type: ignore[call-overload]
    B = torch.randn(r // 2, layer.out_features).T.mm(Q[1::2]) / 10.0  # type: ignore[call-overload]
    _set_factors(layer, adapter_name, A.contiguous().to(dtype), B.contiguous().to(dtype))


@_method("eva")
def _eva(layer: LoraLayer, adapter_name: str, config: LoraConfig) -> None:
    B: Any = layer.lora_B[adapter_name]
    B.weight.data.zero_()


def _mica(layer: LoraLayer, adapter_name: str, config: LoraConfig | None) -> None:
    """MiCA (arXiv:2604.01694): B the r least left singular vectors of W, not trained; A zero."""
    from fastpeft.layers.embedding import Embedding
    from fastpeft.layers.linear import Linear

    A: Any
    B: Any
    if isinstance(layer, Linear):
        A, B, name = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight, "lora_B"
        weight = None if B.is_meta else _weight(layer, "MiCA")
    elif isinstance(layer, Embedding):
        A, B, name = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name], "lora_embedding_B"
        weight = None if B.is_meta else layer.get_base_layer().weight.data.float().T
    else:
        raise ValueError(
            f"Invalid or unsupported variant combination: lora.{type(layer).__name__} does not support "
            "init_lora_weights='mica'; it is defined for linear layers and embeddings."
        )
    if weight is not None:
        r = layer.r[adapter_name]
        if r > min(weight.shape):
            raise ValueError(
                f"MiCA requires `r` <= min(in_features, out_features), but got r={r} for lora.{type(layer).__name__} "
                f"with a weight of shape {tuple(weight.shape)}."
            )
        with torch.no_grad():
            U = torch.linalg.svd(weight, full_matrices=False)[0]
        B.data = U[:, -r:].contiguous().to(layer.get_base_layer().weight.dtype)
        A.data = torch.zeros(A.shape, dtype=B.dtype, device=B.device)
    layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter_name: (name,)}


INIT_METHODS["mica"] = _mica


def _weight(layer: LoraLayer, method: str) -> Tensor:
    """The base weight as (N, K) in fp32."""
    weight = layer.get_base_layer().weight
    if weight.dtype not in _FLOATING:
        raise TypeError(
            f"Please initialize {method} under float32, float16, or bfloat16, not {weight.dtype}. Subsequently, "
            "re-quantize the residual model to help minimize quantization errors."
        )
    return _as_rows(layer, weight.data.to(torch.float32))


def _as_rows(layer: LoraLayer, weight: Tensor) -> Tensor:
    return weight.T if layer.fan_in_fan_out else weight


def _move_out_of_base(layer: LoraLayer, adapter_name: str, weight: Tensor, A: Tensor, B: Tensor) -> None:
    """Make A and B the adapter's, and subtract what the adapter computes from the base weight, given in fp32."""
    _set_factors(layer, adapter_name, A, B)
    _set_base(layer, weight - layer.scaling[adapter_name] * B @ A)


def _set_factors(layer: LoraLayer, adapter_name: str, A: Tensor, B: Tensor) -> None:
    for module, value in ((layer.lora_A[adapter_name], A), (layer.lora_B[adapter_name], B)):
        if not module.weight.is_meta:  # an adapter being loaded: its file will fill it
            module.weight.data = value  # type: ignore[union-attr, assignment]


def _set_base(layer: LoraLayer, weight: Tensor) -> None:
    base = layer.get_base_layer()
    base.weight.data = _as_rows(layer, weight.to(base.weight.dtype)).contiguous()
