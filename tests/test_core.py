"""Settings, the register of files, writing, seeds, devices, progress and the command line."""
import io, json, multiprocessing, os, pickle, random, stat, subprocess, sys, zipfile
from pathlib import Path

import numpy as np, pytest, scipy.sparse, torch
from click.testing import CliRunner
from PIL import Image

from emoca_nb import __version__, core
from emoca_nb.core import *
from emoca_nb.core import KEYS

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared/golden"


@pytest.fixture(autouse=True)
def bare_machine(tmp_path, monkeypatch):
    "An empty folder, and no variable of ours"
    for name in [n for n in os.environ if n.startswith("EMOCA_NB_")]: monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def ini(text, path="settings.ini"):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize("error", [BadFile("a.pkl", "x", "y"), AssetMissing("m"), UnsafeFile("u"), EmocaError("e")])
def test_errors_survive_a_process_border(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and isinstance(again, EmocaError)


# ---------------------------------------------------------------- settings
def test_defaults_without_a_file(tmp_path):
    s = settings()
    assert (s.data, s.reports, s.profile, s.device) == (tmp_path / "data", tmp_path / "reports", "demo", "auto")
    assert set(s.files) == set(ASSETS) and set(s.origin.values()) == {"default"}
    assert all(p == tmp_path / "data" / ASSETS[n].place for n, p in s.files.items())


def test_the_file_of_this_repository_is_the_template(monkeypatch):
    assert (ROOT / "settings.ini").read_text() == settings_template(), "run: emoca-nb settings --template > settings.ini"
    monkeypatch.chdir(ROOT / "nbs")
    s = settings()
    assert s.data == ROOT / "data" and s.reports == ROOT / "reports" and s.profile == "demo"


def test_found_upwards_and_relative_to_the_file(tmp_path, monkeypatch):
    ini("[paths]\ndata = faces\n[files]\ndeca = nets/deca.tar\n")
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    s = settings()
    assert s.data == tmp_path / "faces" and s.files["deca"] == tmp_path / "nets/deca.tar"
    assert s.files["smirk"] == tmp_path / "faces" / ASSETS["smirk"].place
    assert s.origin["data"] == s.origin["deca"] == str(tmp_path / "settings.ini")


def test_the_file_named_by_the_environment_wins(tmp_path, monkeypatch):
    ini("[run]\nprofile = gpu\n")
    ini("[run]\nprofile = paper\n[paths]\nreports = r\n", "elsewhere/mine.ini")
    monkeypatch.setenv("EMOCA_NB_SETTINGS", "elsewhere/mine.ini")
    s = settings()
    assert s.profile == "paper" and s.reports == tmp_path / "elsewhere/r"
    monkeypatch.setenv("EMOCA_NB_SETTINGS", "nowhere.ini")
    with pytest.raises(BadFile, match="nowhere.ini"): settings()


@pytest.mark.parametrize("key", list(KEYS))
def test_every_key_can_be_set_in_the_file_and_overridden_by_the_environment(tmp_path, monkeypatch, key):
    in_file, in_environment = ("gpu", "paper") if key == "profile" else ("from_file", "/from/environment")
    ini(f"[{KEYS[key][0]}]\n{key} = {in_file}\n")
    get = lambda s: str(s.files[key] if key in ASSETS else getattr(s, key))
    assert get(settings()).endswith(in_file) and settings().origin[key] == str(tmp_path / "settings.ini")
    monkeypatch.setenv(f"EMOCA_NB_{key.upper()}", in_environment)
    assert get(settings()) == in_environment and settings().origin[key] == f"EMOCA_NB_{key.upper()}"
    monkeypatch.setenv(f"EMOCA_NB_{key.upper()}", "")
    assert get(settings()).endswith(in_file)


MISSPELT = [
    ("[files]\nflame_2020 = x\n", ["flame_2020", "flame2020"]), ("[run]\ndevise = cpu\n", ["devise", "device"]),
    ("[paths]\nreport = r\n", ["report", "reports"]), ("[path]\ndata = x\n", ["[path]", "[paths]"]), ("[run]\ndata = x\n", ["data", "[paths]"]),
    ("[paths]\ndeca = x\n", ["deca", "[files]"]), ("[DEFAULT]\nmispelt = 1\n[run]\nprofile = gpu\n", ["[DEFAULT]"])]


@pytest.mark.parametrize("text,words", MISSPELT)
def test_unknown_keys_are_told_the_nearest(text, words):
    ini(text)
    with pytest.raises(EmocaError) as e: settings()
    assert "settings.ini" in str(e.value) and all(w in str(e.value) for w in words)


@pytest.mark.parametrize("text", ["data = x", "[paths\n", "[paths]\ndata\n", "[paths]\ndata = a\ndata = b\n", "[paths]\n[paths]\n", "\0\xff" * 9])
def test_broken_settings_files(text):
    Path("settings.ini").write_bytes(text.encode("latin1"))
    with pytest.raises(BadFile, match="settings.ini"): settings()


def test_home_percent_umlaut_and_byte_order_mark():
    Path("settings.ini").write_bytes("\ufeff[paths]\ndata = ~/100%/Gesichter-ä\n".encode())
    assert settings().data == Path.home() / "100%/Gesichter-ä"


# ---------------------------------------------------------------- register
def test_the_register_is_complete_and_sane():
    wanted = """flame2020 flame2023 flame2023_open landmark_embedding mediapipe_embedding static_embedding dynamic_embedding albedo_bfm texture_space
        texture_data mean_texture uv_face_mask uv_face_eye_mask head_template fixed_displacement flame_masks flame_mask_triangles l_eyelid r_eyelid
        deca emoca_v1 emoca_v2_mp emoca_v2_lr_mse_20 emoca_v2_lr_cos_1_5 smirk emonet_8 emonet_5 emotion_resnet50 emotion_swin_b emoca_emorec
        vggface2_resnet50 mica arcface mobilenet_small mobilenet_large fan_2d s3fd face_landmarker lip_reading ddamfn cage affectnet emonet_val
        emonet_test afew_va aff_wild2 raf_db vggface2 voxceleb2 ffhq celeba lrs3 mead famos_templates""".split()
    assert set(wanted) <= set(ASSETS)
    for name, a in ASSETS.items():
        assert a.name == name and name.isidentifier() and name == name.lower() and name not in ("data", "reports", "profile", "device", "settings")
        assert a.terms.licence and a.terms.page.startswith(("https://", "http://")) and a.notebooks and callable(a.check)
        assert not Path(a.place).is_absolute() and ".." not in a.place


@pytest.mark.parametrize("name", list(ASSETS))
def test_asking_for_a_missing_one_says_all(name, tmp_path):
    with pytest.raises(AssetMissing) as e: asset(name)
    a, text = ASSETS[name], str(e.value)
    assert all(w in text for w in (name, a.what, a.terms.licence, a.terms.page, str(tmp_path / "data" / a.place), "settings.ini"))
    assert f"EMOCA_NB_{name.upper()}" in text


JUNK = [b"", b"<!DOCTYPE html><title>Sign in</title>", bytes(2048), b"\x80\x02N.", b"\x89PNG", b"PK\x03\x04xxxxxxxx", None]


@pytest.mark.parametrize("content", JUNK)
def test_no_check_takes_junk(tmp_path, monkeypatch, content):
    "A page, zeros, an empty file or an empty folder in the place of each asset"
    (tmp_path / "junk").write_bytes(content) if content is not None else (tmp_path / "junk").mkdir()
    for name, a in ASSETS.items():
        if content == b"\x89PNG" and name.startswith("uv_"): continue
        monkeypatch.setenv(f"EMOCA_NB_{name.upper()}", str(tmp_path / "junk"))
        with pytest.raises(BadFile, match="junk"): asset(name)
    wrong = {r["name"] for r in asset_status() if r["state"] == "wrong"}
    assert len(wrong) >= len(ASSETS) - 2 and all(r["problem"] for r in asset_status() if r["state"] == "wrong")


MODEL = ["v_template", "shapedirs", "posedirs", "J_regressor", "kintree_table", "weights"]
ON_FACES = ["lmk_face_idx", "lmk_b_coords", "landmark_indices"]
CLEAN = ["valence", "arousal", "expression_correct"]
NPZ = dict(mediapipe_embedding=ON_FACES, albedo_bfm=["MU", "PC"], texture_space=["mean", "tex_dir"])
NPY = dict(l_eyelid=(5023, 3), r_eyelid=(5023, 3), fixed_displacement=(256, 256))
NPY_DICT = dict(landmark_embedding=["static_lmk_faces_idx", "dynamic_lmk_faces_idx", "full_lmk_faces_idx"], dynamic_embedding=ON_FACES,
                flame_mask_triangles=["face_clean", "lips"], texture_data=["valid_pixel_ids", "valid_pixel_b_coords"])
PICKLED = dict(static_embedding=ON_FACES, flame_masks=["face", "lips", "left_eyeball"], vggface2_resnet50=["conv1.weight", "layer4.0"],
               emonet_val=CLEAN, emonet_test=CLEAN, flame2020=MODEL, flame2023=MODEL, flame2023_no_jaw=MODEL, flame2023_open=MODEL)
NETS = dict(deca=["E_flame", "E_detail", "D_detail"], smirk=["smirk_encoder.expression_encoder"], mica=["arcface", "flameModel"],
            emonet_8=["module.conv1.weight"], emonet_5=["conv1.weight"], lip_reading=["x"], fan_2d=["conv1"], s3fd=["conv1_1.weight"])
FOLDERS = dict(affectnet=["training.csv", "validation.csv", "Manually_Annotated/x"], afew_va=["001/001.json"], aff_wild2=["VA/train/1.txt"],
               raf_db=["EmoLabel/list_patition_label.txt"], vggface2=["train/x.jpg"], voxceleb2=["images_cropped/id/x.png"], ffhq=["00000/1.png"],
               celeba=["img/1.jpg"], lrs3=["a/1.mp4"], mead=["M003/1.mp4"], famos_templates=["s/jaw/1.npy"], arcface=["w600k_r50.onnx"],
               ddamfn=["a.pth"], cage=["m.pt"])
EMOCA_RUN = ["cfg.yaml", "checkpoints/deca-epoch=01-val_loss_total/dataloader_idx_0=1.27.ckpt"]


def good(name, path):
    "Write something of the right kind for this asset, as small as can be"
    path.parent.mkdir(parents=True, exist_ok=True)
    if name in NPZ: np.savez(path, **dict.fromkeys(NPZ[name], np.zeros(2)))
    elif name in NPY: np.save(path, np.zeros(NPY[name]))
    elif name in NPY_DICT: np.save(path, dict.fromkeys(NPY_DICT[name], 0), allow_pickle=True)
    elif name in PICKLED: path.write_bytes(pickle.dumps(dict.fromkeys(PICKLED[name], 0), 0 if "emonet" in name else 2))
    elif name in NETS: torch.save({n: torch.zeros(2) for n in NETS[name]}, path, _use_new_zipfile_serialization=name != "deca")
    elif name == "head_template": path.write_text("v 0 0 0\nvt 0 0\nf 1/1 1/1 1/1\n")
    elif name.startswith("mobilenet"): path.write_bytes(b"\x40\0\0\0\0\0\0\0" + b'{"conv_stem.weight":{}}')
    elif name == "face_landmarker": zipfile.ZipFile(path, "w").writestr("face_landmarks_detector.tflite", b"x")
    elif path.suffix in (".jpg", ".png"): Image.new("RGB", (2, 2)).save(path)
    else:
        for n in FOLDERS.get(name, EMOCA_RUN):
            (path / n).parent.mkdir(parents=True, exist_ok=True)
            (path / n).write_bytes(b"x")


@pytest.mark.parametrize("name", list(ASSETS))
def test_the_right_kind_is_taken_and_given_back(name, tmp_path):
    good(name, tmp_path / "data" / ASSETS[name].place)
    assert asset(name) == tmp_path / "data" / ASSETS[name].place
    assert {r["state"] for r in asset_status() if r["name"] == name} == {"there"}


def test_checks_never_unpickle(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self): return os.mkdir, ("canary",)
    for name, a in ASSETS.items(): good(name, tmp_path / "data" / a.place)
    (tmp_path / "data" / ASSETS["flame2020"].place).write_bytes(pickle.dumps(dict.fromkeys(MODEL, Evil())))
    torch.save({"E_flame": Evil(), "E_detail": 0, "D_detail": 0}, tmp_path / "data" / ASSETS["deca"].place)
    for forbidden in (pickle, "loads"), (pickle, "load"), (torch, "load"), (core, "_unpickle"): monkeypatch.setattr(*forbidden, None)
    assert {r["state"] for r in asset_status()} == {"there"} and not Path("canary").exists()


def test_an_unknown_asset_is_told_the_nearest():
    with pytest.raises(EmocaError, match="flame2020"): asset("flame_2020")


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is not beside this checkout")
def test_checks_take_the_published_layouts(monkeypatch):
    monkeypatch.setenv("EMOCA_NB_FLAME2020", str(GOLDEN / "flame_tiny.pkl"))
    monkeypatch.setenv("EMOCA_NB_LANDMARK_EMBEDDING", str(GOLDEN / "landmark_embedding_tiny.npy"))
    assert asset("flame2020").name == "flame_tiny.pkl" and asset("landmark_embedding").suffix == ".npy"
    monkeypatch.setenv("EMOCA_NB_LANDMARK_EMBEDDING", str(GOLDEN / "flame_tiny.pkl"))
    with pytest.raises(BadFile): asset("landmark_embedding")


# ---------------------------------------------------------------- arrays
EYES = [np.eye(3), np.eye(3, dtype="f4"), np.eye(3, dtype=np.uint8), np.eye(3).tolist(), scipy.sparse.csc_matrix(np.eye(3)), torch.eye(3),
        torch.eye(3, requires_grad=True)]


@pytest.mark.parametrize("value", EYES)
def test_expect_array_takes_what_files_hold(value):
    a = expect_array(value, "x", "f", (3, 3))
    assert isinstance(a, np.ndarray) and a.dtype.kind == "f" and np.array_equal(a, np.eye(3))


def test_expect_array_keeps_single_precision_and_makes_int64():
    assert expect_array(np.zeros(2, "f4"), "x", "f").dtype == np.float32
    assert expect_array(np.array([2**32 - 1], np.uint32), "x", "f", (1,), "i").tolist() == [2**32 - 1]
    assert expect_array(["a", "b"], "x", "f", (None,), "U").tolist() == ["a", "b"] and expect_array([True], "x", "f", (1,), "b").all()


WRONG = [
    (np.zeros((2, 3)), (3, 3), "f"), (np.zeros(3), (None, 3), "f"), (np.zeros((2, 3, 1)), (None, 3), "f"), (np.zeros(3), (), "f"),
    ([[1, 2], [3]], None, "f"), (None, None, "f"), ("text", None, "f"), ({"a": 1}, None, "f"), ([np.nan], None, "f"), ([np.inf], None, "f"),
    (np.array([None]), None, "f"), (1j, None, "f"), ([1.5], None, "i"), (["a"], None, "i"), ([True], None, "i"), ([1], None, "b"), ([1], None, "U")]


@pytest.mark.parametrize("value,shape,kind", WRONG)
def test_expect_array_refuses(value, shape, kind):
    with pytest.raises(BadFile, match="model.pkl: expected weights to be .*, found ."): expect_array(value, "weights", "model.pkl", shape, kind)


# ---------------------------------------------------------------- writing
def test_atomic_write_replaces_only_on_success(tmp_path):
    path = tmp_path / "new/folder/a.npz"
    with atomic_write(path) as p:
        assert p.parent == path.parent and p.suffix == ".npz" and not path.exists()
        np.savez(p, a=np.arange(3))
    assert load_npz(path)["a"].tolist() == [0, 1, 2] and os.listdir(path.parent) == ["a.npz"]
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), atomic_write(path) as p:
            p.write_bytes(b"half")
            raise error
    assert load_npz(path)["a"].tolist() == [0, 1, 2] and os.listdir(path.parent) == ["a.npz"]


