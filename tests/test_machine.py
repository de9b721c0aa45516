"""What a container, a service or a job may use: CPUs and memory."""

import os

import pytest

from qfllama import machine

MIB = 1 << 20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups in a folder: `groups(controller, {name: text})` makes one."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    known = {}

    def make(controller, files, name="job"):
        folder = tmp_path / controller / name
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text)
        known.setdefault(controller, []).append(folder)

    monkeypatch.setattr(machine, "_groups", lambda controller: known.get(controller, []))
    return make


@pytest.mark.parametrize(
    ("files", "n"),
    [
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "5000 100000\n"}, 1),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, 64),
        ({"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"}, 2),
        ({}, 64),
    ],
)
def test_no_more_threads_than_the_quota_of_cpus(groups, files, n):
    groups("cpu", files)
    assert machine.n_threads() == n


def test_the_smallest_quota_counts(groups):
    groups("cpu", {"cpu.max": "max 100000"})
    groups("cpu", {"cpu.max": "400000 100000"}, "service")
    assert machine.n_threads() == 4


@pytest.mark.skipif(machine.available_bytes() is None, reason="only Linux tells free memory")
@pytest.mark.parametrize(
    ("limit", "used", "name"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_files_that_were_read_do_not_take_the_memory_of_a_container(groups, limit, used, name):
    stat = f"anon {20 * MIB}\n{name} {30 * MIB}\nactive_file {MIB}\n"
    groups("memory", {limit: f"{64 * MIB}\n", used: f"{60 * MIB}\n", "memory.stat": stat})
    assert machine.available_bytes() == 34 * MIB


@pytest.mark.skipif(machine.available_bytes() is None, reason="only Linux tells free memory")
def test_without_a_limit_free_memory_is_that_of_the_machine(groups):
    free = machine.available_bytes()
    groups("memory", {"memory.max": "max\n", "memory.current": "1\n", "memory.stat": ""})
    assert machine.available_bytes() == pytest.approx(free, rel=0.2)


def test_the_groups_are_those_of_this_process_up_to_the_root(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    text = "5:memory,hugetlb:/docker/1\n4:cpu,cpuacct:/\n0::/user.slice/job\n"
    monkeypatch.setattr(machine.Path, "read_text", lambda path: text)
    assert machine._groups("memory") == [
        tmp_path / "memory/docker/1", tmp_path / "memory/docker", tmp_path / "memory",
        tmp_path / "user.slice/job", tmp_path / "user.slice", tmp_path,
    ]  # fmt: skip
    assert machine._groups("cpu")[0] == tmp_path / "cpu"
