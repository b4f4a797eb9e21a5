"""Hostile, damaged and merely old files: every one gives the right value or an EmocaError, and none of them runs anything."""
import base64, builtins, functools, io, operator, os, pickle, random, re, struct, subprocess, sys, types, warnings, zipfile, zlib
from pathlib import Path

import numpy as np, pytest, scipy.sparse, torch

from emoca_nb import core
from emoca_nb.core import BadFile, EmocaError, UnsafeFile, load_checkpoint, load_npy, load_npz, load_pickle

GOLDEN = Path(__file__).parents[2] / "shared/golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is not beside this checkout")


class Calls:
    "Pickles as a call of `f`"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


@pytest.fixture
def canary(tmp_path):
    "A path that must not exist at the end of the test"
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something in the file has run"


def hostile(canary):
    c, code = str(canary), f"open({str(canary)!r}, 'w')"
    return {
        "posix.system": Calls(os.system, f"touch {c}"),
        "posix.mkdir": Calls(os.mkdir, c),
        "subprocess.Popen": Calls(subprocess.Popen, ["touch", c]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, c, "w"),
        "__import__": Calls(__import__, "os"),
        "functools.partial": Calls(functools.partial(os.mkdir, c)),
        "getattr": Calls(getattr, "x", "upper"),
        "operator.attrgetter": Calls(operator.attrgetter("system"), 1),
        "builtins.getattr": Calls(Path(c).touch),
        "numpy.load": Calls(np.load, c),
        "numpy.memmap": Calls(np.memmap, c, "u1", "w+", 0, (1,)),
        "torch.load": Calls(torch.load, c),
        "builtins.map": Calls(map, len, []),
    }


NAMES = list(hostile(Path("x")))


def wrappings(x):
    return {"bare": x, "nested": {"v_template": [({"a": x},)]}, "key": {(1, "x"): x}, "object array": np.array([x], object),
            "in state": types.SimpleNamespace(x=x)}


# ---------------------------------------------------------------- pickles that want to run something
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", NAMES)
def test_pickle_that_calls_is_refused(tmp_path, canary, name, protocol):
    for wrapped in wrappings(hostile(canary)[name]).values():
        path = tmp_path / "model.pkl"
        path.write_bytes(pickle.dumps(wrapped, protocol))
        with pytest.raises(UnsafeFile, match="model.pkl") as e: load_pickle(path)
        assert "refused" in str(e.value) and "." in str(e.value).split("asks for ")[1].split(",")[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_refused_class_is_named(tmp_path, canary, name):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"a": hostile(canary)[name]}, 4))
    with pytest.raises(UnsafeFile) as e: load_pickle(path)
    assert name.split(".")[-1] in str(e.value)


@pytest.mark.parametrize("name", NAMES)
def test_npy_and_npz_that_call_are_refused(tmp_path, canary, name):
    a = np.array({"x": hostile(canary)[name]}, object)
    np.save(tmp_path / "a.npy", a, allow_pickle=True)
    np.savez(tmp_path / "a.npz", a=a, b=np.zeros(3))
    with pytest.raises(UnsafeFile, match="a.npy"): load_npy(tmp_path / "a.npy")
    with pytest.raises(UnsafeFile, match="a.npz"): load_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_that_calls_is_refused(tmp_path, canary, name, zipped):
    path = tmp_path / "model.tar"
    torch.save({"state_dict": {"w": torch.zeros(2)}, "extra": [hostile(canary)[name]]}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeFile, match="model.tar") as e: load_checkpoint(path)
    assert "weights_only" not in str(e.value)


def test_bytes_of_a_storage_are_read_as_carefully(tmp_path, canary):
    "torch.storage._load_from_bytes is a pickle inside a pickle"
    for inner in (pickle.dumps(Calls(os.mkdir, str(canary)), 2), *(_saved(Calls(os.mkdir, str(canary)), z) for z in (True, False))):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(Calls(torch.storage._load_from_bytes, inner), 2))
        with pytest.raises(EmocaError): load_pickle(tmp_path / "a.pkl")


def _saved(x, zipped=True):
    f = io.BytesIO()
    torch.save(x, f, _use_new_zipfile_serialization=zipped)
    return f.getvalue()


