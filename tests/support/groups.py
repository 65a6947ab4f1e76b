"""Groups without a sampler: prompts and responses that a test has made itself."""

from __future__ import annotations

from papo_fast.data.prompts import Prompt
from papo_fast.samples import Completion, Group, Sample


def as_prompt(encoded, index=0):
    return Prompt(index, "", "", "", [], encoded)


def group_of(encoded, responses, aug_pixels=None):
    """A group of these responses, each a list of token ids, without scores."""
    samples = [Sample(Completion(list(r), [-1.0] * len(r), True)) for r in responses]
    return Group(as_prompt(encoded), samples, aug_pixels)


def token_ids(group):
    return [sample.completion.token_ids for sample in group.samples]
