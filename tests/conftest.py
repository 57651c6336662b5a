"""Without a GPU the Triton kernels run in their interpreter, which must be asked for before triton is imported."""

import os
import tempfile

import pytest
import torch

#: Hashes of the tests' pictures are kept apart from those of the user; removed when the tests end.
_cache = tempfile.TemporaryDirectory(prefix="rcmstr_fast-cache-")
os.environ["RCMSTR_FAST_CACHE"] = _cache.name
#: Runs of tests take the priors, unless a test is about tuning.
os.environ["RCMSTR_FAST_TUNE"] = "off"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def readable(text: str) -> str:
    """A text that can be written as UTF-8: bytes of names that are not are shown as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Reports travel between processes as UTF-8, also those of tests with names that are not."""
    report = yield
    report.sections = [(name, readable(text)) for name, text in report.sections]
    if report.longrepr is not None and readable(str(report.longrepr)) != str(report.longrepr):
        report.longrepr = readable(str(report.longrepr))
    return report
