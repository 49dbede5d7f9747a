"""data.py: buckets, masks, and the loader, on drawn samples and real files."""

import dataclasses
import json
import time
from collections import Counter

import numpy as np
import pytest
import torch
from test_media import encode
from test_metadata import items, make_files

import data
import media
import presets
import run_folder
import shapes
from runtime import generator
from sizes import Bucket


def record(num_frames=100, height=512, width=512, name="", read=None) -> data.Record:
    return data.Record(name, lambda num_frames: f"{name} in {num_frames}", num_frames, (height, width), read)


def test_a_bucket_is_never_much_larger_than_the_sample_nor_longer():
    plan = data.Plan((512, 768, 1024), max_tokens=29952, batch_tokens=29952)

    def drawn(num: int = 50, **sample) -> Counter:
        one = record(**sample)
        return Counter(data.choose_bucket(one, plan, generator(0, 0, i, "resolution")) for i in range(num))

    assert drawn(height=600, width=600).keys() == {(49, 512, 512)}  # 750 is below 768
    assert drawn(height=620, width=620).keys() == {(49, 512, 512), (49, 768, 768)}
    assert drawn(height=100, width=100).keys() == {(49, 512, 512)}  # nothing fits: the smallest
    assert drawn(height=400, width=640).keys() == {(49, 400, 656)}
    assert drawn(height=64, width=4096).keys() == {(49, 256, 1024)}
    assert drawn(num_frames=30).keys() == {(29, 512, 512)}
    assert drawn(num_frames=4).keys() == {(1, 512, 512)}
    large = drawn(1500, height=2000, width=2000)
    assert large.keys() == {(49, 512, 512), (49, 768, 768), (25, 1024, 1024)}
    assert all(abs(count - 500) < 5 * 18 for count in large.values())  # 5 standard deviations


def mixed_records(num: int = 100) -> list[data.Record]:
    """Long, short, wide and single: with `mixed_plan` in some ten buckets."""
    shapes = ((100, 300, 300), (1, 640, 360), (20, 720, 1280), (9, 600, 600))
    return [record(*shapes[i % 4], name=str(i)) for i in range(num)]


def mixed_plan(batch_tokens: int = 13312) -> data.Plan:
    return data.Plan((256, 512), max_tokens=13312, batch_tokens=batch_tokens)


def places(micros) -> set[tuple]:
    """What a cache is asked for: (bucket, index, key) of each sample."""
    return {(m.bucket, *place) for m in micros for place in zip(m.indices, m.keys)}


