"""The way by torch's operators: on any device, for all dtypes, and without a compiler."""
