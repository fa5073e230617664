/* A layer of SDCNv3 after its product p = W x, and its gradient; sdcnv3.py has the same in torch.

       out = keep * (y * g + x),  g = [c + b1, c * relu(n) + b2]
       c   = BatchNorm(p) = factor * (p - mean) + shift,  n = LayerNorm(c) = w * (c - its mean) * rstd + s

   One pass over the rows. A row is one head of an impression: K numbers of p, 2K of x, y and out. Row r is of head
   (first + r) % heads; mean, factor and shift have one number for each head. `y` is x_1; in the deep tower it is null,
   and x is used. Unless `dropped` is 0, a number of out is dropped if the lower 15 of its 16 random bits are below
   `dropped`, and the kept ones are multiplied by `scale`. The bits are those of `random_bits` in layers.py, where row
   `first` has the number `before` + first. `real` is float or double (cross_step.py).
   The compiler can vectorise the loops: flags are constants, and each array has a pointer of its own. */

#include <math.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define KEEP(i) (masked ? ((bits[i] & 32767) >= dropped ? scale : 0) : 1)

/* splitmix64's output after `number` steps from `seed`. */
INLINE uint64_t random_at(uint64_t seed, uint64_t number) {
  uint64_t z = seed + (number + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

/* By head, added to what is there: the sum of (p - mean) to the power of one or two. */
void cross_moment(long first, long rows, long heads, long K, int power, const real *p, const double *mean,
                  double *moment) {
  for (long r = 0; r < rows; r++) {
    const long h = (first + r) % heads;
    const real *q = p + r * K, centre = mean[h];
    real sum = 0;
    for (long k = 0; k < K; k++) sum += power == 1 ? q[k] - centre : (q[k] - centre) * (q[k] - centre);
    moment[h] += sum;
  }
}

/* c of a row, and of it the mean and one over the standard deviation. */
INLINE void normalise(long K, const real *restrict p, real centre, real factor, real shift, real eps, real *restrict c,
                      real *mean, real *rstd) {
  real sum = 0, squares = 0;
  for (long k = 0; k < K; k++) sum += c[k] = factor * (p[k] - centre) + shift;
  *mean = sum / K;
  for (long k = 0; k < K; k++) squares += (c[k] - *mean) * (c[k] - *mean);
  *rstd = 1 / (real)sqrt(squares / K + eps);
}

INLINE void forward_row(int deep, int masked, long K, const real *restrict c, real mean, real rstd,
                        const real *restrict x, const real *restrict y, const real *restrict bias,
                        const real *restrict w, const real *restrict s, const int16_t *restrict bits, int dropped,
                        real scale, real *restrict out) {
  for (long k = 0; k < K; k++) {
    const real n = (c[k] - mean) * rstd * w[k] + s[k];
    const real gate = c[k] + bias[k], masked_gate = c[k] * (n > 0 ? n : 0) + bias[K + k];
    out[k] = KEEP(k) * ((deep ? x[k] : y[k]) * gate + x[k]);
    out[K + k] = KEEP(K + k) * ((deep ? x[K + k] : y[K + k]) * masked_gate + x[K + k]);
  }
}

/* Writes grad_c, grad_x and, in the shallow tower, grad_y; adds to grad_bias, grad_w and grad_s. */
INLINE void backward_row(int deep, int masked, long K, const real *restrict grad, const real *restrict c, real mean,
                         real rstd, const real *restrict y, const real *restrict bias, const real *restrict w,
                         const real *restrict s, const int16_t *restrict bits, int dropped, real scale,
                         real *restrict grad_c, real *restrict grad_x, real *restrict grad_y,
                         real *restrict grad_bias, real *restrict grad_w, real *restrict grad_s) {
  real through[K], sum = 0, along = 0;
  for (long k = 0; k < K; k++) {
    const real normal = (c[k] - mean) * rstd, n = normal * w[k] + s[k], mask = n > 0 ? n : 0;
    const real a = KEEP(k) * grad[k], b = KEEP(K + k) * grad[K + k];
    const real gate = c[k] + bias[k], masked_gate = c[k] * mask + bias[K + k];
    grad_x[k] = deep ? a * (gate + 1) : a;
    grad_x[K + k] = deep ? b * (masked_gate + 1) : b;
    if (!deep) grad_y[k] = a * gate, grad_y[K + k] = b * masked_gate;
    const real grad_gate = a * y[k], grad_masked = b * y[K + k];
    grad_bias[k] += grad_gate;
    grad_bias[K + k] += grad_masked;
    const real grad_n = n > 0 ? grad_masked * c[k] : 0;
    grad_w[k] += grad_n * normal;
    grad_s[k] += grad_n;
    grad_c[k] = grad_gate + grad_masked * mask;
    through[k] = grad_n * w[k];
    sum += through[k];
    along += through[k] * normal;
  }
  for (long k = 0; k < K; k++) grad_c[k] += rstd * (through[k] - sum / K - (c[k] - mean) * rstd * (along / K));
}

/* The flags as constants: each pair gets loops of its own. */
#define ROW(row, ...)                            \
  do {                                           \
    if (y && dropped) row(0, 1, __VA_ARGS__);       \
    else if (y) row(0, 0, __VA_ARGS__);          \
    else if (dropped) row(1, 1, __VA_ARGS__);       \
    else row(1, 0, __VA_ARGS__);                 \
  } while (0)
/* Four numbers of a row share one of 64 bits; a row begins with a new one. */
#define DRAW                                            \
  const long numbers = (2 * K + 3) / 4;                 \
  uint64_t bits[numbers];                               \
  if (dropped)                                          \
    for (long i = 0; i < numbers; i++) bits[i] = random_at(seed, (before + first + r) * numbers + i);
#define AT(pointer) ((pointer) ? (pointer) + r * 2 * K : 0)

void cross_forward(long first, long rows, long heads, long K, const real *p, const real *x, const real *y,
                   const double *mean, const double *factor, const real *shift, const real *bias, const real *w,
                   const real *s, real eps, uint64_t seed, long before, int dropped, real scale, real *out) {
  for (long r = 0; r < rows; r++) {
    const long h = (first + r) % heads;
    real c[K], middle, rstd;
    normalise(K, p + r * K, mean[h], factor[h], shift[h], eps, c, &middle, &rstd);
    DRAW
    ROW(forward_row, K, c, middle, rstd, AT(x), AT(y), bias, w, s, (int16_t *)bits, dropped, scale, AT(out));
  }
}

/* By head, grad_shift gets the sum of grad_c, and grad_factor that of grad_c * (p - mean). */
void cross_backward(long first, long rows, long heads, long K, const real *p, const real *x, const real *y,
                    const double *mean, const double *factor, const real *shift, const real *bias, const real *w,
                    const real *s, real eps, uint64_t seed, long before, int dropped, real scale, const real *grad,
                    real *grad_c, real *grad_x, real *grad_y, double *grad_shift, double *grad_factor,
                    real *grad_bias, real *grad_w, real *grad_s) {
  for (long r = 0; r < rows; r++) {
    const long h = (first + r) % heads;
    const real *q = p + r * K, centre = mean[h], *factors = (y ? y : x) + r * 2 * K;
    real c[K], *gradient = grad_c + r * K, middle, rstd, sum = 0, along = 0;
    normalise(K, q, centre, factor[h], shift[h], eps, c, &middle, &rstd);
    DRAW
    ROW(backward_row, K, AT(grad), c, middle, rstd, factors, bias, w, s, (int16_t *)bits, dropped, scale, gradient,
        AT(grad_x), AT(grad_y), grad_bias, grad_w, grad_s);
    for (long k = 0; k < K; k++) sum += gradient[k], along += gradient[k] * (q[k] - centre);
    grad_shift[h] += sum;
    grad_factor[h] += along;
  }
}

/* grad_c becomes the gradient of p: factor * (grad_c - level - slope * (p - mean)). */
void cross_backward_norm(long first, long rows, long heads, long K, const real *p, const double *mean,
                         const double *factor, const double *level, const double *slope, real *grad_c) {
  for (long r = 0; r < rows; r++) {
    const long h = (first + r) % heads;
    const real *restrict q = p + r * K, a = factor[h], b = level[h], c = slope[h], centre = mean[h];
    real *restrict g = grad_c + r * K;
    for (long k = 0; k < K; k++) g[k] = a * (g[k] - b - c * (q[k] - centre));
  }
}