def test_an_epoch_holds_every_sample_once_in_batches_of_one_shape():
    records = mixed_records()
    epochs = data.Epochs(records, mixed_plan(), seed=3)
    lists = [epochs.micros(epoch) for epoch in range(2)]
    for epoch, micros in enumerate(lists):
        assert sorted(index for micro in micros for index in micro.indices) == list(range(100))
        assert [(micro.epoch, micro.number) for micro in micros] == [(epoch, i) for i in range(len(micros))]
        short = Counter()
        for micro in micros:
            size = max(1, 13312 // micro.bucket.tokens)
            assert all(records[index].num_frames >= micro.bucket.num_frames for index in micro.indices)
            assert micro.keys == [(3, epoch, index) for index in micro.indices] and len(micro.keys) <= size
            short[micro.bucket] += len(micro.keys) < size
        assert max(short.values()) == 1  # one short batch a bucket
        assert micros != sorted(micros, key=lambda micro: micro.indices)
        assert any(micro.indices != sorted(micro.indices) for micro in micros)
    assert lists[0] == data.Epochs(records, mixed_plan(), seed=3).micros(0) == epochs.micros(0)
    other_seed = data.Epochs(records, mixed_plan(), seed=4).micros(0)
    first, *others = [[micro.indices for micro in micros] for micros in (*lists, other_seed)]
    assert first not in others
    table = data.bucket_table(lists[0], PLAN).splitlines()
    assert sum(int(line.split()[5]) for line in table[1:]) == 100
    assert len(table) == 1 + len({micro.bucket for micro in lists[0]})


def test_with_a_number_of_draws_epochs_take_them_in_turn_but_mix_the_samples_anew():
    epochs = data.Epochs(mixed_records(), mixed_plan(), seed=3, num_draws=2)
    first, second, third = (epochs.micros(epoch) for epoch in range(3))
    assert {key[1] for _, _, key in places(first)} == {0} and {key[1] for _, _, key in places(second)} == {1}
    assert places(third) == places(first) != places(second)
    assert [micro.indices for micro in third] != [micro.indices for micro in first]
    assert third[0].epoch == 2  # which decides the noise


def test_with_only_full_micro_batches_each_bucket_has_one_size_and_no_sample_is_lost():
    """A bucket with too few samples for a full one is one micro-batch, else it would never be trained on."""
    epochs = data.Epochs(mixed_records(), mixed_plan(4 * 13312), seed=3, num_draws=1, only_full=True)
    members = Counter(epochs._buckets(0))
    left_out = []
    for epoch in range(8):
        micros = epochs.micros(epoch)
        for micro in micros:
            full = max(1, 4 * 13312 // micro.bucket.tokens)
            assert len(micro.keys) == min(full, members[micro.bucket])
        left_out.append(set(range(100)) - {index for micro in micros for index in micro.indices})
    assert any(left_out) and not set.intersection(*left_out)  # what is left over has its turn later


@pytest.mark.parametrize("only_full", [False, True])
@pytest.mark.parametrize("num_draws", [1, 3])
def test_what_a_cache_is_asked_for_is_all_that_the_steps_need(only_full, num_draws):
    epochs = data.Epochs(mixed_records(), mixed_plan(), 3, num_draws, only_full)
    everything = {place for draw in range(num_draws) for place in places(epochs.micros(draw, True))}
    for epoch, number, num_steps in [(0, 0, 1), (0, 0, 5), (1, 3, 6), (4, 2, 11), (2, 1, 40), (0, 0, 200)]:
        steps = epochs.steps(epoch, number, size=2)
        needed = places(micro for _ in range(num_steps) for micro in next(steps))
        asked = places(epochs.asked(epoch, number, 2, num_steps))
        assert needed <= asked <= everything
        is_short = 2 * num_steps < sum(len(epochs.micros(draw)) for draw in range(num_draws))
        assert asked == (needed if is_short else everything)
    assert not is_short


@pytest.mark.parametrize("num_draws, only_full", [(0, False), (2, True)])
def test_a_resume_goes_on_with_the_next_micro_batch_across_an_epochs_end(num_draws, only_full):
    """From each place that run_folder.Counters remembers the rest of the steps follows."""
    phases = (presets.TINY.phases[0],)
    whole = data.Epochs(mixed_records(30), mixed_plan(), 3, num_draws, only_full).steps(0, 0, size=3)
    steps = [next(whole) for _ in range(25)]
    assert any(micros[0].epoch < micros[-1].epoch for micros in steps)  # a step may lie in two epochs
    at = run_folder.Counters()
    for done, micros in enumerate(steps, 1):
        at.advance(micros, phases)
        assert (at.step, at.total_steps) == (done, done)
        resumed = data.Epochs(mixed_records(30), mixed_plan(), 3, num_draws, only_full)
        rest = resumed.steps(at.epoch, at.batch, size=3)
        assert [next(rest) for _ in range(25 - done)] == steps[done:]


def test_a_resume_where_an_epoch_ends_begins_the_next():
    epochs = data.Epochs(mixed_records(30), mixed_plan(), 3)
    at = run_folder.Counters()
    at.advance(epochs.micros(0), (presets.TINY.phases[0],))  # a step of just one epoch
    assert (at.epoch, at.batch) == (0, len(epochs.micros(0)))
    assert next(epochs.steps(at.epoch, at.batch, size=2)) == epochs.micros(1)[:2]


def test_a_phase_ends_with_its_last_step_and_the_next_begins_an_epoch():
    phases = (dataclasses.replace(presets.TINY.phases[0], num_steps=2),) * 2
    steps = data.Epochs(mixed_records(), mixed_plan(), 3).steps(0, 0, size=2)
    at = run_folder.Counters()
    at.advance(next(steps), phases)
    assert (at.phase, at.step, at.epoch, at.batch) == (0, 1, 0, 2)
    at.advance(next(steps), phases)
    assert (at.phase, at.step, at.total_steps, at.epoch, at.batch) == (1, 0, 2, 1, 0)


def test_what_follows_from_a_name_does_not_depend_on_the_place_in_the_list():
    records = mixed_records(40)
    names = [10**30 + int(one.name) for one in records]  # as long as digests are

    def drawn(order: list[int]) -> dict[str, tuple]:
        shuffled = [records[i] for i in order]
        epochs = data.Epochs(shuffled, mixed_plan(), 3, 2, False, [names[i] for i in order])
        return {shuffled[index].name: (bucket, key) for bucket, index, key in places(epochs.micros(5))}

    before = drawn(list(range(40)))
    assert before == drawn(torch.randperm(40).tolist())
    assert {key for _, key in before.values()} == {(3, 1, name) for name in names}


def test_a_draw_depends_on_what_it_is_for_and_on_nothing_else():
    def number(*key):
        return torch.rand((), generator=generator(*key)).item()

    keys = [(s, e, i, p) for s in range(3) for e in range(3) for i in range(12) for p in ("mask", "noise")]
    first = {key: number(*key) for key in keys}
    assert len(set(first.values())) == len(keys) and all(number(*key) == first[key] for key in reversed(keys))
    assert first[0, 0, 11, "mask"] != number(0, 0, 1, "1mask")
    # pinned: a run must resume on another machine and version with the same draws
    assert torch.randint(1000, (3,), generator=generator(1, 2, 3, "mask")).tolist() == [393, 535, 926]


PLAN = data.Plan((32,), max_tokens=80, batch_tokens=80, max_frames=17)


def black(start: int, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    return np.zeros((num_frames, *size, 3), np.uint8)


def test_a_sample_is_drawn_from_its_key_alone():
    bucket = Bucket(17, 32, 32)
    starts = Counter()

    def read(start, num_frames, size):
        assert size == (32, 32)
        starts[start] += 1
        return black(start, num_frames, size)

    drawing = record(20, 32, 32, "d", read)
    samples = [data.load_sample(drawing, bucket, (1, 2, index), PLAN) for index in range(1000)]
    assert sorted(starts) == [0, 1, 2, 3]
    assert min(starts.values()) > 180  # 250 ± 5 standard deviations of 14
    captions = Counter(sample.caption for sample in samples)
    assert captions.keys() == {"", "d in 17"} and 53 < captions[""] < 147
    assert 53 < sum(not sample.zero_if_all_masked for sample in samples) < 147
    masks = {tuple(sample.mask.flatten(1).all(1).tolist()) for sample in samples}
    assert len(masks) > 20
    assert torch.equal(samples[7].mask, data.load_sample(drawing, bucket, (1, 2, 7), PLAN).mask)
    for sample in samples[:20]:  # what a cache asks without reading
        assert data.draw_caption(drawing, bucket, sample.key) == sample.caption


def test_the_plan_says_which_masks_and_how_many_are_text_only():
    def drawn(**settings) -> list[data.Sample]:
        plan = dataclasses.replace(PLAN, masks={"after the start": 1.0}, **settings)
        clip = record(17, 32, 32, "d", black)
        return [data.load_sample(clip, Bucket(17, 32, 32), (0, 0, index), plan) for index in range(200)]

    ends, some = drawn(), drawn(text_only=0.3)
    assert not any(sample.mask[0].any() for sample in ends) and all(sample.mask[-1].all() for sample in ends)
    num_text_only = sum(sample.mask.all() for sample in some)
    assert abs(num_text_only - 60) < 5 * 6.5  # five standard deviations
    for before, after in zip(ends, some):  # the others stay what they were
        assert after.zero_if_all_masked if after.mask.all() else torch.equal(before.mask, after.mask)


def test_drawn_clips_of_several_lengths_come_together_as_each_alone():
    clips = shapes.records(3, 0, sizes=[(32, 32)], num_frames=17) + shapes.records(3, 1, num_frames=9)
    records = [data.shape_record(clip) for clip in clips]
    order = torch.randperm(6).tolist()
    samples = [data.load_sample(records[i], Bucket(5, 32, 48), (0, 0, i), PLAN) for i in order]
    assert all(sample.frames is None for sample in samples)
    together = data.pixels_of(samples, torch.device("cpu"))
    assert together.shape == (6, 3, 5, 32, 48)
    for i, sample, pixels in zip(order, samples, together):
        _, start, _ = sample.drawing
        assert torch.equal(pixels, media.to_pixels(records[i].read(start, 5, (32, 48))))


def records_of(folder, *items: dict) -> tuple[list[data.Record], dict[str, str]]:
    (folder / "meta.json").write_text(json.dumps(items))
    return data.open_records(data.read_metadata(folder / "meta.json"))


def test_control_clips_are_cut_like_their_clips(tmp_path):
    make_files(tmp_path)
    item = items()[0] | {"control_file_path": "a.mp4"}
    bucket, key = Bucket(9, 32, 48), (0, 0, 5)
    [same], _ = records_of(tmp_path, item)
    sample = data.load_sample(same, bucket, key, PLAN)
    assert torch.equal(sample.control, sample.frames)  # the same frames and the same cut
    [other], _ = records_of(tmp_path, item | {"control_file_path": "b.mp4"})
    assert other.num_frames == 16 and other.size == (48, 64)  # what both fill, the clip's own size
    assert not torch.equal(data.load_sample(other, bucket, key, PLAN).control, sample.control)


def still(name: str, fails: bool = False) -> data.Record:
    """A picture that shows its number."""

    def read(start, num_frames, size):
        if fails:
            raise ValueError(f"{name} is damaged")
        return np.full((num_frames, *size, 3), int(name), np.uint8)

    return record(1, 32, 32, name, read)


def read_still(record: data.Record, bucket: Bucket, key: data.Key) -> data.Sample:
    return data.load_sample(record, bucket, key, PLAN)


def load_all(loader: data.Loader) -> list[list[int]]:
    """The numbers of two epochs, by micro-batch."""
    plan = data.Plan((32,), max_tokens=4, batch_tokens=12)  # three pictures of four tokens
    epochs = data.Epochs(loader.records, plan, seed=0)
    micros = epochs.micros(0) + epochs.micros(1)
    loaded = list(loader.each(micros, read_still))
    assert [[sample.key for sample in samples] for samples in loaded] == [micro.keys for micro in micros]
    return [[int(sample.frames[0, 0, 0, 0]) for sample in samples] for samples in loaded]


def test_batches_come_in_order_whatever_the_number_of_threads():
    records = [still(str(i)) for i in range(40)]
    one = load_all(data.Loader(records, num_workers=1))
    assert one == load_all(data.Loader(records, num_workers=7))
    assert Counter(sum(one, [])) == {i: 2 for i in range(40)}


def test_batches_are_loaded_ahead_of_their_use_and_no_further():
    records, begun = [still(str(i)) for i in range(20)], []

    def read(record: data.Record, bucket: Bucket, key: data.Key) -> data.Sample:
        begun.append(int(record.name))
        return read_still(record, bucket, key)

    todo = [data.Micro(Bucket(1, 32, 32), [i], [(0, 0, i)], 0, i) for i in range(20)]
    batches = data.Loader(records).each(todo, read, ahead=3)
    next(batches)
    begin = time.time()
    while len(begun) < 4 and time.time() - begin < 10:
        time.sleep(0.01)
    assert sorted(begun) == [0, 1, 2, 3]
    batches.close()


def test_a_broken_file_is_named_once_and_replaced_by_the_next_that_is_long_enough(capsys):
    records = [still(str(i), fails=i in (3, 4)) for i in range(40)]
    loader = data.Loader(records)
    counts = Counter(sum(load_all(loader), []))
    assert counts == {i: 6 if i == 5 else 2 for i in range(40) if i not in (3, 4)}
    said = capsys.readouterr().out.splitlines()
    assert sorted(said) == ["skipped: 3 is damaged", "skipped: 4 is damaged"]
    assert set(loader.failures) == {"3", "4"}
    long = [record(9, 32, 32, "7", lambda start, n, size: np.full((n, *size, 3), 7, np.uint8))]
    loader = data.Loader([still("0", fails=True), still("1"), *long])
    sample = loader.load(0, Bucket(9, 32, 32), (0, 0, 0), read_still)
    assert len(sample.frames) == 9 and (sample.frames == 7).all()


def test_too_many_broken_files_stop_the_run_with_the_list():
    records = [still(str(i), fails=i < 3) for i in range(40)]
    with pytest.raises(ValueError, match=r"0 is damaged\n  1 is damaged\n  2 is damaged"):
        load_all(data.Loader(records))
    with pytest.raises(ValueError, match="3 of 40 (.|\n)*2no.mp4 is empty"):
        data.Loader(records[3:], {f"{i}no.mp4": f"{i}no.mp4 is empty" for i in range(3)})
    load_all(data.Loader(records[2:6]))  # one is forgiven in the smallest set


def test_a_clip_that_ends_before_its_header_says_is_a_broken_file(tmp_path):
    make_files(tmp_path)
    [clip], _ = records_of(tmp_path, items()[0])
    encode(tmp_path / "a.mp4", 30)
    with pytest.raises(ValueError, match="a.mp4 ends [0-9]+ frames before its header says"):
        data.load_sample(clip, Bucket(17, 32, 32), (0, 0, 6), PLAN)
    (tmp_path / "a.mp4").write_bytes(b"")
    records, failures = records_of(tmp_path, items()[0])
    assert records == [] and "a.mp4" in failures[str(tmp_path / "a.mp4")]
