"""Room for workers: counted a node at a time, with something left to those who read the data."""

import time

import pytest
import ray

from cxr_ray.errors import CxrRayError
from cxr_ray.placement import check_placement, lacking, slots

pytestmark = pytest.mark.ray

# CPUs of the session's Ray, which is a single node.
CPUS = 4


@pytest.fixture
def nodes(ray_cluster, monkeypatch):
    """Makes the cluster one of other nodes; they are described as Ray describes its own."""

    def become(*resources: dict[str, float], lost: tuple[dict[str, float], ...] = ()) -> None:
        described = [{"Alive": held not in lost, "Resources": {**held, "memory": 1e9}} for held in (*resources, *lost)]
        monkeypatch.setattr(ray, "nodes", lambda: described)

    return become


def test_what_the_cluster_holds_is_let_through(ray_cluster):
    check_placement(1, {"CPU": 3.5})
    check_placement(7, {"CPU": 0.5})
    check_placement(35, {"CPU": 0.1})


def test_what_it_can_never_hold_is_refused_at_once_with_what_is_there(ray_cluster):
    asked = time.monotonic()
    with pytest.raises(CxrRayError) as refused:
        check_placement(5, {"CPU": 1})
    assert time.monotonic() - asked < 10
    assert str(refused.value) == (
        f"setting 'workers' is 5 with 1 CPU each: the cluster has 1 x {CPUS} CPU, room for 3 "
        "beside the half CPU that reading the data takes; lower workers or cpus_per_worker, or add nodes"
    )
    with pytest.raises(
        CxrRayError, match=rf"1 CPU and 1 GPU each: the cluster has 1 x {CPUS} CPU and 0 GPU, room for 0 beside"
    ):
        check_placement(1, {"CPU": 1, "GPU": 1})


@pytest.mark.parametrize(("workers", "cpus", "room"), [(4, 1, 3), (8, 0.5, 7), (1, 4, 0), (2, 1.8, 1)])
def test_workers_that_leave_nothing_to_the_readers_are_refused(ray_cluster, workers, cpus, room):
    with pytest.raises(CxrRayError, match=f"room for {room} beside the half CPU that reading the data takes"):
        check_placement(workers, {"CPU": cpus})


def test_a_worker_is_not_spread_over_nodes(nodes):
    """Two workers of two CPUs: four CPUs are enough on two nodes of two and more, and not on one of three and one of one."""
    nodes({"CPU": 3.0}, {"CPU": 1.0})
    with pytest.raises(CxrRayError, match="the cluster has 1 x 3 CPU, 1 x 1 CPU, room for 1 beside"):
        check_placement(2, {"CPU": 2})
    nodes({"CPU": 3.0}, {"CPU": 2.0})
    check_placement(2, {"CPU": 2})


def test_what_reads_the_data_needs_its_half_cpu_on_one_node(nodes):
    """Of two nodes a quarter is left each: together half a CPU, and no task may run on either."""
    nodes({"CPU": 2.0}, {"CPU": 2.0})
    with pytest.raises(CxrRayError, match="the cluster has 2 x 2 CPU, room for 1 beside"):
        check_placement(2, {"CPU": 1.75})
    check_placement(2, {"CPU": 1.5})
    nodes({"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 0.5})
    check_placement(2, {"CPU": 1.75})


def test_nodes_alike_are_told_together_and_lost_ones_are_not_counted(nodes):
    big, small = {"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}
    nodes(big, big, small, lost=({"CPU": 64.0, "GPU": 8.0},))
    check_placement(4, {"CPU": 1, "GPU": 1})
    with pytest.raises(CxrRayError, match=r"the cluster has 2 x 8 CPU and 2 GPU, 1 x 4 CPU and 0 GPU, room for 4 beside"):
        check_placement(5, {"CPU": 1, "GPU": 1})


def test_shares_of_a_cpu_are_counted_exactly(nodes):
    """0.3 / 0.1 is 2.9999999999999996 in floating point."""
    nodes({"CPU": 0.3}, {"CPU": 1.0})
    check_placement(3 + 5, {"CPU": 0.1})
    with pytest.raises(CxrRayError, match="room for 8 beside"):
        check_placement(3 + 6, {"CPU": 0.1})
    with pytest.raises(CxrRayError, match="room for 8 beside"):
        check_placement(14, {"CPU": 0.1})


def test_a_cluster_without_nodes_has_room_for_nobody(nodes):
    nodes()
    with pytest.raises(CxrRayError, match="the cluster has no node, room for 0 beside"):
        check_placement(1, {"CPU": 1})


def test_slots_are_of_workers_with_their_readers(nodes):
    nodes({"CPU": 4.0})
    assert slots({"CPU": 0.5}) == 4
    assert slots({"CPU": 1.5}) == 2
    assert slots({"CPU": 4.0}) == 0
    nodes({"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0})
    assert slots({"CPU": 0.5, "GPU": 1.0}) == 2
    nodes({"CPU": 3.0}, {"CPU": 1.0})
    assert slots({"CPU": 2.0}) == 1


def test_what_is_lacking_now_is_told_in_words(ray_cluster):
    assert lacking(1, {"CPU": 0.5}) is None
    told = lacking(2, {"CPU": CPUS})
    assert told is not None
    assert told.startswith(f"2 workers with {CPUS} CPU each; the cluster has ")
    assert told.endswith(" CPU free now")
    assert lacking(1, {"CPU": 0.5, "GPU": 1.0}).endswith("CPU and 0 GPU free now")
