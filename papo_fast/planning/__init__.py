"""What a configuration needs, before anything runs: memory per GPU and seconds per step.

From the model's config.json alone: no weights are read and no GPU is touched.
"""
