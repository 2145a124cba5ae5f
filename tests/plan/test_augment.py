"""What is drawn: RandAugment, colour jitter, interpolation and erasing as timm and torchvision draw them; the same for
any batch."""

import itertools
import random

import numpy as np
import pytest
import torch
from scipy import stats
from small_betons import write

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import ColorJitter

from tl_fast.labelmaps.format import MapSpec
from tl_fast.maths import scalar
from tl_fast.pipeline.loader import Loader
from tl_fast.plan import records as plan
from tl_fast.plan.rand_augment import MAX_LAYERS, OPS, RandAugment

RECIPE = plan.Augment(interpolation="random", auto_augment="rand-m9-mstd0.5-inc1", erase=0.25)
N = 20_000


def draw(n=N, seed=3, epoch=5, augment=RECIPE, height=375, width=500, aspect=1.0):
    return plan.draw(seed, epoch, np.arange(n), np.full(n, height), np.full(n, width), augment, aspect)


# --- the notation


STRINGS = [
    "rand",
    "rand-m9",
    "rand-m9-mstd0.5-inc1",
    "rand-n3-m9-mstd0.5-inc1",
    "rand-m15-mmax20-p0.3-n1",
    "rand-m7-mstd101",
    "rand-inc0-m5-p1",
    "rand-mstd1-n4-inc1-mmax30",
    "rand-m0-p0.0",
]


def our_name(theirs: str) -> str:
    return theirs.removesuffix("Increasing").removesuffix("Rel")


@pytest.mark.parametrize("text", STRINGS)
def test_strings_mean_what_they_mean_to_timm(text):
    ours, theirs = RandAugment.parse(text), auto_augment.rand_augment_transform(text, {})
    assert [our_name(op.name) for op in theirs.ops] == list(OPS)
    assert any(op.name.endswith("Increasing") for op in theirs.ops) == ours.increasing
    assert theirs.num_layers == ours.layers and theirs.choice_weights is None
    for op in theirs.ops:
        assert (op.magnitude, op.prob, op.magnitude_std) == (ours.magnitude, ours.probability, ours.std)
        assert (op.magnitude_max or 10) == ours.ceiling
    assert plan.Augment(auto_augment=text).rand_augment == ours


@pytest.mark.parametrize(
    "text, part",
    [
        ("augmix-m5", "augmix-m5"),
        ("original", "original"),
        ("RAND-m9", "RAND-m9"),
        ("rand-m", "'m'"),
        ("rand-m9.5", "m9.5"),
        ("rand-x3", "x3"),
        ("rand--m9", "''"),
        ("rand-m9-", "''"),
        ("rand-n0", "n0"),
        (f"rand-n{MAX_LAYERS + 1}", f"n{MAX_LAYERS + 1}"),
        ("rand-p1.5", "p1.5"),
        ("rand-pnan", "pnan"),
        ("rand-mstdnan", "mstdnan"),
        ("rand-mstd", "'mstd'"),
        ("rand-mmax0", "mmax0"),
        ("rand-mmax101", "mmax101"),
        ("rand-incyes", "incyes"),
        ("rand-tweights", "tweights"),
        ("rand-w0", "w0"),
        ("rand-m9-m-1", "'m'"),
        ("rand m9", "rand m9"),
    ],
)
def test_bad_strings_are_refused_and_their_part_named(text, part):
    for parse in (RandAugment.parse, lambda text: plan.Augment(auto_augment=text)):
        with pytest.raises(ValueError) as error:
            parse(text)
        assert part in str(error.value) and text in str(error.value)


@pytest.mark.parametrize(
    "options, word",
    [
        ({"interpolation": "lanczos"}, "interpolation"),
        ({"erase": 1.1}, "erase"),
        ({"erase": float("nan")}, "erase"),
        ({"color_jitter": -0.1}, "color_jitter"),
        ({"color_jitter": 0.4, "auto_augment": "rand-m9"}, "auto_augment"),
        ({"fill": (0, 0)}, "fill"),
        ({"fill": (0, 0, 256)}, "fill"),
    ],
)
def test_bad_settings_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        plan.Augment(**options)


