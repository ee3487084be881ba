"""Files of weights from strangers: the published forms load, and nothing that a file says is executed."""

import argparse
import collections
import contextlib
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from mixhead.errors import MixheadError
from mixhead.interop import load_pickle_weights

WEIGHTS = {"a.weight": torch.arange(600.0).view(20, 30), "a.bias": torch.arange(30, dtype=torch.bfloat16)}


class Hostile:
    """Whoever unpickles it runs a command."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Harmless:
    """A class of its own that a file may name."""


def assert_weights(loaded):
    assert loaded.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch(tmp_path, zipped):
    file = tmp_path / "w.pt"
    torch.save(collections.OrderedDict(WEIGHTS), file, _use_new_zipfile_serialization=zipped)
    assert_weights(load_pickle_weights(file))
    assert_weights(load_pickle_weights(str(file), verify=False, allow=()))


def test_safetensors_whatever_the_name(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.pth")
    assert_weights(load_pickle_weights(tmp_path / "w.pth"))


@pytest.mark.parametrize("zipped", [True, False])
def test_published_training_checkpoint(tmp_path, zipped):
    """As the official training scripts save: weights, optimizer, counters and the command line."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {name: torch.nn.Parameter(tensor) for name, tensor in WEIGHTS.items()},
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": {"base_values": [1e-3], "t_initial": 300, "noise_range_t": None},
        "epoch": 299,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": argparse.Namespace(model="moh_transnext_small_75", lr=1e-3, decay_keywords=["cpb"], resume=None),
        "max_accuracy": 84.6,
    }
    file = tmp_path / "checkpoint.pth"
    torch.save(checkpoint, file, _use_new_zipfile_serialization=zipped)
    loaded = load_pickle_weights(file, entry="model")
    assert_weights(loaded)
    assert not any(tensor.requires_grad for tensor in loaded.values())
    with pytest.raises(MixheadError, match=r"no state dict but holds 'model', 'optimizer'.*choose one with `entry`"):
        load_pickle_weights(file)
    with pytest.raises(MixheadError, match=r"has no entry 'ema', only: 'model'"):
        load_pickle_weights(file, entry="ema")
    with pytest.raises(MixheadError, match=r"argparse\.Namespace.*allowed .*: none"):
        load_pickle_weights(file, entry="model", allow=())


