"""The C++ of the CPU (`cpp/`): its functions, as tensors call them.

Where `build` cannot have it, and for other dtypes and devices, `eager/` does the work.
"""

import ctypes
import functools
import logging
import threading
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from papo_kernels.cpu import build

log = logging.getLogger("papo_kernels")

SOURCES = Path(__file__).with_name("cpp")
FLAGS = "-O3 -funroll-loops -std=c++17 -shared -fPIC -pthread -march=native".split()
# A call with fewer logits than this is quick enough by torch's operators, and nothing is compiled.
LEAST_LOGITS = 1 << 20


def usable(logits, device, *dtypes):
    """Whether the C++ can serve so many logits on that device, of tensors of these dtypes."""
    if logits < LEAST_LOGITS or device.type != "cpu":
        return False
    if any(dtype not in (torch.float32, torch.bfloat16) for dtype in dtypes):
        return False
    return _library() is not None


def statistics(z, z_aug, fields):
    """(`fields`, R) statistics of one or two (R, V) logits, whose rows are equally far apart.

    Their order, and their number for one and two streams, is that of `rows.statistics_names`.
    """
    rows, vocab = z.shape
    out = z.new_empty(fields, rows)
    aug = None if z_aug is None else z_aug.data_ptr()
    _library().statistics(
        z.data_ptr(), aug, rows, vocab, z.stride(0), out.data_ptr(), rows, _threads()
    )
    return out


