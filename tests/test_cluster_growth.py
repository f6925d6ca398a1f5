"""How far a cluster may grow: read from what its site says, counted beside what is there, and waited for."""

import os

import pytest
import ray

from cxr_ray.cluster_growth import MAX_CLUSTER, await_cpu, cpus_at_most, nodes_at_most, stated_nodes
from cxr_ray.cpus import available_cpus
from cxr_ray.errors import CxrRayError
from cxr_ray.placement import check_placement, check_task, slots

GROUPS = '[{"nodes": 2, "CPU": 8}, {"nodes": 1, "CPU": 4, "GPU": 1}]'
HEAD = {"node:__internal_head__": 1.0, "memory": 1e9}


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch):
    """A cluster of a head and such workers, whose site states that much; described as Ray describes its own."""

    def become(*workers: dict[str, float], stated: str = GROUPS) -> None:
        described = [{"Alive": True, "Resources": node} for node in (HEAD, *workers)]
        monkeypatch.setattr(ray, "nodes", lambda: described)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setitem(os.environ, MAX_CLUSTER, stated)

    return become


def test_each_node_that_may_come_is_counted() -> None:
    assert stated_nodes({MAX_CLUSTER: GROUPS}) == [{"CPU": 8.0}, {"CPU": 8.0}, {"CPU": 4.0, "GPU": 1.0}]
    assert stated_nodes({}) == stated_nodes({MAX_CLUSTER: ""}) == []


@pytest.mark.parametrize(
    "stated", ["8", "{", '{"nodes": 8}', '[{"CPU": 8}]', '[{"nodes": 0, "CPU": 8}]', '[{"nodes": 1, "CPU": "eight"}]']
)
def test_what_cannot_be_read_is_named_with_the_remedy(stated: str) -> None:
    with pytest.raises(CxrRayError) as refused:
        stated_nodes({MAX_CLUSTER: stated})
    assert str(refused.value) == (
        f"CXR_RAY_MAX_CLUSTER is {stated!r}: no list of worker nodes; give the like of "
        '[{"nodes": 8, "CPU": 8}, {"nodes": 4, "CPU": 8, "GPU": 1}]'
    )


def test_a_head_alone_has_room_for_what_may_come(grown) -> None:
    grown()
    assert cpus_at_most() == 20
    check_placement(19, {"CPU": 1})
    check_placement(1, {"CPU": 3, "GPU": 1})
    check_task({"CPU": 8}, "--x")
    assert slots({"CPU": 3.5}) == 5


def test_what_never_fits_is_refused_with_what_is_there_and_what_may_come(grown) -> None:
    grown({"CPU": 8.0})
    size = "has 1 x 0 CPU, 1 x 8 CPU, and may grow to 1 x 0 CPU, 2 x 8 CPU, 1 x 4 CPU"
    remedy = "let it grow further, and say so in CXR_RAY_MAX_CLUSTER"
    with pytest.raises(CxrRayError) as refused:
        check_placement(20, {"CPU": 1})
    assert str(refused.value) == (
        f"setting 'workers' is 20 with 1 CPU each: the cluster {size}, room for 19 beside the half CPU that reading the data "
        f"takes; lower workers or cpus_per_worker, or {remedy}"
    )
    with pytest.raises(CxrRayError) as refused:
        check_task({"CPU": 9}, "--cpus-per-worker 9")
    assert str(refused.value) == f"--cpus-per-worker 9: takes 9 CPU of one node; the cluster {size}; ask for less, or {remedy}"


def test_more_workers_than_are_stated_count_as_they_are(grown) -> None:
    grown({"CPU": 2.0}, {"CPU": 2.0}, stated='[{"nodes": 1, "CPU": 64}]')
    assert nodes_at_most() == [HEAD, {"CPU": 2.0}, {"CPU": 2.0}]


def test_a_cluster_without_cpus_that_does_not_grow_is_refused_and_not_waited_for(grown) -> None:
    grown(stated="")
    assert cpus_at_most() == 1
    with pytest.raises(CxrRayError, match=r"the cluster has no CPU; add nodes, or say in CXR_RAY_MAX_CLUSTER how many come"):
        await_cpu()


def test_where_a_cpu_is_nobody_waits(grown, capsys: pytest.CaptureFixture[str]) -> None:
    grown({"CPU": 1.0})
    await_cpu()
    assert capsys.readouterr().err == ""


def test_without_a_cluster_the_cpus_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert cpus_at_most() == available_cpus()
    await_cpu()
