"""Checkpoints of two real processes: damage that one of them sees, and a disk that is full for one of them."""

import pytest
from processes import HEARTBEAT, job, wait_until


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_damage_that_one_process_sees_sends_all_to_the_checkpoint_before(tmp_path):
    """A broken half of a moment (read by its owner alone), a bad record, arrays that are not what was saved."""
    with job(tmp_path, ["tests/savers.py", str(tmp_path), "damage"], size=2) as (ranks, outputs):
        statuses = [rank.wait(90) for rank in ranks]
    texts = [output.read_text() for output in outputs]
    assert statuses == [0, 0], "\n".join(texts)
    expected = ["whole 2", "moment 1", "record 0 1", "content 0 1", "record 1 1", "content 1 1"]
    for text in texts:
        assert [line for line in text.splitlines() if line in expected] == expected
    assert "another process found the damage" in texts[0] and "its arrays cannot be read" not in texts[0]
    assert "moment/checkpoints/2 is damaged: its arrays cannot be read" in texts[1]
    for place in ("moment", "record_0", "record_1", "content_0", "content_1"):
        assert (tmp_path / place / "damaged" / "2").is_dir() and not (tmp_path / place / "checkpoints" / "2").exists()
    assert (tmp_path / "whole" / "checkpoints" / "2").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("rank, size", [(0, 60_000), (1, 60_000), (1, 4000)])
def test_a_save_that_fails_on_one_process_ends_the_job(tmp_path, rank, size):
    """That process at its next save, with the error; the other within two heartbeats. Of 4000 bytes, its output too."""
    with job(tmp_path, ["tests/savers.py", str(tmp_path), "full", str(rank), str(size)], size=2) as (ranks, outputs):
        wait_until(lambda: "steps are done" in outputs[1 - rank].read_text(), 60, "the second save starts")
        assert ranks[rank].wait(5) == 1
        took = wait_until(lambda: ranks[1 - rank].poll() is not None, 2 * HEARTBEAT + 5, "the other ends")
        assert ranks[1 - rank].returncode != 0
    text = outputs[rank].read_text()
    assert "OUT_OF_RANGE" in text and (size < 60_000 or text.rstrip().splitlines()[-1].startswith("ValueError"))
    assert all("all saved" not in output.read_text() for output in outputs)
    assert [path.name for path in (tmp_path / "saved" / "checkpoints").glob("[0-9]*") if path.name.isdigit()] == ["1"]
    print(f"the other ended {took:.1f} s later, heartbeat {HEARTBEAT} s")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_an_error_does_not_wait_for_a_save_that_cannot_finish(tmp_path):
    """Its part of the save failed on process 0, which does not know yet and waits for process 1 elsewhere."""
    with job(tmp_path, ["tests/savers.py", str(tmp_path), "full", "0", "60000", "1"], size=2) as (ranks, outputs):
        wait_until(lambda: "steps are done" in outputs[1].read_text(), 60, "the second save starts")
        assert ranks[1].wait(5) == 1
        wait_until(lambda: ranks[0].poll() is not None, 2 * HEARTBEAT + 5, "the other ends")
        assert ranks[0].returncode != 0
    assert outputs[1].read_text().rstrip().endswith("ValueError: this process fails")
