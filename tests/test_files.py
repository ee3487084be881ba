"""What is written is whole or absent."""

import errno

import pytest

from mixhead import files


def test_a_full_disk_keeps_the_model_that_was_there(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")

    def fill(partial):
        (partial / "new").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_folder(tmp_path / "model", fill)
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (tmp_path / "model" / "old").exists()
