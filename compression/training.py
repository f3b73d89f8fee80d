"""One training loop for every step that trains: plain fitting, masked recovery and distillation.

A network whose inputs are padded says so in two attributes, and is then trained and asked without most of the padding:

    dynamic_axes = {"input_ids": {1: "tokens"}, "attention_mask": {1: "tokens"}}
    padding_mask = "attention_mask"     # [N, L], 0 at the end of the rows that are shorter than others

`dynamic_axes` names the axes, other than the first, whose size may change from call to call, as `torch.onnx` calls
them; `compression.export` leaves them free in the ONNX model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np

from compression.errors import StepError
from compression.workload import Progress, no_progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


_SORTED_BATCHES = 32
"""Rows are sorted by length among so many batches: enough to save most padding, and few enough to stay random."""
_CYCLE = 4
"""Updates that a cycle of learning rates takes: the last of each is at next to none, so that of one would be all."""
_LARGE = 5_000_000
"""Networks with more weights are updated by PyTorch's fused AdamW, which is several times faster there; smaller ones
gain nothing by it."""
_SMALL_BATCH = 256
"""Rows that are asked together where their states are large, as those of texts are."""


class Objective(Protocol):
    """A term of the loss that looks at more than the logits, such as the hidden states of a teacher."""

    def parameters(self) -> Sequence[nn.Parameter]:
        """Weights of its own that are trained with the network's."""

    def loss(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The term for the batch that the network has just been given, a scalar."""


def fit(
    model: nn.Module,
    tensors: Mapping[str, np.ndarray],
    labels: np.ndarray,
    *,
    epochs: int,
    lr: float = 1e-3,
    batch_size: int = 512,
    weight_decay: float = 1e-4,
    balanced: bool = False,
    teacher_logits: np.ndarray | None = None,
    temperature: float = 4.0,
    alpha: float = 1.0,
    objective: Objective | None = None,
    answers: bool = True,
    masks: Mapping[str, Tensor] | None = None,
    bfloat16: bool = False,
    seed: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Train `model` in place with AdamW and a one-cycle schedule, and leave it in eval mode.

    Args:
        tensors: inputs by the name that `forward` has for them, each [N, ...].
        labels: class indices int64 [N].
        balanced: weigh classes by the inverse of their frequency.
        teacher_logits: float [N, K]; the loss becomes `alpha * CE + (1 - alpha) * T^2 * KL(teacher || model)`
            with both softened by the temperature T (Hinton, Vinyals, Dean: arXiv 1503.02531).
        objective: a further term of the loss.
        answers: whether the logits count; without, `objective` is the whole loss.
        masks: parameter name -> 0/1 tensor of its shape; masked weights stay exactly zero.
        bfloat16: multiply in bfloat16 where the processor has instructions for it; a processor without them is many
            times slower at it than in float32, which it uses then.
        seed: of shuffling and dropout; the caller's random state is left alone.

    Raises:
        StepError: there are no rows, or the loss stopped being a number.
    """
    import torch
    from torch.nn import functional

    if len(labels) == 0:
        raise StepError("there are no rows to train on")
    inputs = {name: torch.from_numpy(array) for name, array in tensors.items()}
    target = torch.tensor(labels)  # a copy: pandas hands out arrays that may not be written to
    soft = None if teacher_logits is None else torch.from_numpy(teacher_logits)
    weight = class_weights(target) if balanced else None
    batches = len(_sizes(len(labels), batch_size))
    lengths = _lengths(model, inputs)
    extra = list(objective.parameters()) if objective is not None else []
    trained = [*model.parameters(), *extra]
    large = sum(parameter.numel() for parameter in trained) > _LARGE
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, fused=large or None)
    schedule = _schedule(optimizer, lr, epochs * batches)
    low = bfloat16 and has_bfloat16()
    masked = [(model.get_parameter(name), mask) for name, mask in (masks or {}).items()]
    with seeded(seed):
        model.train()
        for epoch in range(epochs):
            for number, rows in enumerate(_drawn(len(labels), batch_size, lengths)):
                batch = trimmed(model, {name: tensor[rows] for name, tensor in inputs.items()})
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    logits = model(**batch).float()
                    further = objective.loss(batch) if objective is not None else None
                loss = functional.cross_entropy(logits, target[rows], weight=weight)
                if soft is not None:
                    loss = alpha * loss + (1 - alpha) * _distance(logits, soft[rows], temperature)
                if further is not None:
                    loss = loss + further if answers else further
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    for parameter, mask in masked:
                        parameter.mul_(mask)
                if number % 20 == 0:
                    progress(f"epoch {epoch + 1} of {epochs}", (epoch + number / batches) / epochs)
            if not torch.isfinite(loss):
                raise StepError("training diverged: the loss is not a number; lower lr")
        with torch.no_grad():
            for parameter, _ in masked:
                parameter.add_(0.0)  # makes 0 of -0, which a file would have to tell apart
    model.eval()
    progress("trained", 1.0)


