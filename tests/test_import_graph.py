"""The picture of who imports whom is that of the sources, and there is no circle."""

import pytest

from bench.import_graph import PICTURE, edges, longest_chain, module_edges, ranks, reduced, statements, svg


def test_the_picture_is_fresh():
    assert PICTURE.read_text(encoding="utf-8") == svg(), "run python -m bench.import_graph"


def test_chains_are_short_and_without_circles():
    assert max(ranks(edges()).values()) <= 12
    with pytest.raises(ValueError, match="circle of imports: a -> b -> a"):
        ranks({"a": {"b"}, "b": {"a"}})


def test_the_longest_chain_of_modules_has_at_most_twelve():
    """Whoever changes a module has at most so many to think of, one upon the other."""
    chain = longest_chain(module_edges())
    assert 5 < len(chain) <= 12, " -> ".join(chain)


def test_imports_of_functions_and_for_checkers_are_told_from_those_of_the_module(tmp_path):
    (tmp_path / "a.py").write_text(
        "import b\nif TYPE_CHECKING:\n    import c\ntry:\n    from d import e\nexcept ImportError: ...\n"
        "class F:\n    import g\n    def h(self):\n        import i\n"
    )
    assert sorted(map(tuple, statements(tmp_path / "a.py", later=False))) == [("b",), ("d", "d.e"), ("g",)]
    assert ["i"] in list(statements(tmp_path / "a.py")) and ["c"] not in list(statements(tmp_path / "a.py"))


def test_a_package_counts_where_its_own_file_is_asked_for():
    found = module_edges()
    assert "rcmstr_fast.ops" not in found["rcmstr_fast.models.vit"]  # from rcmstr_fast.ops.replace_tokens import ..
    assert "rcmstr_fast.ops" in found["rcmstr_fast.methods.losses"]  # from rcmstr_fast import ops
    assert "rcmstr_fast.kernels.architectures" in found["rcmstr_fast.ops.triton_backend"]


def test_arrows_that_a_longer_way_shows_are_left_out():
    assert reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
