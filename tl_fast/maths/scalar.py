"""Scalar maths of the decode pipeline, written once for every backend.

Plain functions of scalars: `numba.njit` compiles them for the CPU and `numba.cuda` as device functions (see
`tl_fast.maths.compile.compile_scalar`); called undecorated they are their own slow reference. Nothing here allocates,
loops over pixels or knows a backend. What both backends use works in `real`: float64 on the CPU, float32 on the GPU. It
casts integers to `real` before it mixes them with floats, since numba makes float64 of an integer and a float32.
"""

from __future__ import annotations

import math

import numpy as np

real = float  # np.float32, like every constant, in the copies for the GPU

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_PHILOX_M0 = np.uint64(0xD2511F53)
_PHILOX_M1 = np.uint64(0xCD9E8D57)
_PHILOX_W0 = np.uint64(0x9E3779B9)
_PHILOX_W1 = np.uint64(0xBB67AE85)

# The last counter word says what a draw is for, so that no two uses share random numbers.
DRAW_FLIP = np.uint64(0)
DRAW_CROP = np.uint64(1)  # tries 0..9 use words 1..10
DRAW_INTERPOLATION = np.uint64(16)
DRAW_NOISE = np.uint64(17)
DRAW_JITTER = np.uint64(20)  # and 21
DRAW_LAYER = np.uint64(32)  # RandAugment's layer n uses words 32 + 2 n and the one after it
DRAW_ERASE = np.uint64(64)  # whether; tries 0..9 use words 65..74
DRAW_SCALE = np.uint64(128)  # of segmentation
DRAW_DISTORT = np.uint64(129)  # and 130, 131
DRAW_SEGMENT_CROP = np.uint64(256)  # try n uses word 256 + n
DRAW_ORDER = np.uint64(1 << 16)
DRAW_MIX_BOX = np.uint64(1 << 17)
DRAW_MIXUP = np.uint64(1 << 18)

CROP_TRIES = 10
ERASE_TRIES = 10

BILINEAR, BICUBIC = 0, 1
PRECISION = 22  # bits behind the point of a resize's weights, as Pillow has them

ROI_SLACK = 1e-4  # of `roi_samples`, for bins of rotated crops, whose extent is a square root

# RandAugment's operations, in timm's order.
NO_OP = -1
AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS = (
    range(11)
)
SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(11, 15)
OP_COUNT = 15
# mmsegmentation's photometric operations, behind the fifteen that RandAugment draws from. Arguments: grey levels added,
# factor of HSV's saturation, degrees that the hue is turned by (mmsegmentation's hue_delta counts in 2 degrees).
ADD, SATURATE, HUE = 15, 16, 17
LEVELS = 10.0  # a level of 10 is an operation's full strength


