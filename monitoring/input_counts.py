"""How often each field of new records fell into each bin of the reference rows: what `input_drift` is judged by.

Records are read where reports are made, in a process of its own, so that the controller never waits for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from monitoring.baseline import ColumnSpec
from monitoring.ledger import Ledger
from monitoring.tally import TallyKey, bucket_of

__all__ = ["count_inputs", "tally_inputs"]


def tally_inputs(ledger: Ledger, rollout_id: str, limit: int, now: float) -> int:
    """Count the records of a rollout's newest pairs that no call has counted yet.

    Each is counted once, also when two processes do this at once. Where more than `limit` have come since the last call
    the oldest of them are passed over: which ones that are depends on when they came, and not on what they hold.

    Args:
        limit: so many pairs at most.
        now: seconds since the epoch.

    Returns:
        How many pairs were counted.
    """
    columns = ledger.rollout(rollout_id).baseline.columns
    if not columns:
        return 0
    source = f"inputs/{rollout_id}"
    last = ledger.last_sequence(source)
    fresh = [pair for pair in ledger.recent_pairs(rollout_id, limit) if pair.seq > last]
    if not fresh:
        return 0
    bucket = bucket_of(now)
    deltas = {
        (rollout_id, TallyKey("input_drift", name, bucket)): counts
        for name, counts in count_inputs((pair.record for pair in fresh), columns).items()
        if counts
    }
    return len(fresh) if ledger.add_counts(source, fresh[-1].seq, deltas, now) else 0


def count_inputs(
    records: Iterable[Mapping[str, object]], columns: Sequence[ColumnSpec]
) -> dict[str, dict[int, int]]:
    """Count records into the bins of the reference rows.

    A field that a record lacks counts in the last bin, as does a value of the wrong type. Records without any field
    (of requests that brought tensors, or too large to be kept) say nothing about inputs and are passed over.

    Args:
        records: what clients sent; fields that no column is about are ignored.
        columns: the fields, as they were among the reference rows.

    Returns:
        Column name -> bin -> how many records; bins without a record are left out, columns are not.
    """
    counts = {column.name: Counter[int]() for column in columns}
    for record in records:
        if not record:
            continue
        for column in columns:
            counts[column.name][column.bin_of(record.get(column.name))] += 1
    return {name: dict(sorted(found.items())) for name, found in counts.items()}
