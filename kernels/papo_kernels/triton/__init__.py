"""The way of GPUs, in Triton. This package may be imported only where triton is installed."""
