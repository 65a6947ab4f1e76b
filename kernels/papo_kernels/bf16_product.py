"""Products of bfloat16 matrices in float32 on the CPU, which torch can only round to bfloat16.

One C++ file, compiled once per process in a second or two, for x86 with AVX512_BF16 (twice the
speed of float32 products there). Elsewhere `product` says no, and its caller upcasts.
"""

import ctypes
import functools
import logging
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
import torch.nn.functional as F

from papo_kernels.row_math import compiler

log = logging.getLogger("papo_kernels")

FLAGS = "-O3 -funroll-loops -std=c++17 -shared -fPIC".split()
FLAGS += "-mavx512f -mavx512bw -mavx512vl -mavx512bf16".split()
# Multiply-adds below which starting threads costs more than it saves.
THREAD_WORK = 1 << 27

# Lanes are words: WORDS rows of w are packed so that one load holds a pair of features of 16 words,
# and ROWS rows of x share it. After every PAIRS pairs the sums go to z: longer ones would lose
# several times what float32 products lose, whose libraries block the same way.
SOURCE = r"""
#include <immintrin.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>

enum { ROWS = 12, WORDS = 32, PAIRS = 128 };

static void pack(const uint16_t *w, int64_t stride, int words, int64_t d, uint32_t *packed)
{
    int64_t whole = d / 2;
    for (int64_t first = 0; first < whole; first += 16)  // a cache line of every word in turn
        for (int v = 0; v < words; v++) {
            int64_t last = first + 16 < whole ? first + 16 : whole;
            const uint16_t *from = w + v * stride;
            for (int64_t k = first; k < last; k++)
                memcpy(packed + k * WORDS + v, from + 2 * k, 4);
        }
    if (d % 2)
        for (int v = 0; v < words; v++) packed[whole * WORDS + v] = w[v * stride + d - 1];
    for (int v = words; v < WORDS; v++)
        for (int64_t k = 0; k < (d + 1) / 2; k++) packed[k * WORDS + v] = 0;
}

template <int rows>
static void block(const uint32_t *x, int64_t stride_x, const uint32_t *packed, int64_t pairs,
                  float *z, int64_t stride_z, __mmask16 low, __mmask16 high, bool add)
{
    __m512 a[rows], b[rows];
    for (int r = 0; r < rows; r++) a[r] = b[r] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh w0 = (__m512bh)_mm512_load_si512(packed + k * WORDS);
        __m512bh w1 = (__m512bh)_mm512_load_si512(packed + k * WORDS + 16);
        for (int r = 0; r < rows; r++) {
            __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[r * stride_x + k]);
            a[r] = _mm512_dpbf16_ps(a[r], pair, w0);
            b[r] = _mm512_dpbf16_ps(b[r], pair, w1);
        }
    }
    for (int r = 0; r < rows; r++, z += stride_z) {
        if (add) {
            a[r] = _mm512_add_ps(a[r], _mm512_maskz_loadu_ps(low, z));
            b[r] = _mm512_add_ps(b[r], _mm512_maskz_loadu_ps(high, z + 16));
        }
        _mm512_mask_storeu_ps(z, low, a[r]);
        _mm512_mask_storeu_ps(z + 16, high, b[r]);
    }
}

// z[n, v] = sum over d of x[n, d] w[v, d]; rows of x are `stride_x` pairs of features, the last
// pair completed with zero. Returns 0, or 1 where there is no memory.
extern "C" int product(const uint32_t *x, int64_t n, int64_t stride_x, const uint16_t *w,
                       int64_t stride_w, int64_t vocab, int64_t d, float *z, int64_t stride_z)
{
    int64_t all = (d + 1) / 2;
    uint32_t *packed = (uint32_t *)aligned_alloc(64, all * WORDS * 4);
    if (!packed) return 1;
    for (int64_t v = 0; v < vocab; v += WORDS, z += WORDS) {
        int words = vocab - v < WORDS ? vocab - v : WORDS;
        pack(w + v * stride_w, stride_w, words, d, packed);
        uint32_t mask = words == WORDS ? ~0u : (1u << words) - 1;
        __mmask16 low = mask & 0xffff, high = mask >> 16;
        for (int64_t k = 0; k < all; k += PAIRS) {
            int64_t pairs = all - k < PAIRS ? all - k : PAIRS, r = 0;
            const uint32_t *xk = x + k, *pk = packed + k * WORDS;
#define SWEEP(rows)                                                                          \
    for (; r + rows <= n; r += rows)                                                         \
        block<rows>(xk + r * stride_x, stride_x, pk, pairs, z + r * stride_z, stride_z, low, \
                    high, k > 0);
            SWEEP(ROWS) SWEEP(8) SWEEP(4) SWEEP(1)
        }
    }
    free(packed);
    return 0;
}
"""


def product(x, weight, out):
    """Writes (R, D) x @ (V, D) weight.T into (R, V) `out`; returns whether it could.

    It can where x and weight are bfloat16 and out float32 on a CPU that multiplies bfloat16, with
    a compiler there. Rows of weight and of out are contiguous each.
    """
    operands = x.dtype == weight.dtype == torch.bfloat16 and out.dtype == torch.float32
    if not operands or x.device.type != "cpu" or x.shape[1] == 0 or weight.stride(1) != 1:
        return False
    library = _library()
    if library is None:
        return False
    rows, width = x.shape
    x = F.pad(x, (0, width % 2)).contiguous()
    threads = min(torch.get_num_threads(), max(1, rows * width * len(weight) // THREAD_WORK))
    size = -(-len(weight) // threads)
    codes = []

    def run(first):
        w, z = weight[first : first + size], out[:, first : first + size]
        codes.append(
            library.product(
                x.data_ptr(), rows, x.shape[1] // 2, w.data_ptr(), w.stride(0), len(w), width,
                z.data_ptr(), z.stride(0),
            )
        )  # fmt: skip

    # ctypes lets go of the interpreter while C++ runs.
    others = [threading.Thread(target=run, args=(v,)) for v in range(size, len(weight), size)]
    for t in others:
        t.start()
    run(0)
    for t in others:
        t.join()
    if any(codes):
        raise MemoryError(f"no memory to pack rows of weight {tuple(weight.shape)}")
    return True


@functools.cache
def _library():
    """The compiled function, or None where it cannot be had or cannot run."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "avx512_bf16" not in flags.read_text():
        log.info("token_stats: bfloat16 products run as float32: this CPU has no AVX512_BF16")
        return None
    if not compiler():  # which has said so
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "product.cpp"), Path(folder, "product.so")
        source.write_text(SOURCE)
        command = [compiler(), *FLAGS, str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            log.warning(
                "token_stats: bfloat16 products on the CPU run as float32, at half the speed: "
                "%s failed: %s", " ".join(command), done.stderr.strip()[-500:],
            )  # fmt: skip
            return None
        library = ctypes.CDLL(str(target))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.product.argtypes = [pointer, *[size] * 2, pointer, *[size] * 3, pointer, size]
    return library
