"""Faces: any picture decoded or refused, the published crop and its inverse, detectors with and without their files, the cache."""
import importlib.util
import io
import os
import pickle
import socket
import struct
import types
import zlib

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageOps
from skimage.transform import estimate_transform, warp

from emoca_nb import faces
from emoca_nb.core import AssetMissing, BadFile, EmocaError, UnsafeFile
from emoca_nb.faces import (BadImage, Crop, Face, crop_from_box, crop_from_landmarks, crop_whole, detect, detect_folder, read_crop,
                            read_image)

PHOTO = skimage.data.astronaut()
HAS_DLIB = importlib.util.find_spec("dlib") and importlib.util.find_spec("face_recognition_models")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
needs_dlib = pytest.mark.skipif(not HAS_DLIB, reason="needs the `dlib` extra")


@pytest.fixture(autouse=True)
def own_data(tmp_path, monkeypatch):
    """A data folder, a folder of torch's checkpoints, and no network."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("EMOCA_NB_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("EMOCA_NB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was asked"))
    return tmp_path / "data"


def stored(picture, format, **options):
    file = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(file, format, **options)
    return file.getvalue()


def turned(picture, orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(picture, format, exif=exif)


def png16(a):
    """A PNG of 16 bits a channel, for kinds that Pillow does not write."""
    h, w, c = a.shape
    rows = b"".join(b"\0" + a[i].astype(">u2").tobytes() for i in range(h))
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


# --- pictures -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [dict(), dict(quality=40), dict(progressive=True), dict(subsampling=0)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_have_the_pixels_that_pillow_gives(mode, options):
    raw = stored(Image.fromarray(PHOTO[:333, :471]).convert(mode), "JPEG", **options)
    np.testing.assert_array_equal(read_image(raw), np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_upright(format, orientation):
    raw = turned(PHOTO[:64, :96], orientation, format)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB"))
    np.testing.assert_array_equal(read_image(raw), upright)
    np.testing.assert_array_equal(read_image(Image.open(io.BytesIO(raw))), upright)
    assert upright.shape == ((96, 64, 3) if orientation > 4 else (64, 96, 3)) and read_image(raw).flags.c_contiguous


@pytest.mark.parametrize("orientation", [99, 0])
def test_an_orientation_that_does_not_exist_is_ignored(orientation):
    assert read_image(turned(PHOTO[:64, :96], orientation, "JPEG")).shape == (64, 96, 3)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_scaled_not_clipped(channels):
    eight = np.random.default_rng(0).integers(0, 256, (12, 20, channels), dtype=np.uint8)
    if channels in (2, 4): eight[..., -1] = 255
    expected = np.broadcast_to(eight[..., :max(channels - 1, 1) if channels in (2, 4) else channels], (12, 20, 3))
    assert np.abs(read_image(png16(eight.astype(np.uint16) * 257)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("raw, top", [(np.uint16, 65535), (np.float32, 1), (np.float32, 255), (np.int32, 65535), (np.int32, 2**31 - 1)], ids=str)
def test_tiffs_of_many_depths(raw, top):
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    out = read_image(stored(Image.fromarray((ramp * top).astype(raw)), "TIFF"))
    assert np.abs(out[..., 0] - ramp * 255).max() <= 1


def test_floats_beyond_brightness_are_refused():
    for bad in (np.full((16, 16), 3e4, np.float32), np.full((16, 16), -1, np.float32), np.full((16, 16), np.nan, np.float32)):
        with pytest.raises(BadImage, match="brightness"): read_image(stored(Image.fromarray(bad), "TIFF"))
        with pytest.raises(BadImage, match="brightness"): read_image(bad)


def test_transparency_shows_the_background():
    rgba = np.dstack([PHOTO[:32, :32], np.zeros((32, 32), np.uint8)])
    rgba[:, 16:, 3] = 255
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    for raw in (stored(rgba, "PNG"), stored(rgba, "WEBP", lossless=True, exact=True)):
        np.testing.assert_array_equal(read_image(raw)[:, 16:], PHOTO[:32, 16:32])
        assert (read_image(raw)[:, :16] == 255).all() and (read_image(raw, background=(1, 2, 3))[:, :16] == [1, 2, 3]).all()
    assert (read_image(stored(palette, "PNG", transparency=1), background=(9, 9, 9)) == 9).all()
    assert (read_image(stored(palette, "PNG")) == [200, 0, 0]).all()
    np.testing.assert_array_equal(read_image(rgba)[:, 16:], PHOTO[:32, 16:32])
    assert (read_image(stored(Image.fromarray(rgba).convert("LA"), "PNG"))[:, :16] == 255).all()


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    raw = stored(Image.fromarray(PHOTO).convert("CMYK"), format)
    assert np.abs(read_image(raw).astype(int) - PHOTO).mean() < 4


def test_cmyk_with_a_broken_profile_is_still_read():
    raw = stored(Image.fromarray(PHOTO[:64, :64]).convert("CMYK"), "JPEG", icc_profile=b"no profile")
    assert np.abs(read_image(raw).astype(int) - PHOTO[:64, :64]).mean() < 12


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_picture(format):
    red, blue = (Image.new("RGB", (20, 20), c) for c in ("#ff0000", "#0000ff"))
    raw = stored(red, format, save_all=True, append_images=[blue], **(dict(lossless=True) if format == "WEBP" else {}))
    assert (read_image(raw) == [255, 0, 0]).all()


def test_the_content_decides_not_the_name(tmp_path):
    (tmp_path / "a.png").write_bytes(stored(PHOTO, "JPEG"))
    (tmp_path / "b.txt").write_bytes(stored(PHOTO, "PNG"))
    assert read_image(tmp_path / "a.png").shape == PHOTO.shape
    np.testing.assert_array_equal(read_image(str(tmp_path / "b.txt")), PHOTO)


def test_arrays():
    grey = PHOTO[..., 0]
    for a in (PHOTO, PHOTO[::-1, ::-1], PHOTO.astype(np.uint16) * 257, PHOTO / 255):
        expected = PHOTO[::-1, ::-1] if a.base is PHOTO else PHOTO
        np.testing.assert_array_equal(read_image(a), expected)
    for a in (grey, grey[..., None]): np.testing.assert_array_equal(read_image(a), np.repeat(grey[..., None], 3, 2))
    assert set(np.unique(read_image(grey > 128))) == {0, 255}
    for shape in [(3, 64, 64), (64,), (2, 64, 64, 3), (64, 64, 2)]:
        with pytest.raises(BadImage, match="array"): read_image(np.zeros(shape, np.uint8))
    with pytest.raises(TypeError): read_image(7)


@pytest.mark.parametrize("raw, reason", [
    (b"", "empty"), (b"\xff\xd8\xff", "truncated"), (b"\x89PNG\r\n", "truncated"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"), (bytes(1000), "not an image"), (png16(np.zeros((4, 90, 1))), "too small"),
    (stored(Image.new("1", (12000, 12000)), "PNG"), "too large"), (stored(Image.new("1", (20000, 20000)), "PNG"), "too large")], ids=range(9))
def test_what_is_no_picture(tmp_path, raw, reason):
    (tmp_path / "x.jpg").write_bytes(raw)
    for source in (raw, tmp_path / "x.jpg"):
        with pytest.raises(BadImage) as e: read_image(source)
        assert e.value.reason == reason and isinstance(e.value, BadFile)
        again = pickle.loads(pickle.dumps(e.value))
        assert (str(again), again.reason) == (str(e.value), reason)
    assert "x.jpg" in str(e.value)


def test_paths_that_hold_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "none.jpg", tmp_path / "pipe", "a\0b"):
        with pytest.raises(BadImage) as e: read_image(path)
        assert e.value.reason == "missing"
    for a in (np.zeros((0, 5, 3), np.uint8), np.zeros((50, 0), np.uint8)):
        with pytest.raises(BadImage) as e: read_image(a)
        assert e.value.reason == "empty"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_off_anywhere_is_refused(format):
    raw = stored(PHOTO[:90, :70], format)
    for n in np.linspace(1, len(raw) * .98, 25).astype(int):
        with pytest.raises(BadImage): read_image(raw[:n])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_spoilt_bytes_never_raise_anything_else(format):
    random, raw = np.random.default_rng(3), stored(PHOTO[:60, :60], format)
    for _ in range(120):
        spoilt = bytearray(raw)
        for at in random.integers(0, min(len(raw), random.choice([60, 600, 10**6])), 4): spoilt[at] = random.integers(256)
        try: assert read_image(bytes(spoilt)).shape[2] == 3
        except BadImage: pass


def test_a_large_photograph_and_its_limit():
    raw = stored(Image.new("RGB", (8000, 6000), (10, 200, 30)), "JPEG", quality=30)
    assert read_image(raw, shrink=8).shape == (750, 1000, 3)
    with pytest.raises(BadImage, match="48000000|48,000,000|8000 x 6000"): read_image(raw, max_pixels=40_000_000)
    assert np.abs(read_image(raw)[::999, ::999].astype(int) - [10, 200, 30]).max() < 4


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_shrunk_pictures_are_means_of_what_they_cover(format, orientation, n):
    picture = np.asarray(Image.fromarray(PHOTO).resize((227, 301)))
    raw = turned(picture, orientation, format)
    whole, small = read_image(raw), read_image(raw, shrink=n)
    assert small.shape[:2] == tuple(-(-s // n) for s in whole.shape[:2])
    h, w = (s // n for s in whole.shape[:2])
    means = whole[:h * n, :w * n].reshape(h, n, w, n, 3).mean((1, 3))
    assert np.abs(small[:h, :w] - means).mean() < (.6 if format == "PNG" or orientation > 1 else 3)


def test_shrink_takes_only_what_jpeg_offers():
    with pytest.raises(ValueError): read_image(PHOTO, shrink=3)
    assert read_image(PHOTO, shrink=4).shape == (128, 128, 3)


# --- crops ----------------------------------------------------------------------------------------------------------

def published(crop, image, order=1):
    """DECA's recipe: a similarity from three corners, and scikit-image's warp."""
    (x, y), h, last = crop.center, crop.side / 2, crop.size - 1
    corners = np.array([[x - h, y - h], [x - h, y + h], [x + h, y - h]])
    transform = estimate_transform("similarity", corners, np.array([[0, 0], [0, last], [last, 0]]))
    return transform, warp(image / 255.0, transform.inverse, output_shape=(crop.size, crop.size), order=order)


CROPS = [Crop((256, 200), 180), Crop((256.37, 201.9), 181), Crop((40.2, 30.7), 333),
         Crop((500, 500), 700, 112), Crop((250.1, 120.9), 57, 256), Crop((-40, 9), 30)]


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("crop", CROPS, ids=str)
def test_the_crop_is_the_published_one(crop, order):
    transform, expected = published(crop, PHOTO, order)
    np.testing.assert_allclose(crop.cut(PHOTO, exact=True, order=order).transpose(1, 2, 0), expected, atol=1e-5)
    np.testing.assert_allclose(crop.matrix, transform.params, atol=1e-9)
    rounded = crop.cut(PHOTO, order=order)
    assert rounded.dtype == np.uint8 and np.abs(rounded.transpose(1, 2, 0) - expected * 255).max() <= .5 + 1e-3


def test_float_pictures_and_views_are_cut_too():
    crop = CROPS[1]
    np.testing.assert_allclose(crop.cut((PHOTO / 255).astype(np.float32)), crop.cut(PHOTO, exact=True), atol=1e-5)
    np.testing.assert_array_equal(crop.cut(PHOTO[:, ::-1][:, ::-1]), crop.cut(PHOTO))


@pytest.mark.parametrize("crop", CROPS, ids=str)
def test_points_have_an_exact_inverse(crop):
    px = np.random.default_rng(0).uniform(-50, 600, (3, 68, 2))
    for option in (False, True): np.testing.assert_allclose(crop.photo_points(crop.points(px, option), option), px, atol=1e-9)
    transform, _ = published(crop, PHOTO[:8, :8])
    np.testing.assert_allclose(crop.points(px[0], published=True), transform(px[0]) / crop.size * 2 - 1, atol=1e-9)
    np.testing.assert_allclose((crop.points(px[0]) + 1) * crop.size / 2 - .5, transform(px[0]), atol=1e-9)


def test_published_squares():
    points = np.array([[10.0, 20], [110, 20], [60, 160]])
    assert crop_from_landmarks(points) == Crop((60, 90), int((100 + 140) / 2 * 1.1 * 1.25))
    assert crop_from_landmarks(points, 1.7, 256, margin=1, shift=(.1, -.1)) == Crop((72, 78), 204, 256)
    assert crop_from_landmarks(np.c_[points, [1, 2, 3]]) == crop_from_landmarks(points)
    assert crop_from_box([10, 20, 110, 160], 1.6) == Crop((60, 90 + .12 * 120), 192)
    assert crop_whole(640, 480) == Crop((319.5, 239.5), int((639 + 479) / 2 * 1.1 * 1.25))
    for bad in ([[np.nan, 0], [1, 1]], [[5, 5], [5, 5]], [[np.inf, 0], [1, 1]]):
        with pytest.raises(EmocaError): crop_from_landmarks(bad)


def test_fast_reading_sees_the_same_square():
    picture = Image.fromarray(PHOTO).resize((2048, 2048), Image.Resampling.BICUBIC)
    crop = Crop((880.5, 490.2), 1000)
    for raw in (stored(picture, "JPEG", quality=95), turned(np.rot90(np.asarray(picture), 1), 6, "JPEG")):
        slow, fast = (read_crop(raw, crop, fast=f).astype(float) for f in (False, True))
        moved = {(dx, dy): np.roll(fast, (dy, dx), (1, 2)) for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
        shifts = {shift: np.abs(slow - picture)[:, 8:-8, 8:-8].mean() for shift, picture in moved.items()}
        assert min(shifts, key=shifts.get) == (0, 0) and shifts[0, 0] < 2
    np.testing.assert_array_equal(read_crop(PHOTO, CROPS[0], fast=True), CROPS[0].cut(PHOTO))


@pytest.mark.parametrize("side", [57, 223, 600])
def test_pasting_is_the_inverse_of_cutting(side):
    y, x = np.indices((400, 500))
    smooth = np.stack([x / 2, y / 2, 128 + (x - y) / 6], -1).round().astype(np.uint8)
    crop = Crop((260.4, 210.8), side)
    back = crop.paste(torch.tensor(crop.cut(smooth, exact=True)), np.zeros_like(smooth))
    inside = tuple(slice(max(6, int(c - side / 2 + 6)), min(n - 6, int(c + side / 2 - 6))) for c, n in ((210.8, 400), (260.4, 500)))
    assert np.abs(back[inside].astype(int) - smooth[inside]).max() <= 2
    assert (back[:, :max(0, int(260.4 - side / 2))] == 0).all()


def test_a_mask_covers_without_a_dark_fringe():
    crop, white = Crop((250, 250), 150), np.full((512, 512, 3), 255, np.uint8)
    mask = np.hypot(*(np.indices((224, 224)) - 111.5)) < 60
    picture = np.where(mask, 1., 0.)[None].repeat(3, 0)
    assert (crop.paste(picture, white, mask[None]) == 255).all()
    black = np.zeros_like(white)
    hard, soft = (crop.paste(picture, black, mask, feather=f)[..., 0].astype(float) for f in (0, 20))
    assert (soft <= hard + 1).all() and hard[250, 250] == soft[250, 250] == 255
    assert hard.sum() / 255 == pytest.approx(np.pi * (60 * 150 / 223)**2, rel=.02)
    rim = [((p > 20) & (p < 235)).sum() for p in (hard, soft)]
    assert rim[1] > 3 * rim[0]
    np.testing.assert_array_equal(PHOTO, skimage.data.astronaut())


# --- detectors ------------------------------------------------------------------------------------------------------

def test_without_files_an_error_says_which_and_where(own_data):
    task = "face_landmarker.task" if importlib.util.find_spec("mediapipe") else "emoca-nb[mediapipe]"
    for name, file in (("fan", "s3fd-619a316812.pth"), ("mediapipe", task)):
        with pytest.raises(EmocaError, match=file.replace("[", r"\[")): detect(PHOTO, name)
    with pytest.raises(AssetMissing) as e: detect(PHOTO, "fan")
    assert str(own_data) in str(e.value) and str(own_data.parent / "torch/hub/checkpoints") in str(e.value) and "download_fan" in str(e.value)
    with pytest.raises(EmocaError, match="no detector"): detect(PHOTO, "viola")


def test_with_no_detector_at_all_every_way_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in ("dlib", "mediapipe") else found(n, *a))
    with pytest.raises(AssetMissing) as e: detect(PHOTO)
    assert all(text in str(e.value) for text in ("2DFAN4", "emoca-nb[dlib]", "emoca-nb[mediapipe]")) or "s3fd" in str(e.value)
    assert list(faces.detectors()) == ["fan", "dlib", "mediapipe"] and all(faces.detectors().values())


@pytest.fixture(scope="module")
def fan_files(tmp_path_factory):
    """Random weights in the files of the face-alignment library; one thread, for a busy machine lets two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    from face_alignment.detection.sfd.net_s3fd import s3fd
    from face_alignment.models import FAN
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    for name, net in (("s3fd-619a316812.pth", s3fd()), ("2DFAN4-11f355bf06.pth.tar", FAN(4))):
        torch.save(net.state_dict(), folder / name, _use_new_zipfile_serialization=name.startswith("2DFAN4"))
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize("place", ["data/face_alignment", "torch/hub/checkpoints"])
def test_fan_files_are_found_at_either_place(fan_files, tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    for f in fan_files.iterdir(): (tmp_path / place / f.name).symlink_to(f)
    assert faces.detectors()["fan"] == "" and faces.pick_detector() == "fan"
    names = [f.name for f in sorted(fan_files.iterdir(), reverse=True)]
    assert faces._search(None, None, 1, 1280, "cpu", False).files == tuple(tmp_path / place / name for name in names)


def test_fan_gives_faces_from_its_files(fan_files, own_data, monkeypatch):
    """Real networks with random weights; only the boxes are given, for random weights find anything."""
    from face_alignment import utils
    from face_alignment.detection.sfd import sfd_detector
    for name in ("transform_np", "_get_preds_fromhm"): monkeypatch.setattr(utils, name, getattr(utils, name).py_func)  # compiling them takes long
    seen, box = [], np.array([88.0, 38, 133, 90, .99])
    monkeypatch.setattr(sfd_detector, "detect", lambda net, image, device: (seen.append(image.shape), [np.array([box])])[1])
    (own_data / "face_alignment").mkdir(parents=True)
    for f in fan_files.iterdir(): (own_data / "face_alignment" / f.name).symlink_to(f)
    [face] = found = detect(PHOTO, longest=256, device="cpu")
    assert (found.detector, face.detector, face.score, seen) == ("fan", "fan", .99, [(256, 256, 3)])
    np.testing.assert_allclose(face.box, (box[:4] + .5) * 2 - .5)
    assert face.landmarks.shape == (68, 2) and (np.abs(face.landmarks - [220.5, 128]) < 300).all()
    assert face.crop() == crop_from_landmarks(face.landmarks)


def test_s3fd_itself_runs(fan_files, own_data):
    model = faces._fan_model(faces._Search("fan", tuple(sorted(fan_files.iterdir(), reverse=True)), "", .5, 0, 1280, "cpu", None))
    assert all(len(box) == 5 for box in model.face_detector.detect_from_image(PHOTO[:160, :160]))
    file = torch.load(fan_files / "s3fd-619a316812.pth", weights_only=True)
    for name, value in model.face_detector.face_detector.state_dict().items(): assert torch.equal(value, file[name])


def test_wrong_weights_are_named(fan_files, own_data):
    for place, key in (("s3fd-619a316812.pth", "conv1_1.weight"), ("2DFAN4-11f355bf06.pth.tar", "conv1.weight")):
        folder = own_data / "face_alignment"
        folder.mkdir(parents=True, exist_ok=True)
        for f in fan_files.iterdir():
            (folder / f.name).unlink(missing_ok=True)
            (folder / f.name).symlink_to(f)
        (folder / place).unlink()
        torch.save({key: torch.zeros(3)}, folder / place)
        with pytest.raises(BadFile, match=place): detect(PHOTO, "fan")
        (folder / place).write_bytes(pickle.dumps(os.system))
        with pytest.raises((BadFile, UnsafeFile), match=place): detect(PHOTO, "fan")


def test_mediapipe_results_become_faces(own_data, monkeypatch):
    """The result type of MediaPipe's task, given by a stand-in of its model."""
    points = np.random.default_rng(1).random((2, 478, 3)) * [.4, .3, .1] + [[[.1, .2, 0]], [[.5, .6, 0]]]
    marks = [[types.SimpleNamespace(x=x, y=y, z=z) for x, y, z in face] for face in points]
    package = types.SimpleNamespace(Image=lambda image_format, data: data, ImageFormat=types.SimpleNamespace(SRGB=1))
    model = types.SimpleNamespace(detect=lambda image: types.SimpleNamespace(face_landmarks=marks))
    monkeypatch.setitem(__import__("sys").modules, "mediapipe", package)
    monkeypatch.setattr(faces, "_mediapipe_model", lambda search: model)
    search = faces._Search("mediapipe", ("x.task",), "", .1, 0, 1280, "cpu", own_data / "m")
    for _ in range(2):
        found = faces._found(PHOTO[:, :300], search)
        np.testing.assert_allclose(found[1].mediapipe, points[1] * [300, 512, 300] - [.5, .5, 0], atol=1e-6)
        assert len(found) == 2 and np.isnan(found[0].score) and found[0].mediapipe_105.shape == (105, 2) and found[0].landmarks is None
    assert len(list((own_data / "m").rglob("*.npz"))) == 1
    assert found[0].crop(1.4, margin=1) == crop_from_landmarks(found[0].mediapipe, 1.4, margin=1)


def test_the_105_points_are_those_of_the_head():
    from emoca_nb.flame import HeadModel
    assert tuple(HeadModel.load().mediapipe.ids) == faces.MEDIAPIPE_105


def test_fetched_weights_are_checked(tmp_path, own_data, monkeypatch):
    for name, content in (("s3fd", b"a"), ("fan_2d", b"b")):
        file = tmp_path / f"{name}-{faces.hashlib.sha256(content).hexdigest()[:10]}.pth"
        file.write_bytes(content)
        monkeypatch.setitem(faces._FAN_FILES, name, file.as_uri())
    faces.download_fan()
    assert (own_data / "face_alignment/s3fd-619a316812.pth").read_bytes() == b"a"
    (own_data / "face_alignment/s3fd-619a316812.pth").unlink()
    file = tmp_path / "s3fd-0123456789.pth"
    file.write_bytes(b"other")
    monkeypatch.setitem(faces._FAN_FILES, "s3fd", file.as_uri())
    with pytest.raises(BadFile, match="checksum"): faces.download_fan()
    assert not (own_data / "face_alignment/s3fd-619a316812.pth").exists()


# --- dlib, cache, folders -------------------------------------------------------------------------------------------

@needs_dlib
def test_dlib_finds_the_astronaut():
    found = detect(PHOTO, "dlib", threshold=.5)
    [face] = found
    assert found and found.size == (512, 512) and face.score > 1 and face.landmarks.shape == (68, 2) and face.mediapipe is None
    eyes, mouth = face.landmarks[36:48].mean(0), face.landmarks[48:].mean(0)
    assert np.abs(eyes - [225, 112]).max() < 12 and 35 < mouth[1] - eyes[1] < 60
    large = np.asarray(Image.fromarray(PHOTO).resize((2048, 2048), Image.Resampling.BICUBIC))
    again = detect(large, "dlib", threshold=.5, longest=512)
    assert np.abs((again[0].landmarks + .5) / 4 - .5 - face.landmarks).mean() < 2.5 and again[0].area / 16 == pytest.approx(face.area, rel=.1)


@needs_dlib
def test_no_face_is_an_answer():
    found = detect(np.full((200, 300, 3), 90, np.uint8), "dlib")
    assert not found and len(found) == 0 and found.crop() == crop_whole(300, 200)
    assert found.crop().cut(np.zeros((200, 300, 3), np.uint8)).shape == (3, 224, 224)
    assert not detect(np.full((8, 9000, 3), 90, np.uint8), "dlib", upsample=0)


class Counted:
    """Stands in for dlib's detector and counts its calls."""
    def __init__(self, monkeypatch):
        self.calls, true = 0, faces._DETECTORS["dlib"]
        def find(*a):
            self.calls += 1
            yield Face(np.array([1.0, 2, 30, 40]), .5, np.random.default_rng(self.calls).random((68, 2)), detector="dlib")
        monkeypatch.setitem(faces._DETECTORS, "dlib", faces.replace(true, faces=find, packages=(), files=lambda: []))


def test_results_are_kept_by_content(tmp_path, own_data, monkeypatch):
    counted = Counted(monkeypatch)
    (tmp_path / "a.jpg").write_bytes(stored(PHOTO[:60, :60], "JPEG"))
    first = detect(tmp_path / "a.jpg", "dlib")
    (tmp_path / "a.jpg").rename(tmp_path / "b.jpg")
    for source in (tmp_path / "b.jpg", (tmp_path / "b.jpg").read_bytes()):
        again = detect(source, "dlib")
        np.testing.assert_array_equal(again[0].landmarks, first[0].landmarks)
        assert again.size == (60, 60) and again[0].detector == "dlib"
    assert counted.calls == 1
    detect(tmp_path / "b.jpg", "dlib", threshold=.3); detect(tmp_path / "b.jpg", "dlib", upsample=0); detect(tmp_path / "b.jpg", "dlib", cache=False)
    assert counted.calls == 4
    (tmp_path / "b.jpg").write_bytes(stored(PHOTO[:61, :60], "JPEG"))
    detect(tmp_path / "b.jpg", "dlib")
    for a in (PHOTO[:60, :60], PHOTO[:60, :60], Image.fromarray(PHOTO[:50, :50]), Image.fromarray(PHOTO[:50, :50])): detect(a, "dlib")
    assert counted.calls == 7 and not [p for p in own_data.rglob("*") if p.name.startswith(".")]


def spoil(entry, how):
    arrays = dict(np.load(entry))
    if how == "cut": return entry.write_bytes(entry.read_bytes()[:-30])
    if how == "empty": return entry.write_bytes(b"")
    if how == "pickle": arrays["box"] = np.array([print], object)
    if how == "short": arrays["landmarks"] = arrays["landmarks"][:, :5]
    if how == "nan": arrays["landmarks"][:] = np.nan
    if how == "missing": del arrays["box"]
    if how == "count": arrays["score"] = np.zeros(3)
    if how == "scalar": arrays["box"] = np.array(3.0)
    np.savez(entry, **arrays)


@pytest.mark.parametrize("how", ["cut", "empty", "pickle", "short", "nan", "missing", "count", "scalar"])
def test_a_damaged_entry_is_made_again(own_data, monkeypatch, how):
    counted = Counted(monkeypatch)
    detect(PHOTO[:60, :60], "dlib")
    [entry] = own_data.rglob("*.npz")
    spoil(entry, how)
    second = detect(PHOTO[:60, :60], "dlib")
    third = detect(PHOTO[:60, :60], "dlib")
    assert counted.calls == 2 and np.array_equal(second[0].landmarks, third[0].landmarks)


def test_a_folder_goes_on_where_it_stopped(tmp_path, monkeypatch):
    counted, album = Counted(monkeypatch), tmp_path / "album"
    (album / "deep").mkdir(parents=True); (album / ".hidden").mkdir()
    for i, place in enumerate(("a.jpg", "deep/b.PNG", "c.webp", ".hidden/d.jpg")): (album / place).write_bytes(stored(PHOTO[:40 + i, :40], "PNG"))
    (album / "notes.txt").write_text("no picture"); (album / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    find = faces._DETECTORS["dlib"].faces
    def dies(*a):
        if counted.calls == 2: raise KeyboardInterrupt
        yield from find(*a)
    monkeypatch.setitem(faces._DETECTORS, "dlib", faces.replace(faces._DETECTORS["dlib"], faces=dies))
    with pytest.raises(KeyboardInterrupt): detect_folder(album, "dlib")
    monkeypatch.setitem(faces._DETECTORS, "dlib", faces.replace(faces._DETECTORS["dlib"], faces=find))
    found = detect_folder(album, "dlib")
    assert counted.calls == 3 and [p.name for p in found.detections] == ["a.jpg", "c.webp", "b.PNG"]
    assert {p.name: e.reason for p, e in found.bad.items()} == {"bad.jpg": "truncated"}
    assert repr(found) == "4 pictures: a face in 3, none in 0, 1 unreadable"
    missing = detect_folder([album / "a.jpg", album / "gone.jpg"], "dlib")
    assert len(missing.detections) == 1 and missing.bad[album / "gone.jpg"].reason == "missing"
    with pytest.raises(BadFile, match="folder"): detect_folder(album / "gone", "dlib")


@needs_dlib
def test_two_processes_find_what_one_finds(tmp_path):
    for i in range(4): Image.fromarray(PHOTO[:300, 60 + i * 10:360]).save(tmp_path / f"{i}.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    alone = detect_folder(sorted(tmp_path.glob("*.jpg")), "dlib", cache=False, upsample=0)
    two = detect_folder(sorted(tmp_path.glob("*.jpg")), "dlib", cache=False, upsample=0, workers=2)
    assert repr(alone) == repr(two) == "5 pictures: a face in 4, none in 0, 1 unreadable"
    for path, d in alone.detections.items(): np.testing.assert_array_equal(d[0].landmarks, two.detections[path][0].landmarks)


def test_landmarks_beside_a_picture(tmp_path):
    import scipy.io
    points = np.random.default_rng(0).uniform(0, 300, (68, 2))
    for name in ("a", "b", "c", "d"): (tmp_path / f"{name}.jpg").touch()
    np.savetxt(tmp_path / "a.txt", points)
    scipy.io.savemat(tmp_path / "b.mat", dict(pt3d_68=np.r_[points.T, np.ones((1, 68))]))
    np.savetxt(tmp_path / "b.txt", points * 2)
    for name in "ab": np.testing.assert_allclose(faces.sidecar_landmarks(tmp_path / f"{name}.jpg"), points)
    assert faces.sidecar_landmarks(tmp_path / "d.jpg") is None
    cut = (tmp_path / "b.mat").read_bytes()[:200]
    for file, content in (("c.txt", b""), ("c.txt", b"1 2\n3 x\n"), ("c.txt", b"nan nan\n" * 68), ("c.mat", b"MATLAB"), ("c.mat", cut)):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(BadFile, match=file): faces.sidecar_landmarks(tmp_path / "c.jpg")