@pytest.mark.parametrize("increasing", [False, True])
@pytest.mark.parametrize("level_argument", [scalar.level_argument, plan._scalar.level_argument], ids=["python", "njit"])
def test_arguments_of_levels_are_timms(monkeypatch, increasing, level_argument):
    transforms = auto_augment.rand_augment_choices("", increasing)
    levels = [*np.linspace(0, 10, 101), *np.random.default_rng(0).uniform(0, 10, 300), 12.5, 20.0, 100.0]
    values = set()
    for negate in (False, True):
        monkeypatch.setattr(auto_augment.random, "random", lambda negate=negate: 0.75 if negate else 0.25)
        for op, name in enumerate(transforms):
            assert our_name(name) == OPS[op]
            rule = auto_augment.LEVEL_TO_ARG[name]
            for level in levels:
                (expected,) = rule(level, {}) if rule else (0.0,)
                assert level_argument(op, level, increasing, negate) == expected, (name, level, negate)
                values.add(expected)
    assert len(values) > 2000


# --- distributions


def timm_draws(text: str, n: int) -> list[list[tuple[str, float]]]:
    """The (operation, argument) pairs that timm's RandAugment applies to each of `n` images."""
    transform = auto_augment.rand_augment_transform(text, {})
    seen: list[tuple[str, float]] = []

    def recorder(name):
        return lambda image, *arguments, **_: seen.append((name, float(arguments[0]) if arguments else 0.0))

    for op in transform.ops:
        op.aug_fn = recorder(our_name(op.name))
    random.seed(0)
    np.random.seed(0)
    images = []
    for _ in range(n):
        transform(None)
        images.append(seen.copy())
        seen.clear()
    return images


def by_op(images) -> dict[str, np.ndarray]:
    arguments = {name: [] for name in OPS}
    for name, argument in itertools.chain.from_iterable(images):
        arguments[name].append(argument)
    return {name: np.array(values) for name, values in arguments.items()}


def our_draws(text: str, n: int):
    plans = draw(n, augment=plan.Augment(auto_augment=text))
    return plans, [
        [(OPS[op], float(a)) for op, a in zip(p["ops"], p["arguments"], strict=True) if op >= 0] for p in plans
    ]


@pytest.mark.parametrize(
    "text",
    [
        "rand-m9-mstd0.5-inc1",
        "rand-n3-m9-mstd0.5-inc1",
        "rand-m6-mstd101-p0.8",
        "rand-m9-inc1-p1",
        "rand-m12-mstd3-mmax15",
    ],
)
def test_operations_and_arguments_are_distributed_as_timms(text):
    theirs = timm_draws(text, N)
    plans, ours = our_draws(text, N)
    assert (plans["ops"][:, RandAugment.parse(text).layers :] == scalar.NO_OP).all()
    lengths = [np.bincount([len(image) for image in images], minlength=MAX_LAYERS) for images in (theirs, ours)]
    lengths = np.array(lengths)[:, np.sum(lengths, axis=0) > 0]
    assert lengths.shape[1] == 1 or stats.chi2_contingency(lengths).pvalue > 1e-3
    theirs, ours = by_op(theirs), by_op(ours)
    counts = np.array([[len(arguments[name]) for name in OPS] for arguments in (theirs, ours)])
    assert stats.chi2_contingency(counts).pvalue > 1e-3 and counts.min() > 500
    assert stats.chisquare(counts[1]).pvalue > 1e-3
    for name in OPS:
        # Arguments are kept as float32; ties of the discrete ones must stay ties.
        result = stats.ks_2samp(theirs[name].astype(np.float32), ours[name].astype(np.float32))
        assert result.pvalue > 1e-4, (name, result)


def test_the_comparison_would_notice_other_settings():
    theirs, ours = by_op(timm_draws("rand-m9-mstd0.5-inc1", N)), by_op(our_draws("rand-m9-mstd0.75-inc1", N)[1])
    assert stats.ks_2samp(np.abs(theirs["Rotate"]), np.abs(ours["Rotate"])).pvalue < 1e-4
    ours = by_op(our_draws("rand-m9-mstd0.5", N)[1])
    assert stats.ks_2samp(theirs["Color"], ours["Color"]).pvalue < 1e-4


