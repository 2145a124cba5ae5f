"""Which way to decode: measured with a clock of its own, and two decoders at work on one batch."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from small_betons import write

from tl_fast.beton.samples import Samples
from tl_fast.labelmaps.format import MapSpec
from tl_fast.pipeline import choice
from tl_fast.pipeline.choice import MEASURED, WARM_UP, AutoDecoder, HybridDecoder, call, chosen, rate
from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.regions import DecodeError


@pytest.fixture
def clock(monkeypatch):
    """A clock in place of the machine's that only `Timed`, and who takes batches, moves."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(choice, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class Timed:
    """A decoder that takes so many seconds an image, and ten times as many for each of its first two batches."""

    threads, busy_seconds = 4, 0.0

    def __init__(self, clock: SimpleNamespace, seconds: float):
        self.clock, self.seconds, self.batches, self.closed = clock, seconds, 0, False

    def start(self, ids, starts, shapes, stream=None):
        def finish():
            self.batches += 1
            self.clock.now += self.seconds * len(ids) * (10 if self.batches <= 2 else 1)
            return [], None

        return finish

    def close(self):
        self.closed = True


def work():
    while True:
        yield np.arange(4), np.zeros((4, 2), np.int64), np.ones((4, 2), np.int64)


def test_a_rate_counts_what_follows_the_warm_up(clock):
    decoder = Timed(clock, 0.025)
    assert rate(decoder, work(), seconds=1) == pytest.approx(40)
    assert decoder.batches == 2 + 10 + 2  # the last two were begun already
    with pytest.raises(ValueError, match="more than 4 batches"):
        rate(decoder, [next(work())])


# --- auto


@pytest.fixture
def auto(clock):
    """A function: (AutoDecoder whose nvJPEG takes so many seconds an image, the CPU's decoder, nvJPEG's opened ones, a
    function that takes batches, of which a step lasts 4 ms and keeps the CPU's threads so busy)."""

    def build(mixed: Timed | float, on_rank_0=call):
        opened = []

        def open_nvjpeg():
            opened.append(mixed if isinstance(mixed, Timed) else Timed(clock, mixed))
            return opened[-1]

        decoder = AutoDecoder(cpu := Timed(clock, 0.001), open_nvjpeg, work, on_rank_0, announce=True)

        def take(batches: int, busy: float) -> None:
            for batch in itertools.islice(work(), batches):
                decoder.start(*batch)
                clock.now += 0.004
                cpu.busy_seconds += busy * cpu.threads * 0.004
                decoder.taken(4)

        return decoder, cpu, opened, take

    return build


def test_auto_stays_with_cores_that_keep_up(auto, capsys):
    decoder, cpu, opened, take = auto(0.0001)
    take(WARM_UP, busy=1)  # compiling and an empty queue say nothing
    take(MEASURED - 1, busy=0.6)
    assert decoder.way == "auto"
    take(1, busy=0.6)
    assert decoder.way == "cpu" and not opened
    take(2 * MEASURED, busy=1)
    assert decoder.way == "cpu"
    said = "tl_fast: decode 'cpu': 4 threads are 60% busy at the step's 1,000 images/s\n"
    assert capsys.readouterr().err == said
    decoder.close()
    assert cpu.closed


@pytest.mark.parametrize("mixed, way", [(0.0004, "mixed"), (0.00089, "mixed"), (0.00095, "cpu"), (0.003, "cpu")])
def test_auto_takes_nvjpeg_where_cores_do_not_keep_up_and_it_gains(auto, capsys, mixed, way):
    decoder, cpu, opened, take = auto(mixed)
    take(WARM_UP + MEASURED, busy=0.97)
    assert decoder.way == way and opened[0].closed
    said = capsys.readouterr().err
    assert f"decode {way!r}: 4 threads are 97% busy" in said and f"(nvJPEG) {1 / mixed:,.0f}" in said
    if way == "mixed":
        finish = decoder.start(*next(work()))
        finish()
        assert opened[1].batches == 1 and not opened[1].closed
    decoder.close()
    assert cpu.closed and all(nvjpeg.closed for nvjpeg in opened)


def test_auto_follows_rank_0(auto):
    asked = []

    def on_rank_0(function):
        asked.append(function)
        return "mixed", "decode 'mixed': as rank 0 measured"

    decoder, _, opened, take = auto(1.0, on_rank_0)
    take(WARM_UP + MEASURED, busy=0.1)
    assert decoder.way == "mixed" and len(asked) == 1 and len(opened) == 1 and opened[0].batches == 0


