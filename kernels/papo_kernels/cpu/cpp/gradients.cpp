// Gradients of the states and of picked rows of the weight, for many tiles together.

#include "vectors.h"

#include <cstdlib>

// How many columns and features of `weight` are unpacked at a time: they stay in the second-level
// cache. docs/kernels.md names them.
enum { COLUMNS = 256, PANEL = 320 };

static inline float widen(uint16_t x)  // bfloat16
{
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

// d_x[r][:] += sum over columns g[c][r] w[at[c]][:], M vectors of features; rows of w are as long.
template <int R, int M>
static void state_block(const float *g, int64_t rows, const float *w, const int32_t *at,
                        int64_t count, float *d_x, int64_t stride)
{
    vf acc[R][M];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) acc[r][m] = load(d_x + r * stride + m * LANES);
    for (int64_t c = 0; c < count; c++) {
        vf v[M];
        for (int m = 0; m < M; m++) v[m] = load(w + at[c] * M * LANES + m * LANES);
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) acc[r][m] += g[c * rows + r] * v[m];
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) store(d_x + r * stride + m * LANES, acc[r][m]);
}

// d_w[at[c]][:] += sum over rows g[c][r] x[r][:]
template <int C, int M>
static void weight_block(const float *g, int64_t rows, const float *x, int64_t stride, float *d_w,
                         const int32_t *at)
{
    vf acc[C][M] = {};
    for (int64_t r = 0; r < rows; r++) {
        vf v[M];
        for (int m = 0; m < M; m++) v[m] = load(x + r * stride + m * LANES);
        for (int c = 0; c < C; c++)
            for (int m = 0; m < M; m++) acc[c][m] += g[c * rows + r] * v[m];
    }
    for (int c = 0; c < C; c++)
        for (int m = 0; m < M; m++) {
            float *to = d_w + at[c] * M * LANES + m * LANES;
            store(to, load(to) + acc[c][m]);
        }
}

// A tile's gradients g (count, rows) of the logits on `count` columns. `places` says where those
// columns stand in the call's list of columns, in ascending order. x (rows, width) are the tile's
// states. d_x is where the states' gradients go: it may be the same memory, or null.
struct TileGradients {
    const float *g;
    const int32_t *places;
    int64_t count, rows;
    const void *x;
    void *d_x;
};

// A matrix of `width` features in float32 or bfloat16.
struct Matrix {
    const void *data;
    int64_t stride;
    bool is_bf16;
    // Reads the features [from, from + size) of a row as float, and zeros beyond `width`.
    void read(int64_t row, int64_t from, int64_t size, int64_t width, float *out) const
    {
        int64_t at = row * stride + from, some = width - from < size ? width - from : size, k = 0;
        const uint16_t *half = (const uint16_t *)data + at;
        const float *whole = (const float *)data + at;
        if (is_bf16)
            for (; k < some; k++) out[k] = widen(half[k]);
        else
            for (; k < some; k++) out[k] = whole[k];
        for (; k < size; k++) out[k] = 0;
    }
    // Writes or adds the part of `in` that lies within `width`.
    void write(int64_t row, int64_t from, int64_t size, int64_t width, const float *in, bool add) const
    {
        int64_t at = row * stride + from, some = width - from < size ? width - from : size;
        uint16_t *half = (uint16_t *)data + at;
        float *whole = (float *)data + at;
        if (is_bf16)
            for (int64_t k = 0; k < some; k++) half[k] = rounded(in[k]);
        else if (add)
            for (int64_t k = 0; k < some; k++) whole[k] += in[k];
        else
            for (int64_t k = 0; k < some; k++) whole[k] = in[k];
    }
};