def test_signs_and_layers_are_fair():
    plans = draw(augment=plan.Augment(auto_augment="rand-n8-m9-mstd0.5-inc1"))
    for n in range(MAX_LAYERS):
        op, argument = plans["ops"][:, n], plans["arguments"][:, n]
        assert stats.binomtest(int((op >= 0).sum()), N, 0.5).pvalue > 1e-3
        signed = argument[
            np.isin(op, [scalar.ROTATE, scalar.SHEAR_X, scalar.SHEAR_Y, scalar.TRANSLATE_X, scalar.TRANSLATE_Y])
        ]
        assert stats.binomtest(int((signed < 0).sum()), signed.size, 0.5).pvalue > 1e-3
    assert (plans["arguments"][plans["ops"] < 0] == 0).all()


def test_interpolation_is_either_or_fixed():
    assert stats.binomtest(int(draw()["interpolation"].sum()), N, 0.5).pvalue > 1e-3
    for number, name in enumerate(("bilinear", "bicubic")):
        assert (draw(500, augment=plan.Augment(interpolation=name))["interpolation"] == number).all()


def test_colour_jitter_is_torchvisions():
    jitter = ColorJitter(0.4, 0.4, 0.4)
    torch.manual_seed(0)
    drawn = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(N)]
    theirs_order = [tuple(i for i in order.tolist() if i < 3) for order, *_ in drawn]
    plans = draw(augment=plan.Augment(color_jitter=0.4))
    codes = [scalar.BRIGHTNESS, scalar.CONTRAST, scalar.COLOR]
    assert (plans["ops"][:, 3:] == scalar.NO_OP).all() and (
        np.sort(plans["ops"][:, :3], axis=1) == np.sort(codes)
    ).all()
    ours_order = [tuple(codes.index(op) for op in row) for row in plans["ops"][:, :3]]
    orders = list(itertools.permutations(range(3)))
    counts = [[drawn_orders.count(order) for order in orders] for drawn_orders in (theirs_order, ours_order)]
    assert stats.chi2_contingency(counts).pvalue > 1e-3 and np.min(counts) > N / 8
    for number, code in enumerate(codes):
        ours = plans["arguments"][:, :3][plans["ops"][:, :3] == code]
        assert stats.ks_2samp([d[1 + number] for d in drawn], ours).pvalue > 1e-3
        assert ours.min() >= 0.6 - 1e-6 and ours.max() <= 1.4 + 1e-6


@pytest.mark.parametrize("height, width", [(64, 64), (48, 112), (128, 40)])
def test_erased_boxes_are_distributed_as_timms(height, width):
    random.seed(0)
    erasing = RandomErasing(probability=0.25, mode="const", device="cpu")
    theirs = []
    for _ in range(N):
        rows, columns = (erasing(torch.ones(1, height, width))[0] == 0).nonzero().numpy().T
        if rows.size:
            theirs.append((rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1))
            assert rows.size == theirs[-1][2] * theirs[-1][3]
    theirs = np.array(theirs)
    ours = plan.erase_boxes(draw(aspect=width / height), (height, width))
    ours = ours[ours[:, 2] > 0]
    assert stats.binomtest(len(ours), N, 0.25).pvalue > 1e-3
    assert (
        (ours[:, :2] >= 0).all()
        and (ours[:, 2:] > 0).all()
        and (ours[:, 2:] < (height, width)).all()
        and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    )
    views = {
        "top": lambda y, x, h, w: y,
        "left": lambda y, x, h, w: x,
        "height": lambda y, x, h, w: h,
        "width": lambda y, x, h, w: w,
        "area": lambda y, x, h, w: h * w,
        "ratio": lambda y, x, h, w: h / w,
        "below": lambda y, x, h, w: height - y - h,
    }
    for name, view in views.items():
        assert stats.ks_2samp(view(*theirs.T), view(*ours.T)).pvalue > 1e-3, name


