"""Caches of libraries where the home folder cannot be written to, as on many clusters' nodes."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

_log = logging.getLogger(__name__)


def find_room_for_data() -> None:
    """Have `datasets`, where it is loaded, keep its cache in a temporary folder if it must."""
    datasets = sys.modules.get("datasets")
    if datasets is None:
        return
    place = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        place.mkdir(parents=True, exist_ok=True)
        usable = os.access(place, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        room = tempfile.mkdtemp(prefix="papo-fast-data-")
        atexit.register(shutil.rmtree, room, ignore_errors=True)
        datasets.config.HF_DATASETS_CACHE = Path(room)
        _log.warning("%s cannot be written to: data is cached in %s for this run", place, room)