FORBIDDEN = """
os.system posix.system nt.system subprocess.call builtins.eval __builtin__.eval builtins.exec builtins.compile builtins.getattr builtins.setattr
builtins.__import__ builtins.globals builtins.type builtins.bytearray builtins.range types.FunctionType types.CodeType functools.partial
functools.reduce operator.methodcaller itertools.starmap copyreg.__newobj__ copyreg.add_extension copyreg.dispatch_table importlib.import_module
importlib._bootstrap._call_with_frames_removed pickle.loads _pickle.loads marshal.loads shelve.open codecs.open codecs.lookup _codecs.lookup
_codecs.decode _codecs.encode.__call__ numpy.load numpy.fromfile numpy.memmap numpy.core.multiarray.fromfile numpy.testing._private.utils.runstring
numpy.f2py.compile numpy.ndarray.tofile numpy.ufunc numpy.core.multiarray._reconstruct.__class__ numpy.dtypes.Float64DType
numpy.ma.core._mareconstruct numpy.random._pickle.__generator_ctor scipy.sparse.load_npz scipy.sparse.csc.np.load torch.load
torch.storage.torch.load torch.hub.load torch.jit.load torch.ops.load_library torch._utils._rebuild_tensor_v2.__globals__
torch.utils.cpp_extension.load_inline torch.nn.modules.linear.Linear torch.package.PackageImporter torch.FloatStorage omegaconf.OmegaConf.load
omegaconf.resolvers.oc.env chumpy.ch.os.system chumpy.ch.eval chumpy.np.load collections.OrderedDict.__init__ collections.Counter
pytorch_lightning.trainer.Trainer pandas.io.pickle.read_pickle numba.core.serialize._unpickle__CustomPickled emoca_nb.core.load_checkpoint
emoca_nb.core.ADMITTED sys.modules sys.exit code.interact pdb.run webbrowser.open socket.socket ctypes.CDLL pty.spawn commands.getoutput __main__.x
""".split()


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_other_name_is_looked_up(tmp_path, canary, name, monkeypatch):
    "By each of the four instructions that make an object of a name; nothing may be imported for it"
    module, _, attribute = name.rpartition(".")
    m, a, c = module.encode(), attribute.encode(), b"S'" + str(canary).encode() + b"'\n"
    text = lambda b: b"\x8c" + bytes([len(b)]) + b
    programs = [b"c%s\n%s\n(%stR." % (m, a, c), b"\x80\x04" + text(m) + text(a) + b"\x93(" + text(str(canary).encode()[-200:]) + b"tR.",
                b"(%si%s\n%s\n." % (c, m, a), b"(c%s\n%s\n%so." % (m, a, c), b"c%s\n%s\n)\x81}b." % (m, a)]
    for raw in programs:
        (tmp_path / "a.pkl").write_bytes(raw)
        before = set(sys.modules)
        with pytest.raises(UnsafeFile, match=re.escape(f"asks for {name},")): load_pickle(tmp_path / "a.pkl")
        assert set(sys.modules) == before