def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011, Random123): counter words `c0..c3`, key words `k0, k1` -> four random words.

    All arguments and results are uint64 that hold 32-bit words.
    """
    for _ in range(10):
        p0 = _PHILOX_M0 * c0
        p1 = _PHILOX_M1 * c2
        c0 = (p1 >> _HALF) ^ c1 ^ k0
        c1 = p1 & _MASK
        c2 = (p0 >> _HALF) ^ c3 ^ k1
        c3 = p0 & _MASK
        k0 = (k0 + _PHILOX_W0) & _MASK
        k1 = (k1 + _PHILOX_W1) & _MASK
    return c0, c1, c2, c3


def draw4(seed, epoch, identity, draw):
    """Four random words of one draw: key = seed (64 bits), counter = (identity low, identity high, epoch, draw).

    `identity` (uint64) is the sample id, or the step for batch-level draws; all arguments uint64.
    """
    return philox4x32(identity & _MASK, identity >> _HALF, epoch & _MASK, draw, seed & _MASK, seed >> _HALF)


def unit(word):
    """A 32-bit word -> float64 in the open interval (0, 1)."""
    return (float(word) + 0.5) * (1.0 / 4294967296.0)


def below(word, n):
    """A 32-bit word -> int64 in [0, n), n >= 1 (Lemire's multiply-shift; the bias is below n / 2**32)."""
    return np.int64((word * np.uint64(n)) >> _HALF)


def random_resized_crop(seed, epoch, sample_id, height, width, scale_low, scale_high, log_ratio_low, log_ratio_high):
    """Random resized crop of an image of `height` x `width` pixels -> int64 (top, left, crop height, crop width) in
    pixels.

    The same distribution as torchvision's `RandomResizedCrop.get_params`: area uniform in [scale_low, scale_high],
    aspect ratio log-uniform, ten tries, then the central crop with the nearest allowed ratio. Ratios are given as
    natural logarithms.
    """
    area = float(height) * float(width)
    for attempt in range(CROP_TRIES):
        r0, r1, r2, r3 = draw4(seed, epoch, sample_id, DRAW_CROP + np.uint64(attempt))
        target_area = area * (scale_low + (scale_high - scale_low) * unit(r0))
        ratio = math.exp(log_ratio_low + (log_ratio_high - log_ratio_low) * unit(r1))
        w = np.int64(math.floor(math.sqrt(target_area * ratio) + 0.5))
        h = np.int64(math.floor(math.sqrt(target_area / ratio) + 0.5))
        if 0 < w <= width and 0 < h <= height:
            return below(r2, height - h + 1), below(r3, width - w + 1), h, w
    low = math.exp(log_ratio_low)
    high = math.exp(log_ratio_high)
    w = np.int64(width)
    h = np.int64(height)
    if float(width) < low * float(height):
        h = np.int64(math.floor(float(width) / low + 0.5))
    elif float(width) > high * float(height):
        w = np.int64(math.floor(float(height) * high + 0.5))
    return (np.int64(height) - h) // 2, (np.int64(width) - w) // 2, h, w


def normal(word0, word1):
    """Two 32-bit words -> a float64 of the standard normal distribution (Box and Muller)."""
    return math.sqrt(-2.0 * math.log(unit(word0))) * math.cos(2.0 * math.pi * unit(word1))


def level_argument(op, level, increasing, negate):
    """timm's argument of an operation at `level` (0 to 10, or more): degrees, bits kept, threshold, addend, factor,
    shear or share of the side.

    negate: take the mirrored direction, where there is one. Operations without an argument get 0.
    """
    if op == ROTATE:
        value = level / LEVELS * 30.0
    elif op == POSTERIZE:
        bits = float(int(level / LEVELS * 4.0))
        return 4.0 - bits if increasing else bits
    elif op == SOLARIZE:
        threshold = float(min(256, int(level / LEVELS * 256.0)))
        return 256.0 - threshold if increasing else threshold
    elif op == SOLARIZE_ADD:
        return float(min(128, int(level / LEVELS * 110.0)))
    elif COLOR <= op <= SHARPNESS:
        if not increasing:
            return level / LEVELS * 1.8 + 0.1
        value = level / LEVELS * 0.9
        return max(0.1, 1.0 - value if negate else 1.0 + value)
    elif op == SHEAR_X or op == SHEAR_Y:
        value = level / LEVELS * 0.3
    elif op == TRANSLATE_X or op == TRANSLATE_Y:
        value = level / LEVELS * 0.45
    else:
        return 0.0
    return -value if negate else value


def rand_augment_layer(seed, epoch, sample_id, layer, probability, magnitude, std, ceiling, increasing):
    """One layer of timm's RandAugment -> (op, argument); NO_OP where the layer is left out. std: inf for a uniform
    level."""
    draw = DRAW_LAYER + np.uint64(2) * np.uint64(layer)
    r0, r1, r2, r3 = draw4(seed, epoch, sample_id, draw)
    sign = draw4(seed, epoch, sample_id, draw + np.uint64(1))[0]
    op = below(r0, OP_COUNT)
    if unit(r1) >= probability:
        return np.int64(NO_OP), 0.0
    level = magnitude
    if math.isinf(std):
        level = magnitude * unit(r2)
    elif std > 0.0:
        level = magnitude + std * normal(r2, r3)
    level = max(0.0, min(level, ceiling))
    return op, level_argument(op, level, increasing, unit(sign) > 0.5)


def geometric_step(op, argument, aspect):
    """A geometric operation as Pillow applies it to an output `aspect` times as wide as high: output -> input
    coordinates, each in shares of the output's side, (a, b, c, d, e, f) for x' = a x + b y + c, y' = d x + e y + f; the
    identity for all other operations. Rotation is about the centre, shear about the top left corner."""
    if op == ROTATE:
        cosine, sine = math.cos(math.radians(argument)), -math.sin(math.radians(argument))
        slant, rise = sine / aspect, sine * aspect
        return cosine, slant, 0.5 - 0.5 * cosine - 0.5 * slant, -rise, cosine, 0.5 + 0.5 * rise - 0.5 * cosine
    if op == SHEAR_X:
        return 1.0, argument / aspect, 0.0, 0.0, 1.0, 0.0
    if op == SHEAR_Y:
        return 1.0, 0.0, 0.0, argument * aspect, 1.0, 0.0
    if op == TRANSLATE_X:
        return 1.0, 0.0, argument, 0.0, 1.0, 0.0
    if op == TRANSLATE_Y:
        return 1.0, 0.0, 0.0, 0.0, 1.0, argument
    return 1.0, 0.0, 0.0, 0.0, 1.0, 0.0


def compose(a, b, c, d, e, f, op, argument, aspect):
    """The affine a..f after `geometric_step(op, argument, aspect)`: (x, y) -> affine(step(x, y))."""
    g, h, i, j, k, m = geometric_step(op, argument, aspect)
    return a * g + b * j, a * h + b * k, a * i + b * m + c, d * g + e * j, d * h + e * k, d * i + e * m + f


def erase_fractions(seed, epoch, sample_id, probability, area_low, area_high, log_ratio_low, log_ratio_high):
    """timm's random erasing (arXiv 1708.04896) -> (top, left, height, width) in 0..1, height 0 for none.

    height and width are shares of the output's sides, top and left of the room that the box leaves (`erase_box`).
    """
    if unit(draw4(seed, epoch, sample_id, DRAW_ERASE)[0]) < probability:
        for attempt in range(ERASE_TRIES):
            r0, r1, r2, r3 = draw4(seed, epoch, sample_id, DRAW_ERASE + np.uint64(1 + attempt))
            area = area_low + (area_high - area_low) * unit(r0)
            ratio = math.exp(log_ratio_low + (log_ratio_high - log_ratio_low) * unit(r1))
            height, width = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if height < 1.0 and width < 1.0:
                return unit(r2), unit(r3), height, width
    return 0.0, 0.0, 0.0, 0.0


def erase_box(share, room, size):
    """One side of an erased box in an output of `size` pixels -> (first, length). share: of the side that it covers;
    room: of the pixels left over, how large a share lies before it."""
    length = int(math.floor(share * size + 0.5))
    length = min(length, size - 1) if share > 0.0 else 0
    # A room below 1 may have become 1 when it was kept as float32.
    return min(int(math.floor(room * (size - length + 1))), size - length), length


def filter_support(box_extent, out_size, interpolation):
    """Half-width in source pixels of Pillow's antialiased filters: 1 (bilinear) or 2 (bicubic) times max(scale, 1)."""
    return max(real(box_extent) / real(out_size), 1.0) * (2.0 if interpolation == BICUBIC else 1.0)


def filter_centre(i, box_start, box_extent, out_size):
    """Middle of output pixel `i` in source pixels when `box_start .. box_start + box_extent` maps to `out_size`
    pixels."""
    return box_start + (real(i) + 0.5) * (real(box_extent) / real(out_size))


def filter_range(i, box_start, box_extent, out_size, in_size, interpolation):
    """Source pixels [first, last) that output pixel `i` reads when `box_start .. box_start + box_extent` maps to
    `out_size` pixels.

    Pillow's rule (`precompute_coeffs`): the window is clipped to the image, not to the box.
    """
    support = filter_support(box_extent, out_size, interpolation)
    centre = filter_centre(i, box_start, box_extent, out_size)
    first = max(int(centre - support + 0.5), 0)
    last = min(int(centre + support + 0.5), in_size)
    return first, last


def kernel(distance, interpolation):
    """Weight at `distance` >= 0 in output pixels: a triangle, or Keys' cubic with a = -0.5, as Pillow's resize has
    them."""
    if interpolation == BICUBIC:
        if distance < 1.0:
            return (1.5 * distance - 2.5) * distance * distance + 1.0
        if distance < 2.0:
            return (((distance - 5.0) * distance + 8.0) * distance - 4.0) * -0.5
        return 0.0
    return max(1.0 - distance, 0.0)


def cubic_weights(d):
    """Weights of the four pixels around a point `d` (0..1) behind the second of them: Keys' cubic with a = -1, as
    Pillow's transform has it."""
    square, cube = d * d, d * d * d
    return 2.0 * square - cube - d, 1.0 - 2.0 * square + cube, d + square - cube, cube - square


def filter_weight(x, i, box_start, box_extent, out_size, interpolation):
    """Unnormalised weight of source pixel `x` for output pixel `i` (arguments as in `filter_range`)."""
    scale = max(real(box_extent) / real(out_size), 1.0)
    return kernel(abs((real(x) - filter_centre(i, box_start, box_extent, out_size) + 0.5) / scale), interpolation)


def chroma_range(start, stop, size):
    """Chroma samples (first, the one behind the last) that pixels `start` to `stop` (exclusive) of `size` are upsampled
    from, along one axis of YUV 4:2:0 planes: their own and one beyond on each side. Integers, or arrays of them."""
    behind = (stop + 1) >> 1
    return (start >> 1) - (start > 1), behind + (behind < (size + 1) >> 1)


def chroma_neighbour(pixel, size):
    """The second nearest chroma sample of a pixel along one axis of `size` pixels, int32. The nearest one is
    pixel >> 1; at the image's edge both are the same. libjpeg smooths chroma of at least `ycbcr.SMOOTHED` columns."""
    return min(max(np.int32((pixel >> 1) - 1 + ((pixel & 1) << 1)), np.int32(0)), np.int32(((size + 1) >> 1) - 1))


def chroma_mix(near, other):
    """Chroma at a pixel, times 4, from the samples or sums nearest and second nearest to it along one axis; int32."""
    return np.int32(3 * np.int32(near) + np.int32(other))


def chroma_of(sums, column):
    """Chroma at a pixel of column `column`, from the `chroma_mix` along both axes; int32. libjpeg's triangle filter
    ("fancy" upsampling, jdsample.c), whose rounding alternates."""
    return np.int32(np.int32(sums + (8 - (column & 1))) >> 4)


def channel_of(luma, colour):
    """Y plus a colour difference, times 2**16 -> a channel, 0..255, int32; rounded and clamped as in jdcolor.c."""
    return min(max(np.int32(luma + (np.int32(colour + 32768) >> 16)), np.int32(0)), np.int32(255))


def rgb_of(luma, blue, red):
    """RGB of a pixel in JPEG's YCbCr (full-range BT.601), int32, as libjpeg's jdcolor.c has it, to the bit."""
    blue, red = np.int32(blue - 128), np.int32(red - 128)
    return (
        channel_of(luma, np.int32(91881 * red)),  # 1.402 * 2**16, and so on
        channel_of(luma, np.int32(-22554 * blue - 46802 * red)),
        channel_of(luma, np.int32(116130 * blue)),
    )


def luma(red, green, blue):
    """Pillow's 8-bit grey of three int64 channels (ITU-R 601-2)."""
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


def product(a, b):
    """a * b in float32, rounded before anything is added. On the GPU another function takes its place, which the
    compiler does not fuse with a sum."""
    return a * b


def blend(degenerate, value, factor):
    """Pillow's Image.blend of two integer grey values, float32 `factor`: truncated to 0..255, int32."""
    mixed = np.float32(degenerate) + product(factor, np.float32(np.int32(value - degenerate)))
    return np.int32(min(max(mixed, np.float32(0.0)), np.float32(255.0)))


def added(value, addend):
    """A grey value (integer) and a float32, added: truncated to 0..255, int32."""
    return np.int32(min(max(np.float32(value) + addend, np.float32(0.0)), np.float32(255.0)))


def curve(op, argument, value):
    """The grey value (int64, 0..255) that a pointwise operation makes of `value`; other operations leave it."""
    if op == INVERT:
        return 255 - value
    if op == POSTERIZE:
        bits = np.int64(argument)
        return value if bits >= 8 else value >> (8 - bits) << (8 - bits)
    if op == SOLARIZE:
        return value if real(value) < argument else 255 - value
    if op == SOLARIZE_ADD:
        return min(255, value + np.int64(argument)) if value < 128 else value
    if op == BRIGHTNESS:
        return blend(np.int64(0), value, np.float32(argument))
    if op == ADD:
        return added(value, np.float32(argument))
    return value


def nearest_pixel(i, j, rows, columns, along, across, start):
    """The source pixel, counted along one axis, under the centre of pixel (i, j) of an output of rows x columns pixels;
    negative or too large outside the source.

    along, across, start: float32, the axis' part of an affine: x = along u + across v + start, u and v in 0..1. Every
    backend computes in float32 and rounds every step, so all find the same pixel.
    """
    u = (np.float32(j) + np.float32(0.5)) / np.float32(columns)
    v = (np.float32(i) + np.float32(0.5)) / np.float32(rows)
    return int(math.floor(product(along, u) + product(across, v) + start))


def changes_colours(op):
    """False for NO_OP and for the operations that move pixels."""
    return (AUTO_CONTRAST <= op <= SHARPNESS and op != ROTATE) or ADD <= op <= HUE


def to_grey(value):
    """A float32 in 0..255 -> int32, rounded, halves up."""
    return np.int32(value + np.float32(0.5))


def saturated(red, green, blue, factor):
    """The saturation of HSV times `factor` >= 0, clipped at 1, hue and value kept: float32 channels 0..255 -> the same,
    int32.

    The distance of a channel to the highest one grows by `factor`, as far as the lowest channel can follow.
    """
    high, low = max(max(red, green), blue), min(min(red, green), blue)
    factor = min(factor, high / max(high - low, np.float32(1.0)))
    return (
        to_grey(high - product(factor, high - red)),
        to_grey(high - product(factor, high - green)),
        to_grey(high - product(factor, high - blue)),
    )


def sextants(degrees):
    """An angle -> the same one in units of 60 degrees, in -3..3; both float32, on every backend."""
    turns = degrees / np.float32(360.0)
    return np.float32(6.0) * (turns - np.float32(math.floor(turns + np.float32(0.5))))


def turned(red, green, blue, turn):
    """The hue of HSV turned by `turn` (of `sextants`), saturation and value kept: float32 channels 0..255 -> the same,
    int32.

    The hue is counted in sextants times `span`, the highest channel less the lowest: so nothing is divided, and a grey
    pixel, which has no hue, stays.
    """
    high, low = max(max(red, green), blue), min(min(red, green), blue)
    span = high - low
    hue = (red - green) - (span + span)
    hue = (blue - red) + (span + span) if high == green else hue
    hue = green - blue if high == red else hue
    hue += product(turn, span)
    whole, half = np.float32(6.0) * span, np.float32(3.0) * span
    hue = hue - whole if hue > half else hue
    hue = hue + whole if hue < -half else hue
    # A channel is highest within a sextant of its own hue, lowest beyond two, and linear in between.
    from_green, from_blue = abs(hue + span), abs(hue - span)
    return (
        to_grey(high - min(max(abs(hue) - span, np.float32(0.0)), span)),
        to_grey(high - min(max(max(span + span - from_green, from_green - (half + span)), np.float32(0.0)), span)),
        to_grey(high - min(max(max(span + span - from_blue, from_blue - (half + span)), np.float32(0.0)), span)),
    )


def round53(n):
    """A positive integer rounded to 53 significant bits (to the nearest, halves to even), as float64 would."""
    bits = 0
    while n >> (53 + bits):
        bits += 1
    return (n + (1 << (bits - 1)) - 1 + (n >> bits & 1)) >> bits << bits if bits else n


def stretch(value, low, high):
    """Pillow's autocontrast: `low` becomes 0, `high` 255; an image of one value stays. All int64, 0..255.

    Pillow computes int(value * s - low * s) with s = 255.0 / (high - low) in double precision, whose rounding shows
    where the exact result is whole. The GPU shall do without double precision, so the same three roundings are done
    here in integers, in units of 2**-shift.
    """
    if high <= low:
        return value
    if value <= low:
        return value - value
    span = high - low
    shift = 52
    while span << (53 - shift) <= 255:
        shift -= 1
    scale = (255 << shift) // span
    twice = 2 * ((255 << shift) - scale * span)
    if twice > span or (twice == span and scale & 1):
        scale += 1
    return min(round53(round53(value * scale) - round53(low * scale)) >> shift, 255)


def rounded_mean(total, count):
    """The sum `total` of `count` grey values -> their mean, halves rounded up. In integers; Pillow's double precision
    gives the same for any image."""
    return (2 * total + count) // (2 * count)


def smoothed(around, here):
    """Pillow's SMOOTH filter of a pixel `here` whose eight neighbours sum to `around`: the mean with weights 1 and 5,
    rounded (never at a half)."""
    return (2 * (around + 5 * here) + 13) // 26


def roi_samples(extent, bins, slack):
    """RoIAlign's adaptive number of sampling points per bin along one axis; `extent` in cells (at least 1), `bins`
    output bins.

    The division is float32's on every backend, as torchvision's. slack: how far above a whole number the quotient still
    counts as that number; 0, but for an `extent` computed in steps that backends round differently.
    """
    return max(int(math.ceil(np.float32(extent) / np.float32(bins) - np.float32(slack))), 1)


def roi_point(i, s, start, extent, bins, samples):
    """Coordinate in cells of sampling point `s` of bin `i` along one axis (torchvision's `roi_align`)."""
    size = extent / real(bins)
    return start + real(i) * size + (real(s) + 0.5) * size / real(samples)


def roi_tap(point, cells):
    """Linear interpolation at `point` along an axis of `cells` cells -> (low cell, weight of low, weight of low + 1).

    torchvision's `roi_align`: zero beyond one cell outside, clamped to the border cells inside that.
    """
    if point < -1.0 or point > real(cells):
        return 0, 0.0, 0.0
    point = max(point, 0.0)
    low = int(point)
    if low >= cells - 1:
        return cells - 1, 1.0, 0.0
    return low, 1.0 - (point - real(low)), point - real(low)


def roi_outside(point, cells):
    """True for a sampling point beyond the map's edge; RoIAlign itself repeats the border cell for half a cell more."""
    return point < -0.5 or point > real(cells) - 0.5


def smooth(p, smoothing, num_classes):
    """Label smoothing of the published code: p * (1 - s + s / C) + s / C."""
    off = smoothing / real(num_classes)
    return p * (1.0 - smoothing + off) + off
