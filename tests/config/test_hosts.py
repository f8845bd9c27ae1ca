"""Several hosts as two processes on loopback, each with two virtual devices of one mesh.

``make test`` runs all phases, ``make test-all`` the failures too.
"""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from kvpipe.config.hosts import check_hosts, check_node_rank, own_file, who_ended, with_node_rank
from kvpipe.config.schema import EngineConfig, Kvpipe, RunnerConfig
from kvpipe.pipeline.ledger import Ledger
from kvpipe.records.json_record import decode
from kvpipe.records.run import Check, Memory, Peak
from kvpipe.worker.host_results import HostResult, merge
from kvpipe.worker.measurement import Measurement
from tests import faults
from tests.command import KVPIPE, environment
from tests.conftest import DEVICES, greedy
from tests.helpers_config import default_names
from tests.refusal import refusal
from tests.sinks import wandb_file
from tests.sop import STEPS

PATIENCE_S = 240
NEW_TOKENS = 4
HERE = socket.gethostname()
# As the engine that the tests of the engine share, which has all four devices in one process.
AS_THE_SHARED_ENGINE = [
    "engine.max_total_tokens=1024",
    "engine.context_length=256",
    "engine.max_running_requests=2",
    "engine.max_prefill_tokens=128",
    f"sampling.max_new_tokens={NEW_TOKENS}",
    "sampling.ignore_eos=true",
]


@dataclass
class Host:
    """One of the two hosts: the command, in a directory of its own."""

    process: subprocess.Popen
    cwd: Path
    output: tuple[str, str] = ("", "")

    @property
    def worker(self):
        """The id of its worker, once that has come to the step that waits."""
        deadline = time.monotonic() + PATIENCE_S
        while not (path := self.cwd / "worker.pid").exists() or not path.read_text():
            assert self.process.poll() is None, "the run ended too early"
            assert time.monotonic() < deadline, "the run did not get there"
            time.sleep(0.05)
        return int(path.read_text())

    def finish(self):
        self.output = self.process.communicate(timeout=PATIENCE_S)

    @property
    def exit_code(self):
        return self.process.returncode

    @property
    def run_dir(self):
        (path,) = (self.cwd / "outputs/tiny").iterdir()
        return path

    def records(self, name="records.jsonl"):
        return [json.loads(line) for line in (self.run_dir / name).open()]


