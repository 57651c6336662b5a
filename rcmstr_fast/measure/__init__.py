"""What an installed package needs to measure itself.

`timer` times candidates in turn, `records` writes and reads what was measured, `machine` says on what, `ceilings` how
fast that machine can be at all. `costs` counts the work of a training step, `step` times whole steps, `pipeline` the
data path; both run the trainer through `running`, the only file here that knows its inside. Comparisons with other
libraries, and the pages, are in `bench/` of a checkout.
"""
