"""The stages of a triple for a tile of pairs: pair functions, normalizations, pointwise losses and
their derivatives. The same numerics as csrc/stages.h.

All functions are element by element, in float32 or float64. `HOW` (choices.Choices) picks a stage
when the kernel is compiled. NaN passes through: comparisons with it are false, and maximum and
minimum, which may swallow it, are not used.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from .configs import INTERPRETED

FUSED = tl.constexpr(not INTERPRETED)


@triton.jit
def at_least(x, low):
    return tl.where(x < low, low, x)


@triton.jit
def zero_unless_finite(x):
    """For items that take part in nothing: their share of a sum is 0 times what they hold."""
    return tl.where(x - x == 0, x, 0.0).to(x.dtype)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))


@triton.jit
def of_directions(x, dim):
    """Of a direction in `dim` dimensions, or of the cosine of two: in a single one there is but the
    sign, and 1 / |x|, rounded, must not make opposite items almost opposite."""
    return tl.where(dim == 1, sign(x), x)


@triton.jit
def quotient(a, b, HOW: tl.constexpr):
    """a / b rounded correctly, so that a / a is 1."""
    if HOW.double:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def multiply_add(a, b, c, HOW: tl.constexpr):
    """a b + c, rounded once."""
    if FUSED:
        return tl.fma(a, b, c)
    else:
        # Triton's interpreter would round a b
        wide = a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)
        return wide.to(HOW.number)


@triton.jit
def difference_of_products(a, x, b, y, HOW: tl.constexpr):
    """a x - b y to 1.5 units in its own last place (Kahan), however nearly the two agree."""
    product = b * y
    return multiply_add(a, x, -product, HOW) - multiply_add(b, y, -product, HOW)


@triton.jit
def log_ratio(a, b):
    """log(a / b) of positive a and b, which keeps its digits where they nearly agree.

    With z = (a - b) / (a + b) it is 2 atanh(z), and a - b is exact where b / 2 <= a <= 2 b.
    """
    z = (a - b) / (a + b)
    square = z * z
    # of 2 atanh(z) = 2 z (1 + z^2 / 3 + z^4 / 5 + ...), enough terms for |z| <= 1/8 in float64
    series = 1.0 + square * 0.0
    for k in tl.static_range(9):
        series = series * square * ((2.0 * (8 - k) + 1.0) / (2.0 * (8 - k) + 3.0)) + 1.0
    return tl.where(tl.abs(z) <= 0.125, 2.0 * z * series, tl.log(a / b))


@triton.jit
def exponential_series(z, ORDER: tl.constexpr):
    """1 + z (1 + z/2 (1 + z/3 (...))), the Taylor series of exp up to z^ORDER."""
    series = 1.0 + z * 0.0
    for p in tl.static_range(ORDER):
        series = 1.0 + series * z * (1.0 / (ORDER - p))
    return series


@triton.jit
def integer_power(x, EXPONENT: tl.constexpr):
    result = 1.0 + x * 0.0
    for _ in tl.static_range(EXPONENT):
        result = result * x
    return result


@triton.jit
def pair_argument(g, query_norm, key_norm, HOW: tl.constexpr):
    """What a pair function takes, and what is held of a pair: g, or the square of a distance."""
    if HOW.distance:
        return at_least(query_norm + key_norm - (g + g), 0.0)
    else:
        return g


@triton.jit
def pair_value(argument, scale, offset, eps, HOW: tl.constexpr):
    """The affinity of a pair, or the argument of a function of g."""
    if HOW.pair == "distance":
        value = tl.sqrt(at_least(argument, eps))
    elif HOW.pair == "gaussian":
        value = tl.exp(-scale * argument)
    elif HOW.pair == "taylor":
        value = scale * argument
    elif HOW.pair == "power":
        value = scale * argument + offset
    else:
        value = argument
    return value


@triton.jit
def cosine_of(argument, HOW: tl.constexpr):
    """Of two directions, the argument of whose pair function is known."""
    if HOW.distance:
        return 1.0 - 0.5 * argument
    else:
        return argument


@triton.jit
def affinity_of(value, scale, offset, HOW: tl.constexpr):
    """A of a value, before any clamp."""
    order: tl.constexpr = HOW.order
    if HOW.pair == "taylor":
        return tl.exp(-scale) * exponential_series(value, order)
    elif HOW.pair == "power":
        return integer_power(value, order)
    elif HOW.pair == "linear":
        return scale * value + offset
    else:
        return value


@triton.jit
def affinity_slope(value, scale, eps, HOW: tl.constexpr):
    """dA / dg of a value (but for the factor of a linear function), or dA / dsq."""
    order: tl.constexpr = HOW.order
    if HOW.pair == "distance":
        far = value > tl.sqrt(eps)
        slope = tl.where(far, 0.5 / tl.where(far, value, 1.0), 0.0)
    elif HOW.pair == "gaussian":
        slope = -scale * value
    elif HOW.pair == "taylor":
        if order > 0:
            slope = scale * tl.exp(-scale) * exponential_series(value, order - 1)
        else:
            slope = value * 0.0
    elif HOW.pair == "power":
        slope = scale * order * integer_power(value, order - 1)
    else:
        slope = value * 0.0 + 1.0
    return slope


@triton.jit
def normalized(affinity, first, second, inverse_tau, HOW: tl.constexpr):
    """P and, for a softmax, log P.

    `first` and `second` are terms of the entry's row: 1 / statistic and the statistic, or the peak
    of a softmax and log sum exp((A - peak) / tau). The difference from the peak comes first: it is
    exact near the peak, however large the affinities are.
    """
    if HOW.softmax:
        log_p = (affinity - first) * inverse_tau - second
        return tl.exp(log_p), log_p
    elif HOW.normalization == "none":
        return affinity, affinity
    elif HOW.kinked:
        return quotient(affinity, second, HOW), affinity
    else:
        return affinity * first, affinity


@triton.jit
def normalized_difference(a, b, s, t, first, other_first, HOW: tl.constexpr):
    """s - t of affinities a and b, of which `first` and `other_first` make s and t.

    Where P and T nearly agree, as with a common offset of all features, the rounding of s and of t
    is a share of their difference that c, made of the affinities, would not take out.
    """
    if HOW.exact_difference:
        return difference_of_products(a, first, b, other_first, HOW)
    else:
        return s - t


@triton.jit
def log_difference(s, log_s, t, log_t, eps, HOW: tl.constexpr):
    """log t - log s; outside a softmax both are guarded by eps."""
    if HOW.softmax:
        return log_t - log_s
    else:
        return log_ratio(t + eps, s + eps)


@triton.jit
def loss_value(difference, s, log_s, t, log_t, beta, eps, balanced, HOW: tl.constexpr):
    """l(s, t), of `difference` s - t.

    `balanced` is 1 where s and t both sum to 1 along the row, else 0. There a divergence may add
    s - t, which sums to 0: every term then vanishes to second order, and nothing is left of the
    rounding of the two normalizations, which for s close to t is larger than the loss.
    """
    if HOW.loss == "mse":
        loss = difference * difference
    elif HOW.loss == "l1":
        loss = tl.abs(difference)
    elif HOW.loss == "smooth_l1":
        size = tl.abs(difference)
        small = size < beta
        quadratic = 0.5 * difference * difference / tl.where(small, beta, 1.0)
        loss = tl.where(small, quadratic, size - 0.5 * beta)
    elif HOW.loss == "cross_entropy":
        loss = -t * log_s
    else:
        logs = log_difference(s, log_s, t, log_t, eps, HOW)
        if HOW.loss == "kl_forward":
            loss = t * logs + balanced * difference
        elif HOW.loss == "kl_reverse":
            loss = -s * logs - balanced * difference
        else:
            loss = -difference * logs
    return loss


@triton.jit
def loss_slope(difference, s, log_s, t, log_t, beta, eps, HOW: tl.constexpr):
    """dl / ds; for a softmax s * dl / ds, in which no division is left."""
    if HOW.loss == "cross_entropy":
        return -t
    elif HOW.divergence:
        if HOW.softmax:
            forward = -t
            reverse = s * (1.0 - log_difference(s, log_s, t, log_t, eps, HOW))
        else:
            forward = -t / (s + eps)
            reverse = s / (s + eps) - log_difference(s, log_s, t, log_t, eps, HOW)
        if HOW.loss == "kl_forward":
            return forward
        elif HOW.loss == "kl_reverse":
            return reverse
        else:
            return forward + reverse
    else:
        if HOW.loss == "mse":
            slope = difference + difference
        elif HOW.loss == "l1":
            slope = sign(difference)
        else:
            small = tl.abs(difference) < beta
            slope = tl.where(small, difference / tl.where(small, beta, 1.0), sign(difference))
        if HOW.softmax:
            slope = slope * s
        return slope


@triton.jit
def statistic_slope(affinity, p, first, second, HOW: tl.constexpr):
    """u = d statistic / dA up to a constant of the row."""
    if HOW.softmax:
        return p
    elif HOW.l2:
        return affinity * first
    elif HOW.normalization == "row_l1":
        return sign(affinity)
    elif HOW.normalization == "mean_positive":
        return tl.where(affinity > 0, 1.0, 0.0).to(affinity.dtype)
    elif HOW.largest:
        return tl.where(affinity == second, 1.0, 0.0).to(affinity.dtype)
    else:
        return affinity * 0.0 + 1.0
