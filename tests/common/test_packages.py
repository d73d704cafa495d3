"""Packages that only some features need."""

import pytest

from common.packages import optional


def test_a_missing_package_is_to_be_installed():
    with pytest.raises(ValueError, match=r"^x\.toml needs a package: pip install no-such-thing$"):
        optional("no_such_thing.part", "x.toml", "no-such-thing")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libmy.so.6: version 3.4 not found')", "libmy.so.6: version 3.4"),
        ("import no_such_thing", "No module named 'no_such_thing'"),
    ],
)
def test_a_package_that_is_there_but_not_importable_is_not_to_be_installed(
    tmp_path, monkeypatch, code, reason
):
    """Else one installs it again and again (dask/dask#3345)."""
    (tmp_path / "broken_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="broken_package, which cannot be imported") as error:
        optional("broken_package", "x.toml")
    assert reason in str(error.value)
    assert "pip install" not in str(error.value)
