"""The benchmark of saves compares checkpoints that differ in their manifest alone."""

import bench_saves as bench

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


def test_the_time_of_checksums_is_a_part_of_that_of_the_save(tmp_path):
    trainer = bench.make_trainer(str(tmp_path), quick=True)
    trainer.train()
    found, facts = bench.time_saves(trainer, 1)
    assert {len(seconds) for seconds in found.values()} == {1}
    assert 0 < facts["checksum_share"] < 1
    assert 0 < facts["checksum_cpu_share"] < 1
    assert facts["bytes"] > 10**6