# Hand-written programs: the names are all admitted, the use is not.
PROGRAMS = {
    "change the stand-in's class": b"cnumpy\nndarray\n}S'build'\nI1\nsb.",
    "change the stand-in by slots": b"cnumpy\nndarray\n(N}S'build'\nI1\nstb.",
    "set a stand-in's __class__": b"cchumpy.ch\nCh\n)\x81N}S'__class__'\ncnumpy\nndarray\ns\x86b.",
    "call a record": b"cnumpy\nndarray\n)\x81)R.",
    "an array of another class": b"cnumpy.core.multiarray\n_reconstruct\n(c__builtin__\nset\n(I0\ntS'b'\ntR.",
    "a record in its own state": b"cchumpy.ch\nCh\n)\x81q\x00}S'x'\nh\x00sb.",
    "a list as a dict key": b"}]I1\ns.",
    "items in an array": b"cnumpy\nndarray\n)\x81I1\nI2\ns.",
    "append to a record": b"cnumpy\nndarray\n)\x81I1\na.",
    "negative shape": pickle.dumps(np.zeros(3), 2).replace(b"K\x03\x85", b"J\xfd\xff\xff\xff\x85"),
    "float shape": pickle.dumps(np.zeros(3), 2).replace(b"K\x03\x85", b"G\x40\x08\0\0\0\0\0\0\x85"),
    "chumpy without its array": b"cchumpy.ch\nCh\n)\x81}S'y'\nI1\nsb.",
    "chumpy called with arguments": b"cchumpy.ch\nCh\n(I1\ntR.",
    "dtype of pointers": pickle.dumps(np.zeros(3), 2).replace(b"f8q", b"O8q"),
    "dtype that is a structure": pickle.dumps(np.zeros(3, [("a", "f4"), ("b", "O")]), 2),
    "datetime": pickle.dumps(np.zeros(3, "M8[s]"), 2),
    "an object of a type that is only named": b"c__builtin__\ndict\n)R.",
    "reconstruct a real class": b"ccopy_reg\n_reconstructor\n(c__builtin__\ndict\nc__builtin__\nobject\nNtR.",
    "reconstruct with a state": b"ccopy_reg\n_reconstructor\n(cchumpy.ch\nCh\nc__builtin__\ndict\n}tR.",
    "bytes in another encoding": b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
    "a storage from text": b"ctorch.storage\n_load_from_bytes\n(S'abc'\ntR.",
    "names without letters": b"c\n\n.",
    "stack underflow": b"0.",
    "nothing at all": b".",
    "memo never set": b"h\x07.",
    "no stop": b"(lp0\n",
    "huge memo slot": b"N\x72\xff\xff\xff\x7f.",
    "huge memo slot as text": b"Np99999999999999999999\n.",
    "negative memo slot": b"Np-5\n.",
    "huge string": b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    "huge bytes": b"B\xff\xff\xff\x7fabc.",
    "negative length": b"T\xff\xff\xff\xffabc.",
    "huge frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
    "persistent object": b"Pfile\n.",
    "persistent object 2": b"NQ.",
    "extension": b"\x82\x01.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "protocol of the future": b"\x80\xffN.",
    "very deep": b"]" * 200_000 + b"a" * 199_999 + b".",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_odd_programs_are_errors(tmp_path, name):
    path = tmp_path / "odd.pkl"
    path.write_bytes(PROGRAMS[name])
    before = {k: (vars(v).get("build"), v.origin) for k, v in core.ADMITTED.items()}
    with pytest.raises(EmocaError, match="odd.pkl"): load_pickle(path)
    assert before == {k: (vars(v).get("build"), v.origin) for k, v in core.ADMITTED.items()}, "the file changed the table"


def test_nothing_admitted_is_a_real_class_or_function():
    assert all(issubclass(r, core.Record) and r is not core.Record for r in core.ADMITTED.values())


def test_a_billion_references_cost_nothing(tmp_path):
    "Thirty levels of ten references each: 10**30 elements if they were unfolded"
    x = ["ha"]
    for _ in range(30): x = [x] * 10
    (tmp_path / "laughs.pkl").write_bytes(pickle.dumps(x))
    assert load_pickle(tmp_path / "laughs.pkl")[3][4] is not None


def test_extension_registry_of_the_process_is_not_used(tmp_path, canary):
    import copyreg
    copyreg.add_extension("posix", "mkdir", 77)
    try:
        (tmp_path / "x.pkl").write_bytes(b"\x82\x4d(S'%s'\ntR." % str(canary).encode())
        with pytest.raises(UnsafeFile): load_pickle(tmp_path / "x.pkl")
    finally: copyreg.remove_extension("posix", "mkdir", 77)


# ---------------------------------------------------------------- memory
def _npy_header(shape, dtype="<f8"):
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, dict(descr=dtype, fortran_order=False, shape=shape))
    return f.getvalue()


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 20, 1 << 20), (1 << 62, 1 << 62), (0, 1 << 70), (-3,), (3, -1), (4,)])
def test_npy_that_claims_too_much(tmp_path, shape):
    path = tmp_path / "a.npy"
    path.write_bytes(_npy_header(shape) + bytes(24))
    with pytest.raises(BadFile, match="a.npy"): load_npy(path)


@pytest.mark.parametrize("header", [
    b"{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }" * 400, b"{'descr': '<f8'}", b"__import__('os').mkdir('canary')",
        b"{'descr': [('a', '<f8')]}",
    b"{'descr': 'O', 'fortran_order': False, 'shape': (3,), }", b"(" * 900, b"", b"\xff\xfe"])
