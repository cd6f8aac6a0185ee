import pytest

from diffusion_prior.files import whole_file


def test_a_file_takes_its_place_once_it_is_written(tmp_path):
    path = tmp_path / "new" / "figures.json"
    with whole_file(path) as partial:
        partial.write_text("{}")
        assert not path.exists()
    assert [entry.name for entry in path.parent.iterdir()] == ["figures.json"]
    assert path.read_text() == "{}"


def write_half(path):
    with whole_file(path) as partial:
        partial.write_text("half")
        raise OSError("disk full")


def test_what_was_there_stays_where_writing_fails(tmp_path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(OSError, match="disk full"):
        write_half(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]
    assert path.read_text() == "old"