@pytest.mark.parametrize("share", [0.9999999, 0.3, 0.001, 0.0])
@pytest.mark.parametrize("size", [1, 2, 7, 224])
def test_erased_boxes_stay_inside(share, size):
    """Rounded to the record's float32, what was drawn below 1 can be 1."""
    plans = np.zeros(3, plan.PLAN)
    plans["erase"][:, 2:] = share
    plans["erase"][:, :2] = np.array([0, 0.5, 1 - 1e-9])[:, None]
    boxes = plan.erase_boxes(plans, size)
    assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= size).all()
    if share == 0.3 and size == 224:
        assert boxes[:, 0].tolist() == [0, 79, 157] and (boxes[:, 2:] == 67).all()


# --- what a record depends on


def same(left, right) -> bool:
    return all((left[name] == right[name]).all() for name in plan.PLAN.names)


def test_a_full_record_depends_on_its_sample_alone():
    sizes = np.random.default_rng(0).integers(20, 600, (1000, 2))

    def records(ids):
        return plan.draw(3, 5, ids, *sizes[ids].T, RECIPE)

    together = records(np.arange(1000))
    shuffled = np.random.default_rng(1).permutation(1000)
    assert same(records(shuffled), together[shuffled])
    assert all(same(records(part), together[part]) for part in np.array_split(np.arange(1000), 13))
    assert all(same(records(np.array([i])), together[i : i + 1]) for i in range(0, 1000, 37))


def test_one_setting_does_not_change_what_others_draw():
    base = draw(2000)
    crop = ("top", "left", "height", "width", "flip")
    fields = {
        plan.Augment(): crop + ("noise",),
        plan.Augment(interpolation="random", color_jitter=0.4): crop + ("interpolation", "noise"),
        plan.Augment(interpolation="random", auto_augment="rand-n3-m9", erase=0.25): (
            crop + ("interpolation", "erase", "noise")
        ),
        plan.Augment(auto_augment="rand-m9-mstd0.5-inc1", erase=0.0, flip=0.1): (
            crop[:4] + ("ops", "arguments", "noise")
        ),
    }
    for augment, unchanged in fields.items():
        other = draw(2000, augment=augment)
        assert all((other[name] == base[name]).all() for name in unchanged), augment
    more = draw(2000, augment=plan.Augment(auto_augment="rand-n3-m9-mstd0.5-inc1"))
    assert (more["ops"][:, :2] == base["ops"][:, :2]).all() and (
        more["arguments"][:, :2] == base["arguments"][:, :2]
    ).all()


def features(plans) -> dict[str, np.ndarray]:
    """Small numbers of each purpose's draws, which must tell nothing about each other."""

    def quarters(values):
        return np.searchsorted(np.quantile(values, [0.25, 0.5, 0.75]), values)

    # -2 to 2: direction of a geometric operation and whether its level is above the mean; 0 for other operations.
    full = np.select(
        [plans["ops"] == 3, np.isin(plans["ops"], [11, 12]), np.isin(plans["ops"], [13, 14])], [30, 0.3, 0.45], np.inf
    )
    strength = (np.sign(plans["arguments"] / full) * (1 + (np.abs(plans["arguments"]) / full > 0.9))).astype(int)
    return {
        "crop area": quarters(plans["height"] * plans["width"]),
        "crop ratio": quarters(plans["width"] / plans["height"]),
        "flip": plans["flip"].astype(int),
        "interpolation": plans["interpolation"].astype(int),
        "first op": plans["ops"][:, 0] + 1,
        "second op": plans["ops"][:, 1] + 1,
        "first strength": strength[:, 0] + 2,
        "second strength": strength[:, 1] + 2,
        "erase": (plans["erase"][:, 2] > 0).astype(int),
        "noise": (plans["noise"] & np.uint64(3)).astype(int),
        "noise high": (plans["noise"] >> np.uint64(62)).astype(int),
    }


def independent(left: np.ndarray, right: np.ndarray) -> float:
    table = np.zeros((left.max() + 1, right.max() + 1))
    np.add.at(table, (left, right), 1)
    return stats.chi2_contingency(table).pvalue


