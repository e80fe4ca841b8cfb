"""Functions named in a configuration."""

import pytest

from pegbox.errors import BadInput
from pegbox.parts.functions import function_at, is_function_path


def test_functions_of_files_and_modules(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def double(x):\n    return 2 * x\nvalue = 3\n")
    assert function_at(f"{file}:double")(4) == 8
    assert function_at("math:sqrt")(9) == 3
    for path, words in (
        (f"{file}:absent", "no function 'absent'"),
        (f"{file}:value", "no function 'value'"),
        (f"{tmp_path}/none.py:f", "does not exist"),
        ("no_such_module_here:f", "can't be imported"),
        ("double", "file.py:function"),
    ):
        with pytest.raises(BadInput, match=words):
            function_at(path)


def test_roles_are_no_function_paths():
    assert is_function_path("a.py:f")
    assert not is_function_path("reward")
    assert not is_function_path("org/model")
    assert not is_function_path("a:b c")
