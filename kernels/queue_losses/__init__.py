"""Kernels of the losses over queues; see `rcmstr_fast.ops.queue_losses`."""
