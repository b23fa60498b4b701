"""Adding up inside a process: nothing is lost between threads and drains."""

from threading import Thread

from deployments.observability import metrics
from deployments.observability.accumulator import Accumulator
from deployments.observability.events import BatchRan, EngineState
from models.contracts import Priority


def test_a_drain_takes_counts_and_leaves_gauges() -> None:
    accumulator = Accumulator()
    accumulator.emit(BatchRan(model="m", rows=2, duration_s=0.25, decode_tokens=2))
    accumulator.emit(BatchRan(model="m", rows=300, duration_s=0.25, decode_tokens=3))
    accumulator.emit(EngineState(model="m", running=1, waiting={Priority.VIP: 4}))

    first = accumulator.drain()
    assert first.counters == {(metrics.STEP_TOKENS, ("m", "decode")): 5}
    rows = first.histograms[metrics.BATCH_ROWS, ("m",)]
    assert rows.total == 302
    assert rows.counts[1] == 1, "an upper bound belongs to its bucket"
    assert rows.counts[-1] == 1

    second = accumulator.drain()
    assert not second.counters
    assert not second.histograms
    assert second.gauges == {
        (metrics.RUNNING, ("m",)): 1,
        (metrics.QUEUE_DEPTH, ("m", "vip")): 4,
    }


def test_threads_lose_nothing() -> None:
    accumulator = Accumulator()
    event = BatchRan(model="m", rows=1, duration_s=1, decode_tokens=1)
    drained = 0.0

    def work() -> None:
        for _ in range(2000):
            accumulator.emit(event)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        drained += sum(accumulator.drain().counters.values())
    drained += sum(accumulator.drain().counters.values())
    assert drained == 8000
