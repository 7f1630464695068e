"""What a training step will need, from a config alone.

    weights      as they lie on the device: NF4 for the linear layers under QLoRA, the dtype given for the rest
    adapters     in fp32
    gradients    of what is trained, in its dtype
    optimizer    its states (see `optimizers`)
    communication  DDP: the buckets in which gradients are reduced. FSDP2: the parameters gathered for the layer that
                 computes and for the next one, and those that belong to no layer
    activations  what layers keep, counted (see `counting`), at the fullest moment of a step
    logits       at that moment, if it is the loss: logits, their gradient, what the loss keeps
    temporary    at that moment, if it is in a layer: what is alive within it, panels decoded from NF4 among it

Not counted: the CUDA context and libraries (0.5 to 1 GiB), workspaces inside operators, fragmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .counting import Counts
from .modes import MODES
from .optimizers import DEFAULT, OPTIMIZERS
from .planner import solve
from .standin import METHODS, Method, Sizes, StandIn, nf4_bytes

PARTS = ("weights", "adapters", "gradients", "optimizer", "communication", "activations", "logits", "temporary")
PARALLEL = ("ddp", "fsdp2")


@dataclass
class Estimate:
    """Bytes on each GPU, by part; their sum is the peak."""

    batch: int  # rows on each GPU
    seq: int
    checkpoint: str
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    communication: int
    activations: int
    logits: int
    temporary: int
    moment: str
    paged_out: int = 0  # optimizer states that may lie in host memory
    offloaded: int = 0  # layer inputs in host memory
    kept_per_token: float = 0.0  # by a layer, on average
    recompute: float = 0.0  # additional FLOPs of products, as a share of the step's
    modes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The sum of all parts."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def growth(self) -> int:
        """What a step adds to weights and adapters, the first step's optimizer states included."""
        return self.peak - self.weights - self.adapters

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"peak": self.peak}


class Estimator:
    """Estimates of one config under one method; the model stand-in is built once.

    Raises ValueError on a method, optimizer or way of parallel training that is not known.
    """

    def __init__(self, config: Any, method: Method, optim: str = DEFAULT, gpus: int = 1, parallel: str = "ddp") -> None:
        for what, value, known in [
            ("method", method.name, METHODS),
            ("optim", optim, OPTIMIZERS),
            ("parallel", parallel, PARALLEL),
        ]:
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
        if gpus < 1:
            raise ValueError(f"gpus must be at least 1, got {gpus}")
        self.method = method
        self.gpus = gpus
        self.parallel = parallel
        self.optim = OPTIMIZERS[optim]
        self.stand_in = StandIn(config, method)
        self._sizes = self.stand_in.sizes

    def estimate(self, batch: int, seq: int, checkpoint: str, budget: int | None = None) -> Estimate:
        """For `batch` rows of `seq` tokens on each GPU. checkpoint: a mode, or "auto" for the plan that fits `budget`.

        Raises ValueError if "auto" has no budget or no plan fits.
        """
        counts = self.stand_in.count(batch, seq, MODES if checkpoint == "auto" else [checkpoint])
        static = self._static()
        if checkpoint == "auto":
            if budget is None:
                raise ValueError("checkpoint 'auto' needs a budget")
            modes = solve(counts, budget - sum(static.values()), MODES)
            if modes is None:
                raise ValueError(f"no plan for {batch} x {seq} tokens fits")
        else:
            modes = [checkpoint] * len(counts.layers)
        return self._estimate(counts, modes, static, batch, seq, checkpoint)

    def _estimate(
        self,
        counts: Counts,
        modes: Sequence[str],
        static: dict[str, int],
        batch: int,
        seq: int,
        checkpoint: str,
    ) -> Estimate:
        moment, kept, alive, _ = counts.peak(modes)
        at_loss = moment == "the loss"
        plain = counts.flops(["none"] * len(modes))
        return Estimate(
            batch=batch,
            seq=seq,
            checkpoint=checkpoint,
            weights=static["weights"],
            adapters=static["adapters"],
            gradients=static["gradients"],
            optimizer=static["optimizer"],
            communication=static["communication"],
            activations=kept,
            logits=alive if at_loss else 0,
            temporary=0 if at_loss else alive,
            moment=moment,
            paged_out=self._state()[1],
            offloaded=sum(layer[mode].sent for layer, mode in zip(counts.layers, modes)),
            kept_per_token=sum(layer[m].kept for layer, m in zip(counts.layers, modes)) / len(modes) / batch / seq,
            recompute=counts.flops(modes) / plain - 1,
            modes=list(modes),
        )

    def _static(self) -> dict[str, int]:
        """What is there all through a step. All gradients count, though the first to come arrive after the loss."""
        share = self.gpus if self.parallel == "fsdp2" else 1
        layers = [parameter for layer in self._sizes.layers for parameter in layer]
        everything = [*layers, *self._sizes.rest]
        full = self.method.name == "full"
        trained = sum(n * size for n, size, is_trained, _ in everything if is_trained)
        return {
            "weights": sum(_bytes(p) for p in everything if full or not p[2]) // share,
            "adapters": 0 if full else trained // share,
            "gradients": trained // share,
            "optimizer": self._state()[0] // share,
            "communication": self._communication(trained),
        }

    def _state(self) -> tuple[int, int]:
        everything = [*(p for layer in self._sizes.layers for p in layer), *self._sizes.rest]
        return self.optim.states([(n, size) for n, size, is_trained, _ in everything if is_trained])

    def _communication(self, trained: int) -> int:
        if self.gpus == 1:
            return 0
        if self.parallel == "ddp":
            return trained
        gathered = sorted((sum(_bytes(p) for p in layer) for layer in self._sizes.layers), reverse=True)[:2]
        reduced = max(sum(n * size for n, size, is_trained, _ in layer if is_trained) for layer in self._sizes.layers)
        return sum(gathered) + reduced + sum(_bytes(p) for p in self._sizes.rest)

    def longest(self, batch: int, checkpoint: str, budget: int, limit: int, multiple: int = 64) -> Estimate | None:
        """The estimate at the longest sequence, a multiple of `multiple` up to `limit`, that fits; or None."""

        def try_(blocks: int) -> Estimate | None:
            try:
                found = self.estimate(batch, blocks * multiple, checkpoint, budget)
            except ValueError:
                return None
            return found if found.peak <= budget else None

        low, high = 0, max(1, limit // multiple)
        best = None
        guess = high
        while low < high:
            found = try_(guess)
            if found is not None:
                best, low = found, guess
            else:
                high = guess - 1
            guess = (low + high + 1) // 2
            if best is not None and best.seq < limit:  # most of a step is in proportion to its tokens
                static = best.peak - best.activations - best.logits - best.temporary
                straight = int((budget - static) / max(1, best.peak - static) * best.seq) // multiple
                guess = min(high, max(low + 1, straight)) if straight > low else min(high, low + 1)
        return best


def _bytes(parameter: tuple[int, int, bool, bool]) -> int:
    elements, size, _, quantised = parameter
    return nf4_bytes(elements) if quantised else elements * size


__all__ = ["PARTS", "Estimate", "Estimator", "Method", "Sizes"]