// Writes the gradients of all tiles' states to their d_x, and adds the gradients of the rows `cols` of
// the weight to d_weight; either may be null. A bfloat16 d_weight is overwritten instead, so that the
// sum over all tiles is rounded once. All tiles go through the columns together, so that each row of
// the weight and of its gradient is touched once.
static void gradients_of(Matrix weight, const int64_t *cols, int64_t count,
                         const TileGradients *tiles, int64_t n_tiles, bool x_bf16, bool d_x_bf16,
                         Matrix d_weight, int64_t width, int threads)
{
    enum { M = WIDEST, WIDTH = M * LANES, B = ACCUMULATORS / M };
    int64_t all_rows = 0;
    for (int64_t t = 0; t < n_tiles; t++) all_rows += tiles[t].rows;
    split((width + WIDTH - 1) / WIDTH * WIDTH, WIDTH, threads, FEW, [=](int64_t first, int64_t last) {
        int64_t stride = last - first < PANEL ? last - first : PANEL;
        // A panel of the weight: WIDTH features of COLUMNS columns, then the next WIDTH features.
        float *w = (float *)aligned_alloc(64, COLUMNS * stride * 4);
        float *d_w = (float *)aligned_alloc(64, COLUMNS * stride * 4);
        // A panel of all tiles' states, one tile after the other.
        float *x = (float *)aligned_alloc(64, all_rows * stride * 4);
        float *d_x = (float *)aligned_alloc(64, all_rows * stride * 4);
        std::vector<int64_t> at(n_tiles);
        std::vector<int32_t> place(COLUMNS);
        for (int64_t from = first; from < last; from += PANEL) {
            int64_t to = last - from < PANEL ? last : from + PANEL, panel = to - from;
            for (int64_t t = 0, row = 0; t < n_tiles; row += tiles[t++].rows) {
                at[t] = 0;
                Matrix states = {tiles[t].x, width, x_bf16};
                for (int64_t r = 0; r < tiles[t].rows; r++)
                    states.read(r, from, panel, width, x + (row + r) * stride);
            }
            memset(d_x, 0, all_rows * stride * 4);
            for (int64_t c = 0; c < count; c += COLUMNS) {
                int64_t size = count - c < COLUMNS ? count - c : COLUMNS;
                for (int64_t i = 0; i < size; i++)
                    for (int64_t d = 0; d < panel; d += WIDTH)
                        weight.read(cols[c + i], from + d, WIDTH, width, w + d * COLUMNS + i * WIDTH);
                memset(d_w, 0, COLUMNS * panel * 4);
                for (int64_t t = 0, row = 0; t < n_tiles; row += tiles[t++].rows) {
                    const TileGradients &tile = tiles[t];
                    int64_t rows = tile.rows, some = 0;
                    const float *g = tile.g + at[t] * rows;
                    for (; at[t] < tile.count && tile.places[at[t]] < c + size; at[t]++)
                        place[some++] = (int32_t)(tile.places[at[t]] - c);
                    for (int64_t d = 0; some && d < panel; d += WIDTH) {
                        const float *wd = w + d * COLUMNS, *xd = x + row * stride + d;
                        float *dd = d_w + d * COLUMNS, *dx = d_x + row * stride + d;
                        int64_t r = 0, i = 0;
                        if (tile.d_x) {
                            for (; r + B <= rows; r += B)
                                state_block<B, M>(g + r, rows, wd, place.data(), some,
                                                  dx + r * stride, stride);
                            for (; r + 2 <= rows; r += 2)
                                state_block<2, M>(g + r, rows, wd, place.data(), some,
                                                  dx + r * stride, stride);
                            for (; r < rows; r++)
                                state_block<1, M>(g + r, rows, wd, place.data(), some,
                                                  dx + r * stride, stride);
                        }
                        if (!d_weight.data) continue;
                        for (; i + B <= some; i += B)
                            weight_block<B, M>(g + i * rows, rows, xd, stride, dd, place.data() + i);
                        for (; i < some; i++)
                            weight_block<1, M>(g + i * rows, rows, xd, stride, dd, place.data() + i);
                    }
                }
                for (int64_t i = 0; d_weight.data && i < size; i++)
                    for (int64_t d = 0; d < panel; d += WIDTH)
                        d_weight.write(cols[c + i], from + d, WIDTH, width,
                                               d_w + d * COLUMNS + i * WIDTH, true);
            }
            for (int64_t t = 0, row = 0; t < n_tiles; row += tiles[t++].rows) {
                Matrix out = {tiles[t].d_x, width, d_x_bf16};
                for (int64_t r = 0; out.data && r < tiles[t].rows; r++)
                    out.write(r, from, panel, width, d_x + (row + r) * stride, false);
            }
        }
        free(w);
        free(d_w);
        free(x);
        free(d_x);
    });
}

extern "C" void picked_gradients(const void *weight, int is_bf16, int64_t stride_w,
                                 const int64_t *cols, int64_t count, const TileGradients *tiles,
                                 int64_t n_tiles, int x_bf16, int d_x_bf16, void *d_weight,
                                 int d_weight_bf16, int64_t width, int threads)
{
    gradients_of({weight, stride_w, !!is_bf16}, cols, count, tiles, n_tiles, x_bf16, d_x_bf16,
                 {d_weight, width, !!d_weight_bf16}, width, threads);
}
