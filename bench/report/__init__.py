"""docs/performance.md and docs/results.md, written from the records in `bench/results`: `python -m bench.report`."""
