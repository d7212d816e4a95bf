"""Scoring by inference engines, compared with JAX."""

import json
import logging
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from bef_jax.data.sources.synthetic import drawn_patches
from bef_jax.errors import RunError, UserError
from bef_jax.runtime import sharding
from bef_jax.scoring import scorer
from bef_jax.scoring.engines import choice, predictor, sessions
from bef_jax.scoring.engines.predictor import EngineScorer
from bef_jax.training.state import create_state

pytest.importorskip("onnx", reason="onnx is not installed")
INSTALLED = [name for name in sessions.ENGINES if sessions.version_of(name)]


@pytest.fixture
def mesh():
    return sharding.make_mesh()


@pytest.fixture
def no_cache(tmp_path):
    """Keeps choices of engines below tmp_path, and returns their file."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "engines.json"
    jax.config.update("jax_compilation_cache_dir", before)


def variables_of(config, mesh):
    return create_state(config, sharding.replicated(mesh)).eval_variables()


def scores_of(config, mesh, scored_by, images):
    return np.concatenate(list(scorer.make_predictor(config, scored_by, mesh)(images)))


@pytest.mark.parametrize("engine", INSTALLED)
@pytest.mark.parametrize(
    "changes",
    [{"eval.tta": 8}, {"model.num_classes": 3, "data.classes": ("a", "b", "c")}],
    ids=["eight views", "three classes"],
)
def test_an_engine_gives_the_probabilities_of_jax(small_config, mesh, engine, changes, no_cache):
    config = small_config(**{"predict.engine": engine, "eval.batch_size": 4, **changes})
    variables = variables_of(config, mesh)
    by_engine = EngineScorer(config, variables, mesh)
    images = drawn_patches(96, 11)  # the last batch is padded
    found = scores_of(config, mesh, by_engine, images)
    assert by_engine.engine == f"{engine} float32"
    by_jax = scorer.make_scorer(config, mesh)(variables)
    np.testing.assert_allclose(found, scores_of(config, mesh, by_jax, images), atol=1e-5)
    assert not no_cache.exists()  # only what `auto` has found is kept


@pytest.mark.skipif(not INSTALLED, reason="no engine is installed")
def test_auto_stays_with_jax_for_few_patches_and_times_for_many(
    small_config, mesh, monkeypatch, no_cache, caplog
):
    config = small_config(**{"eval.batch_size": 4})
    variables, images = variables_of(config, mesh), drawn_patches(96, 20)
    by_auto = EngineScorer(config, variables, mesh)
    first = scores_of(config, mesh, by_auto, images)
    assert by_auto.engine == "jax float32"
    # The median of the calls of each, in turn: the engine is the fastest, then JAX is.
    monkeypatch.setattr(predictor, "WORTH", 12)
    for fastest in (INSTALLED[0], "jax"):
        no_cache.unlink(missing_ok=True)
        monkeypatch.setattr(choice.time, "perf_counter", clock_for(fastest))
        by_auto = EngineScorer(config, variables, mesh)
        with caplog.at_level(logging.INFO, "bef_jax"):
            found = scores_of(config, mesh, by_auto, images)
        assert by_auto.engine == f"{fastest} float32"
        assert f"scoring by {fastest} float32" in caplog.text
        np.testing.assert_allclose(found, first, atol=1e-5)
        np.testing.assert_array_equal(found[:8], first[:8])  # JAX scored those
        assert list(json.loads(no_cache.read_text()).values()) == [fastest]


def clock_for(fastest):
    """Returns a clock by which a call of `fastest` takes no time, and any other one second.

    Two readings belong to each call; the calls are of JAX, then of each engine, in turn.
    """
    names, state = ["jax", *INSTALLED], {"calls": 0, "now": 0.0}

    def perf_counter():
        name = names[state["calls"] // 2 % len(names)]
        state["now"] += 1e-9 if name == fastest else (state["calls"] % 2) * 1.0
        state["calls"] += 1
        return state["now"]

    return perf_counter


@pytest.mark.skipif(not INSTALLED, reason="no engine is installed")
def test_a_kept_choice_is_taken_without_timing(small_config, mesh, monkeypatch, no_cache):
    config = small_config()
    variables = variables_of(config, mesh)
    monkeypatch.setattr(choice, "_fastest", None)  # a call would fail
    for kept in ("jax", INSTALLED[0]):
        no_cache.write_text(json.dumps({choice._key(config): kept}))
        by_auto = EngineScorer(config, variables, mesh)
        by_auto.expect(predictor.WORTH)
        assert by_auto.engine == f"{kept} float32"


@pytest.mark.skipif(not INSTALLED, reason="no engine is installed")
def test_the_number_of_patches_decides_once(small_config, mesh, monkeypatch, no_cache):
    config = small_config(**{"eval.batch_size": 4})
    by_auto = EngineScorer(config, variables_of(config, mesh), mesh)
    by_auto.expect(predictor.WORTH - 1)
    monkeypatch.setattr(predictor, "WORTH", 4)
    monkeypatch.setattr(predictor, "choose", None)  # a call would fail
    scores_of(config, mesh, by_auto, drawn_patches(96, 8))
    assert by_auto.engine == "jax float32"


@pytest.mark.parametrize("engine", INSTALLED)
def test_an_engine_that_differs_from_jax_is_not_used(
    small_config, mesh, monkeypatch, caplog, engine, no_cache
):
    original = choice.open_session

    def wrong(*arguments):
        session = original(*arguments)
        return sessions.Session(session.engine, session.dtype, lambda x: session.run(x) + 0.01)

    monkeypatch.setattr(choice, "open_session", wrong)
    variables = variables_of(small_config(), mesh)
    asked = EngineScorer(small_config(**{"predict.engine": engine}), variables, mesh)
    with pytest.raises(RunError, match=f"by {engine} differ .* give --config.predict.engine=jax"):
        asked(drawn_patches(96, 4))
    by_auto = EngineScorer(small_config(), variables, mesh)
    by_auto.expect(predictor.WORTH)
    assert by_auto.engine == "jax float32"
    assert f"{engine} is not used: probabilities by {engine} differ" in caplog.text


@pytest.mark.skipif(not INSTALLED, reason="no engine is installed")
def test_auto_stays_with_jax_where_a_network_has_no_onnx(
    small_config, mesh, monkeypatch, caplog, no_cache
):
    def lacks(*_):
        raise NotImplementedError("sort is not among the operators that can be exported to ONNX")

    monkeypatch.setattr(choice, "graph", lacks)
    by_auto = EngineScorer(small_config(), variables_of(small_config(), mesh), mesh)
    by_auto.expect(predictor.WORTH)
    assert by_auto.engine == "jax float32"
    assert f"{INSTALLED[0]} is not used: sort is not among the operators" in caplog.text
    assert not no_cache.exists()  # another version may have it


def test_an_engine_that_is_missing_is_named_with_its_extra(small_config, mesh, monkeypatch):
    monkeypatch.setattr(sessions, "version_of", lambda engine: None)
    config = small_config(**{"predict.engine": "openvino"})
    with pytest.raises(UserError, match=r"engine=openvino is not installed: .*\[openvino\]"):
        EngineScorer(config, variables_of(config, mesh), mesh)


@pytest.mark.skipif("openvino" not in INSTALLED, reason="openvino is not installed")
def test_openvino_sends_no_word_of_its_use(tmp_path):
    program = """
