"""Kernels in Triton for CUDA devices. `kernels.gpu_provider` brings them to the ops; importing one imports triton."""