def levels(logits, order, normalisers, tile, per_nat):
    """(ceil(R / tile), V) uint8 levels, see `certificate`, of one or two (R, V) logits.

    The rows of both are equally far apart. order: (R,) rows in the order in which tiles are cut.
    normalisers: peak and log_sum of each stream, (2 or 4, R).
    """
    rows, vocab = logits[0].shape
    out = torch.empty(-(-rows // tile), vocab, dtype=torch.uint8)
    aug = logits[1].data_ptr() if len(logits) == 2 else None
    _library().levels(
        logits[0].data_ptr(), aug, order.data_ptr(), rows, vocab, logits[0].stride(0), tile,
        normalisers.data_ptr(), rows, out.data_ptr(), per_nat, _threads(),
    )  # fmt: skip
    return out


def product(x, weight, out, bias=None):
    """Writes (R, D) x @ (V, D) weight.T into (R, V) `out`; returns whether it could.

    bias: (V,), which is added; -inf where it is LOG_ZERO or below.

    It can where x and weight are bfloat16 and the processor multiplies those: torch can only round
    such products to bfloat16. Rows of weight and of out are contiguous each.
    """
    if not x.dtype == weight.dtype == torch.bfloat16:
        return False
    if out.dtype != torch.float32 or x.shape[1] == 0 or weight.stride(1) != 1:
        return False
    if not multiplies_bf16():
        return False
    wide = None if bias is None else bias.float().contiguous()
    _product(_pairs(x), weight, False, out, False, wide)
    return True


def add_product(x, y, out):
    """Adds (R, K) x @ (K, C) y to (R, C) float32 `out`, of bfloat16 x and y on the CPU.

    Only where `multiplies_bf16`. Rows of y and of out are contiguous each.
    """
    _product(_pairs(x), y, True, out, True)


def add_product_of_pairs(pairs, y, out, fresh):
    """Adds x.T @ (K, C) y to float32 `out`, where `pairs` holds rows of x as `Halves` does.

    fresh: writes it instead.
    """
    _product(pairs.T, y, True, out, not fresh)


def _pairs(x):
    """(R, D) bfloat16 x as (R, D / 2 rounded up) int32, two columns in each."""
    if x.shape[1] % 2:
        x = F.pad(x, (0, 1))
    return x.contiguous().view(torch.int32)


def _product(pairs, y, by_terms, out, add, bias=None):
    """x @ y, or x @ y.T unless `by_terms`; `pairs` holds two terms of x in each int32."""
    terms = y.shape[0] if by_terms else y.shape[1]
    _library().product(
        pairs.data_ptr(), len(out), *pairs.stride(), y.data_ptr(), y.stride(0), by_terms,
        out.shape[1], terms, out.data_ptr(), out.stride(0), add,
        None if bias is None else bias.data_ptr(), _threads(),
    )  # fmt: skip


class Halves(NamedTuple):
    """(R, B) gradients in bfloat16, for products with the weight and with the states."""

    rows: torch.Tensor  # (R, B)
    pairs: torch.Tensor  # (R / 2 rounded up, B) int32: rows 2 n and 2 n + 1 in each


class Block(ctypes.Structure):
    """As in `cpp/dense.cpp`."""

    _fields_ = [
        ("z", ctypes.c_void_p),
        ("half", ctypes.c_void_p),
        ("pairs", ctypes.c_void_p),
        ("wanted", ctypes.c_int64),
    ]


def dense_gradients(logits, wanted, halves, reverse, fields, targets, head):
    """Gradients of one or two streams' (R, B) contiguous logits, None where not `wanted`.

    They are (R, B) float32 in the place of the logits, or `Halves`. reverse: whether KL(q || p) has
    an upstream gradient. fields: (5 or 14, R), which the C++ lists. targets: (R,) int32, where
    among the words a row's target stands, or -1.
    """
    rows, words = logits[0].shape
    # rows that are a power of two apart would share few lines of a cache
    stride = words + 16

    def place(z):
        if not halves:
            return z
        pairs = torch.empty(-(-rows // 2), stride, dtype=torch.int32)
        return Halves(torch.empty(rows, words, dtype=torch.bfloat16), pairs[:, :words])

    found = [place(z) if of_it else None for z, of_it in zip(logits, wanted, strict=True)]
    blocks = (Block * len(logits))()
    for block, z, grad in zip(blocks, logits, found, strict=True):
        block.z, block.wanted = z.data_ptr(), grad is not None
        if isinstance(grad, Halves):
            block.half, block.pairs = (x.data_ptr() for x in grad)
    _library().dense_gradients(
        blocks, len(logits), reverse, rows, words, stride, fields.data_ptr(), targets.data_ptr(),
        head.temperature, head.softcap or 0.0, _threads(),
    )  # fmt: skip
    return found


def round_to_bf16(x, out):
    """Writes contiguous float32 x into contiguous bfloat16 `out` of the same shape."""
    _library().round_to_bf16(x.data_ptr(), out.data_ptr(), x.numel(), _threads())


class TileLogits(ctypes.Structure):
    """As in `cpp/products.cpp`."""

    _fields_ = [
        ("cols", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("z", ctypes.c_void_p),
    ]


def picked_logits(tiles, weight):
    """Of each tile (rows, cols) the (K, R) float32 products of rows `cols` of weight with rows.

    tiles: (R, D) and ascending (K,) int64 each; R is a multiple of `whole_vectors`. Rows of (V, D)
    weight are contiguous each.
    """
    if not weight.shape[1]:
        # The C++ writes a product when it has added a feature, and here it would have none to add.
        return [torch.zeros(len(c), len(r), dtype=torch.float32) for r, c in tiles]
    bf16 = weight.dtype == torch.bfloat16
    pairs = bf16 and all(rows.dtype == weight.dtype for rows, _ in tiles) and multiplies_bf16()
    pairs = pairs and weight.shape[1] % 2 == 0 and weight.stride(0) % 2 == 0
    if bf16 and not pairs:
        return [
            _picked_logits([(r, torch.arange(len(c)))], weight[c].float(), False)[0]
            for r, c in tiles
        ]
    return _picked_logits(tiles, weight, pairs)


def _picked_logits(tiles, weight, pairs):
    xs = [(r.view(torch.int32) if pairs else r.float()).T.contiguous() for r, _ in tiles]
    # a dtype everywhere: without one these would follow torch.set_default_dtype
    zs = [torch.empty(len(cols), len(rows), dtype=torch.float32) for rows, cols in tiles]
    given = (TileLogits * len(tiles))(
        *(
            TileLogits(cols.data_ptr(), len(cols), len(rows), x.data_ptr(), z.data_ptr())
            for (rows, cols), x, z in zip(tiles, xs, zs, strict=True)
        )
    )
    _library().picked_logits(
        weight.data_ptr(), pairs, weight.stride(0), len(weight), given, len(tiles),
        weight.shape[1], _threads(),
    )  # fmt: skip
    return zs


def column_gradients(z, streams, aug, reverse, rows, targets, fields):
    """Gradients of the (K, R) logits z, and (`fields`, R / streams) sums over the K columns.

    aug: whether the second of two streams gets gradients, else they are (K, R / streams). reverse:
    whether KL(q || p) has an upstream gradient. rows: (F, R / streams) statistics and upstream
    gradients. targets: (R / streams,) int32, where among the columns a row's target stands. The C++
    says which sums and which rows; so does `cpu/tiles.py`.
    """
    padded = rows.shape[1]
    g = z.new_empty(len(z), padded * (2 if streams == 2 and aug else 1))
    sums = torch.empty(fields, padded, dtype=torch.float32)
    _library().column_gradients(
        z.data_ptr(), g.data_ptr(), len(z), streams, aug, reverse, padded, rows.data_ptr(),
        targets.data_ptr(), sums.data_ptr(),
    )  # fmt: skip
    return g, sums


def drop_least(g, streams, net, room):
    """(keep, dropped): which columns of (K, R) g stay, ascending, and what the others hold.

    room: (streams + net, R / streams) sums of |g| that rows may drop, `net` of the streams' sum;
    dropped is alike.
    """
    keep, dropped = torch.empty(len(g), dtype=torch.int64), torch.empty_like(room)
    kept = _library().drop_least(
        g.data_ptr(), len(g), streams, room.shape[1], net, room.data_ptr(), dropped.data_ptr(),
        keep.data_ptr(),
    )  # fmt: skip
    return keep[:kept], dropped


class TileGradients(ctypes.Structure):
    """As in `cpp/gradients.cpp`."""

    _fields_ = [
        ("g", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("d_x", ctypes.c_void_p),
    ]


def add_picked_gradients(tiles, weight, cols, d_weight):
    """g.T @ weight[cols[places]] to each tile's d_x, and g @ x added to those rows of d_weight.

    tiles: (g, places, x, d_x) of each: (K, R) and (K,) int32 ascending places in `cols`; (R, D)
    contiguous states and the memory for their gradients, which may be the states' own. d_x and
    d_weight may be None; a bfloat16 d_weight loses what it held in those rows.
    """
    given = (TileGradients * len(tiles))(
        *(
            TileGradients(
                g.data_ptr(), places.data_ptr(), len(g), g.shape[1], x.data_ptr(),
                None if d_x is None else d_x.data_ptr(),
            )
            for g, places, x, d_x in tiles
        )
    )  # fmt: skip
    kinds = (weight, *tiles[0][2:], d_weight)
    halves = [t is not None and t.dtype == torch.bfloat16 for t in kinds]
    _library().picked_gradients(
        weight.data_ptr(), halves[0], weight.stride(0), cols.data_ptr(), len(cols), given,
        len(tiles), *halves[1:3], None if d_weight is None else d_weight.data_ptr(), halves[3],
        weight.shape[1], _threads(),
    )  # fmt: skip


def whole_vectors(rows):
    """The least multiple of the vectors' length that is not below `rows`."""
    return -(-rows // _library().lanes()) * _library().lanes()


def _threads():
    return torch.get_num_threads()


@functools.cache
def multiplies_bf16():
    """Whether the processor multiplies bfloat16 numbers and adds the products in float32."""
    if _library().multiplies_bf16():
        return True
    log.info("token_stats: bfloat16 products run as float32: this CPU has no AVX512_BF16")
    return False


def _once(function):
    """As functools.cache, for threads that ask at the same time too: one of them does the work."""
    cached, lock = functools.cache(function), threading.Lock()

    @functools.wraps(function)
    def ask():
        with lock:
            return cached()

    return ask


@_once
def _library():
    """The compiled functions, or None and a warning where they cannot be had."""
    try:
        return _declare(build.library(SOURCES, FLAGS))
    except (build.Unavailable, AttributeError) as reason:  # the latter names a missing function
        log.warning(
            "token_stats: on the CPU, torch's operators run instead of papo_kernels' own C++, at "
            "less than half the speed: %s",
            reason,
        )
        return None


def _declare(library):
    p, n, i, f = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    library.statistics.argtypes = [p, p, n, n, n, p, n, i]
    library.levels.argtypes = [p, p, p, n, n, n, n, p, n, p, f, i]
    library.product.argtypes = [p, n, n, n, p, n, i, n, n, p, n, i, p, i]
    library.dense_gradients.argtypes = [p, n, i, n, n, n, p, p, f, f, i]
    library.round_to_bf16.argtypes = [p, p, n, i]
    library.picked_logits.argtypes = [p, i, n, n, p, n, n, i]
    library.picked_gradients.argtypes = [p, i, n, p, n, p, n, i, i, p, i, n, i]
    library.column_gradients.argtypes = [p, p, n, n, i, i, n, p, p, p]
    library.drop_least.argtypes = [p, n, n, n, i, p, p, p]
    library.drop_least.restype = n
    return library