import os
import socket
import numpy as np
from bef_jax.scoring.engines.sessions import open_session
from onnx import TensorProto, helper

def refuse(*_):
    print("refused")
    raise RuntimeError

os.fork = socket.socket.connect = refuse
kinds = [("image", TensorProto.UINT8), ("scores", TensorProto.UINT8)]
ends = [[helper.make_tensor_value_info(name, kind, ["n"])] for name, kind in kinds]
node = helper.make_node("Identity", ["image"], ["scores"])
graph = helper.make_graph([node], "g", *ends)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
session = open_session("openvino", model.SerializeToString(), "float32")
print(session.run(np.arange(3, dtype=np.uint8)))
"""
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=home, capture_output=True, text=True, check=True)
    assert found.stdout == "[0 1 2]\n"
    assert not list(tmp_path.iterdir())  # its number of this user would be kept there


@pytest.mark.skipif("openvino" not in INSTALLED, reason="openvino is not installed")
def test_bfloat16_is_used_where_the_cpu_has_it(small_config, mesh, no_cache):
    import openvino

    config = small_config(**{"predict.engine": "openvino", "predict.dtype": "bfloat16"})
    by_engine = EngineScorer(config, variables_of(config, mesh), mesh)
    scores_of(config, mesh, by_engine, drawn_patches(96, 4))
    has_it = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert by_engine.engine == f"openvino {'bfloat16' if has_it else 'float32'}"
