"""What tests of the encoder share; the folder `qwen25` is in conftest.py."""

import json

from papo_fast.config import DataConfig

SMALL = DataConfig(min_pixels=28 * 28, max_pixels=64 * 28 * 28)


def padded(path, by):
    """The checkpoint with so many ids more in the model than in the tokenizer."""
    config = json.loads((path / "config.json").read_text())
    size = config["text_config"]["vocab_size"]
    config["text_config"]["vocab_size"] = size + by
    (path / "config.json").write_text(json.dumps(config))
    return size
