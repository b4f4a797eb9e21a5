"""Mesh files: what is written is what the formats ask for, whatever the head brings."""
import json

import numpy as np
import pytest
import torch
import trimesh

from emoca_nb.core import EmocaError
from emoca_nb.export import four_joints, glb_bytes, jaw_waves, morph_targets, obj_files, skeleton, split_seams, target_weights, write_glb, write_obj
from emoca_nb.flame import FLAME
from emoca_nb.open_head import JAW_OPEN

TEXTURE = np.full((8, 8, 3), 120, np.uint8)


@pytest.fixture(scope="module")
def flame(): return FLAME.load(n_exp=51).eval()


@pytest.fixture(scope="module")
def bare(shared):
    """A head without texture coordinates and names, from a FLAME pickle."""
    return FLAME.load(shared / "golden/flame_tiny.pkl", shared / "golden/landmark_embedding_tiny.npy", n_shape=10, n_exp=5).eval()


def document(content): return json.loads(content[20:20 + int.from_bytes(content[12:16], "little")])


def test_glb_follows_the_specification(flame):
    d = document(glb_bytes(flame, texture=TEXTURE))
    assert d["asset"]["version"] == "2.0" and len(d["skins"][0]["joints"]) == 5
    targets = d["meshes"][0]["primitives"][0]["targets"]
    assert len(targets) == len(d["meshes"][0]["extras"]["targetNames"]) == len(d["meshes"][0]["weights"])
    for a in d["accessors"]:
        if "sparse" in a: assert "byteOffset" not in a and "bufferView" not in a
    for v in d["bufferViews"]: assert v["byteOffset"] % 4 == 0 and v["byteOffset"] + v["byteLength"] <= d["buffers"][0]["byteLength"]
    position = d["accessors"][d["meshes"][0]["primitives"][0]["attributes"]["POSITION"]]
    assert len(position["min"]) == len(position["max"]) == 3
    assert d["accessors"][d["meshes"][0]["primitives"][0]["attributes"]["NORMAL"]]["count"] == position["count"]


def test_codes_may_be_tensors_arrays_or_absent(flame):
    exp = torch.zeros(1, 51, requires_grad=True)
    weights = document(glb_bytes(flame, dict(exp=exp.detach(), pose=np.array([[0, 0, 0, JAW_OPEN, 0, 0]]))))["meshes"][0]["weights"]
    assert weights[51:53] == pytest.approx([1, 1]) and weights[:51] == [0] * 51
    assert target_weights(flame, {})[51:53] == [0, 0]


def test_a_head_without_texture_or_names(bare, tmp_path):
    names = list(morph_targets(bare))
    assert names[:5] == [f"expression{i:02d}" for i in range(5)] and names[5:7] == ["jawOpenSine", "jawOpenCosine"]
    write_glb(tmp_path / "a.glb", bare, texture=TEXTURE)
    assert "textures" not in document((tmp_path / "a.glb").read_bytes())
    write_obj(tmp_path / "a.obj", bare.head.v_template, bare.head, TEXTURE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.glb", "a.obj"]
    read = trimesh.load(tmp_path / "a.obj", process=False)
    assert np.allclose(read.triangles, bare.head.v_template[bare.head.faces], atol=1e-5)


def test_skeleton_at_rest_puts_joints_where_they_are():
    joints = np.array([[0., 0, 0], [0, 1, 0], [0, 1, 1], [1, 2, 0], [-1, 2, 0]])
    nodes = skeleton(joints, np.array([-1, 0, 1, 1, 1]), np.zeros((5, 3)))
    assert nodes[2].translation == [0, 0, 1] and nodes[1].children == [2, 3, 4] and nodes[0].rotation == [0, 0, 0, 1]


def test_weights_keep_four_joints():
    joints, weights = four_joints(np.array([[.5, .2, .1, .15, .05], [1, 0, 0, 0, 0]]))
    assert joints[0].tolist() == [0, 1, 3, 2] and weights[0].sum() == pytest.approx(1) and weights[0, 0] == pytest.approx(.5 / .95)
    assert joints[1].tolist() == [0, 0, 0, 0] and weights[1].tolist() == [1, 0, 0, 0]


def test_waves_of_the_jaw(): assert jaw_waves(0) == [0, 0] and jaw_waves(-JAW_OPEN)[0] == pytest.approx(-1)


def test_seams():
    quad = np.array([[0, 1, 2], [2, 1, 3]])
    vertex_of, uv_of, triangles = split_seams(quad, np.array([[0, 1, 2], [4, 5, 3]]))
    assert len(vertex_of) == 6 and (vertex_of[triangles] == quad).all()


@pytest.mark.parametrize("name", ["a b", "", "a/b"])
def test_names_that_break_an_obj_are_refused(flame, name):
    with pytest.raises(EmocaError, match="names its material"): obj_files(name, flame.head.v_template, flame.head)


def test_an_unwritable_place_is_named(flame, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EmocaError, match="file/a.glb"): write_glb(tmp_path / "file/a.glb", flame)
