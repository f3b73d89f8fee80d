"""One training loop for every step that trains: plain fitting, masked recovery and distillation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from compression.errors import StepError
from compression.workload import Progress, no_progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


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
    batches = -(-len(labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    low = bfloat16 and has_bfloat16()
    masked = [(model.get_parameter(name), mask) for name, mask in (masks or {}).items()]
    with seeded(seed):
        model.train()
        for epoch in range(epochs):
            order = torch.randperm(len(labels))
            for number, rows in enumerate(torch.split(order, batch_size)):
                with torch.autocast("cpu", torch.bfloat16, enabled=low):
                    logits = model(**{name: tensor[rows] for name, tensor in inputs.items()}).float()
                loss = functional.cross_entropy(logits, target[rows], weight=weight)
                if soft is not None:
                    loss = alpha * loss + (1 - alpha) * _distance(logits, soft[rows], temperature)
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
    rows = len(next(iter(inputs.values())))
    with torch.no_grad():
        parts = [
            model(**{name: tensor[start : start + batch_size] for name, tensor in inputs.items()})
            for start in range(0, rows, batch_size)
        ]
    return torch.cat(parts).numpy()


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
