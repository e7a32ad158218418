"""The comparison of two builds, on this one twice."""

import pytest

from benchmarks import compare
from benchmarks.cases import MODELS
from benchmarks.lineup import SUBJECTS


@pytest.mark.slow
def test_a_build_against_itself(capsys) -> None:
    options = "--mixes uniform,skip --subject float32-direct --turns 3 --calls 1 --threads 1"
    compare.main([str(compare.ROOT), *options.split()])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["uniform", "skip"]
    assert all("quartiles" in line for line in lines)


def test_the_ratio_is_of_turns_and_its_quartiles_are_told() -> None:
    before, after = [2.0, 4.0, 6.0, 8.0, 9.0], [1.0, 2.0, 3.0, 2.0, 9.0]
    assert compare.line("full", before, after) == "full       2.000x (quartiles 1.500 to 3.000), 6e+03 -> 2e+03 ms"


def test_a_subject_is_frozen_as_in_the_benchmark(tmp_path) -> None:
    job = compare.den_job(MODELS[0], SUBJECTS["bfloat16-direct"], 1, "skip", tmp_path, selector=True)
    assert job.dtype == "bfloat16"
    assert job.options == {"backend": "cpu", "freeze": {"winograd": False}, "selector": True}
