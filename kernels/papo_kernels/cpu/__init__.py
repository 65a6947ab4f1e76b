"""The way of the CPU: matrix products of a chunk by torch, everything else in C++."""