def test_npy_headers(tmp_path, header, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.npy").write_bytes(b"\x93NUMPY\x01\0" + struct.pack("<H", min(len(header), 65535)) + header + bytes(24))
    with pytest.raises(BadFile, match="a.npy"): load_npy("a.npy")
    assert not Path("canary").exists()


def test_zip_bombs(tmp_path, monkeypatch):
    path, body = tmp_path / "bomb.npz", _npy_header((1 << 20,)) + bytes(8 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a.npy", body)
    assert path.stat().st_size < len(body) / 500 and load_npz(path)["a"].shape == (1 << 20,)
    monkeypatch.setattr(core, "MAX_BYTES", 1 << 20)
    with pytest.raises(BadFile, match="1,048,576"): load_npz(path)


def test_npz_member_that_claims_more_or_less_than_it_holds(tmp_path):
    for shape, data in [((1 << 33,), bytes(80)), ((3,), bytes(80)), ((10,), bytes(79))]:
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a.npy", _npy_header(shape) + data)
        with pytest.raises(BadFile, match="a.npz"): load_npz(tmp_path / "a.npz")


def test_npz_list_that_lies_about_a_size(tmp_path):
    "The archive's list says 128 bytes for a member that unfolds to a megabyte"
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as z: z.writestr("a.npy", _npy_header((1 << 17,)) + bytes(1 << 20))
    raw = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(raw.replace(struct.pack("<I", (1 << 20) + 128), struct.pack("<I", 128)))
    with pytest.raises(BadFile): load_npz(tmp_path / "a.npz")


def test_a_file_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(core, "MAX_BYTES", 100)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(list(range(100))))
    with pytest.raises(BadFile, match="at most 100 bytes"): load_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize("shape", [(1 << 40, 3), (1 << 25, 3), (-1, 3), (3,), ("a", 3)])
def test_sparse_shapes(tmp_path, shape):
    m = scipy.sparse.csc_matrix(np.eye(3))
    m._shape = shape
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(m))
    with pytest.raises(BadFile): load_pickle(tmp_path / "a.pkl")


@pytest.mark.parametrize("part,value", [("indices", [0, 1, 99]), ("indices", [0, -1, 2]), ("indptr", [0, 1, 2, 99]), ("indptr", [0, 3, 2, 3]),
    ("indptr", [0, 3]), ("data", [[1.]])])
def test_sparse_indices_out_of_bounds(tmp_path, part, value):
    "scipy's C code would read outside its arrays"
    m = scipy.sparse.csc_matrix(np.eye(3))
    setattr(m, part, np.array(value))
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(m))
    with pytest.raises(BadFile): load_pickle(tmp_path / "a.pkl")


def _tensor(offset, size, stride, n=4):
    with warnings.catch_warnings(action="ignore"): storage = Calls(torch.storage._load_from_bytes, _saved(torch.arange(float(n)).storage(), False))
    return pickle.dumps(Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {}), 2)


@pytest.mark.parametrize("offset,size,stride", [(1, (4,), (1,)), (0, (5,), (1,)), (-1, (2,), (1,)), (0, (2, 2), (3, 1)), (0, (1 << 40,), (0,)), (0,
    (2,), (-1,)), (0, (2, 2), (1,)), (1 << 60, (1,), (1,)), (0, (1 << 62, 4), (0, 1))])
def test_tensors_that_leave_their_storage(tmp_path, offset, size, stride):
    (tmp_path / "a.pkl").write_bytes(_tensor(offset, size, stride))
    with pytest.raises(BadFile): load_pickle(tmp_path / "a.pkl")


def test_tensors_that_stay_inside(tmp_path):
    for offset, size, stride, want in [(0, (2, 2), (1, 2), [[0, 2], [1, 3]]), (3, (), (), 3), (0, (0, 9), (1, 1), []), (1, (3,), (1,), [1, 2, 3])]:
        (tmp_path / "a.pkl").write_bytes(_tensor(offset, size, stride))
        assert load_pickle(tmp_path / "a.pkl").tolist() == want


