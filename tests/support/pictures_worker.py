"""One rank of a test: a step of training, and what became of each picture in this process.

    python pictures_worker.py CONFIG.pt OUT

It writes to OUT/rank*.json how often each picture of the data was decoded and processed, how many
bytes of objects this rank sent to others, and what of them were pixels. Run by
test_pictures_ranks.py, with torchrun's variables in the environment.
"""

import io
import json
import pickle
import sys
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed import barrier, distributed_c10d

from papo_fast.cli import leave
from papo_fast.data import rows
from papo_fast.data.encoder import PromptEncoder
from papo_fast.parallel import process_group, rank
from papo_fast.rewards.scorer import Scorer
from papo_fast.run.clock import Clock
from papo_fast.run.progress import Progress
from papo_fast.trainer import Trainer

decoded: list[bytes] = []
processed: list[bytes] = []
sent: list[bytes] = []


def watch() -> None:
    read, process = rows.read_picture, PromptEncoder.process_images

    def reading(file):
        picture = read(file)
        decoded.append(picture.tobytes())
        return picture

    def processing(self, images):
        processed.extend(image.tobytes() for image in images)
        return process(self, images)

    rows.read_picture, PromptEncoder.process_images = reading, processing
    pack = distributed_c10d._object_to_tensor  # what every collective of objects goes through

    def packing(thing, *args):
        tensor, size = pack(thing, *args)
        sent.append(tensor.clone().numpy().tobytes())  # it is resized later
        return tensor, size

    distributed_c10d._object_to_tensor = packing


def main(config_path: str, out: str) -> None:
    torch.set_num_threads(1)
    config = torch.load(config_path, weights_only=False)  # written by the test itself
    with process_group(torch.device("cpu")), Scorer(config.reward) as scorer:
        watch()
        progress = Progress(Console(file=io.StringIO()))
        trainer = Trainer(config, Path(out), scorer, progress, Clock())
        trainer.load_sampler()
        trainer.step(1)
        counts = Counter(decoded), Counter(processed)
        prompts = list(trainer.train_data)
        # of each picture: lines of its pixels, and patches
        pixels = [prompt.images[0].tobytes() for prompt in prompts]
        marks = [raw[at : at + 48] for raw in pixels for at in (0, len(raw) // 2)]
        for prompt in prompts:
            patches = prompt.encoded.pixel_values
            marks += [patches[0, :32].numpy().tobytes(), patches[-1, -32:].numpy().tobytes()]
        found = {
            "decoded": [counts[0][raw] for raw in pixels],
            "processed": [counts[1][raw] for raw in pixels],
            "bytes_sent": sum(map(len, sent)),
            "pixels_sent": sum(mark in thing for mark in marks for thing in sent),
            # and how a prompt would look
            "pixels_of_a_prompt": sum(mark in pickle.dumps(prompts[0]) for mark in marks),
            "bytes_of_a_picture": patches.nbytes,
        }
        (Path(out) / f"rank{rank()}.json").write_text(json.dumps(found))
        trainer.journal.close()
        trainer.engine.close()
        barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
