"""Locks that a fork does not share with the process that it was forked from."""

import threading

from tqdm import tqdm


def own_progress_locks():
    """Gives this process progress bars of its own.

    All processes that are forked from one share tqdm's lock. A process that is killed while it
    draws a bar never gives it back, and the others wait for ever. Some subclasses of tqdm, such as
    huggingface_hub's, hold the lock as their own.
    """
    lock, classes = threading.RLock(), [tqdm]
    while classes:
        one = classes.pop()
        one.set_lock(lock)
        classes += one.__subclasses__()
