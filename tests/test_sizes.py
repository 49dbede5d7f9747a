"""sizes.py: the report's table of frames, shapes of equal area, grids and the sizes a model takes."""

import pytest

import sizes
from sizes import Bucket, aspect_shapes, frames_for, nearest_shape, num_tokens


def test_four_frames_are_one_latent_but_the_first_is_one_alone():
    assert [sizes.latent_frames(f) for f in (1, 5, 8, 9, 49)] == [1, 2, 2, 3, 13]
    assert [sizes.video_frames(f) for f in (1, 2, 13)] == [1, 5, 49]
    assert sizes.latent_grid(49, 480, 720) == (13, 60, 90) == Bucket(49, 480, 720).latent_grid
    assert num_tokens(49, 512, 512) == 13312 == Bucket(49, 512, 512).tokens
    assert num_tokens(49, 512, 512, frames_per_token=2) == 7 * 32 * 32  # thirteen in pairs, one is padding


def test_sizes_a_model_does_not_take_are_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"num_frames=48; .* try 49 \(or 45\)"):
        sizes.check_frames(48)
    with pytest.raises(ValueError, match="--height=470; .* try 464"):
        sizes.check_side("--height", 470)


def test_frames_fill_a_budget_and_exceed_it_by_a_fifth_at_most():
    for budget, frames in {80: [17, 5, 1], 180: [17, 17, 9], 320: [17, 17, 17]}.items():  # the tiny preset
        assert [frames_for(budget, size, size, max_frames=17) for size in (64, 96, 128)] == frames
    for budget in (13312, 29952, 53248):  # the report's; its table is in docs/facts.md
        for size in range(512, 1281, 16):
            frames = frames_for(budget, size, size, 10_000)
            assert num_tokens(frames, size, size) <= 1.2 * budget
    assert frames_for(13312, 256, 1024) == 49 and frames_for(1, 512, 512) == 1
    in_pairs = [frames_for(29952, size, size, 85, frames_per_token=2) for size in (512, 1024, 1280)]
    assert in_pairs == [85, 21, 13]


@pytest.mark.parametrize("size, num_shapes", [(64, 9), (512, 41), (768, 41), (1024, 41)])
def test_shapes_reach_from_1_to_4_to_4_to_1_at_equal_area(size, num_shapes):
    shapes = aspect_shapes(size)
    assert len(shapes) == num_shapes and (size, size) in shapes
    assert {(size // 2, size * 2), (size * 2, size // 2)} <= set(shapes)
    for height, width in shapes:
        assert height % 16 == 0 == width % 16 and (width, height) in shapes
        assert abs(height * width / size**2 - 1) < (0.13 if size == 64 else 0.03)  # half a step of 16


def test_the_nearest_shape_is_nearest_in_the_ratio_of_its_sides():
    assert nearest_shape(512, 300, 300) == (512, 512) and nearest_shape(16, 9, 10) == (16, 16)
    assert nearest_shape(512, 720, 1280) == tuple(reversed(nearest_shape(512, 1280, 720)))
    height, width = nearest_shape(512, 720, 1280)
    assert abs(width / height / (1280 / 720) - 1) < 0.06  # half a step, 2 ** (1/20), and half a step of 16
    assert nearest_shape(512, 1, 100) == (256, 1024)