def test_changing_loaded_weights_leaves_the_file(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pt")
    load_pickle_weights(tmp_path / "w.pt")["a.weight"].zero_()
    assert_weights(load_pickle_weights(tmp_path / "w.pt"))


def save_zip(content, file):
    torch.save(content, file)


def save_legacy(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


def save_pickle(content, file, protocol=2):
    file.write_bytes(pickle.dumps(content, protocol=protocol))


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
@pytest.mark.parametrize("where", ["weight", "entry", "key", "state"])
@pytest.mark.parametrize("function", [os.system, eval])
def test_hostile_pickles_execute_nothing(tmp_path, save, where, function):
    mark = tmp_path / "executed"
    command = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    bomb = Hostile(function, command)
    namespace = argparse.Namespace(bomb=bomb)
    content = {
        "weight": {**WEIGHTS, "b": bomb},
        "entry": {"model": WEIGHTS, "args": bomb},
        "key": {**WEIGHTS, bomb: torch.ones(1)},
        "state": {"model": WEIGHTS, "args": namespace},
    }[where]
    file = tmp_path / "w.pt"
    save(content, file)
    for entry in (None, "model"):
        with pytest.raises(MixheadError, match="refused, and nothing in it was executed") as refusal:
            load_pickle_weights(file, entry=entry)
        if save is not save_pickle:
            assert f"{function.__module__}.{function.__name__}".removeprefix("builtins.") in str(refusal.value)
    assert not mark.exists()


def test_hostile_class_in_other_protocols(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        mark = tmp_path / "executed"
        save_pickle({"a": Hostile(os.system, f"touch {mark}")}, tmp_path / "w.pt", protocol)
        with pytest.raises(MixheadError):
            load_pickle_weights(tmp_path / "w.pt")
        assert not mark.exists()


def test_refusal_names_the_class_and_the_way_out(tmp_path):
    torch.save({"model": WEIGHTS, "args": Harmless()}, tmp_path / "w.pt")
    with pytest.raises(MixheadError, match=r"asks for .*Harmless.*argparse\.Namespace.*`allow`"):
        load_pickle_weights(tmp_path / "w.pt", entry="model")
    assert_weights(load_pickle_weights(tmp_path / "w.pt", entry="model", allow=(Harmless,)))
    with pytest.raises(MixheadError, match="Harmless"):  # allowed for that one call only
        load_pickle_weights(tmp_path / "w.pt", entry="model")


@pytest.mark.parametrize("save", [save_zip, save_legacy, lambda content, file: save_file(content, file)])
def test_truncated_at_any_point(tmp_path, save):
    whole = tmp_path / "w.pt"
    save(WEIGHTS, whole)
    content = whole.read_bytes()
    file = tmp_path / "cut.pt"
    for length in {0, 1, 2, 3, 8, 9, 20, 64, *range(100, len(content), 397), len(content) - 1}:
        file.write_bytes(content[:length])
        with pytest.raises(MixheadError):
            load_pickle_weights(file)


def test_flipped_bit_of_a_weight(tmp_path):
    file = tmp_path / "w.pt"
    torch.save(WEIGHTS, file)
    content = bytearray(file.read_bytes())
    content[content.find(WEIGHTS["a.weight"].numpy().tobytes()) + 100] ^= 4
    file.write_bytes(content)
    with pytest.raises(MixheadError, match="truncated or corrupt: download it again"):
        load_pickle_weights(file)
    assert load_pickle_weights(file, verify=False).keys() == WEIGHTS.keys()


def test_archive_without_check_sums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert_weights(load_pickle_weights(tmp_path / "w.pt"))


def test_damaged_anywhere_raises_one_type(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for save in (save_zip, save_legacy):
        whole = tmp_path / "w.pt"
        save({"a": torch.ones(4)}, whole)
        content = whole.read_bytes()
        file = tmp_path / "damaged.pt"
        for place in torch.randint(0, len(content), (150,), generator=generator).tolist():
            damaged = bytearray(content)
            damaged[place] ^= 0x55
            file.write_bytes(damaged)
            with contextlib.suppress(MixheadError):  # any other type fails the test
                load_pickle_weights(file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty: download it again"),
        (b"<!DOCTYPE html><html>404</html>", "is no file of weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"PK\x03\x04 and nothing more", "truncated or corrupt"),
        (b"\x80\x02 and nothing more", "corrupt"),
        (b"\xff" * 8 + b"{" + b"x" * 50, "truncated or corrupt"),
    ],
)
def test_no_file_of_weights(tmp_path, content, sentence):
    file = tmp_path / "w.pth"
    file.write_bytes(content)
    with pytest.raises(MixheadError, match=sentence):
        load_pickle_weights(file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([torch.ones(1)], "holds a list"),
        ({}, "holds nothing"),
        (torch.ones(2), "holds a Tensor"),
        ({"a": 1}, "holds a int at 'a'"),
        ({1: torch.ones(1)}, "at 1"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, device="meta")}, "without data"),
    ],
)
def test_something_else_than_named_tensors(tmp_path, content, sentence):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(MixheadError, match=sentence):
        load_pickle_weights(tmp_path / "w.pt")


def test_places_without_a_file(tmp_path):
    with pytest.raises(MixheadError, match="There is no file"):
        load_pickle_weights(tmp_path / "absent.pt")
    with pytest.raises(MixheadError, match="is a folder"):
        load_pickle_weights(tmp_path)
