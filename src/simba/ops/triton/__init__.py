"""The Triton kernels, and the functions that launch them.

A kernel is named ``<operation>_<step>_kernel``. The function that launches an operation's kernels
has the operation's name and the signature that `simba.ops.operators` declares. These modules are
imported when a kernel is about to run.
"""
