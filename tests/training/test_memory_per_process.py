"""What a process holds under FSDP2 falls with their number as the cost model says, the head's part included."""

import pytest
from memory_record import keep, name_of
from memory_runs import held
from processes import on_processes

KINDS = [
    {"reference": reference, "vocab_size": vocab_size}
    for reference in ("cached", "frozen", "adapter")
    for vocab_size in (1000, 16000)
]


@pytest.mark.slow
def test_peaks_of_one_two_and_four_processes_are_those_of_the_formula(tmp_path):
    peaks = {}
    for num_processes in (1, 2, 4):
        folder = tmp_path / str(num_processes)
        folder.mkdir()
        cases = [{"num_processes": num_processes, **kind} for kind in KINDS]
        found = (
            on_processes(held, cases, folder, num_processes)
            if num_processes > 1
            else [[held(folder / str(number), **case)] for number, case in enumerate(cases)]
        )
        for number, of_processes in enumerate(found):
            for measured, estimated, _ in of_processes:
                assert estimated == pytest.approx(measured, rel=0.1), (num_processes, KINDS[number])
            measured, estimated, _ = max(of_processes)
            peaks[num_processes, number] = measured
            keep(name_of(**KINDS[number]), num_processes, measured=measured, estimated=estimated)
    for number in range(len(KINDS)):
        assert peaks[1, number] > peaks[2, number] > peaks[4, number]