def _schedule(
    optimizer: torch.optim.Optimizer, lr: float, updates: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """One cycle up to a learning rate and down to next to none; all at that rate where a cycle has no room."""
    import torch

    if updates < _CYCLE:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates)


def has_bfloat16() -> bool:
    """Whether this processor multiplies matrices in bfloat16."""
    import torch

    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def predict_logits(model: nn.Module, tensors: Mapping[str, np.ndarray], batch_size: int = 4096) -> np.ndarray:
    """Logits float32 [N, K] of a torch model, without gradients and in eval mode."""
    import torch

    model.eval()
    inputs = {name: torch.from_numpy(array) for name, array in tensors.items()}
    lengths = _lengths(model, inputs)
    if lengths is not None:
        batch_size = min(batch_size, _SMALL_BATCH)
        order = lengths.argsort(stable=True)
        inputs = {name: tensor[order] for name, tensor in inputs.items()}
    rows = len(next(iter(inputs.values())))
    with torch.no_grad():
        parts = [
            model(
                **trimmed(
                    model, {name: tensor[start : start + batch_size] for name, tensor in inputs.items()}
                )
            )
            for start in range(0, rows, batch_size)
        ]
    logits = torch.cat(parts)
    return (logits if lengths is None else logits[order.argsort()]).numpy()


def trimmed(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch without what is padding in all of its rows, for a network that says what padding is."""
    lengths = _lengths(model, batch)
    if lengths is None:
        return batch
    axes: Mapping[str, Mapping[int, str]] = getattr(model, "dynamic_axes", {})
    dimension = axes.get(_padding_mask(model) or "", {}).get(1)
    longest = max(1, int(lengths.max())) if len(lengths) else 1
    return {
        name: next(
            (
                tensor.narrow(axis, 0, longest)
                for axis, called in axes.get(name, {}).items()
                if called == dimension
            ),
            tensor,
        )
        for name, tensor in batch.items()
    }


def _padding_mask(model: nn.Module) -> str | None:
    return getattr(model, "padding_mask", None)


def _lengths(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Length of each row without its padding, int64 [N]; None for a network that says nothing about padding."""
    import torch

    name = _padding_mask(model)
    if name is None:
        return None
    shown = inputs[name] != 0
    return (shown * torch.arange(1, shown.shape[1] + 1)).amax(1)


def _drawn(count: int, size: int, lengths: Tensor | None) -> Sequence[Tensor]:
    """The rows of one epoch in batches, in random order; rows of about the same length are put together."""
    import torch

    order = torch.randperm(count)
    sizes = _sizes(count, size)
    if lengths is None:
        return torch.split(order, sizes)
    # Rows of a smaller batch weigh more, so it takes any rows, and not always the longest.
    whole = count if sizes[-1] == size else count - sizes[-1]
    batches = [
        rows
        for some in torch.split(order[:whole], _SORTED_BATCHES * size)
        for rows in torch.split(some[lengths[some].argsort(stable=True)], size)
        if len(rows)
    ]
    if whole < count:
        batches.append(order[whole:])
    return [batches[place] for place in torch.randperm(len(batches)).tolist()]


def _sizes(count: int, size: int) -> list[int]:
    """Sizes of the batches that rows fall into; a last row alone, which batch norm cannot work on, joins the others."""
    sizes = [min(size, count - start) for start in range(0, count, size)]
    return [*sizes[:-2], sizes[-2] + 1] if len(sizes) > 1 and sizes[-1] == 1 else sizes


def class_weights(labels: Tensor) -> Tensor:
    """Weights float32 [K] that give every class that occurs the same sum; 0 for one that does not occur."""
    import torch

    counts = torch.bincount(labels).float()
    return torch.where(counts > 0, len(labels) / (counts > 0).sum() / counts.clamp(min=1), torch.zeros(()))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch within the block and give the caller's random state back afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _distance(logits: Tensor, teacher: Tensor, temperature: float) -> torch.Tensor:
    from torch.nn import functional

    student = functional.log_softmax(logits / temperature, dim=1)
    goal = functional.log_softmax(teacher / temperature, dim=1)
    # T^2 keeps the gradients of the soft part at the size of the hard part's.
    return functional.kl_div(student, goal, reduction="batchmean", log_target=True) * temperature**2
