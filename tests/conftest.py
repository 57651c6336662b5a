"""Without a GPU the Triton kernels run in their interpreter, which must be asked for before triton is imported."""

import os
import tempfile

import torch

#: Hashes of the tests' pictures are kept apart from those of the user; removed when the tests end.
_cache = tempfile.TemporaryDirectory(prefix="rcmstr_fast-cache-")
os.environ["RCMSTR_FAST_CACHE"] = _cache.name
#: Runs of tests take the priors, unless a test is about tuning.
os.environ["RCMSTR_FAST_TUNE"] = "off"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
