"""Histograms that are filled in the event loop."""

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from modalkit.service.metrics import LoopHistogram


def test_a_histogram_tells_what_that_of_prometheus_client_tells() -> None:
    """With values below, between and above the bounds, and equal to one, for several labels."""
    described = ("name_seconds", "Of something.", ("model", "lane"))
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    own = LoopHistogram(*described, buckets=(0.5, 1, 2.5), registry=ours)
    other = Histogram(*described, buckets=(0.5, 1, 2.5), registry=theirs)
    for model, lane, value in (("a", "x", 0.1), ("a", "x", 1.0), ("a", "y", 2.0), ("b", "x", 99.0), ("a", "x", 0.0)):
        own.of(model, lane).observe(value)
        other.labels(model, lane).observe(value)
    for values in ((0.1, 0.2), (0.5, 99.0, 1.5)):
        own.of("a", "x").observe_all(values)
        for value in values:
            other.labels("a", "x").observe(value)
    told = [line for line in generate_latest(theirs).decode().splitlines() if "_created" not in line]
    assert generate_latest(ours).decode().splitlines() == told