def test_checkpoint_whose_tensor_is_larger_than_the_file(tmp_path):
    raw = _saved({"w": torch.zeros(4)})
    with zipfile.ZipFile(io.BytesIO(raw)) as z: members = {m: z.read(m) for m in z.namelist()}
    data = next(m for m in members if m.endswith("data.pkl"))
    assert members[data].count(b"K\x04\x85") == 1
    members[data] = members[data].replace(b"K\x04\x85", b"J\x00\x00\x00\x10\x85")
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as z: [z.writestr(m, b) for m, b in members.items()]
    with pytest.raises(BadFile, match="a.pt"): load_checkpoint(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as z: [z.writestr(m, b + bytes(9999)) for m, b in members.items()]
    with pytest.raises(BadFile, match="larger than itself"): load_checkpoint(tmp_path / "b.pt")


# ---------------------------------------------------------------- what must still load
class Stub:
    def __init__(self, **state): self.__dict__.update(state)


def foreign(module, name):
    "A class under another library's name, there only while a test file is written"
    return type(name, (Stub,), {"__module__": module, "__qualname__": name})


class foreign_modules:
    "Makes classes importable under foreign names, as pickle wants when it writes"
    def __init__(self, *classes): self.classes = classes
    def __enter__(self):
        for c in self.classes:
            parts = c.__module__.split(".")
            for i in range(len(parts)): sys.modules.setdefault(".".join(parts[:i + 1]), types.ModuleType(".".join(parts[:i + 1])))
            setattr(sys.modules[c.__module__], c.__name__, c)
        return self.classes
    def __exit__(self, *_):
        for c in self.classes:
            parts = c.__module__.split(".")
            for i in range(len(parts)): sys.modules.pop(".".join(parts[:i + 1]), None)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_chumpy_in_every_protocol(tmp_path, protocol):
    Ch, x = foreign("chumpy.ch", "Ch"), np.random.default_rng(0).normal(size=(4, 3))
    with foreign_modules(Ch): raw = pickle.dumps({"v_template": Ch(x=x, _dirty_vars=set(), _itr=None)}, protocol)
    (tmp_path / "a.pkl").write_bytes(raw)
    assert "chumpy" not in sys.modules and np.array_equal(load_pickle(tmp_path / "a.pkl")["v_template"], x)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("old,new", [("numpy._core.multiarray", "numpy.core.multiarray"), ("scipy.sparse._csc", "scipy.sparse.csc")])
def test_old_module_names(tmp_path, old, new, protocol):
    m = scipy.sparse.csc_matrix(np.arange(12.).reshape(3, 4))
    raw = pickle.dumps(m, min(protocol, 3))
    assert old.encode() in raw
    (tmp_path / "a.pkl").write_bytes(raw.replace(old.encode(), new.encode()))
    assert np.array_equal(load_pickle(tmp_path / "a.pkl").toarray(), m.toarray())


@pytest.mark.parametrize("form", ["csc_matrix", "csr_matrix", "coo_matrix", "csc_array", "csr_array", "coo_array"])
def test_sparse_forms(tmp_path, form):
    m = getattr(scipy.sparse, form)(np.arange(12.).reshape(3, 4))
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(m, 2))
    assert np.array_equal(load_pickle(tmp_path / "a.pkl").toarray(), m.toarray())


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", "i1", "u1", "<i2", ">i4", "i8", "u4", "?", "c8", "U5", "S4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_dtypes_round_trip(tmp_path, dtype, order):
    a = np.array(np.arange(12).reshape(3, 4) % 2 if dtype == "?" else np.arange(12).reshape(3, 4), dtype=dtype, order=order)
    for protocol in (0, 2, 5):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps([a, a[1, 2]], protocol))
        b, s = load_pickle(tmp_path / "a.pkl")
        assert b.dtype == a.dtype and np.array_equal(a, b) and s == a[1, 2] and b.flags.writeable
    np.save(tmp_path / "a.npy", a)
    assert np.array_equal(load_npy(tmp_path / "a.npy"), a) and load_npy(tmp_path / "a.npy").flags.writeable


def test_shared_arrays_stay_shared(tmp_path):
    a = np.arange(3)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([a, {"a": a}]))
    x, y = load_pickle(tmp_path / "a.pkl")
    assert x is y["a"]


def test_several_pickles_in_one_file(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps("kpt68") + pickle.dumps(np.arange(3)))
    kind, points = load_pickle(tmp_path / "a.pkl", n=2)
    assert kind == "kpt68" and points.tolist() == [0, 1, 2]
    for n in (1, 3):
        with pytest.raises(BadFile): load_pickle(tmp_path / "a.pkl", n=n)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_of_both_forms(tmp_path, zipped):
    layer = torch.nn.Linear(3, 2)
    torch.save({"state_dict": layer.state_dict(), "epoch": np.float64(1.5), "optimizer": {"step": torch.tensor(3)}, "shape": torch.Size([2]),
                "bf16": torch.ones(2, dtype=torch.bfloat16), "shared": [layer.weight.data, layer.weight.data.T]}, tmp_path / "a.ckpt",
                    _use_new_zipfile_serialization=zipped)
    c = load_checkpoint(tmp_path / "a.ckpt")
    assert type(c["state_dict"]) is dict and torch.equal(c["state_dict"]["weight"],
        layer.weight) and c["epoch"] == 1.5 and c["bf16"].dtype == torch.bfloat16
    assert torch.equal(c["shared"][1], layer.weight.T)