def test_auto_measures_nothing_between_iterations(auto, clock, capsys):
    decoder, cpu, opened, take = auto(0.003)
    for _ in range(4):
        decoder.begin()
        take((WARM_UP + MEASURED) // 4, busy=0.95)
        clock.now += 10  # validation
        cpu.busy_seconds += 1  # the next epoch's first batches
    assert decoder.way == "cpu" and len(opened) == 1
    assert "95% busy at the step's 1,000 images/s" in capsys.readouterr().err


def test_without_nvjpeg_the_cpu_decodes_and_the_reason_is_said(auto, clock, capsys):
    class Broken(Timed):
        def start(self, *_):
            raise RuntimeError("nvjpeg: not supported\nmore")

    decoder, _, opened, take = auto(Broken(clock, 0))
    take(WARM_UP + MEASURED, busy=1)
    said = capsys.readouterr().err
    assert decoder.way == "cpu" and "nvjpeg: not supported" in said and "more" not in said and opened[0].closed

    class Damaged(Timed):
        def start(self, *_):
            raise DecodeError("sample 3")

    decoder, _, opened, take = auto(Damaged(clock, 0))
    with pytest.raises(DecodeError, match="sample 3"):
        take(WARM_UP + MEASURED, busy=1)
    assert opened[0].closed


# --- hybrid


def test_a_share_of_the_samples_is_the_same_always_and_spread_evenly():
    ids = np.arange(1_000_000)
    half, third = chosen(ids, 0.5), chosen(ids, 0.3)
    assert abs(half.mean() - 0.5) < 1e-3 and abs(third.mean() - 0.3) < 1e-3
    assert not (third & ~half).any()  # a larger share keeps the samples of a smaller one
    np.testing.assert_array_equal(chosen(ids[::-7], 0.3), third[::-7])
    assert not chosen(ids, 0).any() and chosen(ids, 1).all()
    runs = third.reshape(-1, 100).mean(1)  # of classes that lie side by side
    assert 0.25 < runs.min() and runs.max() < 0.35


def test_a_hybrid_batch_has_every_region_in_its_place(photos, tmp_path):
    """nvJPEG is a decoder of the CPU here."""
    files = [file.read_bytes() for file in sorted(photos.glob("train/*/*.jpg"))[:20]]
    samples = Samples(write(tmp_path / "photos.beton", files, spec=MapSpec(2, 3, 3, 5)))
    ids = np.arange(20)[::-1].copy()
    starts, shapes = np.stack([ids, 2 * ids], axis=1), np.stack([9 + ids, 40 - ids], axis=1)
    alone, nvjpeg = Decoder(samples, 2), Decoder(samples, 1)
    expected = alone(ids, starts, shapes)
    asked = []
    nvjpeg_start, nvjpeg.start = nvjpeg.start, lambda ids, *rest: asked.extend(ids) or nvjpeg_start(ids, *rest)
    for share in (0.0, 0.4, 1.0):
        asked.clear()
        decoder = HybridDecoder(Decoder(samples, 2), nvjpeg, share, work, call, announce=False)
        regions = decoder(ids, starts, shapes)
        assert asked == ids[chosen(ids, share)].tolist() and len(regions) == 20
        for b in range(20):
            np.testing.assert_array_equal(regions[b], expected[b])
        span, offsets = regions.span()
        pixels = np.asarray(span)
        for b, offset in enumerate(offsets):
            np.testing.assert_array_equal(pixels[offset : offset + expected[b].numel()], expected[b].reshape(-1))
        decoder._cpu.close()
    nvjpeg.close()
    alone.close()
    samples.close()


def test_the_share_of_nvjpeg_is_its_part_of_both_rates(clock, capsys):
    rates = Timed(clock, 0.001), Timed(clock, 0.003)
    decoder = HybridDecoder(*rates, None, work, call, announce=True)
    decoder.begin()
    assert decoder.share == 0.25
    said = "decode 'hybrid': cpu 1,000 images/s, mixed (nvJPEG) 333; nvJPEG decodes 25.0% of the samples"
    assert said in capsys.readouterr().err
    decoder.begin()
    assert capsys.readouterr().err == ""
    follower = HybridDecoder(*rates, None, work, lambda function: (0.7, ""), announce=False)
    follower.begin()
    assert follower.share == 0.7
    decoder.close()
    assert all(timed.closed for timed in rates)
