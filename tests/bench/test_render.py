import jax
import pytest

from msdspn_jax.bench.render import bench_render, operations_per_image
from msdspn_jax.clevr.sampling import sample_scenes


@pytest.mark.slow
def test_the_benchmark_adds_up():
    result = bench_render(16, "fast", batch=2, repeat=2)
    assert 0 < result["procedural_images_per_second"] < result["images_per_second"]
    rate = result["operations_per_image"] * result["images_per_second"]
    assert result["operations_per_second"] == pytest.approx(rate)
    assert 0 < result["share_of_machine"] < 1


@pytest.mark.slow
def test_operations_grow_with_samples():
    scenes = sample_scenes(jax.random.key(0), 1)
    fast, default, high = (operations_per_image(scenes, 8, q) for q in ("fast", "default", "high"))
    # Four times the samples, less what is shaded once a pixel; "high" casts more shadows as well.
    assert 3 < default / fast < 4
    assert 3.5 < high / default < 4.5
