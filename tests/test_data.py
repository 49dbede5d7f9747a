"""data.py: buckets, masks, and the loader, on drawn samples and real files."""

import json
import time
from collections import Counter

import numpy as np
import pytest
import torch
from test_media import encode
from test_metadata import items, make_files

import data
import inpaint
import media
from runtime import generator
from sizes import Bucket, aspect_shapes, frames_for

# ---------------------------------------------------------------- buckets


def record(num_frames=100, height=512, width=512, name="", read=None) -> data.Record:
    return data.Record(name, lambda num_frames: f"{name} in {num_frames}", num_frames, (height, width), read)


def test_frames_for_gives_the_table_of_the_report():
    sizes = (512, 640, 768, 896, 1024, 1152, 1280)
    table = {
        13312: [49, 29, 21, 13, 9, 9, 5],
        29952: [49, 49, 49, 37, 25, 21, 17],
        53248: [49, 49, 49, 49, 49, 37, 29],
    }
    for budget, frames in table.items():
        assert [frames_for(budget, size, size) for size in sizes] == frames
    for budget, frames in {80: [17, 5, 1], 180: [17, 17, 9], 320: [17, 17, 17]}.items():  # the tiny preset
        assert [frames_for(budget, size, size, max_frames=17) for size in (64, 96, 128)] == frames
    for budget in table:
        for size in range(512, 1281, 16):
            latent_frames = (frames_for(budget, size, size, 10_000) - 1) // 4 + 1
            assert latent_frames * (size // 16) ** 2 <= 1.2 * budget
    assert frames_for(13312, 256, 1024) == 49 and frames_for(1, 512, 512) == 1
    in_pairs = [frames_for(b, s, s, 85, frames_per_token=2) for b in table for s in (512, 1024, 1280)]
    assert in_pairs == [45, 5, 5, 85, 21, 13, 85, 45, 29]
    assert frames_for(1, 512, 512, frames_per_token=2) == 1


@pytest.mark.parametrize("size, num_shapes", [(64, 9), (512, 41), (768, 41), (1024, 41)])
def test_shapes_reach_from_1_to_4_to_4_to_1_at_equal_area(size, num_shapes):
    shapes = aspect_shapes(size)
    assert len(shapes) == num_shapes and (size, size) in shapes
    assert {(size // 2, size * 2), (size * 2, size // 2)} <= set(shapes)
    for height, width in shapes:
        assert height % 16 == 0 == width % 16 and (width, height) in shapes
        assert abs(height * width / size**2 - 1) < (0.13 if size == 64 else 0.03)  # half a step of 16


def test_a_bucket_is_never_much_larger_than_the_sample_nor_longer():
    plan = data.Plan((512, 768, 1024), max_tokens=29952, batch_tokens=29952)

    def drawn(**sample) -> set:
        return {
            data.choose_bucket(record(**sample), plan, generator(0, 0, i, "resolution")) for i in range(50)
        }

    assert drawn(height=600, width=600) == {(49, 512, 512)}  # 750 is below 768
    assert drawn(height=620, width=620) == {(49, 512, 512), (49, 768, 768)}
    assert drawn(height=2000, width=2000) == {(49, 512, 512), (49, 768, 768), (25, 1024, 1024)}
    assert drawn(height=100, width=100) == {(49, 512, 512)}  # nothing fits: the smallest
    assert drawn(height=400, width=640) == {(49, 400, 656)}
    assert drawn(height=64, width=4096) == {(49, 256, 1024)}
    assert drawn(num_frames=30) == {(29, 512, 512)} and drawn(num_frames=4) == {(1, 512, 512)}
    counts = [
        data.choose_bucket(record(height=2000, width=2000), plan, generator(0, 0, i, "")) for i in range(1500)
    ]
    for height in (512, 768, 1024):
        assert abs(sum(bucket.height == height for bucket in counts) - 500) < 5 * 18  # 5 standard deviations


def test_an_epoch_holds_every_sample_once_in_batches_of_one_shape():
    records = [
        record(*shape) for shape in ((100, 300, 300), (1, 640, 360), (20, 720, 1280), (9, 600, 600)) * 25
    ]
    plan = data.Plan((256, 512), max_tokens=13312, batch_tokens=13312)
    epochs = [data.epoch_batches(records, plan, seed=3, epoch=epoch) for epoch in range(3)]
    for batches in epochs:
        assert sorted(index for batch in batches for index in batch.indices) == list(range(100))
        full = {}
        for batch in batches:
            assert all(records[index].num_frames >= batch.bucket.num_frames for index in batch.indices)
            assert len(batch.indices) <= max(1, 13312 // batch.bucket.tokens)
            full.setdefault(batch.bucket, []).append(
                len(batch.indices) == max(1, 13312 // batch.bucket.tokens)
            )
        assert all(flags.count(False) <= 1 for flags in full.values())  # one short batch a bucket
    assert epochs[0] == data.epoch_batches(records, plan, seed=3, epoch=0)
    assert all(batches != sorted(batches, key=lambda batch: batch.indices) for batches in epochs)
    assert any(batch.indices != sorted(batch.indices) for batch in epochs[0])
    assert epochs[0] != epochs[1] and epochs[0] != data.epoch_batches(records, plan, seed=4, epoch=0)
    assert Bucket(9, 512, 256).tokens == 3 * 32 * 16
    table = data.bucket_table(epochs[0]).splitlines()
    assert sum(int(line.split()[5]) for line in table[1:]) == 100 and len(table) == 1 + len(
        {b.bucket for b in epochs[0]}
    )


# ---------------------------------------------------------------- draws


def test_a_draw_depends_on_what_it_is_for_and_on_nothing_else():
    def number(*key):
        return torch.rand((), generator=generator(*key)).item()

    keys = [(s, e, i, p) for s in range(3) for e in range(3) for i in range(12) for p in ("mask", "noise")]
    first = {key: number(*key) for key in keys}
    assert len(set(first.values())) == len(keys) and all(number(*key) == first[key] for key in reversed(keys))
    assert first[0, 0, 11, "mask"] != number(0, 0, 1, "1mask")
    # pinned: a run must resume on another machine and version with the same draws
    assert torch.randint(1000, (3,), generator=generator(1, 2, 3, "mask")).tolist() == [393, 535, 926]


def masks(num: int, *shape: int) -> list[torch.Tensor]:
    return [inpaint.random_mask(generator(0, 0, i, "mask"), *shape) for i in range(num)]


def kind_of(mask: torch.Tensor) -> str:
    """Which kind of mask this is, told from the mask alone."""
    f = len(mask)
    whole, empty = mask.flatten(1).all(1), ~mask.flatten(1).any(1)
    equal = bool((mask == mask[:1]).all())
    if whole.all():
        return "everything"
    if (whole | empty).all():
        kept = empty.nonzero().flatten().tolist()
        k = len(kept)
        if kept == list(range(k)) and k <= 4:
            return "after the start"
        if k % 2 == 0 and k <= 8 and kept == [*range(k // 2), *range(f - k // 2, f)]:
            return "between start and end"
        return "frames"
    some = mask[(~empty).nonzero()[0, 0]]
    rows, columns = some.any(1), some.any(0)
    is_box = bool((some == rows[:, None] & columns).all())
    if equal:
        return "box" if is_box else "disc"
    inner = (~empty).nonzero().flatten()
    if (mask[inner] == some).all() and is_box and inner[-1] - inner[0] + 1 == len(inner):
        return "box for a while" if len(inner) > 1 else "boxes"
    return "boxes" if mask.float().mean() < 0.25 else "pixels"


def test_masks_of_clips_come_in_the_shares_of_the_reference():
    num = 4000
    kinds = Counter(kind_of(mask) for mask in masks(num, 17, 32, 48))
    shares = {
        "everything": 0.2,
        "after the start": 0.2,
        "between start and end": 0.2,
        "disc": 0.15,  # ellipse .1, circle .05
        "box": 0.05,
        "box for a while": 0.05,
        "boxes": 0.05,
        "pixels": 0.05,
        "frames": 0.05,
    }
    assert kinds.keys() <= shares.keys()
    for kind, share in shares.items():
        # five standard deviations, and six for the rare draws that look like another kind
        assert abs(kinds[kind] - num * share) < 5 * (num * share * (1 - share)) ** 0.5 + 6, (kind, kinds)


def of_kind(kind: str, num: int, f: int, h: int, w: int) -> torch.Tensor:
    draws = [
        inpaint._mask_of_kind(kind, generator(1, 0, i, kind), f, h, w).expand(f, h, w) for i in range(num)
    ]
    return torch.stack(draws)  # num f h w


def test_masks_keep_one_to_four_frames_at_the_start_or_at_both_ends():
    after = of_kind("after the start", 200, 9, 2, 2)[..., 0, 0]
    assert {tuple(m.int().tolist()) for m in after} == {(0,) * k + (1,) * (9 - k) for k in (1, 2, 3, 4)}
    between = of_kind("between start and end", 200, 9, 2, 2)[..., 0, 0]
    assert {tuple(m.int().tolist()) for m in between} == {
        (0,) * k + (1,) * (9 - 2 * k) + (0,) * k for k in (1, 2, 3, 4)
    }
    for f in (2, 5, 8):  # too short for more than one
        assert of_kind("after the start", 20, f, 2, 2)[..., 0, 0].sum(1).tolist() == [f - 1] * 20
        assert of_kind("between start and end", 20, f, 2, 2)[..., 0, 0].sum(1).tolist() == [f - 2 or f] * 20


def off_border(mask: torch.Tensor) -> torch.Tensor:
    """Those of num h w masks that no border cuts."""
    return mask[~(mask[:, [0, -1]].flatten(1).any(1) | mask[:, :, [0, -1]].flatten(1).any(1))]


def extents(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Heights and widths of num h w masks."""
    return mask.any(2).sum(1), mask.any(1).sum(1)


def test_boxes_have_the_sizes_of_the_reference_and_lie_anywhere():
    h, w = 64, 96
    box = of_kind("box", 1000, 1, h, w)[:, 0]
    heights, widths = extents(box)
    assert heights.max() == 3 * h // 4 and widths.max() == 3 * w // 4  # nothing larger, and it is reached
    assert off_border(box).any(2).sum(1).min() == h // 4 and off_border(box).any(1).sum(1).min() == w // 4
    assert box[:, 0].any() and box[:, -1].any()  # a box near the border is cut
    for rows in (box.any(2), box.any(1)):  # around its centre: no side is preferred
        assert abs(rows[:, : rows.shape[1] // 2].sum() / rows.sum() - 0.5) < 0.03


def test_discs_have_the_sizes_of_the_reference_and_lie_anywhere():
    h, w = 64, 96
    circle, ellipse = (of_kind(kind, 600, 1, h, w)[:, 0] for kind in ("circle", "ellipse"))
    for disc in (circle, ellipse):
        assert disc.any(0)[[0, 0, -1, -1], [0, -1, 0, -1]].all()  # all four corners were reached
        for extent in extents(off_border(disc)):
            assert extent.min() == 2 * (h // 8) + 1 and extent.max() == 2 * (h // 4) + 1
    heights, widths = extents(off_border(circle))
    assert torch.equal(heights, widths)
    heights, widths = extents(off_border(ellipse))
    assert (heights > widths + 8).any() and (heights < widths - 8).any()
    fill = off_border(ellipse).flatten(1).sum(1) / ((heights - 1) * (widths - 1))
    assert ((fill - torch.pi / 4).abs() < 0.04).all()  # pixels of a disc in its bounding box


def test_masks_of_a_span_a_few_frames_and_single_pixels_are_as_described():
    f, h, w = 16, 32, 32
    span = of_kind("box for a while", 300, f, h, w).flatten(2).any(2)  # 300 f
    first = span.int().argmax(1)
    last = f - 1 - span.int().flip(1).argmax(1)
    assert first.max() == 7 and first.min() == 0 and last.min() >= 7 and last.max() == f - 2
    assert (span.sum(1) == last - first + 1).all()
    boxes = of_kind("boxes here and there", 300, f, h, w)
    frames = boxes.flatten(2).any(2).sum(1)
    assert frames.min() == 1 and frames.max() == f // 2
    for extent, side in ((boxes.any(3).sum(2), h), (boxes.any(2).sum(2), w)):
        assert extent.max() == side // 4 and extent[extent > 0].min() == 1
    pixels = of_kind("pixels", 4, f, h, w).float()
    assert abs(pixels.mean() - 0.5) < 5 * 0.5 / (4 * f * h * w) ** 0.5
    assert abs((pixels[:, 1:] * pixels[:, :-1]).mean() - 0.25) < 0.01  # neighbours in time know nothing
    assert abs((pixels[..., 1:] * pixels[..., :-1]).mean() - 0.25) < 0.01
    whole = of_kind("frames", 300, f, 2, 2)
    assert abs(whole.float().mean() - 0.5) < 5 * 0.5 / (300 * f) ** 0.5
    assert (whole == whole[..., :1, :1]).all()


def test_masks_of_pictures_are_a_box_or_everything():
    drawn = masks(2000, 1, 32, 32)
    assert all(mask.shape == (1, 32, 32) and mask.dtype == torch.bool for mask in drawn)
    kinds = Counter(kind_of(mask) for mask in drawn)
    assert kinds.keys() == {"everything", "box"} and abs(kinds["box"] - 400) < 5 * 18


def test_a_mask_costs_little_more_than_writing_it():
    """A few times a fill of its size, about 2 in all here: ten thousand a minute of 512×512×49."""

    def cpu_seconds(work) -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    fill = cpu_seconds(lambda: [torch.ones(49, 512, 512, dtype=torch.bool) for _ in range(200)])
    assert cpu_seconds(lambda: masks(200, 49, 512, 512)) < 6 * fill


def test_noise_on_the_reference_is_log_normal_and_spares_what_is_masked():
    logs = torch.tensor([inpaint.draw_noise_sigma(generator(0, 0, i, "sigma")) for i in range(2000)]).log()
    assert abs(logs.mean() + 3) < 5 * 0.5 / 2000**0.5 and abs(logs.std() - 0.5) < 5 * 0.5 / 4000**0.5
    pixels = torch.tensor([-1.0, -0.999, 0.0, 1.0])
    noisy = inpaint.add_reference_noise(pixels, 0.1, torch.tensor([1.0, 2.0, -3.0, 4.0]))
    assert torch.equal(noisy, torch.tensor([-1.0, -0.999 + 0.1 * 2, 0.1 * -3, 1 + 0.1 * 4]))


# ---------------------------------------------------------------- loading


def test_a_sample_is_drawn_from_its_key_alone(tmp_path):
    make_files(tmp_path)
    for item in items():
        (tmp_path / item["file_path"]).with_suffix(".txt").write_text(item["text"])
    records, _ = data.open_records(data.read_metadata(tmp_path))
    bucket = Bucket(17, 32, 32)
    sample = data.load_sample(records[0], bucket, 1, 2, 0)
    again = data.load_sample(records[0], bucket, 1, 2, 0)
    assert sample.pixels.shape == (3, 17, 32, 32) and sample.mask.shape == (17, 32, 32)
    assert torch.equal(sample.pixels, again.pixels) and torch.equal(sample.mask, again.mask)
    starts, captions, flags = Counter(), Counter(), Counter()
    seen = []
    drawing = record(
        20,
        32,
        32,
        "d",
        lambda start, n, size: seen.append((start, size)) or np.zeros((n, *size, 3), np.uint8),
    )
    for index in range(1000):
        sample = data.load_sample(drawing, bucket, 1, 2, index)
        captions[sample.caption] += 1
        flags[sample.zero_if_all_masked] += 1
    starts = Counter(start for start, _ in seen)
    assert {size for _, size in seen} == {(32, 32)} and sorted(starts) == [0, 1, 2, 3]
    assert min(starts.values()) > 180  # 250 ± 5 standard deviations of 14
    assert captions.keys() == {"", "d in 17"} and 53 < captions[""] < 147 and 53 < flags[False] < 147


def test_control_clips_are_cut_like_their_clips(tmp_path):
    make_files(tmp_path)
    item = {"file_path": "a.mp4", "text": "", "type": "video", "control_file_path": "a.mp4"}
    (tmp_path / "meta.json").write_text(json.dumps([item]))
    records, _ = data.open_records(data.read_metadata(tmp_path / "meta.json"))
    sample = data.load_sample(records[0], Bucket(9, 32, 48), 0, 0, 5)
    assert torch.equal(sample.control, sample.pixels)  # the same frames and the same cut
    (tmp_path / "meta.json").write_text(json.dumps([{**item, "control_file_path": "b.mp4"}]))
    records, _ = data.open_records(data.read_metadata(tmp_path / "meta.json"))
    assert records[0].num_frames == 16 and records[0].size == (48, 64)  # what both fill, the clip's own size
    assert not torch.equal(data.load_sample(records[0], Bucket(9, 32, 48), 0, 0, 5).control, sample.control)


def still(name: str, fails: bool = False) -> data.Record:
    def read(start, num_frames, size):
        if fails:
            raise ValueError(f"{name} is damaged")
        return np.full((num_frames, *size, 3), int(name), np.uint8)

    return record(1, 32, 32, name, read)


def load_all(loader: data.Loader, seed: int = 0, epochs: int = 2) -> list:
    plan = data.Plan((32,), max_tokens=4, batch_tokens=12)  # three pictures of four tokens
    batches = [(e, b) for e in range(epochs) for b in data.epoch_batches(loader.records, plan, seed, e)]
    loaded = list(loader.batches(batches))
    assert [(epoch, batch) for epoch, batch, _ in loaded] == batches
    return [media.to_uint8(sample.pixels)[:, 0, 0, 0, 0].tolist() for _, _, sample in loaded]


def test_batches_come_in_order_whatever_the_number_of_threads():
    records = [still(str(i)) for i in range(40)]
    one = load_all(data.Loader(records, 0, num_workers=1))
    assert one == load_all(data.Loader(records, 0, num_workers=7))
    assert Counter(sum(one, [])) == {i: 2 for i in range(40)}
    _, batch, sample = next(data.Loader(records, 0).batches([(0, data.Batch(Bucket(1, 32, 32), [3, 4]))]))
    assert sample.pixels.shape == (2, 3, 1, 32, 32) and sample.mask.shape == (2, 1, 32, 32)
    assert (
        len(sample.caption) == 2 and sample.zero_if_all_masked.dtype == torch.bool and sample.control is None
    )


def test_batches_are_loaded_ahead_of_their_use():
    records = [still(str(i)) for i in range(20)]
    loader, loaded = data.Loader(records, 0), []
    loader.load = lambda bucket, epoch, index: (
        loaded.append(index) or data.Loader.load(loader, bucket, epoch, index)
    )
    todo = [(0, data.Batch(Bucket(1, 32, 32), [i])) for i in range(20)]
    batches = loader.batches(todo, ahead=3)
    next(batches)
    begin = time.time()
    while len(loaded) < 4 and time.time() - begin < 10:
        time.sleep(0.01)
    assert sorted(loaded) == [0, 1, 2, 3]
    batches.close()


def test_a_broken_file_is_named_once_and_replaced_by_the_next_that_is_long_enough():
    records = [still(str(i), fails=i in (3, 4)) for i in range(40)]
    said = []
    loader = data.Loader(records, 0, say=said.append)
    counts = Counter(sum(load_all(loader), []))
    assert counts == {i: 6 if i == 5 else 2 for i in range(40) if i not in (3, 4)}
    assert sorted(said) == ["skipped: 3 is damaged", "skipped: 4 is damaged"] and set(loader.failures) == {
        "3",
        "4",
    }
    long = [record(9, 32, 32, "7", lambda start, n, size: np.full((n, *size, 3), 7, np.uint8))]
    loader = data.Loader([still("0", fails=True), still("1"), *long], 0, say=said.append)
    pixels = loader.load(Bucket(9, 32, 32), 0, 0).pixels
    assert pixels.shape[1] == 9 and (media.to_uint8(pixels) == 7).all()


def test_too_many_broken_files_stop_the_run_with_the_list():
    records = [still(str(i), fails=i < 3) for i in range(40)]
    with pytest.raises(ValueError, match=r"0 is damaged\n  1 is damaged\n  2 is damaged"):
        load_all(data.Loader(records, 0, say=lambda line: None))
    half = [still(str(i), fails=i < 2) for i in range(30)]
    with pytest.raises(ValueError, match="2 of 30"):
        load_all(data.Loader(half, 0, say=lambda line: None))
    load_all(data.Loader(half[1:5], 0, say=lambda line: None))  # one is forgiven in the smallest set
    with pytest.raises(ValueError, match="3 of 40 (.|\n)*2no.mp4 is empty"):
        data.Loader(
            records[3:], 0, {f"{i}no.mp4": f"{i}no.mp4 is empty" for i in range(3)}, say=lambda line: None
        )


def test_a_clip_that_ends_before_its_header_says_is_a_broken_file(tmp_path):
    make_files(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps(items()[:1]))
    records, _ = data.open_records(data.read_metadata(tmp_path / "meta.json"))
    encode(tmp_path / "a.mp4", 30)
    with pytest.raises(ValueError, match="a.mp4 ends 9 frames before its header says"):
        data.load_sample(records[0], Bucket(17, 32, 32), 0, 0, index=6)
    (tmp_path / "a.mp4").write_bytes(b"")
    records, failures = data.open_records(data.read_metadata(tmp_path / "meta.json"))
    assert records == [] and "a.mp4" in failures[str(tmp_path / "a.mp4")]
