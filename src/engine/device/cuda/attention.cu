// Attention that keeps its scores in registers (Dao et al. 2022, FlashAttention), for f16 or bf16 and tensor cores of
// compute capability 8.0 and later. In front of this text stand `WIDTH`, the width of a head rounded up to whole steps
// of 16, and `BRAIN`, 1 for bf16. A block of four warps has 64 queries of one head; keys come 64 at a time.

typedef unsigned short half_bits;

__device__ inline unsigned pair_of(float low, float high) {
    unsigned y;
#if BRAIN
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
    return y;
}

// c (16 x 8) += a (16 x 16) b (16 x 8).
__device__ inline void multiply(float *c, const unsigned *a, unsigned b0, unsigned b1) {
#if BRAIN
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// q (b, n, heads * width), k and v (b, m, heads * width) to y like q; `scale` holds the logarithm of e to the base 2.
extern "C" __global__ void __launch_bounds__(128)
    attention(const half_bits *q, const half_bits *k, const half_bits *v, half_bits *y, unsigned queries, unsigned keys,
              unsigned heads, unsigned width, float scale) {
    // The padding puts neighbouring rows into different banks.
    __shared__ __align__(16) half_bits of_k[64][WIDTH + 8], of_v[64][WIDTH + 8];
    const unsigned lane = threadIdx.x % 32, quad = lane / 4, pair = lane % 4 * 2;
    const unsigned row = blockIdx.x * 64 + threadIdx.x / 32 * 16 + quad;
    const size_t stride = (size_t)heads * width, head = blockIdx.y * width;
    q += (size_t)blockIdx.z * queries * stride + head;
    y += (size_t)blockIdx.z * queries * stride + head;
    k += (size_t)blockIdx.z * keys * stride + head;
    v += (size_t)blockIdx.z * keys * stride + head;

    unsigned of_q[WIDTH / 16][4];
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned at = row + i % 2 * 8, column = step * 16 + i / 2 * 8 + pair;
            of_q[step][i] = at < queries && column < width ? *(const unsigned *)(q + at * stride + column) : 0;
        }
    float out[WIDTH / 8][4] = {}, most[2] = {-1e30f, -1e30f}, sum[2] = {0, 0};
    for (unsigned first = 0; first < keys; first += 64) {
        __syncthreads();
        for (unsigned i = threadIdx.x; i < 64 * (WIDTH / 8); i += 128) {
            unsigned at = i / (WIDTH / 8), column = i % (WIDTH / 8) * 8;
            uint4 a = make_uint4(0, 0, 0, 0), b = a;
            if (first + at < keys && column < width) {
                a = *(const uint4 *)(k + (first + at) * stride + column);
                b = *(const uint4 *)(v + (first + at) * stride + column);
            }
            *(uint4 *)&of_k[at][column] = a;
            *(uint4 *)&of_v[at][column] = b;
        }
        __syncthreads();
        float scores[8][4] = {};
#pragma unroll
        for (int step = 0; step < WIDTH / 16; step++)
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const half_bits *at = &of_k[n * 8 + quad][step * 16 + pair];
                multiply(scores[n], of_q[step], *(const unsigned *)at, *(const unsigned *)(at + 8));
            }
        float now[2] = {most[0], most[1]};
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                bool there = first + n * 8 + pair + i % 2 < keys;
                scores[n][i] = there ? scores[n][i] * scale : -1e30f;
                now[i / 2] = fmaxf(now[i / 2], scores[n][i]);
            }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            now[half] = fmaxf(now[half], __shfl_xor_sync(0xffffffff, now[half], 1));
            now[half] = fmaxf(now[half], __shfl_xor_sync(0xffffffff, now[half], 2));
            float factor = exp2f(most[half] - now[half]);
            most[half] = now[half];
            sum[half] *= factor;
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++) {
                out[n][2 * half] *= factor;
                out[n][2 * half + 1] *= factor;
            }
        }
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scores[n][i] = exp2f(scores[n][i] - most[i / 2]);
                sum[i / 2] += scores[n][i];
            }
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const float *left = scores[2 * step], *right = scores[2 * step + 1];
            unsigned a[4] = {pair_of(left[0], left[1]), pair_of(left[2], left[3]), pair_of(right[0], right[1]),
                             pair_of(right[2], right[3])};
#pragma unroll
            for (int n = 0; n < WIDTH / 8; n++) {
                unsigned at = (unsigned)__cvta_generic_to_shared(&of_v[step * 16 + lane % 16][n * 8]), b0, b1;
                asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                             : "=r"(b0), "=r"(b1)
                             : "r"(at)
                             : "memory");
                multiply(out[n], a, b0, b1);
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 1);
        sum[half] += __shfl_xor_sync(0xffffffff, sum[half], 2);
        unsigned at = row + half * 8;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; n++) {
            unsigned column = n * 8 + pair;
            if (at < queries && column < width)
                *(unsigned *)(y + at * stride + column) =
                    pair_of(out[n][2 * half] / sum[half], out[n][2 * half + 1] / sum[half]);
        }
    }
}
