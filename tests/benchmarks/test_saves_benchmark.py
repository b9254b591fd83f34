"""The benchmark of saves compares checkpoints that differ in their manifest alone."""

import bench_saves as bench
import pytest

from fastdpo.training.saving.manifest import MANIFEST, damage


def test_each_way_saves_what_its_name_says(tmp_path):
    trainer = bench.make_trainer(str(tmp_path), quick=True)
    trainer.train()
    files = {}
    for number, way in enumerate((bench.WHOLE, bench.UNCHECKED, bench.TRAINER)):
        trainer.state.global_step = number
        bench.save(trainer, way)
        files[way] = {path.name for path in (tmp_path / f"checkpoint-{number}").iterdir()}
    assert damage(tmp_path / "checkpoint-0") is None
    assert files[bench.WHOLE] - files[bench.UNCHECKED] == {MANIFEST}
    assert files[bench.TRAINER] <= files[bench.UNCHECKED]


def test_the_share_of_checksums_is_the_median_over_rounds():
    found = {bench.WHOLE: [(1.1, 2.0), (3.0, 2.0), (2.4, 2.0)], bench.UNCHECKED: [(1.0, 1.0), (1.0, 2.0), (2.0, 4.0)]}
    assert bench.share_of_checksums(found, 0) == pytest.approx(0.2)
    assert bench.share_of_checksums(found, 1) == 0.0
