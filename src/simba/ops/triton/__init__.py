"""The kernels and their launches; imported when one is about to run. See `simba.ops.library`."""
