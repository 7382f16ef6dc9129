"""A pretended accelerator, to test on a CPU what a GPU would be strict about.

`device.cpp` gives PyTorch a second device, `fakedev`, whose memory and kernels are the CPU's. It
raises where CUDA would: when one operation gets tensors of both devices. And it counts what makes
the host wait for a GPU: copies to the host, copies from pageable memory to the device that are not
marked `non_blocking`, `item()`, `nonzero`, indexing by a bool mask, `unique` and the like.

What it cannot see: whether memory is pinned (a `non_blocking` copy to the device counts as an
upload, not as a wait); streams, and so whether a copy is read before it has arrived, or how long a
wait lasts; the numerics, the speed and the launches of a GPU's kernels; and the back ends of
attention that exist on CUDA alone (sdpa runs its plain mathematics here).

Installing it changes the process for good, so tests run it in a process of their own.
"""
