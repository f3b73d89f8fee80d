"""A model called directly, in a process of its own: `python -m benchmarks.serving.direct FILE THREADS SECONDS`.

The ceiling that serving the same file with as many threads is compared with. Prints runs per second.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from benchmarks.serving.minilm import minilm_records


def main() -> None:
    """Run the model in a loop in each thread."""
    import onnxruntime

    path, threads, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    records = [dict(record) for record in minilm_records()]
    done = [0] * threads
    ready = threading.Barrier(threads + 1)

    def loop(number: int) -> None:
        for record in records[:8]:
            session.run(None, record)
        ready.wait()
        at, runs, end = number, 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            session.run(None, records[at % len(records)])
            at, runs = at + threads, runs + 1
        done[number] = runs

    workers = [threading.Thread(target=loop, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    print(sum(done) / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
