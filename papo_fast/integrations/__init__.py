"""PAPO in other people's trainers: a kernel and a thin hook, no trainer of its own."""