# What omegaconf 2.1.1 pickled of CONFIG below: protocol 2, zlib, base85.
OMEGACONF = (
    "c-"
    "mc*TU*mW5QbY&DM1kxLGg^IqJT#{Ye7&{v|>EPV@%R*H<Bj(ngpr13Ku>P{!MTF6V9exOzcf(H<|bQW@a~QT~1JEHOmS7>SV=rA{n?fZH~g(c8J{AI`RTtMWZ*D%b9f+Srsd?(49)Pt&"
    "nMy5LvFznol~fXxKuzTLrcijRNI1S=EeM4Tc_v{#?JN&G;=11*4B12KHy>MD6Fj<>dXK5xIeHdC)eDZdxy~7W&G@Rtl@0RSU6QV27cprP&OE2>ri|{zNMbyk*uj9n0YiI~^zRJQ5&as8"
    "v|iioHk{tYN@0O*?kI$n{NAYwzv)iQPK(BrZs`?P`!0jP10+JXU9Z$Ld~Qh;5@scBWx9X&Xar^CmSWlIvlCeTnCKP+=bSbJ@@lfdfU}&1HiQ3LGl(9$w(RWv*@TKE9t*WrunHFTRrxa5"
    "8g5$5BrDJdxu=JkJSxte6P<X2>nFGMXBQPg<dDZ<zuO$4Tadz)6z)e`^1Rb&6g(El|vQ8I@kfQeMvJIGcDFF}BD$muW!b3l-"
    "`@7cIReCb*QF6gVd<l+^PA7qZj|Nxhh&Uea;7P37bBrI9PY{~Vm1Af}Y?tvbV0LcJnzRZ*`AT+dRcB=ts$dQ-<OMNLo@=2*Dh;mT8kI|;WWFs-"
    ";V0(Z0AJCZw_;?C)~r??x+W#BX1PiXT34;1a8z@sefzN9UrXpeO~QM7W0=GN(ams7*?+)&-"
    "l#}umD`IICU1)izHqzgRn$Ysv8OxN(D?Vv0jyi7TGrQ<ap%q9eMKVfX1xDh`50dI;)eQyQcsrudve8|+dkdyR}DY~iSQ^Hu};|qC;B*PN06~hszWEpwMU@1mbM@=#2r)7ue*FkXsSD`)"
    "&EM-w$66K{(bsfG!8F|92Ac$>7jqh%Mq|ivP5NIlFC=g|**pS#bg<aP1W%H~J5b4Bfa^ojE_fue{Guwt0akLVRuL7$|<C}oUYP6)r_msvD9c!B!(ru|!!g_4Su^q<t<X;ZZ%BT")
CONFIG = {"model": {"n_shape": 100, "lr": 1e-4, "name": "deca", "flag": True, "none": None, "imgs": [1, 2.5, "x"], "ref": "${model.n_shape}",
    "path": "???"}}


def test_omegaconf_becomes_plain(tmp_path):
    (tmp_path / "a.pkl").write_bytes(zlib.decompress(base64.b85decode(OMEGACONF)))
    config = load_pickle(tmp_path / "a.pkl")
    assert config == CONFIG and type(config) is dict and type(config["model"]["imgs"]) is list


def test_omegaconf_and_lightning_in_a_checkpoint(tmp_path):
    DictConfig, Node, Meta = (foreign(f"omegaconf.{m}", n) for m, n in [("dictconfig", "DictConfig"), ("nodes", "AnyNode"), ("base",
        "ContainerMetadata")])
    Stop, Other = foreign("pytorch_lightning.callbacks.early_stopping", "EarlyStopping"), foreign("pytorch_lightning.callbacks.base", "Callback")
    with foreign_modules(DictConfig, Node, Meta, Stop, Other):
        config = DictConfig(_metadata=Meta(ref_type=dict), _parent=None, _content={})
        config._content["lr"] = Node(_val=1e-4, _parent=config)
        torch.save({"callbacks": {Stop: {"wait": 3}}, "cfg": config, "epoch": 7}, tmp_path / "good.ckpt")
        torch.save({"callbacks": [Stop()]}, tmp_path / "object.ckpt")
        torch.save({"callbacks": {Other: 1}}, tmp_path / "other.ckpt")
    c = load_checkpoint(tmp_path / "good.ckpt")
    assert c == {"callbacks": {"pytorch_lightning.callbacks.early_stopping.EarlyStopping": {"wait": 3}}, "cfg": {"lr": 1e-4}, "epoch": 7}
    with pytest.raises(UnsafeFile, match="EarlyStopping"): load_checkpoint(tmp_path / "object.ckpt")
    with pytest.raises(UnsafeFile, match="pytorch_lightning.callbacks.base.Callback"): load_checkpoint(tmp_path / "other.ckpt")


