"""Lock, cells and rates: what a comparison decides before it trains."""

import pytest

from pegbox.compare.cells import Row, final_cells, trial_cells
from pegbox.compare.lock import FILE, Lock, open_lock
from pegbox.compare.rates import LADDER, choose, extend, ladder, settings_of
from pegbox.errors import BadInput, Corrupt


def lock(**changes):
    block = {
        "model": "m",
        "fingerprint": "f" * 8,
        "data": {"train": {"rows": 3, "hash": "a"}},
        "encoding": {"max_length": 64},
        "training": {"batch": 8},
        "evaluation": {"suites": {"target": "1"}},
        "seeds": [1, 2, 3],
        "trials": {"count": 5},
        "libraries": {"torch": "2"},
    }
    return Lock.model_validate({**block, **changes})


def test_lock_is_written_once_and_names_what_changed(tmp_path):
    open_lock(tmp_path, lock())
    assert open_lock(tmp_path, lock()).digest() == lock().digest()
    with pytest.raises(BadInput, match=r"training\.batch: 8 \(locked\), 16"):
        open_lock(tmp_path, lock(training={"batch": 16}))


def test_an_edited_lock_is_refused(tmp_path):
    open_lock(tmp_path, lock())
    path = tmp_path / FILE
    path.write_text(path.read_text().replace("batch: 8", "batch: 9"))
    with pytest.raises(Corrupt, match="changed by hand"):
        open_lock(tmp_path, lock())


def test_cells_are_seed_major_and_have_folders_of_their_own(tmp_path):
    rows = [Row("a", {"x": 1}), Row("b", {"x": 2})]
    cells = final_cells(rows, {"a": {"optim.lr": 1.0}, "b": {}}, [1, 2])
    assert [c.key for c in cells] == ["a/seed-1", "b/seed-1", "a/seed-2", "b/seed-2"]
    assert len({c.folder(tmp_path) for c in cells}) == 4


def test_a_title_does_not_change_the_folder():
    assert Row("a", {"x": 1, "title": "t"}).digest == Row("a", {"x": 1}).digest != Row("a", {"x": 2}).digest


def test_trials_interleave_rows():
    rows = [Row("a", {}), Row("b", {"x": 1})]
    cells = trial_cells(rows, {"a": [{"lr": 1}, {"lr": 2}], "b": [{"lr": 1}]}, tuning_seed=9, share=1 / 3)
    assert [c.key for c in cells] == ["a/trial-0", "b/trial-0", "a/trial-1"]
    assert all(c.seed == 9 and c.is_trial for c in cells)


def test_ladder_of_five_is_the_documented_one():
    assert sorted(ladder(5)) == list(LADDER)
    assert ladder(1) == (1.0,)
    assert ladder(0) == ()
    assert len(set(ladder(9))) == 9


def test_further_knobs_share_the_trials():
    tried = settings_of("optim.lr", 1e-4, 5, {"select.every": [10, 20]})
    assert len(tried) == 5
    assert {t["select.every"] for t in tried} == {10, 20}


def test_choice_skips_failures_and_prefers_the_first():
    assert choose([0.1, None, 0.5, 0.5], higher_is_better=True) == 2
    assert choose([0.1, None, 0.5], higher_is_better=False) == 0
    assert choose([None, None], higher_is_better=True) is None


def test_the_edge_is_extended_twice_at_most():
    tried = [1e-5, 1e-4, 1e-3]
    assert extend(tried, 1e-3, 0) == pytest.approx(1e-3 * 10**0.5)
    assert extend(tried, 1e-5, 1) == pytest.approx(1e-5 / 10**0.5)
    assert extend(tried, 1e-4, 0) is None
    assert extend(tried, 1e-3, 2) is None
