"""The built-in task: a small model, made here, that learns to read handwritten digits by PAPO."""
