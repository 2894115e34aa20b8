"""The packed runtime: experts at low-bit speed, on kernels that PyTorch ships."""
