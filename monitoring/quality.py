"""The workload's metric of quality, as a weight for each true class.

Accuracy counts every input alike. Balanced accuracy is the mean of the classes' recalls, and a recall is an accuracy
among the inputs of one class: with p the class's share of the reference rows, a loss on one of them weighs 1 / p. So
the drop of either is the mean of w(y) d, with d = 1[control right] - 1[treatment right] and y the true class, and
where both arms give the same answer d is 0 and no label is needed. (The weights stay as they were on the reference
rows: of a class that becomes twice as frequent the losses count twice.)

w(y) d lies in [-W, W] and is no integer. Divided by W and rounded at random to -1, 0 or 1, with the same mean, it is
again an outcome like d: everything that counts and weighs such outcomes holds, with the margin divided by W. The random
number is a hash of the pair's name, so that a pair has the same outcome whenever it is counted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b

__all__ = ["Quality", "fraction", "quality_of"]


@dataclass(frozen=True, slots=True)
class Quality:
    """What a drop is measured in.

    Attributes:
        metric: its name, such as ``balanced_accuracy``.
        weights: by true class, each divided by the largest; empty where all are alike.
        scale: the largest weight: a drop of `outcome` times this is a drop of the metric.
    """

    metric: str = "accuracy"
    weights: tuple[float, ...] = ()
    scale: float = 1.0

    @property
    def words(self) -> str:
        """The metric's name in a sentence."""
        return self.metric.replace("_", " ")

    def outcome(self, d: int, label: int | None, request_id: str, index: int) -> int:
        """d = 1, -1 or 0 weighed by the true class: d itself or 0."""
        if d == 0 or label is None or not self.weights:
            return d
        weight = self.weights[label] if label < len(self.weights) else 0.0
        return d if fraction("quality", request_id, index) < weight else 0


def quality_of(metric: str, labels: Sequence[float], named: Collection[int] = ()) -> Quality:
    """The weights of a metric.

    Args:
        metric: "accuracy", "balanced_accuracy", or "recall": the mean recall of the `named` classes.
        labels: share of each true class among the reference rows; one that does not occur there has no weight.
        named: indices of classes, for recall.

    Raises:
        ValueError: none of the classes that the metric is about occurs among the reference rows.
    """
    if metric == "accuracy":
        return Quality()
    about = [k for k, share in enumerate(labels) if share > 0 and (metric != "recall" or k in named)]
    if not about:
        raise ValueError(f"{metric}: no reference row is of a class that it is about")
    weights = [1 / (len(about) * labels[k]) if k in about else 0.0 for k in range(len(labels))]
    scale = max(weights)
    return Quality(metric, tuple(weight / scale for weight in weights), scale)


def fraction(what: str, request_id: str, index: int) -> float:
    """A number in [0, 1) that looks random and is always the same for a pair; `what` makes it another one.

    53 bits of a plain BLAKE2b hash of the pair's key, personalised for its use. No secret is needed: a client learns an
    id with the reply, too late to choose what was asked under it.

    Args:
        what: the use, at most 16 bytes.
    """
    key = f"{index}:{request_id}".encode("utf-8", "surrogatepass")
    digest = blake2b(key, digest_size=8, person=what.encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)