def test_atomic_write_keeps_links_and_ordinary_permissions(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    with atomic_write("link.txt") as p: p.write_text("new")
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new"
    assert stat.S_IMODE(os.stat("real.txt").st_mode) == stat.S_IMODE(os.stat("ordinary").st_mode)


def test_atomic_write_to_impossible_places(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file/below"):
        with pytest.raises(EmocaError, match="cannot be written"), atomic_write(path): pass


def _writer(path, n):
    for i in range(30):
        with atomic_write(path) as p: p.write_text(str(n) * 10_000)


def test_atomic_write_by_several_processes(tmp_path):
    "A reader never sees a mixture, or nothing"
    path, context = tmp_path / "a.txt", multiprocessing.get_context("fork")
    path.write_text("0" * 10_000)
    workers = [context.Process(target=_writer, args=(path, n)) for n in (1, 2)]
    for w in workers: w.start()
    while any(w.is_alive() for w in workers):
        text = path.read_text()
        assert len(text) == 10_000 and len(set(text)) == 1
    for w in workers: w.join()
    assert os.listdir(tmp_path) == ["a.txt"]


# ---------------------------------------------------------------- seeds, devices, progress
def test_seed_everything():
    def draw(g): return random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=g).item()
    a, b, c = draw(seed_everything(3)), draw(seed_everything(3)), draw(seed_everything(4))
    assert a == b and all(x != y for x, y in zip(a, c))
    for bad in (-1, 2**32):
        with pytest.raises(EmocaError, match=str(bad)): seed_everything(bad)


def test_pick_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert [str(pick_device(n)) for n in ("auto", "cuda", "cuda:1", "cpu", torch.device("cuda:0"))] == ["cuda:0", "cuda:0", "cuda:1", "cpu", "cuda:0"]
    for bad in ("cuda:2", "mps", "gpu", "", "CUDA", "cuda:-1"):
        with pytest.raises(EmocaError, match="auto, cuda:0, cuda:1, cpu"): pick_device(bad)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(pick_device()) == "cpu"
    with pytest.raises(EmocaError, match="auto, cpu"): pick_device("cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert str(pick_device()) == str(pick_device("mps")) == "mps"


class Terminal(io.StringIO):
    def isatty(self): return True


def test_progress_is_silent_in_a_log_and_shown_in_a_terminal(monkeypatch):
    for stream, shown in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress(iter(range(5)), "fitting", total=5)) == list(range(5))
        assert ("fitting" in stream.getvalue() and "5/5" in stream.getvalue()) is shown


def test_progress_in_a_notebook_is_one_replaced_line(monkeypatch):
    import IPython.display
    shown = []
    class Handle:
        def update(self, data, raw): shown[-1] = data["text/plain"]
    monkeypatch.setattr(core, "in_jupyter", lambda: True)
    monkeypatch.setattr(IPython.display, "display", lambda data, raw, display_id: shown.append(data["text/plain"]) or Handle())
    assert sum(progress(range(50), "fitting")) == 1225
    assert len(shown) == 1 and "fitting" in shown[0] and "50/50" in shown[0] and "\r" not in shown[0]


# ---------------------------------------------------------------- command line
def run(*args): return CliRunner().invoke(cli, args)


def test_version_and_help():
    assert __version__ in run("--version").output
    r = run("--help")
    assert r.exit_code == 0 and "assets" in r.output and "settings" in r.output


def test_assets_lists_everything(tmp_path):
    good("deca", tmp_path / "data" / ASSETS["deca"].place)
    (tmp_path / "data/smirk").mkdir()
    (tmp_path / "data" / ASSETS["smirk"].place).write_text("<html>")
    r = run("assets")
    assert r.exit_code == 0 and all(n in r.output for n in ASSETS) and all(a.terms.page in r.output for a in ASSETS.values())
    rows = {x["name"]: x for x in json.loads(run("assets", "--json").output)}
    assert set(rows) == set(ASSETS) and (rows["deca"]["state"], rows["smirk"]["state"], rows["mica"]["state"]) == ("there", "wrong", "missing")
    assert "<html>" in rows["smirk"]["problem"] and rows["mica"]["path"] == str(tmp_path / "data/mica/mica.tar")
    assert set(rows) - {x["name"] for x in json.loads(run("assets", "--missing", "--json").output)} == {"deca"}


def test_settings_command_says_where_each_comes_from(tmp_path, monkeypatch):
    ini("[run]\nprofile = gpu\n")
    monkeypatch.setenv("EMOCA_NB_DEVICE", "cpu")
    monkeypatch.setenv("EMOCA_NB_FLAME_2020", "x")
    lines = {l.split()[0]: l for l in run("settings").output.splitlines()}
    assert "gpu" in lines["profile"] and "settings.ini" in lines["profile"] and "EMOCA_NB_DEVICE" in lines["device"] and "default" in lines["data"]
    assert "flame2020" in lines["EMOCA_NB_FLAME_2020"]
    assert run("settings", "--template").output == settings_template()


@pytest.mark.parametrize("args", [["settings"], ["assets"], ["assets", "--json"]])
def test_our_errors_are_one_message_and_exit_code_1(args):
    ini("[paths]\ndatta = x\n")
    r = run(*args)
    assert r.exit_code == 1 and "Traceback" not in r.output and "datta" in r.output and "'data'" in r.output


def test_commands_of_other_modules_are_imported_when_called(monkeypatch, tmp_path):
    (tmp_path / "later_module.py").write_text("import click\n@click.command()\n@click.argument('n', type=int)\ndef double(n): click.echo(2 * n)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(core.COMMANDS, "double", ("later_module:double", "twice a number"))
    assert "twice a number" in run("--help").output and "later_module" not in sys.modules
    assert run("double", "21").output == "42\n" and "later_module" in sys.modules
    assert run("nonsense").exit_code == 2


def test_the_console_script(tmp_path):
    script = Path(sys.executable).with_name("emoca-nb")
    if not script.exists(): pytest.skip("the package is not installed beside this Python")
    (tmp_path / "settings.ini").write_text("[fils]\n")
    r = subprocess.run([script, "assets"], capture_output=True, text=True)
    assert r.returncode == 1 and r.stderr.startswith("Error: ") and "[files]" in r.stderr and "Traceback" not in r.stderr


@pytest.mark.parametrize("text, words", [
    ("[DEFAULT]\nflame2020 = /x\n", "no section [DEFAULT]"),
    ("[paths]\ndata = /srv/x ; faces\n", "without a comment"),
    ("[paths]\ndata = /srv/x\n  and/more\n", "one line"),
    ("[files]\nflame2020 = ~nobody_of_this_name/x\n", "not known here"),
    ("[run]\nprofile = bogus\n", "demo, gpu, paper"),
])
def test_settings_that_would_be_misread_are_refused(text, words):
    ini(text)
    with pytest.raises(EmocaError) as e: settings()
    assert words in str(e.value)


def test_quotes_around_a_path_are_taken_off():
    ini('[files]\nflame2020 = "/srv/a b.pkl"\n')
    assert settings().files["flame2020"] == Path("/srv/a b.pkl")


@pytest.mark.parametrize("content", [b"[/red] x", b"[red]a", b"root:x:0:0"])
def test_the_text_of_a_wrong_file_is_shown_as_it_is(tmp_path, monkeypatch, content):
    (tmp_path / "evil.pkl").write_bytes(content)
    monkeypatch.setenv("EMOCA_NB_FLAME2020", str(tmp_path / "evil.pkl"))
    run = CliRunner().invoke(core.cli, ["assets"])
    assert run.exit_code == 0 and "wrong" in run.output and "❌" not in run.output


def test_missing_counts_what_is_there(tmp_path, monkeypatch):
    counts = [CliRunner().invoke(core.cli, ["assets", *flags]).output.split("are here")[0].splitlines()[-1] for flags in ([], ["--missing"])]
    assert counts[0] == counts[1]
