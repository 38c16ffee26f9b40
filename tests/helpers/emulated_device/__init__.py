"""An accelerator on a machine that has none: two CUDA devices, or one of MPS, with the CPU's memory.

``install("cuda")`` makes ``torch.device("cuda:1")`` a device of this whole process, with real
values. It fails where a real one fails: a CPU's tensor that meets one of the device, a generator
of another device, float64 on MPS, a kernel that the device does not have. Every wait of the host for
the device is reported. Not emulated: asynchrony, memory limits, TF32, cuDNN, ``torch.compile``, NCCL.
"""
