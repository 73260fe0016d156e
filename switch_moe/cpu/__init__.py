"""CPU code, one file per operation: it calls what ``csrc`` compiled and chooses among its algorithms.

The functions take contiguous tensors that the operation has checked. Results repeat bit for bit and do not
depend on the number of threads of the compiled code.
"""
