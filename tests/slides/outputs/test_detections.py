"""Points of candidate lesions, compared with a loop over all pairs of windows."""

import csv

import numpy as np
import pytest

from bef_jax.slides.outputs import detections
from bef_jax.slides.outputs.detections import detect, write_detections
from tests.slides.outputs.fake_slide import map_of


def by_brute_force(probability, threshold, radius, pitch):
    left = {place: value for place, value in np.ndenumerate(probability) if value >= threshold}
    found = []
    while left:
        best = min(left, key=lambda place: (-left[place], place))
        found.append(best)
        left = {
            (r, c): value
            for (r, c), value in left.items()
            if ((r - best[0]) * pitch[1]) ** 2 + ((c - best[1]) * pitch[0]) ** 2 > radius**2
        }
    return found


@pytest.mark.parametrize("seed", range(40))
def test_detections_are_those_of_a_loop_over_all_pairs(seed, monkeypatch):
    monkeypatch.setattr(detections, "_ROUND", 50)
    rng = np.random.default_rng(seed)
    probability = rng.integers(0, 1 + rng.choice([2, 5, 1000]), rng.integers(1, 30, 2)) / 10
    probability[rng.random(probability.shape) < 0.2] = np.nan
    pitch = tuple(rng.choice([30.0, 31.104, 40.0], 2))
    radius = rng.choice([0, 29.9, 62.3, 200, 1e5])
    found = detect(probability, 0.1, radius, pitch)
    assert list(map(tuple, found.tolist())) == by_brute_force(probability, 0.1, radius, pitch)


def test_a_plateau_gives_one_point():
    probability = np.zeros((9, 9))
    probability[3:6, 3:6] = 1
    assert detect(probability, 0.5, 200, (32, 32)).tolist() == [[3, 3]]


def test_points_are_the_middles_of_windows_in_the_slide(tmp_path):
    probability = np.full((40, 40), 0.05)
    probability[3, 5], probability[39, 39], probability[20, 20] = 0.5, 0.75, 0.1 + 0.2
    found, slide = map_of(probability)
    assert write_detections(tmp_path / "a.csv", found, 0.1, 200) == 3
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["x", "y", "probability"]
    # The window in the corner ends past the edge; its middle is the last pixel of the slide.
    last = slide.levels[0].width - 1
    assert rows[1] == [str(last), str(last), "0.75"]
    assert rows[2] == [str(5 * 128 + 64), str(3 * 128 + 64), "0.5"]
    assert rows[3] == [str(20 * 128 + 64), str(20 * 128 + 64), "0.30000000000000004"]


def test_no_candidate_leaves_only_the_head(tmp_path):
    found, _ = map_of(np.full((4, 4), np.nan))
    assert write_detections(tmp_path / "a.csv", found, 0.0, 200) == 0
    assert (tmp_path / "a.csv").read_text() == "x,y,probability\n"
