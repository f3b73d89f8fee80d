"""The self-test of a rollout, on the reference rows of its full-precision variant."""

from __future__ import annotations

import logging

from compression.errors import CompressionError
from compression.variant import REFERENCE, load_variant
from monitoring.records import Rollout, SelfTest
from monitoring.self_test import SelfTestRow, self_test

__all__ = ["before_traffic", "reference_rows"]

log = logging.getLogger("trimtab.monitor")

_GROUP = "group_"
"""What the names of the columns with sensitive attributes begin with."""


def before_traffic(rollout: Rollout) -> SelfTest:
    """Test the judge for a rollout, on made-up rows where its reference rows cannot be read."""
    return self_test(rollout, reference_rows(rollout))


def reference_rows(rollout: Rollout) -> list[SelfTestRow] | None:
    """The reference rows of a rollout's full-precision variant; None, and a line in the log, if they cannot be read."""
    # Imported here: nobody but the Monitor needs it, and it only once there is a rollout.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        path = load_variant(rollout.control).asset(REFERENCE)
        names = pq.read_schema(path).names
        attributes = [name for name in names if name.startswith(_GROUP)]
        table = pq.read_table(path, columns=["label", "prediction", *attributes])
        columns = table.to_pydict()
        return [
            SelfTestRow(
                int(columns["prediction"][place]),
                int(columns["label"][place]),
                {name.removeprefix(_GROUP): str(columns[name][place]) for name in attributes},
            )
            for place in range(table.num_rows)
        ]
    except (CompressionError, pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("no reference rows for the self-test of %s: %s", rollout.id, " ".join(str(error).split()))
        return None
