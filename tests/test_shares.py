"""run.share_of, gather, broadcast and barrier in one, two and three processes.

Run as a script under gloo this file is also the worker.
"""

import json
import sys
from pathlib import Path

import pytest

from run import barrier, broadcast, gather, main, rank, share_of


def shares() -> list[tuple[list, list]]:
    """This process's share of lists of 0 to 7 items, and what all shares together give."""
    lists = [[dict(item=i) for i in range(n)] for n in range(8)]
    return [(share_of(items), gather(share_of(items))) for items in lists]


def work() -> None:
    """The worker: its argument is the folder for results."""
    barrier()
    results = dict(shares=shares(), broadcast=broadcast(dict(process=rank(), text="naïve")))
    (Path(sys.argv[1]) / f"{rank()}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module", params=[2, 3])
def results(request, tmp_path_factory) -> list[dict]:
    """What each of several processes has got."""
    from conftest import start_workers  # not at the top: the worker needs none of what conftest.py imports

    out = tmp_path_factory.mktemp("shares")
    start_workers(request.param, __file__, out)
    return [json.loads((out / f"{r}.json").read_text()) for r in range(request.param)]


def test_gather_is_the_inverse_of_shard(results):
    """Lists of 0 to 7: shares are alike in size and a partition; together, in order, on every process."""
    for n in range(8):
        items = [dict(item=i) for i in range(n)]
        parts = [result["shares"][n][0] for result in results]
        assert sorted(d["item"] for part in parts for d in part) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert all(result["shares"][n][1] == items for result in results)


def test_broadcast_is_the_first_processs_value(results):
    """On every process, whatever the others pass."""
    assert [result["broadcast"] for result in results] == [dict(process=0, text="naïve")] * len(results)


def test_one_process_has_it_all():
    """Without a process group they leave a value as it is."""
    barrier()
    for n, (share, together) in enumerate(shares()):
        assert share == together == [dict(item=i) for i in range(n)]
    assert broadcast("value") == "value"


if __name__ == "__main__":
    main(work)