def test_draws_of_different_purposes_epochs_samples_and_seeds_are_independent():
    base = features(draw())
    # Some crops do not fit and are drawn anew, so area and ratio are not independent; nor is an operation of its
    # strength.
    tied = {("crop area", "crop ratio"), ("first op", "first strength"), ("second op", "second strength")}
    pairs = [(a, b) for a, b in itertools.combinations(base, 2) if (a, b) not in tied]
    assert len(pairs) == 52
    for a, b in pairs:
        assert independent(base[a], base[b]) > 1e-4, (a, b)
    assert independent(base["first op"], base["first strength"]) < 1e-9  # it can fail
    shifted = plan.draw(3, 5, np.arange(1, N + 1), np.full(N, 375), np.full(N, 500), RECIPE)
    for other in (draw(epoch=6), draw(seed=4), draw(seed=3 + 2**32), shifted):
        for name, values in features(other).items():
            assert independent(base[name], values) > 1e-4, name


# --- the full recipe through the loader


@pytest.fixture(scope="module")
def beton(photos, tmp_path_factory):
    """24 bundled photos with random label maps of 10 classes, k = 3, 9 x 7 cells."""
    images = [file.read_bytes() for file in sorted(photos.glob("train/*/*.jpg"))[:24]]
    spec = MapSpec(k=3, height=9, width=7, num_classes=10)
    return write(tmp_path_factory.mktemp("augment") / "photos.beton", images, spec=spec)


def epoch_of(beton, batch_size, epoch=2, start_step=0, **options):
    """{sample id: all that its batch says of it} in order."""
    seen = {}
    options = {"augment": RECIPE, "seed": 11} | options
    with Loader(beton, batch_size, image_size=64, grid=4, **options) as loader:
        loader.set_epoch(epoch, start_step)
        for batch in loader:
            parts = (batch.images, batch.targets, batch.labels, batch.erase, batch.noise)
            seen |= {i: [part[b] for part in parts] for b, i in enumerate(batch.sample_ids.tolist())}
    return seen


def test_full_recipe_is_the_same_for_any_threads_batch_size_and_restart(beton):
    base = epoch_of(beton, 8, threads=1)
    assert len(base) == 24 and sum(int(parts[3][2]) > 0 for parts in base.values()) > 1
    whole = [
        epoch_of(beton, 8, threads=2),
        epoch_of(beton, 12, threads=2),
        epoch_of(beton, 3, threads=1),
        epoch_of(beton, 1, threads=2),
    ]
    restarted = [epoch_of(beton, 8, start_step=1), epoch_of(beton, 4, start_step=5, threads=2)]
    assert [len(seen) for seen in whole + restarted] == [24, 24, 24, 24, 16, 4]
    for other in whole + restarted:
        assert list(other) == list(base)[24 - len(other) :]
        assert all(torch.equal(a, b) for i in other for a, b in zip(base[i], other[i], strict=True))
    for options in ({"epoch": 3}, {"seed": 12}):
        other = epoch_of(beton, 8, **options)
        assert list(other) != list(base) and sum(torch.equal(base[i][0], other[i][0]) for i in base) < 2


def test_batches_carry_erasing_only_when_it_is_asked_for(beton):
    with Loader(beton, 8, image_size=32, grid=2, augment=plan.Augment(auto_augment="rand-m9")) as loader:
        batch = next(iter(loader))
        assert batch.erase is None and batch.noise is None
    with Loader(beton, 8, image_size=32, grid=2, train=False, augment=RECIPE) as loader:
        batch = next(iter(loader))
        assert batch.erase is None and batch.targets is None
    with Loader(beton, 8, image_size=32, grid=2, augment=plan.Augment(erase=1.0)) as loader:
        batch = next(iter(loader))
        plans = loader.draw(batch.sample_ids.numpy())
        assert batch.erase.dtype == torch.int32 and batch.erase.shape == (8, 4) and (batch.erase[:, 2:] > 0).all()
        assert batch.noise.dtype == torch.int64 and (batch.noise.numpy().view(np.uint64) == plans["noise"]).all()
        # Left to the training device: the images are those of no erasing.
        with Loader(beton, 8, image_size=32, grid=2, augment=plan.Augment()) as plain:
            assert torch.equal(next(iter(plain)).images, batch.images)
