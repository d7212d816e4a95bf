"""Masks, ASAP's files and GeoJSON, compared with shapely and with plain indexing."""

import gzip
import json
import logging
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import pytest
import shapely
import tifffile

from bef_jax.errors import UserError
from bef_jax.slides.annotations import masks, polygons, read_annotation
from tests.slides.truth_files import CORNERS, closed, feature, write_asap, write_geojson, write_mask

SIZE = (1300, 1000)  # of the slide
HOLE = ((40.0, 40.0), (70.0, 40.0), (70.0, 60.0), (40.0, 60.0))
WHOLE = ((1, 1), (SIZE[1], SIZE[0]))  # scale and shape


def area(file, scale=(1, 1), shape=(SIZE[1], SIZE[0]), x=0, y=0, size=SIZE):
    return read_annotation(file, size).area(x, y, scale, shape)


def centres(x, y, scale, shape):
    """Returns the centres of a rectangle's pixels, in pixels of level 0."""
    rows, columns = np.indices(shape)
    return x + (columns + 0.5) * scale[0], y + (rows + 0.5) * scale[1]


def random_ring(rng, count=40, side=1000):
    """Returns a polygon that may cross itself."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, count))
    radii = rng.uniform(side / 20, side / 2, count)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1) + side / 2


# ---- polygons -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_polygons_with_holes_are_those_of_shapely(seed, tmp_path):
    rng = np.random.default_rng(seed)
    outer = random_ring(rng)
    hole = random_ring(rng, 8, 300) + 300
    inner = shapely.Polygon(outer).intersection(shapely.Polygon(hole).buffer(0)).buffer(-1)
    holes = [] if inner.geom_type != "Polygon" or inner.is_empty else [inner.exterior.coords[:]]
    drawn = shapely.Polygon(outer, holes)
    file = write_geojson(tmp_path / "a.geojson", [feature([closed(outer), *holes])])
    scale, shape = (rng.uniform(5, 9), rng.uniform(5, 9)), (131, 117)
    x, y = rng.uniform(-200, 200, 2)
    right = shapely.contains_xy(drawn, *centres(x, y, scale, shape))
    assert right.any()
    np.testing.assert_array_equal(area(file, scale, shape, x, y), right)


def test_a_rectangle_has_the_pixels_whose_centres_it_has(tmp_path):
    file = write_asap(tmp_path / "a.xml", [("_0", [(2, 3), (7, 3), (7, 5), (2, 5)])])
    right = np.zeros((10, 10), bool)
    right[3:5, 2:7] = True
    np.testing.assert_array_equal(area(file, (1, 1), (10, 10)), right)
    corners = write_asap(tmp_path / "b.xml", [("_0", [(2, 3), (7, 5)])], "Rectangle")
    np.testing.assert_array_equal(area(corners, (1, 1), (10, 10)), right)


def test_neighbouring_polygons_share_no_pixel_and_leave_none_out(tmp_path):
    """Edges through centres of pixels: each centre belongs to one side only."""
    points = [(0.5, 0.5), (20.5, 0.5), (20.5, 20.5), (0.5, 20.5), (7.5, 9.5)]
    outer, middle = points[:4], points[4]
    parts = []
    for number, (a, b) in enumerate(zip(outer, outer[1:] + outer[:1], strict=True)):
        file = write_asap(tmp_path / f"{number}.xml", [("Tumor", [a, b, middle])])
        parts.append(area(file, (1, 1), (21, 21)))
    assert sum(part.astype(int) for part in parts).max() == 1
    np.testing.assert_array_equal(
        np.any(parts, axis=0),
        area(write_asap(tmp_path / "a.xml", [("Tumor", outer)]), (1, 1), (21, 21)),
    )


def test_where_a_polygon_crosses_itself_even_is_outside(tmp_path):
    angles = np.arange(5) * 0.8 * np.pi
    star = np.stack([50 + 40 * np.sin(angles), 50 - 40 * np.cos(angles)], axis=1)
    found = area(write_asap(tmp_path / "a.xml", [("Tumor", star)]), (1, 1), (100, 100))
    assert not found[50, 50] and found[20, 50] and found.any()


def test_many_edges_are_computed_in_parts(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    file = write_asap(tmp_path / "a.xml", [("Tumor", random_ring(rng, 500))])
    whole = area(file)
    monkeypatch.setattr(polygons, "_CROSSINGS", 1000)
    np.testing.assert_array_equal(area(file), whole)


def test_exclusion_wins_in_every_order(tmp_path):
    groups = ["exclusion", "Exclusion", "_2", "normal", "Normal", "exclude"]
    for order in (1, -1):
        for group in groups:
            shapes = [("_1", CORNERS), (group, HOLE)][::order]
            found = area(write_asap(tmp_path / "a.xml", shapes))
            classes = [feature([closed(points)], name) for name, points in shapes]
            np.testing.assert_array_equal(
                area(write_geojson(tmp_path / "a.json", classes)), found, group
            )
            assert found[30, 30] and not found[50, 50]


@pytest.mark.parametrize("group", ["_0", "_1", "Tumor", "tumour", "metastases", "None", ""])
def test_groups_of_tumour(group, tmp_path):
    assert area(write_asap(tmp_path / "a.xml", [(group, CORNERS)]))[50, 50]


def test_an_unknown_group_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a.xml: annotation 1 \(A0\) is of 'Stroma'.*rename"):
        area(write_asap(tmp_path / "a.xml", [("Stroma", CORNERS)]))
    with pytest.raises(UserError, match=r"a.json: feature 1 is of 'Stroma'.*rename"):
        area(write_geojson(tmp_path / "a.json", [feature([closed(CORNERS)], "Stroma")]))


def test_kinds_of_geojson(tmp_path):
    right = area(write_asap(tmp_path / "a.xml", [("Tumor", CORNERS), ("exclusion", HOLE)]))
    holed = [closed(CORNERS), closed(HOLE)]
    one = feature(holed)
    kinds = {
        "geometry": one["geometry"],
        "feature": one,
        "list": [one],
        "multi": feature([holed], "Tumor: Positive", "MultiPolygon"),
        "star": [feature([closed(CORNERS)], "Tumor"), feature([closed(HOLE)], "Ignore*")],
        "names": one | {"properties": {"classification": {"names": ["Tumor", "CD8"]}}},
        "no place": [one, {"type": "Feature", "geometry": None, "properties": None}],
        "open": feature([holed[0][:-1], holed[1][:-1]]),
        "deep": feature([[[*point, 7.0] for point in ring] for ring in holed]),
    }
    for name, content in kinds.items():
        (tmp_path / "b.json").write_text(json.dumps(content))
        np.testing.assert_array_equal(area(tmp_path / "b.json"), right, name)
    (tmp_path / "b.geojson.gz").write_bytes(gzip.compress(json.dumps(one).encode()))
    np.testing.assert_array_equal(area(tmp_path / "b.geojson.gz"), right)


def test_what_has_no_area_is_left_out_and_counted(tmp_path, caplog):
    points = feature([5, 5], kind="Point"), feature([[1, 1], [2, 2]], kind="LineString")
    write_geojson(tmp_path / "a.json", [*points, feature([closed(CORNERS)])])
    write_asap(tmp_path / "a.xml", [("anything", CORNERS[:1])] * 3, "Dot")
    with caplog.at_level(logging.WARNING, "bef_jax"):
        assert area(tmp_path / "a.json").any()
        assert not area(tmp_path / "a.xml").any()
    assert "2 features have no area" in caplog.text
    assert "3 annotations have no area" in caplog.text


@pytest.mark.parametrize(
    "points", [[], [(5, 5)], [(5, 5), (90, 90)], [(5, 5), (90, 90), (5, 5)], [(1, 9), (99, 9)]]
)
def test_shapes_without_area_have_no_pixels(points, tmp_path):
    for kind in ("Polygon", "Spline"):
        assert not area(write_asap(tmp_path / "a.xml", [("Tumor", points)], kind)).any()
    ring = [list(point) for point in points]
    assert not area(write_geojson(tmp_path / "a.json", [feature([ring])])).any()


BOMB = """<?xml version="1.0"?><!DOCTYPE a [<!ENTITY a "aaaaaaaaaa">
<!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]><ASAP_Annotations>&b;</ASAP_Annotations>"""
OUTSIDE = """<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><ASAP_Annotations>&x;"""
ROOT = "<ASAP_Annotations><Annotations><Annotation Name='A' Type='Polygon' PartOfGroup='_0'>"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xml", BOMB, "has a DOCTYPE"),
        ("a.xml", OUTSIDE, "has a DOCTYPE"),
        ("a.xml", "", "cannot be read as XML"),
        ("a.xml", "\0\1\2", "cannot be read as XML"),
        ("a.xml", ROOT, "cannot be read as XML"),
        ("a.xml", "<?xml version='1.0' encoding='nothing'?><a/>", "cannot be read as XML"),
        ("a.xml", "<Annotations MicronsPerPixel='0.2'/>", "is not a file of ASAP"),
        ("a.xml", ROOT + "<Coordinate X='a' Y='1'/>", r"annotation 1 \(A\) has a point"),
        ("a.xml", ROOT + "<Coordinate X='1'/>", r"annotation 1 \(A\) has a point"),
        ("a.xml", ROOT + "<Coordinate X='nan' Y='1'/></Annotation>", "outside of any slide"),
        ("a.xml", ROOT + "<Coordinate X='1e300' Y='1'/></Annotation>", "outside of any slide"),
        ("a.json", "", "cannot be read as GeoJSON"),
        ("a.json", "[" * 100_000, "cannot be read as GeoJSON"),
        ("a.json", "7", "is not GeoJSON"),
        ("a.json", "[7]", "is not GeoJSON"),
        ("a.json", '{"type": "FeatureCollection"}', "is not GeoJSON"),
        ("a.json", '{"type": "Polygon"}', "feature 1 has no lists of points"),
        ("a.json", '{"type": "Polygon", "coordinates": [[1, 2]]}', "feature 1 has a point"),
        ("a.json", '{"type": "Polygon", "coordinates": [[["1", "2"]]]}', "feature 1 has a point"),
        ("a.json", '{"type": "Polygon", "coordinates": [[[1]]]}', "feature 1 has a point"),
        ("a.json", '{"type": "Polygon", "coordinates": [[[1, NaN]]]}', "outside of any slide"),
        ("a.json", f'{{"type": "Polygon", "coordinates": [[[1, {10**400}]]]}}', "feature 1 has a"),
        ("a.json", '{"type": "GeometryCollection"}', "neither a Polygon nor"),
        ("a.json", '[{"type": "Feature", "geometry": 3}]', "neither a Polygon nor"),
        ("a.geojson.gz", "no gzip", "cannot be read as GeoJSON"),
        ("a_mask.tif", "II*\0", "cannot be read as a mask"),
        ("a_mask.tif", "", "cannot be read as a mask"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(name, content, words, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as error:
        area(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_packed_file_that_grows_is_refused(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(bytes(200 << 20), 9))
    with pytest.raises(UserError, match="longer than 96 MiB"):
        area(tmp_path / "a.json.gz")


@pytest.mark.slow
def test_a_million_points(tmp_path):
    angles = np.linspace(0, 2 * np.pi, 1_000_000, endpoint=False)
    points = np.stack([500 + 300 * np.cos(angles), 500 + 300 * np.sin(angles)], axis=1)
    rows, columns = np.indices((1000, 1300)) + 0.5
    right = np.hypot(rows - 500, columns - 500) < 300
    write_asap(tmp_path / "a.xml", [("Tumor", points)])
    write_geojson(tmp_path / "a.json", [feature([closed(points)])])
    for name in ("a.xml", "a.json"):
        np.testing.assert_array_equal(area(tmp_path / name), right)


# ---- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("colours", [1, 3])
def test_alpha_is_no_tumour(colours, tmp_path):
    truth = np.random.default_rng(0).random((100, 130)) < 0.3
    pixels = np.full((100, 130, colours + 1), 255, np.uint8)
    pixels[..., :colours] *= truth[..., None]
    kind = "rgb" if colours == 3 else "minisblack"
    options = {"photometric": kind, "extrasamples": ["unassalpha"], "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "a_mask.tif", pixels, **options)
    np.testing.assert_array_equal(area(tmp_path / "a_mask.tif", (10, 10), truth.shape), truth)


def test_a_mask_whose_0_is_white_is_refused(tmp_path):
    truth = np.zeros((100, 130), np.uint8)
    tifffile.imwrite(tmp_path / "a_mask.tif", truth, photometric="miniswhite")
    with pytest.raises(UserError, match=r"a_mask.tif: says that 0 is white"):
        read_annotation(tmp_path / "a_mask.tif", SIZE)


KINDS = {
    "one strip": {},
    "strips": {"rowsperstrip": 7},
    "tiles": {"tile": (64, 96)},
    "deflate": {"tile": (64, 64), "compression": "deflate"},
    "lzw": {"rowsperstrip": 100, "compression": "lzw"},
    "bigtiff": {"tile": (256, 256), "compression": "zlib", "predictor": True, "bigtiff": True},
}


def random_mask(shape=(SIZE[1], SIZE[0])):
    return np.random.default_rng(0).random(shape) < 0.3


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_read_at_the_centres_of_pixels(kind, value, tmp_path):
    mask = random_mask()
    file = write_mask(tmp_path / "a_mask.tif", mask, value, **KINDS[kind])
    np.testing.assert_array_equal(area(file), mask)
    padded = area(file, shape=(1040, 1320), x=-10, y=-20)
    np.testing.assert_array_equal(padded, np.pad(mask, ((20, 20), (10, 10))))
    np.testing.assert_array_equal(area(file, (4, 4), (250, 325)), mask[2::4, 2::4])
    x, y = (np.floor(each).astype(int) for each in centres(31.7, 5.2, (2.6, 1.9), (99, 88)))
    np.testing.assert_array_equal(area(file, (2.6, 1.9), (99, 88), 31.7, 5.2), mask[y, x])


@pytest.mark.parametrize("size", [(13_000, 10_000), (13_009, 10_009), (12_995, 9_991)])
def test_a_small_mask_is_scaled_by_the_size_of_the_slide(size, tmp_path):
    """10 pixels for one, also where the size of the level was rounded."""
    mask = random_mask()
    file = write_mask(tmp_path / "a_mask.tif", mask)
    np.testing.assert_array_equal(area(file, (10, 10), size=size), mask)
    x, y = (np.floor(each / 10).astype(int) for each in centres(55, 5, (5, 5), (9, 8)))
    np.testing.assert_array_equal(area(file, (5, 5), (9, 8), 55, 5, size), mask[y, x])


def test_the_level_that_fits_is_read(tmp_path):
    levels = [random_mask((1024 >> k, 1280 >> k)) for k in range(4)]
    with tifffile.TiffWriter(tmp_path / "a_mask.tif") as tif:
        for number, mask in enumerate(levels):
            tif.write(mask.astype(np.uint8), tile=(64, 64), subfiletype=int(number > 0))
    file = tmp_path / "a_mask.tif"
    for number, mask in enumerate(levels):
        factor = 1 << number
        found = area(file, (factor, factor), mask.shape, size=(1280, 1024))
        np.testing.assert_array_equal(found, mask)
    found = area(file, (3, 3), (341, 426), size=(1280, 1024))
    x, y = (np.floor(each / 2).astype(int) for each in centres(0, 0, (3, 3), (341, 426)))
    np.testing.assert_array_equal(found, levels[1][y, x])


def test_parts_that_were_dropped_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "_MOST_KEPT", 64 * 64 * 3)
    mask = random_mask()
    file = write_mask(tmp_path / "a_mask.tif", mask, tile=(64, 64), compression="deflate")
    annotation = read_annotation(file, SIZE)
    for _ in range(2):
        np.testing.assert_array_equal(annotation.area(0, 0, *WHOLE), mask)


def test_a_large_mask_is_never_in_memory_as_a_whole(tmp_path):
    """40,000 x 40,000 pixels are 1.6 GB."""
    part = np.zeros((512, 512), np.uint8)
    part[100:200, 50:300] = 255
    encoded = imagecodecs.zlib_encode(part)
    with tifffile.TiffWriter(tmp_path / "a_mask.tif") as tif:
        parts = (encoded if number % 3 == 0 else b"" for number in range(79 * 79))
        shape = (40_000, 40_000)
        tif.write(parts, shape=shape, dtype=np.uint8, tile=(512, 512), compression="zlib")
    tracemalloc.start()
    found = area(tmp_path / "a_mask.tif", (32, 32), (1250, 1250), size=shape)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    tiles = (np.arange(79 * 79) % 3 == 0).reshape(79, 79)
    right = np.kron(tiles, part[16::32, 16::32] > 0)[:1250, :1250]
    np.testing.assert_array_equal(found, right)


def test_several_threads_read_one_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(masks, "_MOST_KEPT", 64 * 64 * 3)
    mask = random_mask()
    file = write_mask(tmp_path / "a_mask.tif", mask, tile=(64, 64), compression="deflate")
    annotation = read_annotation(file, SIZE)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: annotation.area(0, 0, *WHOLE), range(8)):
            np.testing.assert_array_equal(found, mask)


def test_masks_of_colours_and_of_bits(tmp_path):
    mask = random_mask()
    colours = np.zeros((*mask.shape, 3), np.uint8)
    colours[..., 1] = mask * 9
    tifffile.imwrite(tmp_path / "rgb_mask.tif", colours, photometric="rgb", tile=(64, 64))
    tifffile.imwrite(tmp_path / "bits_mask.tif", mask, photometric="minisblack")
    for name in ("rgb_mask.tif", "bits_mask.tif"):
        np.testing.assert_array_equal(area(tmp_path / name), mask)


def test_masks_that_cannot_be_read_are_refused(tmp_path):
    file = write_mask(tmp_path / "a_mask.tif", random_mask(), compression="deflate")
    with pytest.raises(UserError, match=r"a_mask.tif: 1300x1000 pixels do not fit"):
        area(file, size=(1000, 1300))
    content = bytearray(file.read_bytes())
    with tifffile.TiffFile(file) as tif:
        start, count = tif.pages.first.dataoffsets[0], tif.pages.first.databytecounts[0]
    content[start : start + count] = bytes(count)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"a_mask.tif: damaged"):
        area(file)
    file.write_bytes(content[: start + 10])
    with pytest.raises(UserError, match=r"a_mask.tif: "):
        area(file)


def test_mask_xml_and_geojson_of_one_shape_agree(tmp_path):
    write_asap(tmp_path / "a.xml", [("Tumor", CORNERS), ("_2", HOLE)])
    found = area(tmp_path / "a.xml")
    write_geojson(tmp_path / "a.json", [feature([closed(CORNERS), closed(HOLE)])])
    write_mask(tmp_path / "a_mask.tif", found, 1)
    for name in ("a.json", "a_mask.tif"):
        np.testing.assert_array_equal(area(tmp_path / name), found)
