"""Results of forked writers reach the rank, however large, and no server process is needed."""

import multiprocessing
import os
import queue
from pathlib import Path

import pytest

from conf.schema import ParallelConfig, PrecisionConfig
from pipeline.write_results import WriteResults
from tests.distributed import megatron, run_ranks


def put_both(results: WriteResults) -> None:
    results.put({0: ["a" * (1 << 20)]})  # more than a pipe holds
    results.put(ValueError("no room"))


def test_results_of_a_forked_process_come_in_order() -> None:
    results = WriteResults()
    assert results.empty()
    child = multiprocessing.get_context("fork").Process(target=put_both, args=(results,))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and not results.empty()
    assert results.get_nowait() == {0: ["a" * (1 << 20)]}
    error = results.get_nowait()
    assert isinstance(error, ValueError) and results.empty()
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_half_a_result_is_none() -> None:
    results = WriteResults()
    results.put("whole")
    end = os.fstat(results._file.fileno()).st_size
    os.pwrite(results._file.fileno(), b"\x09\0\0\0\0\0\0\0half", end)
    assert results.get_nowait() == "whole"
    with pytest.raises(queue.Empty):
        results.get_nowait()
    assert results.empty()
    results.put("next")
    assert results.get_nowait() == "next"


def children_after_a_save(stage: str) -> list[str]:
    from pipeline.checkpoint import save
    from tests.pipeline.tiny_state import tiny_state

    parallel = ParallelConfig(1)
    with megatron(parallel):
        save(tiny_state(parallel, PrecisionConfig(), 0), Path(stage), keep=1)
        return [child.name for child in multiprocessing.active_children()]


def test_a_save_leaves_no_process(tmp_path: Path) -> None:
    assert run_ranks(1, children_after_a_save, str(tmp_path)) == [[]]
