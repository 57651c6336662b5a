"""Everything that needs a GPU, in resumable pieces: `python -m bench.gpu`."""
