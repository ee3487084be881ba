"""Which instruction set the C++ kernels are compiled for."""

import pytest

from mixhead.errors import MixheadError
from mixhead.ops.cpu import level


@pytest.fixture
def processor(monkeypatch):
    """Makes this processor one of a kind that has some features."""

    def become(machine, *features, capability="AVX512"):
        monkeypatch.delenv("MIXHEAD_CPU_LEVEL", raising=False)
        monkeypatch.setattr(level.platform, "machine", lambda: machine)
        monkeypatch.setattr(level, "can", lambda name: name in features)
        monkeypatch.setattr(level.torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return level.detect_level.__wrapped__

    return become


AVX2 = ("_is_avx2_supported",)
AVX512 = (*AVX2, "_is_avx512_supported")
BF16 = (*AVX512, "_is_avx512_bf16_supported")
AMX = (*BF16, "_is_amx_tile_supported")


@pytest.mark.parametrize(
    ("machine", "features", "best"),
    [
        ("x86_64", (), "plain"),
        ("AMD64", AVX2, "avx2"),
        ("x86_64", AVX512, "avx512"),
        ("x86_64", BF16, "avx512_bf16"),
        ("x86_64", AMX, "avx512_bf16"),  # the operating system refuses
        ("x86_64", (*AMX, "_init_amx"), "amx"),
        ("aarch64", (), "neon"),
        ("arm64", (), "neon"),
        ("riscv64", (), "plain"),
    ],
)
def test_the_best_of_the_processor(processor, machine, features, best):
    assert processor(machine, *features)() == best


def test_what_pytorch_may_use_bounds_it(processor):
    """ATEN_CPU_CAPABILITY=avx2 on a processor with more."""
    assert processor("x86_64", *AMX, capability="AVX2")() == "avx2"
    assert processor("x86_64", *AMX, capability="DEFAULT")() == "plain"


def test_a_user_may_name_a_lesser_one(processor, monkeypatch):
    detect = processor("x86_64", *BF16)
    for wanted in ("plain", "avx2", "avx512"):
        monkeypatch.setenv("MIXHEAD_CPU_LEVEL", wanted)
        assert detect() == wanted


@pytest.mark.parametrize("wanted", ["avx512", "amx", "neon"])
def test_more_than_the_processor_has_is_refused(processor, monkeypatch, wanted):
    """Its first instruction would end the process."""
    detect = processor("x86_64", *AVX2)
    monkeypatch.setenv("MIXHEAD_CPU_LEVEL", wanted)
    with pytest.raises(MixheadError, match=f"'{wanted}', which this processor does not have. It runs avx2, plain"):
        detect()


def test_an_unknown_one_is_the_users_mistake(monkeypatch):
    monkeypatch.setenv("MIXHEAD_CPU_LEVEL", "avx1024")
    with pytest.raises(MixheadError, match="avx1024"):
        level.detect_level.__wrapped__()