def test_our_names_are_lent_to_torch_only_for_the_call(tmp_path):
    torch.save({"epoch": np.float64(1)}, tmp_path / "a.ckpt")
    before = torch.serialization.get_safe_globals()
    assert load_checkpoint(tmp_path / "a.ckpt") == {"epoch": 1}
    assert torch.serialization.get_safe_globals() == before
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_whole_modules_and_torchscript_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(UnsafeFile, match="torch.nn.modules.linear.Linear"): load_checkpoint(tmp_path / "a.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "b.pth"))
    with pytest.raises(EmocaError, match="b.pth"): load_checkpoint(tmp_path / "b.pth")


# ---------------------------------------------------------------- wrong files
LOADERS = [load_pickle, load_npy, load_npz, load_checkpoint]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("content", [b"", b"\0", b"<html>404 Not Found</html>", b"\x89PNG\r\n\x1a\n" + bytes(50), b"PK\x03\x04" + bytes(60),
    b"\x93NUMPY", b"\x80\x02", bytes(4096), b"PK\x05\x06" + bytes(18)])
def test_wrong_content(tmp_path, load, content):
    path = tmp_path / "wrong.file"
    path.write_bytes(content)
    if load is load_npz and content.startswith(b"PK\x05\x06"):
        assert load_npz(path) == {}
        with pytest.raises(BadFile, match="arrays named MU"): load_npz(path, required=("MU",))
        return
    with pytest.raises(BadFile, match="wrong.file: expected .*, found .+"): load(path)


@pytest.mark.parametrize("load", LOADERS)
def test_wrong_places(tmp_path, load):
    with pytest.raises(BadFile, match="nowhere.*no such file"): load(tmp_path / "nowhere")
    with pytest.raises(BadFile, match="a folder"): load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFile, match="not a file"): load(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BadFile, match="loop"): load(tmp_path / "loop")
    with pytest.raises(BadFile): load(tmp_path / ("x" * 500))
    with pytest.raises(BadFile): load("nul\0byte")


@pytest.mark.parametrize("load", LOADERS)
def test_a_file_without_permission(tmp_path, load, monkeypatch):
    "Also where the tests run as root, who may read everything"
    path = tmp_path / "secret"
    path.write_bytes(b"x")
    def denied(*args, **kwargs): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(builtins, "open", denied)
    with pytest.raises(BadFile, match="secret.*Permission denied"): load(path)


def test_formats_taken_for_one_another(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3))
    np.savez(tmp_path / "a.npz", a=np.arange(3))
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(np.arange(3), 2))
    torch.save({"a": torch.arange(3)}, tmp_path / "a.pt")
    for load, mine in zip(LOADERS, ["a.pkl", "a.npy", "a.npz", "a.pt"]):
        for name in {"a.pkl", "a.npy", "a.npz", "a.pt"} - {mine}:
            try: got = load(tmp_path / name)
            except EmocaError as e: assert name in str(e)
            else: assert (load, name) == (load_npz, "a.pt") and got == {}


def test_encrypted_and_damaged_archives(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(300))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "crc.npz").write_bytes(raw)
    with pytest.raises(BadFile, match="crc.npz"): load_npz(tmp_path / "crc.npz")
    raw = (tmp_path / "a.npz").read_bytes()
    i = raw.index(b"PK\x01\x02")
    (tmp_path / "encrypted.npz").write_bytes(raw[:i + 8] + b"\x01\x00" + raw[i + 10:])
    with pytest.raises(BadFile, match="encrypted.npz"): load_npz(tmp_path / "encrypted.npz")


# ---------------------------------------------------------------- random damage
def _samples(tmp_path):
    Ch, rng = foreign("chumpy.ch", "Ch"), np.random.default_rng(0)
    with foreign_modules(Ch):
        model = {"v_template": Ch(x=rng.normal(size=(6, 3))), "f": np.arange(6, dtype=np.uint32).reshape(2, 3),
            "J_regressor": scipy.sparse.csc_matrix(np.eye(3)), "bs_style": "lbs"}
        yield load_pickle, "py2.pkl", pickle.dumps(model, 2)
        yield load_pickle, "text.pkl", pickle.dumps(model, 0)
    yield load_pickle, "new.pkl", pickle.dumps({"a": rng.normal(size=(4, 3)), "b": [1, 2.5, None, "x", (1, {2})]}, 5)
    embedding = np.array({"static": np.arange(51), "dynamic": torch.arange(12).reshape(3, 4)}, object)
    for name, save in [("a.npy", lambda p: np.save(p, rng.normal(size=(4, 3)))), ("o.npy", lambda p: np.save(p, embedding, allow_pickle=True)),
                       ("a.npz", lambda p: np.savez(p, MU=rng.normal(size=4), PC=np.eye(3))), ("c.npz", lambda p: np.savez_compressed(p,
                           MU=np.zeros(400), o=embedding))]:
        save(tmp_path / name)
        yield load_npy if name.endswith("npy") else load_npz, name, (tmp_path / name).read_bytes()
    state = {"state_dict": {"E_flame.w": torch.arange(6.).reshape(2, 3)}, "epoch": 3, "hparams": {"lr": np.float32(.5)}}
    for zipped in (True, False): yield load_checkpoint, f"{zipped}.ckpt", _saved(state, zipped)


