// Layers that a GPU would otherwise take in many passes over memory; NVRTC compiles this text when a device is opened,
// so it includes nothing. All arithmetic is f32. A pack is N neighbours that one thread loads at once.

struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline float widen(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ inline void narrow(float x, float *y) { *y = x; }
__device__ inline void narrow(float x, bf16 *y) {
    unsigned bits = __float_as_uint(x);
    // To the nearest, ties to even; a NaN stays one.
    y->bits = x != x ? 0x7fff : (unsigned short)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
__device__ inline void narrow(float x, f16 *y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y->bits) : "f"(x)); }

template <typename T, int N> struct alignas(sizeof(T) * N) Pack { T at[N]; };

__device__ inline float sum_of_warp(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffff, x, offset);
    return x;
}

__device__ inline float most_of_warp(float x) {
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, offset));
    return x;
}

// The sum over a block of at most 1024 threads, in all of them.
__device__ inline float sum_of_block(float x, float *scratch) {
    x = sum_of_warp(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    int lane = threadIdx.x % 32;
    return sum_of_warp(lane < (blockDim.x + 31) / 32 ? scratch[lane] : 0.0f);
}

__device__ inline float most_of_block(float x, float *scratch) {
    x = most_of_warp(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    int lane = threadIdx.x % 32;
    return most_of_warp(lane < (blockDim.x + 31) / 32 ? scratch[lane] : -1e38f);
}

// Sums of a part of a group, and of its squares, both less the group's first number: block x of group y.
template <typename T, int N>
__device__ void group_sums(const T *x, float *sums, unsigned length, unsigned part) {
    __shared__ float scratch[32];
    const T *group = x + (size_t)blockIdx.y * length;
    float shift = widen(group[0]), sum = 0, squares = 0;
    unsigned end = min(length, (blockIdx.x + 1) * part);
    for (unsigned i = blockIdx.x * part + threadIdx.x * N; i < end; i += blockDim.x * N) {
        Pack<T, N> pack = *(const Pack<T, N> *)(group + i);
        for (int n = 0; n < N; n++) {
            float value = widen(pack.at[n]) - shift;
            sum += value;
            squares += value * value;
        }
    }
    sum = sum_of_block(sum, scratch);
    squares = sum_of_block(squares, scratch);
    if (threadIdx.x == 0) {
        float *out = sums + 2 * (blockIdx.y * gridDim.x + blockIdx.x);
        out[0] = sum;
        out[1] = squares;
    }
}

// Normalises the same part by the sums of all parts; then SiLU, if wanted.
template <typename T, int N>
__device__ void group_apply(const T *x, const T *weight, const T *bias, const float *sums, T *y, unsigned length,
                            unsigned part, unsigned spatial, unsigned groups, float eps, int silu) {
    __shared__ float shared[2];
    size_t start = (size_t)blockIdx.y * length;
    const T *group = x + start;
    if (threadIdx.x < 32) {
        float sum = 0, squares = 0;
        for (unsigned i = threadIdx.x; i < gridDim.x; i += 32) {
            sum += sums[2 * (blockIdx.y * gridDim.x + i)];
            squares += sums[2 * (blockIdx.y * gridDim.x + i) + 1];
        }
        sum = sum_of_warp(sum) / length;
        squares = sum_of_warp(squares) / length;
        if (threadIdx.x == 0) {
            shared[0] = widen(group[0]) + sum;
            shared[1] = rsqrtf(fmaxf(squares - sum * sum, 0.0f) + eps);
        }
    }
    __syncthreads();
    float mean = shared[0], scale = shared[1];
    unsigned first = (blockIdx.y % groups) * (length / spatial);
    unsigned end = min(length, (blockIdx.x + 1) * part);
    for (unsigned i = blockIdx.x * part + threadIdx.x * N; i < end; i += blockDim.x * N) {
        Pack<T, N> pack = *(const Pack<T, N> *)(group + i);
        unsigned channel = first + i / spatial;
        float factor = scale * widen(weight[channel]), shift = widen(bias[channel]);
        for (int n = 0; n < N; n++) {
            float value = (widen(pack.at[n]) - mean) * factor + shift;
            if (silu) value = value / (1.0f + expf(-value));
            narrow(value, &pack.at[n]);
        }
        *(Pack<T, N> *)(y + start + i) = pack;
    }
}

// `a * gelu(b)` of the halves of each row; `width` is that of a half.
template <typename T, int N> __device__ void geglu(const T *x, T *y, unsigned count, unsigned width) {
    for (unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * N; i < count; i += gridDim.x * blockDim.x * N) {
        unsigned row = i / width, column = i % width;
        const T *from = x + (size_t)row * 2 * width + column;
        Pack<T, N> a = *(const Pack<T, N> *)from, b = *(const Pack<T, N> *)(from + width);
        for (int n = 0; n < N; n++) {
            float gate = widen(b.at[n]);
            // The gate is rounded as a tensor of its own would be.
            T rounded;
            narrow(0.5f * gate * (1.0f + erff(gate * 0.70710678f)), &rounded);
            narrow(widen(a.at[n]) * widen(rounded), &a.at[n]);
        }
        *(Pack<T, N> *)(y + i) = a;
    }
}

// `x` plus rows of `s`, `lanes` long: each of the `count` rows in turn for `inner` numbers.
template <typename T, int N>
__device__ void add_repeated(const T *x, const T *s, T *y, unsigned total, unsigned inner, unsigned count,
                             unsigned lanes) {
    for (unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * N; i < total; i += gridDim.x * blockDim.x * N) {
        Pack<T, N> pack = *(const Pack<T, N> *)(x + i);
        const T *row = s + (i / inner) % count * lanes;
        if (lanes == 1) {
            float other = widen(row[0]);
            for (int n = 0; n < N; n++) narrow(widen(pack.at[n]) + other, &pack.at[n]);
        } else {
            Pack<T, N> other = *(const Pack<T, N> *)(row + i % lanes);
            for (int n = 0; n < N; n++) narrow(widen(pack.at[n]) + widen(other.at[n]), &pack.at[n]);
        }
        *(Pack<T, N> *)(y + i) = pack;
    }
}

// Softmax of rows of `width`, one block each.
template <typename T, typename U, int N> __device__ void softmax(const T *x, U *y, unsigned width) {
    __shared__ float scratch[32];
    x += (size_t)blockIdx.x * width;
    y += (size_t)blockIdx.x * width;
    float most = -1e38f, sum = 0;
    for (unsigned i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        Pack<T, N> pack = *(const Pack<T, N> *)(x + i);
        float here = most;
        for (int n = 0; n < N; n++) here = fmaxf(here, widen(pack.at[n]));
        sum *= __expf(most - here);
        most = here;
        for (int n = 0; n < N; n++) sum += __expf(widen(pack.at[n]) - most);
    }
    float all = most_of_block(most, scratch);
    sum = sum_of_block(sum * __expf(most - all), scratch);
    float scale = 1.0f / sum;
    for (unsigned i = threadIdx.x * N; i < width; i += blockDim.x * N) {
        Pack<T, N> pack = *(const Pack<T, N> *)(x + i);
        Pack<U, N> out;
        for (int n = 0; n < N; n++) narrow(__expf(widen(pack.at[n]) - all) * scale, &out.at[n]);
        *(Pack<U, N> *)(y + i) = out;
    }
}

// (b, m, n) to (b, n, m), a tile of 32 x 32 at a time.
template <typename T> __device__ void swap(const T *x, T *y, unsigned m, unsigned n) {
    __shared__ T tile[32][33];
    x += (size_t)blockIdx.z * m * n;
    y += (size_t)blockIdx.z * m * n;
    unsigned column = blockIdx.x * 32 + threadIdx.x, row = blockIdx.y * 32 + threadIdx.y;
    for (unsigned i = 0; i < 32; i += 8)
        if (column < n && row + i < m) tile[threadIdx.y + i][threadIdx.x] = x[(size_t)(row + i) * n + column];
    __syncthreads();
    column = blockIdx.y * 32 + threadIdx.x, row = blockIdx.x * 32 + threadIdx.y;
    for (unsigned i = 0; i < 32; i += 8)
        if (column < m && row + i < n) y[(size_t)(row + i) * m + column] = tile[threadIdx.x][threadIdx.y + i];
}

// (b, m, n, d) to (b, n, m, d).
template <typename T, int N>
__device__ void swap_middle(const T *x, T *y, unsigned total, unsigned m, unsigned n, unsigned d) {
    for (unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * N; i < total; i += gridDim.x * blockDim.x * N) {
        unsigned run = i / d, row = run / m;
        unsigned from = (row / n * m + run % m) * n + row % n;
        *(Pack<T, N> *)(y + i) = *(const Pack<T, N> *)(x + (size_t)from * d + i % d);
    }
}

#define OF_PACK(T, N)                                                                                                  \
    extern "C" __global__ void group_sums_##T##_##N(const T *x, float *sums, unsigned length, unsigned part) {         \
        group_sums<T, N>(x, sums, length, part);                                                                       \
    }                                                                                                                  \
    extern "C" __global__ void group_apply_##T##_##N(const T *x, const T *weight, const T *bias, const float *sums,    \
                                                     T *y, unsigned length, unsigned part, unsigned spatial,          \
                                                     unsigned groups, float eps, int silu) {                           \
        group_apply<T, N>(x, weight, bias, sums, y, length, part, spatial, groups, eps, silu);                         \
    }                                                                                                                  \
    extern "C" __global__ void geglu_##T##_##N(const T *x, T *y, unsigned count, unsigned width) {                     \
        geglu<T, N>(x, y, count, width);                                                                               \
    }                                                                                                                  \
    extern "C" __global__ void add_repeated_##T##_##N(const T *x, const T *s, T *y, unsigned total, unsigned inner,    \
                                                      unsigned count, unsigned lanes) {                                \
        add_repeated<T, N>(x, s, y, total, inner, count, lanes);                                                       \
    }                                                                                                                  \
    extern "C" __global__ void softmax_##T##_##T##_##N(const T *x, T *y, unsigned width) {                             \
        softmax<T, T, N>(x, y, width);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void swap_middle_##T##_##N(const T *x, T *y, unsigned total, unsigned m, unsigned n,         \
                                                     unsigned d) {                                                     \
        swap_middle<T, N>(x, y, total, m, n, d);                                                                       \
    }

#define OF_TYPE(T, N)                                                                                                  \
    OF_PACK(T, 1)                                                                                                      \
    OF_PACK(T, N)                                                                                                      \
    extern "C" __global__ void swap_##T(const T *x, T *y, unsigned m, unsigned n) { swap<T>(x, y, m, n); }

#define NARROWED(T, N)                                                                                                 \
    extern "C" __global__ void softmax_float_##T##_##N(const float *x, T *y, unsigned width) {                         \
        softmax<float, T, N>(x, y, width);                                                                             \
    }

OF_TYPE(float, 4)
OF_TYPE(f16, 8)
OF_TYPE(bf16, 8)
NARROWED(f16, 1)
NARROWED(f16, 4)
NARROWED(bf16, 1)
NARROWED(bf16, 4)
