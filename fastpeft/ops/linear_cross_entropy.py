"""A linear layer and the cross-entropy of its output, which is never there as a whole.

    z = h W^T + bias + c dropout(h) A^T B^T         logits of a row h; A, B: a LoRA adapter, or none
    x = k z,  with soft-capping  x = cap tanh(k z / cap)
    n = log sum_v e^(x_v)
    loss = n - (1 - ε) x_y - ε mean_v(x_v) + ζ n²   0 for an ignored label

h (M, K), W (V, K), labels y (M). ε is label smoothing as torch.nn.functional.cross_entropy has it, ζ the z-loss of PaLM
(Chowdhery et al., 2022, section 5), cap that of Gemma 2 (arXiv:2408.00118, section 2). With p = e^(x - n):

    dx_v = (1 + 2ζn) p_v - (1 - ε) [v = y] - ε/V        dz = dx dx/dz        dh = dz W + c mask * (dz B A)
    dW = dz^T h     dB = dz^T s,  s = c dropout(h) A^T     dA = c (dz B)^T dropout(h)

Logits exist a tile at a time (`cross_entropy_sweep`). Two ways:

* Only h has a gradient (a frozen layer): the forward makes it, two products in all. A tile's e^(x - m), with m the
  largest so far, goes into the second product; the sum is scaled when m grows and divided by sum e^(x - m) at the end.
  With t = log sum_{v≠y} e^(x_v) - x_y the loss is log(1 + e^t) and 1 - p_y = 1/(1 + e^-t), without cancellation. The
  backward multiplies rows.
* Weights have gradients (or labels are smoothed): n must be known first. The forward makes n, the backward forms the
  tiles again: one product more.

Kept for the backward: h, n, in the first case dh, in the second s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cross_entropy_sweep as cross_entropy_sweep  # defines the operators
from . import native, philox, steps
from .backend import OPS, autocast_enabled, exact, route
from .cross_entropy import OF_LABEL, REFERENCE, SUM, TOTAL, accumulator
from .products import MAX_RANK

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    num_items_in_batch: Tensor | float | None = None,
    reduction: str = "mean",
    shift: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """The cross-entropy of `hidden @ weight.T + bias + adapter` with `labels`, in fp32 (float64 for float64).

    hidden: (..., K). weight: (V, K), any strides, frozen or trainable. labels: (...), integers below V or ignore_index.
    bias: (V,). lora_A: (r, K), lora_B: (V, r), both or none, r up to 512, of a dtype that may differ from hidden's.
    dropout_p: applied as given to the adapter's input. Under autocast everything is cast as F.linear casts.

    logit_scale: logits are multiplied by it, then soft-capped: softcap * tanh(logits / softcap). label_smoothing as in
    F.cross_entropy. z_loss: times the square of the log of the softmax's denominator, added to each row's loss.
    reduction: "mean" over the labels not ignored (NaN if there is none), or over `num_items_in_batch` where that is
    given; "sum"; "none": (...), 0 where ignored. shift: the label of a position is the next one's (the last has none).
    seed: what the dropout mask is made from, if it has been drawn already.

    Raises ValueError on shapes or options that do not fit, IndexError on a label out of range (on the CPU; elsewhere a
    device-side assertion fails).
    """
    _check(hidden, weight, labels, bias, lora_A, lora_B, dropout_p)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if num_items_in_batch is not None and reduction != "mean":
        raise ValueError(f"num_items_in_batch goes with reduction 'mean', not {reduction!r}")
    if shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    options = _Options(
        scaling=float(scaling),
        p=float(dropout_p),
        scale=float(logit_scale),
        cap=float(softcap or 0.0),
        smoothing=float(label_smoothing),
        z_loss=float(z_loss),
        cast=torch.get_autocast_dtype(hidden.device.type) if autocast_enabled(hidden.device) else None,
        at_once=_only_hidden_trained(hidden, weight, bias, lora_A, lora_B) and label_smoothing == 0.0,
        backend=route(hidden.device),
    )
    if lora_A is None or philox.threshold(dropout_p) == 0:
        seed = None
    elif seed is None:
        seed = philox.draw_seed(hidden.device)
    targets = labels.reshape(-1).to(hidden.device, torch.int64)
    valid = targets != ignore_index
    _check_range(targets, valid, weight.shape[0])
    targets = torch.where(valid, targets, -1)
    tensors = (hidden.reshape(-1, hidden.shape[-1]), weight, bias, lora_A, lora_B)
    if native.transformed(*tensors):
        losses = plain(*tensors, targets, seed, options)
    else:
        losses = _LinearCrossEntropy.apply(*tensors, targets, seed, options)
    if reduction == "none":
        return losses.view(labels.shape)
    total = losses.sum()
    if reduction == "sum":
        return total
    if num_items_in_batch is None:
        return total / valid.sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class _Options(NamedTuple):
    """Everything about a call that is not a tensor."""

    scaling: float
    p: float
    scale: float
    cap: float
    smoothing: float
    z_loss: float
    cast: torch.dtype | None  # autocast's dtype
    at_once: bool  # the forward makes dh
    backend: str


def _only_hidden_trained(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor | None, lora_B: Tensor | None
) -> bool:
    trained = any(t is not None and t.requires_grad for t in (weight, bias))
    return torch.is_grad_enabled() and hidden.requires_grad and not trained and lora_A is None


def plain(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    labels: Tensor,
    seed: Tensor | None,
    options: _Options,
) -> Tensor:
    """The loss of each row (M,) in ordinary differentiable PyTorch: the reference; also what functorch and second
    derivatives get. labels: negative where ignored."""
    z = F.linear(h, weight, bias)
    if A is not None and B is not None:
        dropped = h
        if seed is not None:
            mask = philox.keep_mask(seed, 0, h.shape[0], h.shape[1], options.p) * philox.keep_scale(options.p)
            dropped = h * mask.to(h.dtype)
        z = (z + F.linear(F.linear(dropped.to(A.dtype), A), B) * options.scaling).to(z.dtype)
    x = z.to(accumulator(z)) * options.scale
    if options.cap:
        x = options.cap * torch.tanh(x / options.cap)
    n = torch.logsumexp(x, 1)
    valid = labels >= 0
    x_y = x.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    losses = n - (1 - options.smoothing) * x_y + options.z_loss * n.square()
    if options.smoothing:
        losses = losses - options.smoothing * x.mean(1)
    return torch.where(valid, losses, 0.0)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of each row from (h, weight, bias, A, B, labels, seed, options)."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        labels: Tensor,
        seed: Tensor | None,
        options: _Options,
    ) -> Tensor:
        o = options
        with exact(h.device):
            h_, A_, B_ = _cast((h, A, B), o.cast)
            s = None
            if A_ is not None:
                s = steps.shrink(o.backend, h_, A_, (o.scaling,), o.p, seed)
            state, products = OPS[o.backend].linear_cross_entropy(
                h_, weight, bias, s, B_, labels, o.scale, o.cap, o.at_once, o.backend
            )
            rows = _Rows.of(state, labels)
            dh = None
            if o.at_once:
                # The gradient of the sum: a mean's, smaller by the number of tokens, would lose digits in fp16.
                dh = (products * rows.of_products(o) + rows.of_label(o, weight, labels, h_.dtype)).to(h_.dtype)
            losses = rows.losses(o, weight.shape[0])
        ctx.save_for_backward(h, weight, bias, A, B, labels, seed, s, None if o.at_once else rows.kept(), dh)
        ctx.options = options
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        h, weight, bias, A, B, labels, seed, s, kept, dh = ctx.saved_tensors
        o, needs = ctx.options, ctx.needs_input_grad[:5]
        found: Any
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            found = _differentiable_backward(gradient, (h, weight, bias, A, B), labels, seed, o, needs)
        elif dh is not None:
            found = (dh * gradient.unsqueeze(1), None, None, None, None)
        else:
            with exact(h.device):
                found = _backward(gradient, h, weight, bias, A, B, labels, seed, s, kept, o, needs)
        return *(
            t.to(like.dtype) if needed and t is not None else None
            for t, needed, like in zip(found, needs, (h, weight, bias, A, B))
        ), *(None, None, None)


def _backward(
    gradient: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    labels: Tensor,
    seed: Tensor | None,
    s: Tensor | None,
    kept: Tensor,
    o: _Options,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """dh, dW, d_bias, dA and dB from the tiles formed again."""
    h, A, B = _cast((h, A, B), o.cast)
    rows = _Rows(kept[0], kept[1], labels).of_gradient(o, weight.shape[0], gradient)
    need = [needs[0], needs[1], needs[2], A is not None and (needs[0] or needs[3]), needs[4]]
    dh, dW, d_bias, ds, dB = OPS[o.backend].linear_cross_entropy_backward(
        h, weight, bias, s, B, labels, rows, o.scale, o.cap, need, o.backend
    )
    dA = None
    if A is not None and need[3]:
        dA = steps.shrink_backward(o.backend, ds, h, A, (o.scaling,), o.p, seed, dh if needs[0] else None)
    return dh, dW, d_bias, dA, dB


def _differentiable_backward(
    gradient: Tensor,
    operands: tuple[Any, ...],
    labels: Tensor,
    seed: Tensor | None,
    options: _Options,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The same as a graph, for a second derivative."""
    wanted = [t for t, needed in zip(operands, needs) if needed]
    h, weight, bias, A, B = _cast(operands, options.cast)
    losses = plain(h, weight, bias, A, B, labels, seed, options)
    found = iter(torch.autograd.grad(losses, wanted, gradient, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _cast(tensors: tuple[Tensor | None, ...], dtype: torch.dtype | None) -> Any:
    return tensors if dtype is None else tuple(None if t is None else t.to(dtype) for t in tensors)


class _Rows(NamedTuple):
    """What the sums over the columns come to, row by row: vectors (M,)."""

    t: Tensor  # log of sum_{v≠y} e^(x_v - x_y); infinite without a label
    log_sum: Tensor
    labels: Tensor
    x_y: Any = None
    mean: Any = None  # sum of x
    total: Any = None  # l

    @staticmethod
    def of(state: Tensor, labels: Tensor) -> _Rows:
        m, total, x_y, mean = (state[i] for i in (REFERENCE, SUM, OF_LABEL, TOTAL))
        others = m + total.log()
        t = torch.where(labels >= 0, others - x_y, torch.inf)
        log_sum = torch.where(t > 0, others + _softplus(-t), x_y + _softplus(t))  # the larger one leads
        return _Rows(t, log_sum, labels, x_y, mean, total)

    def kept(self) -> Tensor:
        """What the backward needs: the first two."""
        return torch.stack([self.t, self.log_sum])

    def losses(self, o: _Options, columns: int) -> Tensor:
        """The loss of each row, 0 without a label."""
        losses = _softplus(self.t) + o.z_loss * self.log_sum.square()
        if o.smoothing:
            losses = losses + o.smoothing * (self.x_y - self.mean / columns)
        return torch.where(self.labels >= 0, losses, 0.0)

    def of_products(self, o: _Options) -> Tensor:
        """(M, 1): what the sums of products with the weights are to be multiplied by."""
        factor = (1 + 2 * o.z_loss * self.log_sum) * torch.sigmoid(self.t) * o.scale
        return torch.where(self.labels >= 0, factor / self.total.clamp_min(1e-30), 0.0).unsqueeze(1)

    def of_label(self, o: _Options, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """(M, K): the label's own product, which those sums leave out."""
        slope = o.scale * (1 - (self.x_y / o.cap).square()) if o.cap else o.scale
        factor = torch.where(labels >= 0, self._dx_of_label(o, weight.shape[0]) * slope, 0.0)
        return weight[labels.clamp_min(0)].to(dtype) * factor.unsqueeze(1)

    def of_gradient(self, o: _Options, columns: int, gradient: Tensor) -> Tensor:
        """(4, M): the rows that cross_entropy_gradient_ takes."""
        given = torch.where(self.labels >= 0, gradient.to(self.t.dtype), 0.0)
        of_p = given * (1 + 2 * o.z_loss * self.log_sum)
        of_label = torch.where(self.labels >= 0, given * self._dx_of_label(o, columns), 0.0)
        return torch.stack([self.log_sum, of_p, given * (o.smoothing / columns), of_label])

    def _dx_of_label(self, o: _Options, columns: int) -> Tensor:
        """(1 + 2ζn) p_y - (1 - ε) - ε/V with p_y = 1 - sigmoid(t)."""
        z = 2 * o.z_loss * self.log_sum
        return z - (1 + z) * torch.sigmoid(self.t) + o.smoothing * (1 - 1 / columns)


def _softplus(t: Tensor) -> Tensor:
    """log(1 + e^t); F.softplus is t from 20 on, which is 2e-9 off."""
    return torch.clamp_min(t, 0.0) + torch.log1p(torch.exp(-t.abs()))


def _check(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    dropout_p: float,
) -> None:
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit: (..., K) and (V, K)"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels must be {tuple(hidden.shape[:-1])}, as hidden's rows, got {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise ValueError(f"labels must be indices, got {labels.dtype}")
    V, K = weight.shape
    if bias is not None and bias.shape != (V,):
        raise ValueError(f"bias must be ({V},), got {tuple(bias.shape)}")
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B go together")
    if lora_A is None or lora_B is None:
        return
    if lora_A.dim() != 2 or lora_A.shape[1] != K or lora_B.shape != (V, lora_A.shape[0]):
        raise ValueError(
            f"with weight {(V, K)}, lora_A must be (r, {K}) and lora_B ({V}, r), got {tuple(lora_A.shape)} and "
            f"{tuple(lora_B.shape)}"
        )
    if not 1 <= lora_A.shape[0] <= MAX_RANK:
        raise ValueError(f"rank must be from 1 to {MAX_RANK}, got {lora_A.shape[0]}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must be between 0 and 1, got {dropout_p}")


def _check_range(targets: Tensor, valid: Tensor, columns: int) -> None:
    """F.cross_entropy refuses the same."""
    if torch.compiler.is_compiling() or targets.is_meta or native.transformed(targets):
        return
    wrong = valid & ((targets < 0) | (targets >= columns))
    if targets.device.type != "cpu":
        torch._assert_async(~wrong.any(), "linear_cross_entropy: a label is out of range")
    elif wrong.any():
        raise IndexError(f"label {targets[wrong][0].item()} is out of range for {columns} columns")