def start_pair(where, overrides, second=(), site=None):
    """Start the command on both; ``second`` is what only the second has typed."""
    address = f"127.0.0.1:{free_port()}"
    several = ["engine.nnodes=2", f"engine.dist_init_addr={address}", f"engine.tp_size={DEVICES}"]
    config_dir = ["--config-dir", str(site / "mine")] if site else []
    hosts = []
    for rank in range(2):
        cwd = where / f"host{rank}"
        cwd.mkdir(parents=True)
        typed = [*config_dir, *several, *overrides, *(second if rank else ())]
        process = subprocess.Popen(
            [*KVPIPE, *typed],
            cwd=cwd,
            env=environment(where.parent, site) | {"KVPIPE_NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        hosts.append(Host(process, cwd))
    return hosts


def free_port():
    """Return a port that is free, as those are that the engine takes after it."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                for after in (5, 6):
                    with socket.socket() as other:
                        other.bind(("127.0.0.1", port + after))
            except OSError:
                continue
            return port


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tiny pipeline, all its phases, on two hosts."""
    hosts = start_pair(tmp_path_factory.mktemp("whole") / "pair", AS_THE_SHARED_ENGINE)
    for host in hosts:
        host.finish()
    return hosts


@pytest.mark.slow
def test_two_hosts_run_all_phases_and_the_first_alone_records_them(whole):
    first, second = whole
    assert [host.exit_code for host in whole] == [0, 0], [host.output for host in whole]
    phases = [record["phase"] for record in first.records()]
    assert phases == [
        "run_started",
        "wandb_init",
        "run_planned",
        *default_names()[1:],
        "run_finished",
    ]
    assert (
        first.output[0].splitlines() == (first.run_dir / "records.jsonl").read_text().splitlines()
    )
    assert second.output == ("", "kvpipe: host 1 of 2; host 0 writes the records\n")
    assert sorted(path.name for path in second.run_dir.iterdir()) == [".hydra", "engine.host1.log"]


@pytest.mark.slow
def test_two_hosts_make_one_run_of_wandb(whole):
    first, second = whole
    (logged,) = first.run_dir.glob("wandb/*/*.wandb")
    assert wandb_file.read(logged)["summary"]["run/exit_code"] == 0
    assert list(second.run_dir.rglob("*.wandb")) == []


@pytest.mark.slow
def test_two_hosts_hold_the_bytes_of_one_process(whole, real_engine):
    from kvpipe.engine import kv_cache, weights

    params, kv = weights.live_bytes(real_engine), kv_cache.nbytes(real_engine)
    held = {record["phase"]: record.get("ledger") for record in whole[0].records()}
    for phase in STEPS[2:]:
        dropped = STEPS.index("kv_cache_dropped") <= STEPS.index(phase)
        dropped &= STEPS.index(phase) < STEPS.index("kv_cache_rebuilt")
        assert (held[phase]["params"], held[phase].get("kv", 0)) == (params, 0 if dropped else kv)
    for slot, phase in (("param_dict", STEPS[4]), ("param_dict2", STEPS[11])):
        assert held[phase][f"slot:{slot}"] == params


@pytest.mark.slow
def test_each_host_drops_its_half_holds_half_the_second_set_and_rebuilds(whole):
    records = {record["phase"]: record for record in whole[0].records()}
    kv = records["engine_ready_dummy"]["ledger"]["kv"]
    second = records["sglang_param_dict2_ready"]["ledger"]["slot:param_dict2"]

    def of_hosts(phase, pool):
        return [host["ledger"].get(pool, 0) for host in records[phase]["hosts"]]

    assert of_hosts("kv_cache_dropped", "kv") == [0, 0]
    assert of_hosts("kv_cache_rebuilt", "kv") == [kv // 2] * 2
    assert of_hosts("sglang_param_dict2_ready", "slot:param_dict2") == [second // 2] * 2
    hosts = records["kv_cache_dropped"]["hosts"]
    assert [host["devices"] for host in hosts] == [[0, 1], [2, 3]]
    assert [host["name"] for host in hosts] == [f"host {rank} ({HERE})" for rank in range(2)]
    assert all(host["process_rss_bytes"] > 0 for host in hosts)
    assert records["kv_cache_dropped"]["drop_info"]["freed_bytes"] == kv
    assert len(records["kv_cache_dropped"]["memory"]["jax_device_memory_stats"]) == DEVICES


@pytest.mark.slow
def test_two_hosts_generate_what_one_process_generates(whole, real_engine):
    records = {record["phase"]: record for record in whole[0].records()}
    before = records["generate_result"]
    expected = real_engine.generate(before["prompt"], greedy(NEW_TOKENS)).token_ids
    assert before["token_ids"] == list(expected)
    assert records["generate_result_after_kv_rebuild"]["token_ids"] == before["token_ids"]


@dataclass(frozen=True)
class Cell:
    """A fault of a pair of hosts, and its expected end.

    Attributes:
        exit_codes: of the two hosts; that of a parent that was killed is minus the signal.
        error: a part of the message in the first host's last record, or in that of ``reporter``.
        how: what the step ``fault`` does.
        act: what is done to the pair once both are in that step.
        reporter: the host whose record has it.
        overrides: overrides of both.
        second: overrides of the second host alone.
        cleaned: whether the cleaning step was run.
    """

    exit_codes: tuple[int, int]
    error: str
    how: str = "wait"
    act: Callable = lambda hosts: None
    reporter: int = 0
    overrides: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    cleaned: bool = False


def to_worker(rank, signum):
    return lambda hosts: os.kill(hosts[rank].worker, signum)


def to_parent(rank, signum):
    return lambda hosts: hosts[rank].process.send_signal(signum)


def ended(rank):
    return f"host {rank} ({HERE}) ended, so jax ended the engine's process here, in step 'fault'"


CELLS = {
    "SIGKILL to worker 1": Cell((3, 3), ended(1), act=to_worker(1, signal.SIGKILL)),
    "SIGKILL to worker 0": Cell((3, 3), ended(0), act=to_worker(0, signal.SIGKILL), reporter=1),
    "SIGKILL to parent 1": Cell((3, -9), ended(1), act=to_parent(1, signal.SIGKILL)),
    "SIGTERM to parent 1": Cell((3, 143), ended(1), act=to_parent(1, signal.SIGTERM)),
    "more bytes on host 1, then an exception": Cell(
        (1, 1),
        "step 'fault': plan/slot:more_bytes: expected 0, it was 100",
        "more_bytes_on_host_1",
        overrides=(
            "runner.on_error=continue",
            "phases.fault.use=fault_measures",
            "phases.after.how=exception_on_host_1",
        ),
        cleaned=True,
    ),
    "another command on host 1": Cell(
        (2, 2),
        f"sampling is not the same on host 0 ({HERE}) and host 1 ({HERE}); type the same",
        second=("sampling.max_new_tokens=5",),
    ),
}


MORE_BYTES = "more bytes on host 1, then an exception"
# What each of them alone would find.
FINDS = {
    MORE_BYTES: "a check or a step that fails on one host alone, and not the step of all",
    "SIGKILL to worker 1": "host 0 waits for, or does not name, a host whose engine's process died",
    "SIGKILL to worker 0": "the hosts after the first keep no record when the first one's died",
    "SIGKILL to parent 1": "a worker that outlives its parent keeps the other host waiting",
    "SIGTERM to parent 1": "a host that is ended in order is reported as a defect by the other",
    "another command on host 1": "hosts run with configs that differ, and the first one's counts",
}
TRIED = [pytest.param(name, marks=pytest.mark.nightly(finds=FINDS[name])) for name in CELLS]


@pytest.fixture(scope="module")
def cells(tmp_path_factory, request):
    """Each asked-for pair, two at a time: they wait most of the time."""
    site = tmp_path_factory.mktemp("site")
    faults.write_site(site)
    where = tmp_path_factory.mktemp("cells")
    asked = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.module is request.module
        and hasattr(item, "callspec")
        and "name" in item.callspec.params
    }

    def carry_out(name):
        cell = CELLS[name]
        overrides = ["pipeline=no_wandb", f"phases.fault.how={cell.how}", *cell.overrides]
        hosts = start_pair(where / name.replace(" ", "_"), overrides, cell.second, site)
        if cell.how == "wait" and not cell.second:
            for host in hosts:
                assert host.worker
            cell.act(hosts)
        for host in hosts:
            host.finish()
        return hosts

    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(carry_out, name) for name in CELLS if name in asked}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_a_failure_on_a_host_ends_both_with_a_record_that_names_it(name, cells):
    cell, hosts = CELLS[name], cells[name].result()
    assert tuple(host.exit_code for host in hosts) == cell.exit_codes, [h.output for h in hosts]
    reporter = hosts[cell.reporter]
    records = reporter.records("records.host1.jsonl" if cell.reporter else "records.jsonl")
    end = records[-1]
    assert end["phase"] == "run_finished"
    assert cell.error in end["error"]
    assert ("cleaning" in [record["phase"] for record in records]) == cell.cleaned


@pytest.mark.slow
@pytest.mark.parametrize("name", [p for p in TRIED if p.values == (MORE_BYTES,)])
def test_an_exception_on_one_host_fails_the_step_of_all(name, cells):
    """It comes after a step that failed too, and so is not what the run is blamed for."""
    (after,) = [r for r in cells[name].result()[0].records() if r["phase"] == "after"]
    (check,) = after["checks"]
    assert (check["expected"], check["actual"]) == ("completed", "ValueError")
    assert check["detail"] == f"on host 1 ({HERE}): a fault of the tests"
    assert [host["ledger"].get("slot:more", 0) for host in after["hosts"]] == [0, 100]


@pytest.mark.slow
@pytest.mark.parametrize("name", [p for p in TRIED if CELLS[p.values[0]].exit_codes[1] > 0])
def test_every_host_that_lives_says_why_it_ended(name, cells):
    """The message of host 0 is on host 1 too, in a file of its own and on stderr."""
    second = cells[name].result()[1]
    end = second.records("records.host1.jsonl")[-1]
    assert end["exit_code"] == second.exit_code
    assert f"kvpipe: host 1 of 2: {end['error']}; its records are in" in second.output[1]
    assert second.output[0] == ""


NAMES_RANK = {"KVPIPE_NODE_RANK": "1", "TPU_WORKER_ID": "2", "SLURM_PROCID": "3"}


def config(**engine):
    several = {"nnodes": 4, "dist_init_addr": "10.0.0.2:8476", "max_total_tokens": 1024}
    return Kvpipe(engine=EngineConfig(**(several | engine)))


def completed(config, environ):
    """Return the rank that a run of this config has in this environment."""
    engine = with_node_rank(asdict(config), environ)["engine"]
    config = replace(config, engine=EngineConfig(**engine))
    check_hosts(config)
    check_node_rank(config.engine, environ)
    return config.engine.node_rank


def test_the_rank_is_that_of_the_config_or_of_the_environment():
    assert completed(config(), NAMES_RANK) == 1
    assert completed(config(), {k: NAMES_RANK[k] for k in ("TPU_WORKER_ID", "SLURM_PROCID")}) == 2
    assert completed(config(), {"SLURM_PROCID": "3"}) == 3
    assert completed(config(node_rank=0), NAMES_RANK) == 0
    assert completed(config(nnodes=1), NAMES_RANK) is None


@pytest.mark.parametrize(
    ("engine", "environ", "message"),
    [
        ({}, {}, "engine.node_rank: nothing says which of the 4 hosts this one is; set KVPIPE_"),
        (
            {},
            {"TPU_WORKER_ID": "4"},
            "engine.node_rank: TPU_WORKER_ID is '4', but engine.nnodes is 4; it must be a number "
            "from 0 to 3",
        ),
        ({}, {"SLURM_PROCID": "first"}, "engine.node_rank: SLURM_PROCID is 'first'"),
        ({"node_rank": 4}, {}, "engine.node_rank is 4, but engine.nnodes is 4; it must be less"),
        ({"nnodes": 1, "node_rank": 1}, {}, "engine.node_rank is 1, but engine.nnodes is 1"),
        ({"dist_init_addr": None}, {}, "engine.dist_init_addr is not set, but engine.nnodes is 4"),
        ({"dist_init_addr": "10.0.0.2"}, {}, "is '10.0.0.2'; write HOST:PORT of host 0"),
        ({"dist_init_addr": "a:65530"}, {}, "has port 65530; it must be 1 to 65529"),
        (
            {"device": "cpu", "tp_size": 2},
            {},
            "engine.nnodes is 4, but the mesh has 2 devices; each host must have the same number",
        ),
        (
            {"tp_size": 2, "dp_size": 2},
            {},
            "engine.tp_size is 2, but engine.nnodes is 4; it must be a multiple of that",
        ),
    ],
)
def test_hosts_that_cannot_be_are_refused_by_their_key(engine, environ, message):
    assert message in refusal(completed, config(**engine), environ)


def test_several_hosts_need_a_process_that_jax_may_end():
    wrong = config()
    wrong.runner = RunnerConfig(isolate=False)
    message = refusal(completed, wrong, NAMES_RANK)
    assert message.startswith("runner.isolate is false, but engine.nnodes is 4")


def test_hosts_that_share_a_directory_share_no_file():
    assert own_file("engine.log", EngineConfig(nnodes=2, node_rank=0)) == "engine.log"
    assert own_file("engine.log", EngineConfig(nnodes=2, node_rank=1)) == "engine.host1.log"
    assert own_file("engine.log", EngineConfig()) == "engine.log"


SERVICE = (
    "F1125 13:43:17 18341 client.h:77] Terminating process because the JAX distributed service "
    "detected fatal errors. This most likely indicates that another task died; absl::Status: "
)


@pytest.mark.parametrize(
    ("log", "reported"),
    [
        (
            f"{SERVICE}UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n"
            "/job:jax_worker/replica:0/task:1\n/job:jax_worker/replica:0/task:2\n",
            "host 1 (b) and host 2 ended",
        ),
        (f"{SERVICE}UNAVAILABLE: Failed to send RPC to coordination service.", "host 0 (a) ended"),
        (
            f"{SERVICE}DEADLINE_EXCEEDED\n\nRPC: /tensorflow.CoordinationService/RegisterTask",
            "not every host came to engine.dist_init_addr",
        ),
        ("/job:jax_worker/replica:0/task:1 is there", None),
    ],
)
def test_which_host_ended_is_read_from_what_jax_says(log, reported):
    assert who_ended(f"a line\n{log}\n", ["a", "b"]) == reported


def share(positions, used, **more):
    stats = tuple({"bytes_in_use": size} for size in used)
    ledger = Ledger(len(used), {"kv": tuple(used)})
    measured = Measurement(Memory(10, 20, stats, "live_arrays"), ledger)
    return HostResult(measured, Peak(tuple(used), sum(used), 10, 1), positions=positions, **more)


def test_the_devices_of_all_hosts_are_in_their_global_order():
    """On a TPU slice the devices of a host need not be adjacent."""
    wrong = Check("a check", 1, 2, False, "why")
    shares = [
        share((0, 2), [1, 3]),
        share((1, 3), [2, 4], checks=(wrong,), engine_lives=False),
    ]
    whole = merge(shares, ["host 0 (a)", "host 1 (b)"])
    assert whole.measured.ledger.of("kv") == (1, 2, 3, 4)
    assert [d["bytes_in_use"] for d in whole.measured.memory.jax_device_memory_stats] == [
        1,
        2,
        3,
        4,
    ]
    assert whole.peak == Peak((1, 2, 3, 4), 10, 10, 1)
    assert whole.checks == (Check("a check", 1, 2, False, "on host 1 (b): why"),)
    assert not whole.engine_lives


def test_a_share_comes_to_another_host_as_it_is():
    reported = share((0, 1), [1, 2], checks=(Check("a check", 1, 1, True),))
    assert decode(HostResult, json.loads(json.dumps(asdict(reported)))) == reported