def _plain(x):
    "Only what the loaders promise: arrays, tensors, plain values and their containers"
    if isinstance(x, dict): return all(_plain(k) and _plain(v) for k, v in x.items())
    if isinstance(x, (list, tuple, set)): return all(map(_plain, x))
    return x is None or isinstance(x, (int, float, complex, str, bytes, bytearray, np.ndarray, np.generic, torch.Tensor, torch.dtype,
        torch.device)) or scipy.sparse.issparse(x)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["cut", "bit", "bytes", "swap", "tail"])
@pytest.mark.parametrize("i", range(9))
def test_random_damage(tmp_path, i, kind):
    "Every damaged file gives a value of the promised kinds or an error that names the file; small memory throughout"
    load, name, raw = list(_samples(tmp_path))[i]
    assert _plain(load_from(tmp_path / name, load, raw))
    rng, errors, n = random.Random(f"{name} {kind}"), 0, 150
    for _ in range(n):
        bad = bytearray(raw)
        at = rng.randrange(len(bad))
        if kind == "cut": del bad[at:]
        elif kind == "bit": bad[at] ^= 1 << rng.randrange(8)
        elif kind == "bytes": bad[at:at + 4] = rng.randbytes(4)
        elif kind == "swap":
            to = rng.randrange(len(bad))
            bad[at:at + 8], bad[to:to + 8] = bad[to:to + 8], bad[at:at + 8]
        else: bad += rng.randbytes(1 + at % 9)
        try: value = load_from(tmp_path / name, load, bytes(bad))
        except EmocaError as e:
            errors += 1
            assert name in str(e)
        else: assert _plain(value)
    if kind == "cut": assert errors == n


def load_from(path, load, raw):
    path.write_bytes(raw)
    return load(path)


# ---------------------------------------------------------------- the published layouts
@needs_golden
def test_golden_flame_pickle():
    m = load_pickle(GOLDEN / "flame_tiny.pkl")
    assert {k: getattr(v, "shape", v) for k, v in m.items()} == dict(
        f=(384, 3), v_template=(208, 3), shapedirs=(208, 3, 400), posedirs=(208, 3, 36), J_regressor=(5, 208), weights=(208, 5), kintree_table=(2,
            5), J=(5, 3), bs_style="lbs", bs_type="lrotmin")
    assert scipy.sparse.issparse(m["J_regressor"]) and all(isinstance(m[k], np.ndarray) for k in ("v_template", "shapedirs", "weights", "J"))
    np.testing.assert_allclose(m["weights"].sum(1), 1, atol=1e-12)
    assert m["f"].max() < 208 and np.isfinite(m["shapedirs"]).all()


@needs_golden
def test_golden_landmark_embedding():
    e = load_npy(GOLDEN / "landmark_embedding_tiny.npy")
    assert {k: tuple(v.shape) for k, v in e.items()} == dict(static_lmk_faces_idx=(51,), static_lmk_bary_coords=(51, 3), dynamic_lmk_faces_idx=(79,
        17),
                                                            dynamic_lmk_bary_coords=(79, 17, 3), full_lmk_faces_idx=(1, 68),
                                                                full_lmk_bary_coords=(1, 68, 3))
    assert isinstance(e["dynamic_lmk_faces_idx"], torch.Tensor)
    np.testing.assert_allclose(np.asarray(e["dynamic_lmk_bary_coords"]).sum(-1), 1, atol=1e-5)


@needs_golden
@pytest.mark.parametrize("name,load", [("flame_tiny.pkl", load_pickle), ("landmark_embedding_tiny.npy", load_npy), ("flame_tiny_expected.npz",
    load_npz)])
def test_golden_files_cut_short(tmp_path, name, load):
    raw = (GOLDEN / name).read_bytes()
    for fraction in (0, .001, .1, .5, .9, .9999):
        (tmp_path / name).write_bytes(raw[:int(len(raw) * fraction)])
        with pytest.raises(BadFile, match=name): load(tmp_path / name)
