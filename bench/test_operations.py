"""Operations and the masked pass, each against its peers."""

from bench.conftest import Bench, median_ms
from bench.ops import call, extras


def test_operation(subject: str, provider: str, mode: str, bench: Bench, benchmark) -> None:  # type: ignore[no-untyped-def]
    """One provider of one operation at one shape; its results are compared with float64 first."""
    entry = bench.entry(subject)
    head = entry.head(provider) | {"mode": mode}
    benchmark.group = f"{subject}, {mode}"
    rounds = 3 if subject.startswith("masked_pass") and bench.size == "cpu" else bench.rounds
    with bench.failures(head):
        errors = bench.check(subject, provider)
        peak_mib = bench.time(benchmark, call(entry, provider, mode), rounds)
    ms = median_ms(benchmark)
    more = extras(entry, mode, bench.device.type, ms, peak_mib) if ms else {}
    benchmark.extra_info |= head | {"errors": errors} | more
