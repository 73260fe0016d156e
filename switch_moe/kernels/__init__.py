"""Triton kernels, one file per operation, with the choice of their tile sizes. Imported when first used.

They take contiguous tensors that the operation has checked, accumulate in float32, address in int64, wait for
nothing on the host, and repeat bit for bit: sums have a fixed order, there are no atomics.
"""
